"""Numbers at the ends of their ranges: the kernels answer as the other implementations do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.nki.implementation import NkiInterpret

ONE, TWO = NkiInterpret(programs=1), NkiInterpret(programs=2)


def of_random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def assert_as_reference(op: Any, *given: Any, by: Any, **options: Any) -> None:
    want = op(*given, **options, implementation="reference")
    np.testing.assert_allclose(op(*given, **options, implementation=by), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [3, 39])
@pytest.mark.parametrize("by", [ONE, TWO])
def test_an_infinite_bias_takes_all_and_hides_no_mask(by: NkiInterpret, at: int) -> None:
    """The last key is hidden from the first of the two tokens."""
    query, key = of_random(1, 2, 2, 16), of_random(1, 40, 1, 16)
    bias = jnp.zeros((1, 1, 1, 40)).at[..., at].set(jnp.inf)
    assert_as_reference(jax_tkg.attention_tkg, query, key, key, bias=bias, by=by)
    assert_as_reference(jax_tkg.attention_cte, query, key, key, bias=bias, by="nki_interpret")


@pytest.mark.parametrize("first", [5, 2**23 - 8, 2**24, 2**29])
@pytest.mark.parametrize("by", [ONE, TWO])
def test_positions_beyond_what_float32_holds(by: NkiInterpret, first: int) -> None:
    query, key = of_random(1, 2, 2, 16), of_random(1, 16, 1, 16)
    options = {
        "key_positions": first + jnp.arange(16)[None],
        "key_value_seq_lengths": jnp.array([first + 16]),
        "local_window_size": (2, 0),
    }
    assert_as_reference(jax_tkg.attention_tkg, query, key, key, **options, by=by)


@pytest.mark.parametrize("by", [ONE, TWO])
def test_windows_far_apart(by: NkiInterpret) -> None:
    """Between them are values that no token sees, and the tiles of a loop that has a few only."""
    positions = jnp.array([[220, 41, 290, 139, 90, 900]])
    key = of_random(1, 1024, 1, 16)
    near = np.asarray(positions)[0][:, None] - np.arange(4)
    value = jnp.full_like(key, jnp.nan).at[0, near].set(key[0, near])
    query = of_random(1, 6, 2, 16)
    options = {"query_positions": positions, "local_window_size": (3, 0)}
    assert_as_reference(jax_tkg.attention_tkg, query, key, value, **options, by=by)


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("masked", ["window", "mask"])
def test_a_key_that_is_nan_reaches_only_rows_that_see_it(programs: int, masked: str) -> None:
    """The first of two tokens sees it, the second does not; heads are narrow, in 16 bits."""
    slots, first = (20_480, 10) if masked == "window" else (4096, 100)
    query, value = (of_random(*shape) for shape in ((1, 2, 1, 64), (1, slots, 1, 64)))
    key = value.at[0, first].set(jnp.nan)
    if masked == "window":
        seen: dict[str, Any] = {
            "key_value_seq_lengths": jnp.array([slots]),
            "local_window_size": (slots - 2 - first, 0),
        }
    else:
        seen = {"mask": jnp.ones((1, 1, 2, slots), bool).at[0, 0, 1, first].set(False)}
    query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))
    by = NkiInterpret(programs=programs, unseen_values="finite")
    for implementation in ("reference", by):
        out = jax_tkg.attention_tkg(query, key, value, **seen, implementation=implementation)
        nan = np.isnan(np.asarray(out))
        np.testing.assert_array_equal(nan.all(axis=(2, 3)), [[True, False]])
        np.testing.assert_array_equal(nan.any(axis=(2, 3)), [[True, False]])
