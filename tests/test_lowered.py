"""The checks of lowered programs: each finds what it is for, and nothing in a clean program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.lowered import hazards, lower_for_neuron, operations

X = jnp.ones((4, 8))
LOOP = "while without constant trip count"


def count(x: jax.Array) -> jax.Array:
    """An integer that depends on data."""
    return x[0, 0].astype(jnp.int32)


def ints(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: lax.fori_loop(0, 5, lambda i, x: x * 2, x),
        lambda x: lax.scan(lambda x, i: (x * 2, i), x, jnp.arange(4), reverse=True),
        lambda x: lax.while_loop(lambda i: i > 0, lambda i: i - 2, 8) + x,
        lambda x: lax.while_loop(lambda i: jnp.int32(5) > i, lambda i: 1 + i, 0) + x,
        lambda x: lax.map(lambda x: lax.fori_loop(0, 3, lambda i, x: x + 1, x), x),
        lambda x: ints(x).at[ints(x[0])].set(1),
        lambda x: x.at[ints(x[0])].add(1),
        lambda x: jnp.max(x) + jnp.dot(x, x.T) + jnp.sum(x),
        lambda x: jax.random.bits(jax.random.key(0, impl="unsafe_rbg"), x.shape, jnp.uint32),
    ],
)
def test_clean_programs(function: Callable[[jax.Array], jax.Array]) -> None:
    assert hazards(lower_for_neuron(function, X)) == set()


@pytest.mark.parametrize(
    ("function", "hazard"),
    [
        (lambda x: lax.cond(x[0, 0] > 0, lambda: 1, lambda: 2), "stablehlo.case"),
        (lambda x: jnp.sort(x, axis=-1), "stablehlo.sort"),
        (lambda x: lax.top_k(x, 5), "chlo.top_k"),
        (lambda x: jnp.argmax(x, axis=-1), "variadic reduce"),
        (lambda x: jax.random.uniform(jax.random.key(0), x.shape), "threefry"),
        (lambda x: jnp.dot(ints(x), ints(x).T), "integer dot"),
        (lambda x: ints(x).at[ints(x[0])].add(1), "integer scatter-add"),
        (lambda x: lax.complex(x, x), "stablehlo.complex"),
        (lambda x: lax.reduce_precision(x, 5, 10), "stablehlo.reduce_precision"),
        (lambda x: jnp.linalg.cholesky(x @ x.T), "stablehlo.cholesky"),
        (lambda x: jnp.fft.rfft(x), "stablehlo.fft"),
        (
            lambda x: jax.ffi.ffi_call("target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x),
            "stablehlo.custom_call",
        ),
        # Trip counts: a bound, a start, a step that depend on data; a second condition; a result.
        (lambda x: lax.fori_loop(0, count(x), lambda i, x: x * 2, x), LOOP),
        (lambda x: lax.while_loop(lambda i: i < 5, lambda i: i + 1, count(x)), LOOP),
        (
            lambda x: lax.while_loop(
                lambda c: c[0] < 5, lambda c: (c[0] + c[1], c[1]), (0, count(x))
            ),
            LOOP,
        ),
        (
            lambda x: lax.while_loop(
                lambda c: (c[0] < 5) & (c[1] > 0), lambda c: (c[0] + 1, c[1]), (0, count(x))
            ),
            LOOP,
        ),
        (lambda x: lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: x * 2, x), LOOP),
        (lambda x: lax.while_loop(lambda i: i < 9, lambda i: i * 2, 1) + x, LOOP),
    ],
)
def test_hazards_are_found(function: Callable[[jax.Array], jax.Array], hazard: str) -> None:
    assert hazard in hazards(lower_for_neuron(function, X))


def test_double_precision_is_found() -> None:
    jax.config.update("jax_enable_x64", True)
    try:
        assert hazards(lower_for_neuron(lambda x: x.astype(jnp.float64), X)) == {"float64"}
    finally:
        jax.config.update("jax_enable_x64", False)


def test_operations_are_counted_inside_loops() -> None:
    def nested(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 3, lambda i, x: lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x), x)

    used = operations(lower_for_neuron(nested, X))
    assert used["stablehlo.while"] == 2
    assert used["stablehlo.sine"] == 1
