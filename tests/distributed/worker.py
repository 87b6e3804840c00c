"""One of two processes of a sharded decode loop; run by the tests, a rank and a port given.

Prints the tokens of every mesh as a line of JSON. Then, in the middle of another generation, the
second process dies, or gives no sign of life any more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import jax

from jax_tkg.sharding.processes import initialize

PATIENCE = 5
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [7], [9, 8]]
MESHES = (("data", "keys"), ("keys", "data"))
"""Axes over the processes, and over the devices of each."""
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "capacity": 16, "prefill_chunk": 8}


def decoder() -> Any:
    """The same weights in every process."""
    from flax import nnx

    from jax_tkg import RotaryEmbedding
    from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder

    attention = AttentionConfig(
        model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, rope=RotaryEmbedding()
    )
    config = DecoderConfig(vocab_size=64, num_layers=1, mlp_dim=32, attention=attention)
    return LlamaDecoder(config, rngs=nnx.Rngs(0))


def main(rank: int, port: int, end: signal.Signals) -> None:
    """`end` is the signal that the second process gives itself."""
    jax.config.update("jax_num_cpu_devices", 2)
    initialize(f"localhost:{port}", num_processes=2, process_id=rank, patience=PATIENCE)
    import jax_tkg
    from jax_tkg.flax_layers.partition import shard_decoder
    from jax_tkg.sharding import AttentionSharding

    model = decoder()

    def columns(axes: tuple[str, str]) -> Any:
        kinds = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((2, 2), axes, axis_types=kinds)
        sharding = AttentionSharding(mesh, batch="data", keys="keys")
        sharded = shard_decoder(model, sharding)
        options = OPTIONS | {"steps_per_call": 1, "cache_options": {"sharding": sharding}}
        return jax_tkg.stream(sharded, PROMPTS, **options)

    for axes in MESHES:
        tokens = [column.tolist() for column in columns(axes)]
        print(json.dumps({"axes": axes, "tokens": tokens}), flush=True)
    for made, _ in enumerate(columns(MESHES[0]), start=1):
        if made == 3:
            print(json.dumps({"time": time.time()}), flush=True)
            if rank == 1:
                os.kill(os.getpid(), end)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), signal.Signals[sys.argv[3]])
