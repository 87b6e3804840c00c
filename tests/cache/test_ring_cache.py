"""The ring: the last S tokens, wherever they are, and nothing that is no longer true."""

from __future__ import annotations

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_tkg
from jax_tkg import RingKVCache
from tests.cache.model import BATCH, HEADS, VALUE_WIDTH, WIDTH, Array, attend, tokens

CAPACITY = 5
LONGEST = 12
small = {"xla_backend_optimization_level": 0}  # most of the time goes to LLVM
append = jax.jit(RingKVCache.append, compiler_options=small)
truncate = jax.jit(RingKVCache.truncate, compiler_options=small)


def empty(layout: str = "BKSH") -> RingKVCache:
    return RingKVCache.create(
        BATCH, CAPACITY, HEADS, WIDTH, value_head_dim=VALUE_WIDTH, layout=layout
    )


def held(cache: RingKVCache, row: int) -> dict[int, tuple[Array, Array]]:
    """The tokens a row may see, by position."""
    key, value = (np.asarray(x[row]) for x in cache.kv.dense(np.dtype(np.float32)))
    first, length = int(cache.starts[row]), int(cache.lengths[row])
    positions = np.asarray(cache.key_positions()[row])
    assert len({p for p in positions if p >= 0}) == (positions >= 0).sum()
    slots = {int(p): s for s, p in enumerate(positions) if first <= p < length}
    assert all(s == p % CAPACITY for p, s in slots.items())
    return {p: (key[:, s], value[:, s]) for p, s in slots.items()}


OPERATIONS = st.one_of(
    st.tuples(
        st.sampled_from([1, 3, LONGEST]),
        st.lists(st.integers(0, LONGEST), min_size=BATCH, max_size=BATCH),
    ),
    st.tuples(st.just(0), st.lists(st.integers(0, 20), min_size=BATCH, max_size=BATCH)),
)


@settings(max_examples=30)
@given(st.lists(OPERATIONS, min_size=1, max_size=8))
def test_agrees_with_lists(operations: list[tuple[int, list[int]]]) -> None:
    """Appends, some of more tokens than the ring holds (size), and truncations (size 0)."""
    rng = np.random.default_rng(0)
    cache = empty()
    rows: list[list[tuple[Array, Array]]] = [[] for _ in range(BATCH)]
    intact = [0] * BATCH  # positions before this one were overwritten
    for size, numbers in operations:
        if size:
            key, value = tokens(rng, BATCH, size)
            cache = append(cache, key, value, jnp.int32(numbers))
            for b, row in enumerate(rows):
                row += [(key[b, t], value[b, t]) for t in range(min(numbers[b], size))]
        else:
            cache = truncate(cache, jnp.int32(numbers))
            rows = [row[:n] for row, n in zip(rows, numbers, strict=True)]
        for b, row in enumerate(rows):
            intact[b] = max(intact[b], len(row) - CAPACITY)
            got = held(cache, b)
            assert sorted(got) == list(range(intact[b], len(row)))
            for position, (key_at, value_at) in got.items():
                np.testing.assert_array_equal(key_at, row[position][0])
                np.testing.assert_array_equal(value_at, row[position][1])
    assert not bool(jnp.any(cache.overflowed()))


@pytest.mark.parametrize("layout", ["BKSH", "BSKH", "BKHS"])
def test_attention_in_a_window(layout: str) -> None:
    """Two tokens at a time; a window of 4 needs the 5 slots there are."""
    rng = np.random.default_rng(1)
    cache, window = empty(layout), 4
    key, value = tokens(rng, BATCH, 14)
    query = tokens(rng, BATCH, 14)[0].repeat(2, axis=2)
    step = jax.jit(
        lambda cache, query: jax_tkg.attention_tkg(query, cache, local_window_size=(window - 1, 0))
    )
    for begin in range(0, 14, 2):
        now = slice(begin, begin + 2)
        cache = append(cache, key[:, now], value[:, now])
        got = step(cache, query[:, now])
        at = np.arange(begin, begin + 2)[:, None]
        seen = (np.arange(begin + 2) <= at) & (np.arange(begin + 2) > at - window)
        for b in range(BATCH):
            wanted = attend(query[b, now], key[b, : now.stop], value[b, : now.stop], seen)
            np.testing.assert_allclose(got[b], wanted, rtol=1e-5, atol=1e-5)


def test_under_vmap() -> None:
    key, value = tokens(np.random.default_rng(2), 2, BATCH, 3)
    cache = append(empty(), *tokens(np.random.default_rng(3), BATCH, 4))
    together = jax.vmap(RingKVCache.append, in_axes=(None, 0, 0))(cache, key, value)
    for i in range(2):
        alone = append(cache, key[i], value[i])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(itemgetter(i), together), alone)
