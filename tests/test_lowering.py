"""Programs for each platform, without its devices: what Neuron can run, and exports that load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_tkg
from jax_tkg.neuron import check_module
from tests.calls import assert_close
from tests.lowered import lower_for_neuron, operations

LONG = 65536
"""Cache slots; with these the scores are not computed in one block anywhere."""


def shapes(*, tokens: int = 1, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Types of the arguments of a large call; nothing is allocated."""

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = LONG + tokens
    return {
        "query": array(4, tokens, 32, 64),
        "key": array(4, LONG, 8, 64),
        "value": array(4, LONG, 8, 64),
        "new_key": array(4, tokens, 8, 64),
        "new_value": array(4, tokens, 8, 64),
        "key_value_seq_lengths": array(4, dtype=jnp.int32),
        "key_value_seq_starts": array(4, dtype=jnp.int32),
        "mask": array(4, 1, 1, keys, dtype=jnp.bool_),
        "bias": array(1, 32, 1, keys),
        "sinks": array(32),
    }


def attend(arrays: dict[str, Any], **static: Any) -> Any:
    return jax_tkg.attention_tkg(**arrays, return_residual=True, **static)


def step(cache: jax_tkg.KVCache, query: jax.Array, key: jax.Array) -> Any:
    cache = cache.append(key, key)
    return jax_tkg.attention_tkg(query, cache), cache


def cache_types(**options: Any) -> Any:
    ring = options.pop("ring", False)
    kind = jax_tkg.RingKVCache if ring else jax_tkg.KVCache
    return jax.eval_shape(lambda: kind.create(4, LONG, 8, 64, **options))


def paged_types() -> Any:
    pages = jax.ShapeDtypeStruct((5000, 8, 64, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((4, LONG // 64), jnp.int32)
    return jax_tkg.Paged(
        key=pages,
        value=pages,
        k_scale=None,
        v_scale=None,
        dtype=np.dtype(jnp.bfloat16),
        page_indices=table,
    )


FULL = shapes(tokens=3)
PLAIN = {name: FULL[name] for name in ("query", "key", "value")}
ROPE = jax_tkg.RotaryEmbedding(base=1e4)


def summed(arrays: dict[str, Any]) -> jax.Array:
    return sum(jnp.sum(x.astype(jnp.float32)) for x in attend(arrays))  # type: ignore[return-value]


def over_copies(arrays: dict[str, Any]) -> Any:
    return jax.vmap(lambda q: attend(arrays | {"query": q}))(jnp.stack([arrays["query"]] * 2))


NEURON_PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "plain": (attend, (PLAIN,)),
    "everything": (
        lambda x: attend(x, rope=ROPE, logits_soft_cap=30.0, local_window_size=(4095, 0)),
        (FULL,),
    ),
    "paged": (attend, ({"query": FULL["query"], "key": paged_types()},)),
    **{
        f"step {name}": (step, (cache_types(**options), FULL["query"], FULL["new_key"]))
        for name, options in {
            "bits": {"dtype": jnp.bfloat16, "as_bits": True},
            "transposed": {"dtype": jnp.bfloat16, "as_bits": False, "layout": "BKHS"},
            "int8": {"dtype": jnp.int8, "layout": "BSKH"},
            "ring": {"dtype": jnp.float8_e4m3, "as_bits": False, "ring": True},
        }.items()
    },
    "vmap, shared cache": (over_copies, (PLAIN,)),
    "vmap over lengths": (
        lambda x, n: jax.vmap(lambda n: attend(x | {"key_value_seq_lengths": n}))(n),
        (PLAIN, jax.ShapeDtypeStruct((2, 4), jnp.int32)),
    ),
    "gradient": (jax.grad(summed), (PLAIN,)),
}


@pytest.mark.parametrize("name", NEURON_PROGRAMS)
def test_neuron_can_run(name: str) -> None:
    function, arguments = NEURON_PROGRAMS[name]
    lowered = lower_for_neuron(function, *arguments)
    assert check_module(lowered) == ()
    assert operations(lowered)["stablehlo.while"] >= 1  # tiles


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_other_platforms_stop_at_the_live_length(platform: str) -> None:
    traced = jax.jit(attend).trace(PLAIN | {"key_value_seq_lengths": FULL["key_value_seq_lengths"]})
    lowered = traced.lower(lowering_platforms=(platform,))
    assert {x.rule for x in check_module(lowered)} == {"dynamic-loop"}


@pytest.mark.parametrize("platforms", [("cpu", "neuron"), ("neuron", "tpu")])
def test_neuron_among_others_keeps_trip_counts_constant(platforms: tuple[str, ...]) -> None:
    """The choice by platform, a case, is JAX's own: it lowers dots differently."""
    lowered = jax.jit(attend).trace(FULL).lower(lowering_platforms=platforms)
    assert {x.operation for x in check_module(lowered)} <= {"stablehlo.case"}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_scope_in_profiles(implementation: str) -> None:
    lowered = jax.jit(lambda x: attend(x, implementation=implementation)).lower(PLAIN)
    assert f"attention_tkg[{implementation}]" in lowered.as_text(debug_info=True)
    assert "attention_tkg[" not in lowered.as_text()


# jax.export


SMALL = {
    "query": np.random.default_rng(0).standard_normal((2, 1, 4, 16), np.float32),
    "key": np.random.default_rng(1).standard_normal((2, 40, 2, 16), np.float32),
    "value": np.random.default_rng(2).standard_normal((2, 40, 2, 16), np.float32),
    "key_value_seq_lengths": np.array([40, 7], np.int32),
}


@pytest.mark.parametrize(
    "platforms", [["cpu"], ["tpu"], ["cuda"], ["neuron"], ["cpu", "tpu"], ["cpu", "neuron"]]
)
def test_export(platforms: list[str]) -> None:
    exported = export.export(jax.jit(attend), platforms=platforms)(SMALL)
    loaded = export.deserialize(exported.serialize())
    assert list(loaded.platforms) == platforms
    assert "custom_call" not in loaded.mlir_module()
    if "cpu" in platforms:
        assert_close(jax.jit(loaded.call)(SMALL), jax.jit(attend)(SMALL))


def test_export_of_a_gradient() -> None:
    def loss(floats: dict[str, jax.Array], run: Any) -> jax.Array:
        return jnp.sum(jnp.sin(run(floats | {"key_value_seq_lengths": lengths})[0]))

    floats = {name: x for name, x in SMALL.items() if name != "key_value_seq_lengths"}
    lengths = SMALL["key_value_seq_lengths"]
    exported = export.export(jax.jit(attend), platforms=["cpu"])(SMALL)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    assert_close(jax.grad(loss)(floats, loaded.call), jax.grad(loss)(floats, attend))


@pytest.mark.usefixtures("no_shape_checks")
def test_export_with_a_symbolic_batch() -> None:
    (batch,) = export.symbolic_shape("batch")
    types = {n: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for n, x in SMALL.items()}
    exported = export.export(jax.jit(attend), platforms=["cpu"])(types)
    for rows in (1, 2):
        given = {name: x[:rows] for name, x in SMALL.items()}
        assert_close(exported.call(given), jax.jit(attend)(given))
