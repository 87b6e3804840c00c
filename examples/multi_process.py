"""A decoder on the devices of several processes: start this script once on each host.

    python examples/multi_process.py --coordinator 10.0.0.1:1234 --processes 2 --rank 0
    python examples/multi_process.py --coordinator 10.0.0.1:1234 --processes 2 --rank 1

or, where JAX finds the others by itself (Slurm, Open MPI, Kubernetes), without these arguments. To
try it on one machine, start both there with `localhost:1234` and `--cpu-devices 2`.

Rows of the batch are split over the processes, slots of the caches over the devices of each:
what devices exchange for every token and layer stays inside a host. `--swap` does it the other way.
If a process dies, the others end with an error within about `--patience` seconds.
"""

import argparse

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

import jax_tkg
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder, decoder_from_gguf
from jax_tkg.flax_layers.partition import shard_decoder
from jax_tkg.sharding import AttentionSharding
from jax_tkg.sharding.processes import initialize

PROMPT = [504, 3575, 282, 4649, 314]
"""The capital of France is"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", help="host:port of the process of rank 0")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--rank", type=int, help="which one this is, from 0")
    parser.add_argument("--patience", type=int, default=20, help="seconds; see above")
    parser.add_argument("--cpu-devices", type=int, help="run on so many CPU devices a process")
    parser.add_argument("--swap", action="store_true", help="slots over processes, rows inside")
    parser.add_argument("--small", action="store_true", help="random weights, no download")
    parser.add_argument("--new-tokens", type=int, default=20)
    return parser.parse_args()


def decoder(small: bool) -> LlamaDecoder:
    """The same weights in every process."""
    if not small:
        from jax_tkg.models import read_gguf, smollm2_path

        return decoder_from_gguf(read_gguf(smollm2_path()))
    attention = AttentionConfig(
        model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, rope=jax_tkg.RotaryEmbedding()
    )
    config = DecoderConfig(vocab_size=512, num_layers=1, mlp_dim=64, attention=attention)
    return LlamaDecoder(config, rngs=nnx.Rngs(0))


def main() -> None:
    args = arguments()
    if args.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    # Before anything that needs a device.
    initialize(args.coordinator, args.processes, args.rank, patience=args.patience)

    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("host", "device"), axis_types=(AxisType.Auto,) * 2)
    rows, slots = ("device", "host") if args.swap else ("host", "device")
    sharding = AttentionSharding(mesh, batch=rows, keys=slots)
    model = shard_decoder(decoder(args.small), sharding)
    result = jax_tkg.generate(
        model,
        [[token % model.config.vocab_size for token in PROMPT]] * mesh.shape[rows],
        max_new_tokens=args.new_tokens,
        cache_options={"sharding": sharding},
    )
    if jax.process_index() == 0:  # every process has the same result
        print(f"{jax.process_count()} processes, {jax.device_count()} devices; {sharding}")
        for row in result.rows():
            print(*row)


if __name__ == "__main__":
    main()
