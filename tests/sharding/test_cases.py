"""What else a sharded call may have: few KV heads, masks, windows, rings, prompts, kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import jax_tkg
from jax_tkg.attention import prepare
from jax_tkg.neuron import check_module
from jax_tkg.problem import Op
from jax_tkg.reference import attend_reference
from jax_tkg.sharding import AttentionSharding
from tests.calls import assert_close, quickly
from tests.lowered import lower_for_neuron
from tests.nki.golden.problems import OUTLINE, native_calls
from tests.sharding.cells import loss, make_mesh

B, T, N, H, S = 4, 2, 8, 16, 64
SLOW = pytest.mark.slow(reason="a program of its own; the quick ones have the other options")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def plain(kv_heads: int = 4) -> dict[str, Any]:
    lengths = np.array([S, 40, 3, 33], np.int32)
    key, value = normal(B, S, kv_heads, H), normal(B, S, kv_heads, H) + 1
    return {
        **{"query": normal(B, T, N, H), "key": key, "value": value},
        "key_value_seq_lengths": lengths,
    }


def beside(kv_heads: int = 4) -> dict[str, Any]:
    new = normal(B, T, kv_heads, H)
    return plain(kv_heads) | {"new_key": new, "new_value": new - 1}


def ring() -> dict[str, Any]:
    """Slots that hold the tokens at any positions, and some none."""
    places = np.stack([np.random.default_rng(b).permutation(S) for b in range(B)])
    positions = places + np.array([[70], [0], [0], [-9]])
    return plain() | {
        "key_positions": np.where(positions < 0, -1, positions).astype(np.int32),
        "key_value_seq_lengths": np.array([134, S, 20, 50], np.int32),
    }


MASK = np.random.default_rng(3).random((B, 1, T, S + T)) < 0.7
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every slot": ({n: x for n, x in plain().items() if n != "key_value_seq_lengths"}, {}),
    "mask and bias beside": (beside() | {"mask": MASK, "bias": normal(1, N, T, S + T)}, {}),
    "bias, not causal": (plain() | {"bias": normal(B, 1, 1, S)}, {"is_causal": False}),
    "window": (plain(), {"local_window_size": (20, 0)}),
    "window, cap, sinks beside": (
        beside() | {"sinks": normal(N)},
        {"local_window_size": 9, "logits_soft_cap": 2.0},
    ),
    "positions": (ring(), {}),
    "query positions": (
        plain() | {"query_positions": np.array([[60, 61], [20, 39], [1, 2], [4, 32]], np.int32)},
        {},
    ),
    "rope": (beside(), {"rope": jax_tkg.RotaryEmbedding(H)}),
}


def run(given: dict[str, Any], options: dict[str, Any], **more: Any) -> Any:
    """Output and log-sum-exp, and the gradients of all floats."""
    floats = {n: x for n, x in given.items() if x.dtype == np.float32}
    op = more.pop("op", "attention_tkg")

    def attend(floats: dict[str, Any]) -> Any:
        rest = {n: jnp.asarray(x) for n, x in given.items() if n not in floats}
        if more.get("implementation") == "oracle":
            out, lse = attend_reference(*prepare(**floats, **rest, **options, op=Op(op)).rotated())
        else:
            out, lse, *_ = getattr(jax_tkg, op)(
                **floats, **rest, **options, **more, return_residual=True
            )
        return loss((out, lse)), (out, lse)

    return quickly(jax.grad(attend, has_aux=True))(floats)


def assert_same(given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    op = more.get("op", "attention_tkg")
    oracle = run(given, options, implementation="oracle", op=op)
    assert_close(run(given, options, **more), oracle, 2e-5)


def sharded(**options: Any) -> AttentionSharding:
    return AttentionSharding(make_mesh("all", 8), **options)


ALL = {"batch": "dp", "heads": "tp", "keys": "sp"}


QUICK = {
    ("window, cap, sinks beside", "nki_interpret"),
    ("mask and bias beside", "xla"),
    ("positions", "xla"),
}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, implementation, marks=() if (name, implementation) in QUICK else SLOW)
        for name in CASES
        for implementation in ("xla", "nki_interpret")
    ],
)
def test_options(name: str, implementation: str) -> None:
    assert_same(*CASES[name], sharding=sharded(**ALL), implementation=implementation)


@pytest.mark.parametrize(
    ("kv_heads", "implementation"),
    [
        (2, "nki_interpret"),
        pytest.param(1, "nki_interpret", marks=SLOW),
        pytest.param(1, "xla", marks=SLOW),
        pytest.param(2, "xla", marks=SLOW),
        pytest.param(4, "xla", marks=SLOW),
    ],
)
def test_few_kv_heads_stay_whole(kv_heads: int, implementation: str) -> None:
    """Each device uses the KV head of its query heads; eight devices split N = 8."""
    sharding = sharded(heads=("dp", "tp", "sp"))
    assert_same(beside(kv_heads), {}, sharding=sharding, implementation=implementation)


@SLOW
@pytest.mark.parametrize("normalize", [True, False])
def test_prompts(normalize: bool) -> None:
    sharding = sharded(**ALL)
    given = beside() | {"query": normal(B, 24, N, H), "alibi_slopes": np.abs(normal(N))}
    given |= {"new_key": normal(B, 24, 4, H), "new_value": normal(B, 24, 4, H) + 1}
    given["key_value_seq_lengths"] = np.array([S + 24, 60, 30, 24], np.int32)
    if normalize:
        assert_same(given, {}, sharding=sharding, op="attention_cte")
        return
    attend = partial(jax_tkg.attention_cte, **jax.tree.map(jnp.asarray, given), normalize=False)
    state, want = quickly(lambda: attend(sharding=sharding))(), quickly(attend)()
    assert_close(state.finalize(), want.finalize())
    assert_close(state.max, want.max)


def test_a_prompt_in_the_cache() -> None:
    """All tokens appended, causal: what a device leaves out depends on where its slots are."""
    given = plain() | {"query": normal(B, 33, N, H)}
    given["key_value_seq_lengths"] = np.array([S, 40, 33, 35], np.int32)
    assert_same(given, {}, sharding=sharded(**ALL), op="attention_cte")


@SLOW
def test_bfloat16_is_rounded_once() -> None:
    """Parts are merged in float32: as good as on one device."""
    given = {n: jnp.asarray(x) for n, x in beside().items()}
    half = {n: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for n, x in given.items()}
    out = quickly(lambda x: jax_tkg.attention_tkg(**x, sharding=sharded(**ALL)))(half)
    alone = quickly(lambda x: jax_tkg.attention_tkg(**x))(half)
    assert out.dtype == jnp.bfloat16
    widened = {n: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for n, x in half.items()}
    exact = quickly(lambda x: jax_tkg.attention_tkg(**x))(widened)
    errors = [float(jnp.max(jnp.abs(x.astype(jnp.float32) - exact))) for x in (out, alone)]
    assert errors[0] <= errors[1] * 1.01


@pytest.mark.parametrize("dtype", ["int8", pytest.param("bfloat16", marks=SLOW)])
def test_a_cache_knows_its_sharding(dtype: str) -> None:
    sharding = sharded(**ALL)
    given = {n: jnp.asarray(x) for n, x in plain().items()}
    scales = {"k_scale": 0.02, "v_scale": 0.02} if dtype == "int8" else {}
    caches = [
        jax_tkg.KVCache.create(B, S, 4, H, dtype=dtype, **scales, **more).append(
            given["key"][:, :40], given["value"][:, :40], counts=jnp.asarray([40, 7, 0, 33])
        )
        for more in ({}, {"sharding": sharding})
    ]
    assert caches[1].sharding == sharding
    alone, split = (jax_tkg.attention_tkg(given["query"], c, return_residual=True) for c in caches)
    assert_close(split, alone)


@pytest.mark.parametrize("split", ["batch", "heads", "keys", "all"])
def test_program_for_neuron(split: str) -> None:
    """Lowered on an abstract mesh: one launch, of a device's shard, and a safe merge."""
    parts = ALL if split == "all" else {split: ALL[split]}
    axes = {"axis_types": (AxisType.Auto,) * len(parts)}
    mesh = AbstractMesh((2,) * len(parts), tuple(parts.values()), **axes)
    sharding = AttentionSharding(mesh, **parts)
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in beside().items()}
    attend = jax.jit(
        lambda given: jax_tkg.attention_tkg(**given, sharding=sharding, implementation=OUTLINE)
    )
    lowered = lower_for_neuron(attend, shapes)
    (call,) = native_calls(lowered)
    b, n, s = (x // 2 if role in parts else x for role, x in zip(ALL, (B, N, S), strict=True))
    k = 2 if "heads" in parts else 4
    assert call["operands"]["query"].startswith(f"f32[{b},{T},{n},{H}]")
    assert call["operands"]["key"].startswith(f"f32[{b},{s},{k},{H}]")
    assert lowered.as_text().count("stablehlo.all_reduce") == (2 if "keys" in parts else 0)
    assert check_module(lowered) == ()
