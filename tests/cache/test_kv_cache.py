"""The contiguous cache: what was appended is there, rounded, in its place, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg import KVCache, PagedKVCache, RingKVCache
from tests.cache.model import (
    BATCH,
    DTYPES,
    HEADS,
    K_SCALE,
    V_SCALE,
    VALUE_WIDTH,
    WIDTH,
    Array,
    attend,
    kept,
    scales,
    tokens,
)

CAPACITY = 8
SIZES, COUNTS = (3, 1, 6), ([3, 0, 2], [1, 1, 0], [6, 2, 4])
"""Tokens in each call, and how many of them are real in each row; the first row gets too many."""
LAYOUTS = ("BKSH", "BSKH", "BKHS", "paged")

small = {"xla_backend_optimization_level": 0}  # most of the time goes to LLVM


def empty(
    layout: str, dtype: Any = np.float32, capacity: int = CAPACITY, **options: Any
) -> KVCache:
    """A cache full of NaN, or of its dtype's nearest thing, that holds no token."""
    options = {"value_head_dim": VALUE_WIDTH, "dtype": dtype, **options}
    if layout == "paged":
        cache: KVCache = PagedKVCache.create(
            BATCH, BATCH * capacity // 4 + 1, 4, capacity // 4, HEADS, WIDTH, **options
        )
    else:
        cache = KVCache.create(BATCH, capacity, HEADS, WIDTH, layout=layout, **options)
    key, value = (jnp.full_like(x, garbage(x.dtype)) for x in (cache.kv.key, cache.kv.value))
    return replace(cache, kv=replace(cache.kv, key=key, value=value))


def garbage(stored: np.dtype) -> Any:
    return 0x7F if jnp.issubdtype(stored, jnp.integer) else jnp.nan


class Grown(NamedTuple):
    """A cache, and what a reader sees: keys `[B, S, K, H]` and values, which rows lost tokens."""

    cache: KVCache
    key: jax.Array
    value: jax.Array
    overflowed: jax.Array


@partial(jax.jit, static_argnames=("layout", "dtype", "as_bits"), compiler_options=small)
def grow(
    calls: list[tuple[jax.Array, ...]],
    layout: str,
    dtype: np.dtype = DTYPES[0],
    as_bits: bool | None = None,
) -> list[Grown]:
    """The cache after each call; all in one program, as compilations are what takes time here."""
    cache, found = empty(layout, dtype, as_bits=as_bits, **scales(dtype)), []
    for call in calls:
        cache = cache.append(*call)
        key, value = (jnp.moveaxis(x, 1, 2) for x in cache.kv.dense(np.dtype(np.float32)))
        found.append(Grown(cache, key, value, cache.overflowed()))
    return found


def some_calls(seed: int = 0) -> list[tuple[Array, Array, Array]]:
    rng = np.random.default_rng(seed)
    return [
        (*tokens(rng, BATCH, size), np.int32(counts))
        for size, counts in zip(SIZES, COUNTS, strict=True)
    ]


def rows_of(calls: list[tuple[Array, Array, Array]]) -> list[tuple[Array, Array]]:
    """All tokens of each row, in order."""
    return [
        tuple(np.concatenate([call[i][b, : call[2][b]] for call in calls]) for i in (0, 1))
        for b in range(BATCH)
    ]


def kinds() -> list[Any]:
    return [
        pytest.param(layout, dtype, as_bits, id=f"{layout}-{dtype}{'-bits' * as_bits}")
        for layout in LAYOUTS
        for dtype in DTYPES
        for as_bits in (False, True)
        if not (as_bits and dtype in (np.float32, np.int8))
    ]


@pytest.mark.parametrize(("layout", "dtype", "as_bits"), kinds())
def test_what_was_appended_is_there(layout: str, dtype: np.dtype, as_bits: bool) -> None:
    calls = some_calls()
    for n, got in enumerate(grow(calls, layout, dtype, as_bits), 1):
        rows = rows_of(calls[:n])
        np.testing.assert_array_equal(got.cache.lengths, [len(key) for key, _ in rows])
        np.testing.assert_array_equal(got.overflowed, [len(key) > CAPACITY for key, _ in rows])
        for row, (key, value) in enumerate(rows):
            key, value = key[:CAPACITY], value[:CAPACITY]
            np.testing.assert_array_equal(got.key[row, : len(key)], kept(key, dtype, K_SCALE))
            np.testing.assert_array_equal(got.value[row, : len(key)], kept(value, dtype, V_SCALE))
        stored = np.asarray(got.cache.kv.key)
        untouched = (stored != stored) | (stored == np.asarray(garbage(stored.dtype), stored.dtype))
        used = sum(min(len(key), CAPACITY) for key, _ in rows) * HEADS * WIDTH
        # No less, but maybe more: what was written may be what the garbage is.
        assert untouched.sum() >= stored.size - used


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, DTYPES[0]) for layout in LAYOUTS] + [("BKSH", dtype) for dtype in DTYPES[1:]],
    ids=str,
)
def test_attention_over_it(layout: str, dtype: np.dtype) -> None:
    """Also over a row that was given more than it could hold."""
    calls = some_calls(1)
    cache = grow(calls, layout, dtype)[-1].cache
    query = tokens(np.random.default_rng(2), BATCH, 2)[0].repeat(2, axis=2)
    attention = jax.jit(jax_tkg.attention_tkg, compiler_options=small)
    got = attention(jnp.asarray(query), cache)
    for row, (key, value) in enumerate(rows_of(calls)):
        seen = np.arange(len(key)) <= np.arange(len(key) - 2, len(key))[:, None]
        key, value = kept(key, dtype, K_SCALE), kept(value, dtype, V_SCALE)
        wanted = attend(query[row], key[:CAPACITY], value[:CAPACITY], seen[:, :CAPACITY])
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_a_row(layout: str) -> None:
    """`row_tile` and `row_products` say the same as `block`."""
    calls = some_calls(3)
    cache, keys, values, _ = grow(calls, layout)[-1]
    query = np.random.default_rng(4).standard_normal((5, WIDTH)).astype(np.float32)
    for row in range(BATCH):
        key, value = np.asarray(keys[row]), np.asarray(values[row])
        for head in range(HEADS):
            for start, size in ((0, CAPACITY), (4, 4)):
                at = (jnp.int32(row), jnp.int32(head), jnp.int32(start))
                tile = cache.kv.row_tile(*at, size)
                slots = slice(start, max(start, min(start + size, int(cache.lengths[row]))))
                count = slots.stop - slots.start
                np.testing.assert_array_equal(tile[1][:count], value[slots, head])
                products = cache.kv.row_products(tile[0], jnp.asarray(query))
                wanted = key[slots, head].astype(np.float64) @ query.T.astype(np.float64)
                np.testing.assert_allclose(products[:count], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_under_vmap(layout: str) -> None:
    """Two caches at once; also one cache that goes two ways."""
    calls = [some_calls(seed)[0] for seed in (5, 6)]
    many = [np.stack(x) for x in zip(*calls, strict=True)]
    cache = empty(layout)
    caches = [cache, grow(calls[:1], layout)[0].cache]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    append = type(cache).append
    single = jax.jit(append, compiler_options=small)
    vmapped = jax.jit(jax.vmap(append), compiler_options=small)
    forked = jax.jit(jax.vmap(append, in_axes=(None, 0, 0, 0)), compiler_options=small)
    for together, starts in (
        (vmapped(stacked, *many), caches),
        (forked(cache, *many), [cache] * 2),
    ):
        for i, (start, call) in enumerate(zip(starts, calls, strict=True)):
            one = jax.tree.map(itemgetter(i), together)
            jax.tree.map(np.testing.assert_array_equal, one, single(start, *call))


def test_the_layout_of_whoever_names_none() -> None:
    """Keys of narrow heads are transposed on CPU, unless a mesh splits them."""
    from_width = partial(KVCache.create, 1, 8, 2)
    assert isinstance(from_width(64).kv, jax_tkg.BKHS)
    assert isinstance(from_width(64, value_head_dim=128).kv, jax_tkg.BKHS)
    assert isinstance(RingKVCache.create(1, 8, 2, 64).kv, jax_tkg.BKHS)
    assert isinstance(from_width(65).kv, jax_tkg.BKSH)
    assert isinstance(from_width(96, dtype=jnp.bfloat16).kv, jax_tkg.BKHS)
    assert isinstance(from_width(97, dtype=jnp.bfloat16).kv, jax_tkg.BKSH)
    assert isinstance(from_width(64, layout="BKSH").kv, jax_tkg.BKSH)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    split = jax_tkg.AttentionSharding(mesh, heads="tensor")
    assert isinstance(from_width(64, sharding=split).kv, jax_tkg.BKSH)


def test_negative_counts_append_nothing() -> None:
    key, value, _ = some_calls()[0]
    cache = empty("BKSH").append(jnp.asarray(key), jnp.asarray(value), jnp.int32([2, -1, 9]))
    np.testing.assert_array_equal(cache.lengths, [2, 0, 3])


def test_prefill_forgets_and_keeps_padding_out() -> None:
    rng = np.random.default_rng(7)
    cache = grow(some_calls(), "BKSH")[-1].cache
    (key, value), query = tokens(rng, BATCH, 6), tokens(rng, BATCH, 1)[0]
    lengths, starts = np.int32([6, 4, 3]), np.int32([0, 2, 1])
    key[1, :2], value[1, :2] = np.nan, np.nan  # left padding
    cache = cache.prefill(*map(jnp.asarray, (key, value, lengths, starts)))
    np.testing.assert_array_equal(cache.lengths, lengths)
    np.testing.assert_array_equal(cache.starts, starts)
    got = jax_tkg.attention_tkg(jnp.asarray(query), cache)
    for b in range(BATCH):
        live = slice(starts[b], lengths[b])
        seen = np.ones((1, lengths[b] - starts[b]), bool)
        wanted = attend(query[b], key[b, live], value[b, live], seen)
        np.testing.assert_allclose(got[b], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cache.prefill(jnp.asarray(key), jnp.asarray(value)).starts, 0)


def test_truncate_and_reset() -> None:
    cache = replace(grow(some_calls(), "BKSH")[-1].cache, starts=jnp.int32([1, 1, 1]))
    np.testing.assert_array_equal(cache.lengths, [10, 3, 6])
    shorter = cache.truncate(jnp.int32([5, 7, -2]))
    np.testing.assert_array_equal(shorter.lengths, [5, 3, 0])
    assert not bool(jnp.any(shorter.overflowed()))
    some = cache.reset(jnp.asarray([True, False, True]))
    np.testing.assert_array_equal(some.lengths, [0, 3, 0])
    np.testing.assert_array_equal(some.starts, [0, 1, 0])
    np.testing.assert_array_equal(cache.reset().lengths, 0)


@pytest.mark.usefixtures("no_shape_checks")
class TestErrors:
    """What a user is told."""

    def test_of_create(self) -> None:
        with pytest.raises(
            ValueError, match=r"unknown layout 'SKBH'; there are BSKH, BKSH, BKHS\."
        ):
            empty("SKBH")
        with pytest.raises(TypeError, match=r"a cache can hold float32, .*; not int32\."):
            empty("BKSH", np.int32)
        with pytest.raises(ValueError, match=r"k_scale is for int8 .* this one is bfloat16"):
            empty("BKSH", jnp.bfloat16, k_scale=1.0)
        with pytest.raises(ValueError, match=r"v_scale must be a number or one per KV head \(2,\)"):
            empty("BKSH", np.int8, v_scale=np.ones(3))
        with pytest.raises(ValueError, match=r"k_scale must be positive and finite; got 0\.0"):
            empty("BKSH", np.int8, k_scale=0.0)
        with pytest.raises(ValueError, match=r"page_len must be .* at least 1; got 0"):
            PagedKVCache.create(1, 4, 0, 2, 1, 8)
        with pytest.raises(ValueError, match=r"capacity must be .* at least 1; got 0"):
            KVCache.create(1, 0, 1, 8)
        with pytest.raises(ValueError, match=r"layout must be BSKH, BKSH, BKHS, or the class"):
            KVCache.create(1, 8, 1, 8, layout=3)  # type: ignore[arg-type]

    def test_of_what_is_given_for_each_row(self) -> None:
        cache = empty("BKSH")
        key, value = map(jnp.asarray, some_calls()[0][:2])
        with pytest.raises(
            ValueError, match=r"rows must be booleans of shape \(3,\).* int32 \(1,\)"
        ):
            cache.reset(np.array([1], np.int32))
        with pytest.raises(ValueError, match=r"lengths must be integers of shape \(3,\).* \(2,\)"):
            cache.prefill(key, value, jnp.array([1, 2]))
        with pytest.raises(ValueError, match=r"starts must be integers of shape \(3,\).* float32"):
            cache.prefill(key, value, None, jnp.ones(3))
        with pytest.raises(ValueError, match=r"lengths must be integers of shape \(3,\).* \(\)"):
            cache.truncate(jnp.int32(1))
        with pytest.raises(ValueError, match=r"key must be of real numbers; got bool"):
            cache.append(key > 0, value)
        got = cache.prefill(key, value, np.array([1, 2, 0]), np.array([-4, 1, 0])).starts
        assert got.tolist() == [0, 1, 0]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_of_append(self, layout: str) -> None:
        cache = empty(layout)
        key, value = map(jnp.asarray, some_calls()[0][:2])
        with pytest.raises(ValueError, match=r"key must be .* = \(3, T, 2, 4\) .* \(3, 3, 1, 4\)"):
            cache.append(key[:, :, :1], value)
        with pytest.raises(ValueError, match=r"value must be .* \(3, T, 2, 3\) .* \(3, 2, 2, 3\)"):
            cache.append(key, value[:, :2])
        with pytest.raises(ValueError, match=r"counts must be integers of shape \(3,\).* float32"):
            cache.append(key, value, jnp.ones(3))
        long = [jnp.concatenate([x] * 3, axis=1) for x in (key, value)]
        with pytest.raises(ValueError, match=r"cannot append 9 tokens to a cache of 8 slots"):
            cache.append(*long)
