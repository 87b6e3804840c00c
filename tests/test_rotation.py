"""`rope=` of the op: who rotates, and that it is the same whoever does."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_tkg
from jax_tkg import rotation
from jax_tkg.flax_layers import AttentionConfig
from jax_tkg.flax_layers.functional import attention_layer
from jax_tkg.neuron import check_module
from jax_tkg.nki.implementation import NkiInterpret
from jax_tkg.online.plan import Target
from jax_tkg.rope import LinearScaling, RotaryEmbedding
from jax_tkg.sharding import AttentionSharding
from tests import oracle
from tests.calls import assert_close, quickly
from tests.lowered import lower_for_neuron, operations
from tests.nki.golden.problems import (
    APPEND_OUTLINE,
    LAYER_FILE,
    OUTLINE,
    PROBLEMS,
    lowered_layer,
    native_calls,
)

B, T, N, K, H, S = 2, 2, 4, 2, 16, 24
FAR = 2**20
KERNEL = NkiInterpret(programs=2)
IMPLEMENTATIONS = {
    "reference": "reference",
    "xla": "xla",
    "xla_lnc": "xla_lnc",
    "kernel": KERNEL,
    "kernel, one program": NkiInterpret(programs=1),
}
ROPES = {
    "half-split, scaled": RotaryEmbedding(base=500.0, scaling=LinearScaling(4.0)),
    "interleaved, partly": RotaryEmbedding(interleaved=True, rotary_dim=8),
}
HALF = ROPES["half-split, scaled"]


def made(**more: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes = {
        "query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, H),
        "new_key": (B, T, K, H), "new_value": (B, T, K, H),
    }  # fmt: skip
    arrays = {n: random.standard_normal(s, np.float32) for n, s in shapes.items()}
    return arrays | {"key_value_seq_lengths": np.array([20, S + T], np.int32)} | more


def attend(arrays: dict[str, Any], implementation: Any = KERNEL, **options: Any) -> Any:
    options = {"rope": HALF, **options}
    arrays = jax.tree.map(jnp.asarray, arrays)
    return jax_tkg.attention_tkg(
        **arrays, **options, implementation=implementation, return_residual=True
    )


def by_hand(arrays: dict[str, Any]) -> Any:
    """The same by a rotation of JAX's around an op that does not."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    lengths = arrays["key_value_seq_lengths"]
    at = lengths[:, None] - T + jnp.arange(T)
    keys = HALF(arrays["new_key"], at)
    given = arrays | {"query": HALF(arrays["query"], at), "new_key": keys}
    return *attend(given, "reference", rope=None), keys


def turned(rope: RotaryEmbedding, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """In float64."""
    factor = 1.0 if rope.scaling is None else rope.scaling.factor  # type: ignore[attr-defined]
    rows = [
        oracle.rotated(rope, row.astype(np.float64), at / factor)
        for row, at in zip(x, positions, strict=True)
    ]
    return np.stack(rows)


# The numbers


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_far_out_at_positions_of_each_row(rope: RotaryEmbedding, implementation: Any) -> None:
    """Against float64: where a float32 angle would be off by 0.06 rad."""
    positions = np.array([[FAR - 1, FAR], [7, FAR // 3]], np.int32)
    arrays = made(query_positions=positions)
    arrays["key_value_seq_lengths"] = np.array([20, S + T], np.int32)
    options: dict[str, Any] = {"is_causal": False}
    run = quickly(lambda x: attend(x, implementation, rope=rope, **options))
    out, lse, keys = run(arrays)
    wide = {n: turned(rope, arrays[n], positions) for n in ("query", "new_key")}
    exact = oracle.attention(oracle.Inputs(**(arrays | wide), **options))
    error = np.abs(np.asarray(keys, np.float64) - wide["new_key"])
    assert error.max() < 4 * np.abs(arrays["new_key"]).max() * np.finfo(np.float32).eps
    assert_close((out, lse), (exact.out.astype(np.float32), exact.lse.astype(np.float32)), 5e-6)


def test_gradients_also_of_what_the_keys_are_used_for() -> None:
    arrays = {n: jnp.asarray(x) for n, x in made().items()}
    lengths = arrays.pop("key_value_seq_lengths")

    def loss(run: Any) -> Any:
        def total(floats: dict[str, Any]) -> jax.Array:
            results = run(floats | {"key_value_seq_lengths": lengths})
            return sum(jnp.sum(jnp.sin((i + 1) * x)) for i, x in enumerate(results))  # type: ignore[return-value]

        return quickly(jax.grad(total))

    assert_close(loss(attend)(arrays), loss(by_hand)(arrays), 1e-5)


COPIES = {
    "of everything": ("query", "key", "value", "new_key", "new_value", "key_value_seq_lengths"),
    "of the query": ("query",),
    "that share a cache": ("query", "new_key", "new_value"),
}


@pytest.mark.parametrize("names", COPIES.values(), ids=COPIES)
def test_vmap(names: tuple[str, ...]) -> None:
    arrays = made()
    copies = arrays | {n: np.stack([arrays[n], arrays[n][::-1]]) for n in names}
    axes = {n: 0 if n in names else None for n in arrays}
    copies = jax.tree.map(jnp.asarray, copies)
    got = quickly(jax.vmap(attend, in_axes=(axes,)))(copies)
    run = quickly(by_hand)
    each = [run({n: x[i] if n in names else x for n, x in copies.items()}) for i in range(2)]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *each), 1e-5)


def test_keys_of_another_dtype_come_back_in_it() -> None:
    arrays = made()
    narrow = arrays | {"new_key": jnp.asarray(arrays["new_key"], jnp.bfloat16)}
    got, wanted = (quickly(run)(narrow)[2] for run in (attend, by_hand))
    assert_close(got, wanted, 2.0**-8)


# Who does it


def test_the_kernel_rotates_and_jax_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("JAX rotates")

    arrays, wanted = made(), quickly(by_hand)(made())
    monkeypatch.setattr(RotaryEmbedding, "rotate", refuse)
    monkeypatch.setattr(RotaryEmbedding, "cos_sin", refuse)
    assert_close(quickly(attend)(arrays), wanted, 1e-5)
    for implementation in ("xla", "reference", "xla_lnc"):
        with pytest.raises(AssertionError, match="JAX rotates"):
            jax.jit(attend, static_argnums=1).lower(arrays, implementation)


def test_nothing_of_it_is_left_around_the_call_on_a_device() -> None:
    """A rotation in JAX shifts digits of positions; the kernel takes positions and a table."""
    problem = PROBLEMS["rotated"]
    inside, before = (
        lower_for_neuron(lambda x, form=form: jax_tkg.attention_tkg(**x, implementation=form), x)
        for form, x in ((OUTLINE, problem), (OUTLINE, problem | WIDE_KEYS))
    )
    assert operations(inside)[SHIFT] == 0 < operations(before)[SHIFT]
    (call,), (other,) = native_calls(inside), native_calls(before)
    assert {"rotary_table", "query_positions"} == call["operands"].keys() - other["operands"].keys()
    assert check_module(inside) == check_module(before) == ()


SHIFT = "stablehlo.shift_right_arithmetic"

WIDE_KEYS = {"new_key": jax.ShapeDtypeStruct(PROBLEMS["rotated"]["new_key"].shape, jnp.float32)}
"""Wider than what the kernel computes in: rotated there they would be rounded twice."""


def test_explain_says_who() -> None:
    problem = PROBLEMS["rotated"]
    told = {"platform": "neuron", "implementation": OUTLINE}
    inside = jax_tkg.explain(**problem, **told)
    assert inside.rotation == "queries and new keys are rotated inside it"
    assert inside.plan.features.rotary == "half"  # type: ignore[attr-defined]
    assert f"\n  {inside.rotation}\n" in str(inside)
    wide = jax_tkg.explain(**(problem | WIDE_KEYS), **told)
    assert "in JAX, before it: new keys in float32 would lose digits in bfloat16" in str(wide)
    assert wide.plan.features.rotary is None  # type: ignore[attr-defined]
    assert "in JAX, before it: the implementation takes them" in str(jax_tkg.explain(**problem))
    assert jax_tkg.explain(**(problem | {"rope": None}), **told).rotation is None


def test_only_who_rotates_is_given_the_rotation() -> None:
    """An implementation of one's own need not know of it."""
    seen = []

    class Own(type(KERNEL)):  # type: ignore[misc]
        def why_not_rotate(self, problem: Any, target: Target) -> str | None:
            return "it does not"

        def run(self, problem: Any, ops: Any, target: Target) -> Any:
            seen.append((problem.rope, ops.rotary_positions))
            return super().run(problem, ops, target)

    run = quickly(lambda x: attend(x, Own()))
    assert_close(run(made()), quickly(by_hand)(made()), 1e-5)
    assert seen == [(None, None)]
    assert rotation.why_in_jax("no implementation", jax_tkg_problem(), Target(())) is not None


def jax_tkg_problem() -> Any:
    return jax_tkg.explain(**PROBLEMS["rotated"]).problem


# On a mesh


def sharding(**roles: str) -> AttentionSharding:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2,
                         devices=jax.devices()[:4])  # fmt: skip
    return AttentionSharding(mesh, **roles)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("roles", "inside"),
    [({"batch": "x", "heads": "y"}, True), ({"batch": "x", "keys": "y"}, False)],
    ids=["rows and heads", "slots"],
)
def test_devices_rotate_what_they_do_not_share(roles: dict[str, str], inside: bool) -> None:
    arrays = {n: jnp.asarray(x) for n, x in made().items()}
    options = {"sharding": sharding(**roles), "rope": HALF, "implementation": KERNEL}
    told = jax_tkg.explain(**arrays, **options).rotation
    assert told is not None
    assert ("inside it" in told) == inside
    assert ("before they are divided" in told) == (not inside)

    def on_mesh(arrays: dict[str, Any]) -> Any:
        return attend(arrays, sharding=options["sharding"])

    if not inside:  # its gradient is that of a rotation of JAX's
        assert_close(quickly(on_mesh)(arrays), quickly(by_hand)(arrays), 1e-5)
        return

    def with_gradient(run: Any) -> Any:
        def total(floats: dict[str, Any]) -> Any:
            results = run(arrays | floats)
            return sum(jnp.sum(jnp.sin(x)) for x in results), results

        return quickly(jax.grad(total, has_aux=True))

    floats = {n: arrays[n] for n in ("query", "new_key", "key")}
    assert_close(with_gradient(on_mesh)(floats), with_gradient(by_hand)(floats), 1e-5)


def test_a_launch_has_the_arrays_in_the_order_of_the_kernel() -> None:
    """Also those of the rotation, which come in the middle: the custom call takes them by place."""
    problem = PROBLEMS["rotated"] | {"sinks": PROBLEMS["lengths and sinks"]["sinks"]}
    lowered = lower_for_neuron(
        lambda x: jax_tkg.attention_tkg(**x, implementation=replace(OUTLINE, programs=1)), problem
    )
    (call,) = native_calls(lowered)
    assert call["operands"]["sinks"].startswith("f32[")
    assert call["operands"]["query_positions"].startswith("i32[")
    assert call["operands"]["rotary_table"].startswith("f32[2,3,")


# In a layer


def layer(cache: Any, tokens: int, seed: int, counts: Any = None, **options: Any) -> Any:
    """An attention layer's step with random weights, the same for the same seed."""
    config = AttentionConfig(
        model_dim=N * H, num_heads=N, num_kv_heads=K, head_dim=H, rope=HALF, **options
    )
    random = np.random.default_rng(seed)
    q, k, v, out = (
        jnp.asarray(random.standard_normal((N * H, heads * H), np.float32) / 8)
        for heads in (N, K, K, N)
    )
    x = jnp.asarray(random.standard_normal((B, tokens, N * H), np.float32))
    return attention_layer(
        config, x, cache, counts,
        q=lambda x: x @ q, k=lambda x: x @ k, v=lambda x: x @ v, out=lambda x: x @ out,
    )  # fmt: skip


def steps(kind: str, **options: Any) -> Any:
    """A chunk of which a row has fewer tokens, then a token: outputs, and the cache after it."""
    if kind == "ring":
        options["sliding_window"] = 5
        cache: Any = jax_tkg.RingKVCache.create(B, 8, K, H)
    else:
        cache = jax_tkg.KVCache.create(B, S, K, H)
    counts = jnp.array([3, 2], jnp.int32)
    first, cache = layer(cache, 3, 1, counts, **options)
    second, cache = layer(cache, 1, 2, **options)
    return first[:, :2], second, cache


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("plain", KERNEL),
        # The op's own cases have new keys beside a ring; this adds the layer's counts.
        pytest.param("ring", "xla", marks=pytest.mark.slow),
    ],
    ids=["plain", "ring"],
)
def test_a_layer_that_attends_before_it_appends(kind: str, implementation: Any) -> None:
    given = {"implementation": implementation}
    fused, plain = (
        quickly(lambda fused=fused: steps(kind, **given, fused_rope=fused))()
        for fused in (True, False)
    )
    assert_close(fused, plain, 1e-5)


@pytest.mark.parametrize("kind", ["flat", "paged"])
def test_a_decoder_layer_without_a_rotation_in_jax(kind: str) -> None:
    """The append takes the keys that the attention has rotated, so it follows it, in place.

    The golden file is made anew by `python -m tests.nki.golden.problems`.
    """
    fused, plain = (
        lowered_layer(kind, OUTLINE, APPEND_OUTLINE, fused_rope=fused) for fused in (True, False)
    )
    assert operations(fused)[SHIFT] == 0 < operations(plain)[SHIFT]
    calls = native_calls(fused)
    assert [call["func_name"] for call in calls] == ["attention_tkg", "append"]
    assert calls == json.loads(LAYER_FILE.read_text())[f"{kind}, fused rope"]
    assert fused.as_text().count("tf.aliasing_output") == plain.as_text().count(
        "tf.aliasing_output"
    )
    assert check_module(fused) == ()


def test_a_layer_without_a_rotation_has_none_to_fuse() -> None:
    with pytest.raises(ValueError, match="fused_rope needs rope"):
        AttentionConfig(model_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, fused_rope=True)
