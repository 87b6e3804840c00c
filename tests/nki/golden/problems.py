"""What the decode op emits for a Neuron device, field by field.

    python -m tests.nki.golden.problems

writes calls.json and layer.json beside this file anew; read the difference before committing it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxlib.mlir import ir

import jax_tkg
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder
from jax_tkg.nki.append_call import NkiWriter
from jax_tkg.nki.custom_call import TARGET, NativeKernel, Outline
from jax_tkg.nki.implementation import Nki
from tests.lowered import lower_for_neuron, walk

OUTLINE = Nki(compiler=Outline())
APPEND_OUTLINE = NkiWriter(compiler=Outline())
"""The device's implementations without their compiler."""

FILE = Path(__file__).with_name("calls.json")
LAYER_FILE = Path(__file__).with_name("layer.json")

B, T, N, K, H, S, PAGE = 2, 2, 8, 2, 64, 512, 64


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def paged() -> jax_tkg.Paged:
    pages = array(32, K, PAGE, H)
    table = array(B, S // PAGE, dtype=jnp.int32)
    dtype = np.dtype(jnp.bfloat16)
    return jax_tkg.Paged(
        key=pages, value=pages, k_scale=None, v_scale=None, dtype=dtype, page_indices=table
    )


def cache(**options: Any) -> Any:
    options = {"layout": "BKSH", **options}
    return jax.eval_shape(lambda: jax_tkg.KVCache.create(B, S, K, H, **options))


QUERY, KEY, LENGTHS = array(B, T, N, H), array(B, S, K, H), array(B, dtype=jnp.int32)
NEW = {"new_key": array(B, T, K, H), "new_value": array(B, T, K, H)}
FLAT = {"query": QUERY, "key": KEY, "value": KEY}

PROBLEMS: dict[str, dict[str, Any]] = {
    "flat": FLAT,
    "lengths and sinks": FLAT | {"key_value_seq_lengths": LENGTHS, "sinks": array(N)},
    "new keys beside": FLAT | NEW | {"key_value_seq_lengths": LENGTHS},
    "rotated": FLAT | NEW | {"key_value_seq_lengths": LENGTHS, "rope": jax_tkg.RotaryEmbedding()},
    "paged": {"query": QUERY, "key": paged(), "key_value_seq_lengths": LENGTHS},
    "transposed keys": {"query": QUERY, "key": cache(layout="BKHS", dtype=jnp.bfloat16)},
    "8-bit floats with scales": {
        **{"query": QUERY, "key": array(B, S, K, H, dtype=jnp.float8_e4m3)},
        **{"value": array(B, S, K, H, dtype=jnp.float8_e4m3)},
        **{"k_scale": array(K, dtype=jnp.float32), "v_scale": array(dtype=jnp.float32)},
    },
    "mask and bias": FLAT | {"mask": array(B, 1, T, S, dtype=jnp.bool_), "bias": array(1, N, T, S)},
}


def lower(problem: dict[str, Any], implementation: Any = OUTLINE, **static: Any) -> Any:
    """The op on a problem, lowered for Neuron."""

    def attend(arrays: dict[str, Any]) -> Any:
        return jax_tkg.attention_tkg(
            **arrays, **static, implementation=implementation, return_residual=True
        )

    return lower_for_neuron(attend, problem)


def native_calls(lowered: Any) -> list[dict[str, Any]]:
    """The custom calls of kernels in a lowered program, in the words of JSON."""
    calls = (_described(op) for op in walk(lowered) if op.name == "stablehlo.custom_call")
    return [call for call in calls if call["target"] == TARGET]


def _described(call: Any) -> dict[str, Any]:
    attributes = call.attributes
    target = ir.StringAttr(attributes["call_target_name"]).value
    if target != TARGET:
        return {"target": target}
    text = ir.StringAttr(attributes["backend_config"]).value
    config = NativeKernel.from_backend_config(text)
    operands = _arrays(call.operands, attributes["operand_layouts"])
    results = _arrays(call.results, attributes["result_layouts"])
    aliased = "output_operand_aliases" in attributes  # an empty one is not always written
    return {
        "target": target,
        "api_version": ir.IntegerAttr(attributes["api_version"]).value,
        "func_name": config.func_name,
        "grid": list(config.grid),
        "kernel_version": config.kernel_version,
        "has_collectives": config.has_collectives,
        "binary": config.binary,
        "operands": dict(zip(config.input_names, operands, strict=True)),
        "results": dict(zip(config.output_names, results, strict=True)),
        "aliases": [str(x) for x in attributes["output_operand_aliases"]] if aliased else [],
    }


def _arrays(values: Any, layouts: Any) -> list[str]:
    """Such as "bf16[2,512]{1,0}", as XLA writes types with layouts, minor axis first."""
    found = []
    for value, layout in zip(values, layouts, strict=True):
        type_ = ir.RankedTensorType(value.type)
        axes = ",".join(map(str, ir.DenseIntElementsAttr(layout)))
        shape = ",".join(map(str, type_.shape))
        found.append(f"{type_.element_type}[{shape}]{{{axes}}}")
    return found


def all_calls() -> dict[str, dict[str, Any]]:
    """What is in the file: the one call of each problem."""
    found = {}
    for name, problem in PROBLEMS.items():
        (found[name],) = native_calls(lower(problem))
    return found


def lowered_layer(
    kind: str, implementation: Any, append_implementation: Any, **options: Any
) -> Any:
    """The decode step of a whole decoder layer: norm, projections, rotation, append, attention."""
    attention = AttentionConfig(
        model_dim=N * H, num_heads=N, num_kv_heads=K, head_dim=H, rope=jax_tkg.RotaryEmbedding(),
        implementation=implementation, append_implementation=append_implementation, **options,
    )  # fmt: skip
    config = DecoderConfig(vocab_size=64, num_layers=1, mlp_dim=64, attention=attention)
    made = nnx.eval_shape(lambda: LlamaDecoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(made.layers[0])
    given = {"dtype": jnp.bfloat16, "as_bits": False}
    cache = {
        "flat": lambda: jax_tkg.KVCache.create(B, S, K, H, layout="BKSH", **given),
        "paged": lambda: jax_tkg.PagedKVCache.create(B, 32, PAGE, S // PAGE, K, H, **given),
    }[kind]

    def step(state: Any, x: jax.Array, cache: Any) -> Any:
        return nnx.merge(graph, state)(x, cache, None)

    x = array(B, 1, N * H)
    return lower_for_neuron(jax.jit(step, donate_argnums=2), state, x, jax.eval_shape(cache))


def layer_calls() -> dict[str, list[dict[str, Any]]]:
    """What is in the file: the calls of a layer's decode step, in order."""
    found = {}
    for kind in ("flat", "paged"):
        found[kind] = native_calls(lowered_layer(kind, OUTLINE, APPEND_OUTLINE))
        fused = lowered_layer(kind, OUTLINE, APPEND_OUTLINE, fused_rope=True)
        found[f"{kind}, fused rope"] = native_calls(fused)
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_calls(), indent=1) + "\n")
    LAYER_FILE.write_text(json.dumps(layer_calls(), indent=1) + "\n")
