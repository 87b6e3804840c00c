"""Gradients: equal to autodiff of the oracle, finite, 0 at padding; transformed, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_tkg
from jax_tkg.online import backward
from tests.calls import Arrays, Run, assert_close, is_float, make_call, quickly
from tests.cases import Case

BASE = Case("base", batch=2, tokens=2, slots=40, heads=4, kv_heads=2, head_dim=16, growth=1.0)
EMPTY = replace(BASE, name="empty rows", rows="empty", tokens=3, layout="BKSH")
CASES = (
    replace(BASE, name="plain", tokens=1, rows="all", holder="arrays"),
    EMPTY,
    replace(EMPTY, name="empty rows with sinks", sinks=True, bias="shared"),
    replace(BASE, name="cache", rows="starts", layout="BKSH", holder="cache", window=(9, 0)),
    replace(BASE, name="beside", beside=True, layout="BKHS", cap=2.0, sinks=True, value_head_dim=8),
    replace(BASE, name="both sides", causal=False, window=5, positions="given", bias="full"),
    replace(BASE, name="dense", mask="full", bias="shared", beside=True, rows="starts", cap=1.0),
    replace(BASE, name="paged", layout="paged", page_len=8, beside=True, bias="full", heads=6),
    replace(BASE, name="ring", positions="ring", holder="cache", window=(20, 0), tokens=3),
    replace(BASE, name="mqa", heads=3, kv_heads=1, scale=0.3, rows="starts only", mask="shared"),
    replace(BASE, name="fp8", cache_dtype="float8_e4m3fn", scales="head", layout="BKSH"),
    replace(BASE, name="fp8-paged", cache_dtype="float8_e5m2", layout="paged", page_len=8),
    replace(BASE, name="int8", cache_dtype="int8", scales="tensor", beside=True),
    replace(BASE, name="bits", cache_dtype="float8_e4m3fn", as_bits=True, rows="all"),
)


def floats_of(arrays: Arrays) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The float leaves, and what puts others in their place."""
    leaves, tree = jax.tree.flatten(arrays)

    def fill(floats: list[jax.Array]) -> Any:
        left = iter(floats)
        return jax.tree.unflatten(tree, [next(left) if is_float(x) else x for x in leaves])

    return [x for x in leaves if is_float(x)], fill


def cotangents(run: Run, arrays: Arrays) -> Arrays:
    """Those of all floats, for random ones of the output and the log-sum-exp."""
    floats, fill = floats_of(arrays)

    @quickly
    def pull(floats: list[jax.Array]) -> list[jax.Array]:
        results, back = jax.vjp(lambda floats: run(fill(floats)), floats)
        keys = jax.random.split(jax.random.key(7), 2)
        given = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, results, strict=True)]
        (found,) = back(tuple(given))
        return found  # type: ignore[no-any-return]

    return fill(pull(floats))  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_autodiff_of_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three tiles that overlap.
    monkeypatch.setattr(backward, "key_tile", lambda problem, run: min(16, run.size))
    call = make_call(case)
    got = cotangents(call.ours, call.arrays)
    assert_close(got, cotangents(call.oracle, call.clean))
    for given, found in zip(jax.tree.leaves(call.arrays), jax.tree.leaves(got), strict=True):
        if is_float(given):  # NaN is padding
            np.testing.assert_array_equal(found[jnp.isnan(given)], 0)


def scalar(run: Run) -> Callable[[Arrays], jax.Array]:
    """A loss whose gradient in every finite result is neither 0 nor constant."""

    def loss(arrays: Arrays) -> jax.Array:
        out, lse = run(arrays)
        empty = lse == -jnp.inf
        finite = jnp.where(empty, 0.0, lse)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.where(empty, 0, finite**2))

    return loss


def test_gradient_of_gradient() -> None:
    call = make_call(replace(BASE, name="twice", beside=True, sinks=True, cap=2.0, rows="empty"))
    floats, fill = floats_of(call.clean)

    def twice(run: Run) -> Any:
        def inner(floats: list[jax.Array]) -> jax.Array:
            found = jax.grad(lambda floats: scalar(run)(fill(floats)))(floats)
            return sum(jnp.sum(jnp.cos(x)) for x in found)  # type: ignore[return-value]

        return quickly(jax.grad(inner))(floats)

    assert_close(twice(call.ours), twice(call.oracle))


@pytest.mark.parametrize("transformed", ["vmap", "scan"])
def test_value_and_grad_under(transformed: str) -> None:
    """One program for three queries, each with its own gradient of the cache they share."""
    call = make_call(replace(BASE, name="shared cache", layout="BKSH"))
    queries = jnp.stack([call.clean["query"] * x for x in (1.0, 0.5, -2.0)])

    def value_and_grad(query: jax.Array) -> Any:
        floats, fill = floats_of(call.clean | {"query": query})
        return jax.value_and_grad(lambda floats: scalar(call.ours)(fill(floats)))(floats)

    def scanned(queries: jax.Array) -> Any:
        return lax.map(value_and_grad, queries)

    run = {"vmap": jax.vmap(value_and_grad), "scan": scanned}[transformed]
    one = quickly(value_and_grad)
    want = jax.tree.map(lambda *x: jnp.stack(x), *map(one, queries))
    assert_close(quickly(run)(queries), want)


def test_numbers_at_the_edge_of_float32_keep_gradients_finite() -> None:
    call = make_call(replace(BASE, name="edge", slots=8, bias="full", sinks=True, rows="empty"))
    bias = jnp.nan_to_num(call.clean["bias"], neginf=-jnp.inf)
    arrays = call.clean | {"bias": bias.at[..., 0].set(jnp.inf)}
    got = cotangents(call.ours, arrays)
    chex.assert_tree_all_finite({k: x for k, x in got.items() if k != "key_value_seq_lengths"})
    assert_close(got, cotangents(call.oracle, arrays))


def test_infinite_cotangent_of_an_empty_row_has_no_effect() -> None:
    call = make_call(replace(EMPTY, name="emptied by bias", rows="all", bias="full", sinks=True))
    arrays = call.arrays | {
        "bias": call.arrays["bias"].at[0].set(-jnp.inf),
        "sinks": call.arrays["sinks"].at[0].set(-jnp.inf),
    }
    floats, fill = floats_of(arrays)

    def squared(floats: list[jax.Array]) -> jax.Array:  # the LSE is -inf, and so is its cotangent
        return jnp.sum(call.ours(fill(floats))[1] ** 2)

    found = quickly(jax.grad(squared))(floats)
    chex.assert_tree_all_finite(found)
    assert all(jnp.any(x != 0) for x in found if x.shape != arrays["key"].value.shape)


def naive(arrays: Arrays, dtype: Any) -> jax.Array:
    """Three lines of attention without a mask, in one dtype."""
    query, key, value = (arrays[n].astype(dtype) for n in ("query", "key", "value"))
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * jnp.asarray(query.shape[-1] ** -0.5, dtype)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_error_budget_of_narrow_types(dtype: str) -> None:
    """At most twice the error of naive attention's gradient in that dtype, against float32."""
    case = replace(BASE, name="narrow", tokens=1, rows="all", holder="arrays", slots=200)
    call = make_call(replace(case, query_dtype=dtype))

    def gradient(attend: Callable[[Arrays], jax.Array]) -> list[np.ndarray]:
        loss = lambda arrays: jnp.sum(jnp.sin(attend(arrays).astype(jnp.float32)))  # noqa: E731
        found = quickly(jax.grad(loss))(call.arrays)
        return [np.asarray(found[n], np.float64) for n in ("query", "key", "value")]

    exact = gradient(lambda arrays: naive(arrays, jnp.float32))
    yardstick = gradient(lambda arrays: naive(arrays, jnp.dtype(dtype)))
    found = gradient(lambda arrays: call.ours(arrays)[0])
    for mine, other, true in zip(found, yardstick, exact, strict=True):
        assert np.abs(mine - true).max() <= 2 * np.abs(other - true).max()


# Caches through which no gradient passes


@pytest.mark.parametrize(
    ("dtype", "as_bits"), [(jnp.int8, False), (jnp.bfloat16, True), (jnp.float8_e5m2, True)]
)
def test_written_keys_refuse_a_gradient_instead_of_losing_it(dtype: Any, as_bits: bool) -> None:
    cache = jax_tkg.KVCache.create(1, 8, 1, 16, dtype=dtype, as_bits=as_bits)

    def loss(query: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sum(jax_tkg.attention_tkg(query, cache.append(key, key)))

    x = jnp.ones((1, 1, 1, 16))
    assert jax.eval_shape(jax.grad(loss), x, x).shape == x.shape  # the query's passes
    with pytest.raises(TypeError, match=r"no gradient passes .* as_bits=False, or .*stop_gradient"):
        jax.eval_shape(jax.grad(loss, argnums=1), x, x)
    jax.eval_shape(jax.grad(lambda x: loss(x, lax.stop_gradient(x))), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e5m2])
def test_written_keys_pass_a_gradient_through_floats(dtype: Any) -> None:
    cache = jax_tkg.KVCache.create(1, 8, 1, 16, dtype=dtype, as_bits=False)
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 2, 1, 16))

    def loss(key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jax_tkg.attention_tkg(query, cache.append(key, value))))

    for found in quickly(jax.grad(loss, argnums=(0, 1)))(key, value):
        chex.assert_tree_all_finite(found)
        assert jnp.any(found != 0)


def test_integers_have_no_cotangent() -> None:
    call = make_call(replace(BASE, name="ints", cache_dtype="int8", scales="head"))
    found = jax.eval_shape(jax.grad(scalar(call.ours), allow_int=True), call.arrays)
    none = jax.dtypes.float0
    assert found["key"].key.dtype == found["key_value_seq_lengths"].dtype == none
    assert found["key"].k_scale.dtype == found["query"].dtype == jnp.float32


# Debugging aids


def test_no_tracer_leaks() -> None:
    call = make_call(replace(BASE, name="leaks", beside=True))

    def gradient(arrays: Arrays) -> Any:
        return jax.grad(scalar(call.ours), allow_int=True)(arrays)["query"]

    with jax.checking_leaks():
        jax.jit(gradient).lower(call.arrays)
        jax.jit(jax.vmap(gradient)).lower(jax.tree.map(lambda x: x[None], call.arrays))


def test_masked_tiles_do_not_trip_debug_nans() -> None:
    call = make_call(replace(EMPTY, sinks=False))
    with jax.debug_nans(True):
        cotangents(call.ours, call.clean)
