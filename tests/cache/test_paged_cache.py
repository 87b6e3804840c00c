"""The paged cache against a model in plain Python: who holds which tokens, which pages are free."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_tkg
from jax_tkg.cache.paged_cache import PagedKVCache

BATCH, PAGES, PAGE_LEN, PER_ROW, HEADS, WIDTH = 3, 9, 4, 4, 2, 8

append = jax.jit(PagedKVCache.append)
fork = jax.jit(PagedKVCache.fork)
truncate = jax.jit(PagedKVCache.truncate)
reset = jax.jit(PagedKVCache.reset)


def empty(pages: int = PAGES, **options: object) -> PagedKVCache:
    return PagedKVCache.create(BATCH, pages, PAGE_LEN, PER_ROW, HEADS, WIDTH, **options)


def tokens(rng: np.random.Generator, count: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal((BATCH, count, HEADS, WIDTH), np.float32))


def held(cache: PagedKVCache, row: int) -> np.ndarray:
    """The keys of a row, read through the layout."""
    key, _ = cache.kv.dense(np.dtype(np.float32))
    return np.moveaxis(np.asarray(key[row]), 0, 1)[: int(cache.lengths[row])]


def check(cache: PagedKVCache, model: list[list[np.ndarray]]) -> None:
    for row, want in enumerate(model):
        assert int(cache.lengths[row]) == len(want)
        if want:
            np.testing.assert_array_equal(held(cache, row), np.stack(want))
    table = np.asarray(cache.page_table)
    used = set(table[table >= 0].tolist())
    np.testing.assert_array_equal(cache.free_pages(), [p not in used for p in range(PAGES)])
    lengths = np.asarray(cache.lengths)
    np.testing.assert_array_equal((table >= 0).sum(1), -(-lengths // PAGE_LEN))
    for row in range(BATCH):  # a page that is not full belongs to one row
        if lengths[row] % PAGE_LEN:
            assert (table == table[row, lengths[row] // PAGE_LEN]).sum() == 1


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.lists(st.integers(0, 3), min_size=BATCH, max_size=BATCH)),
    st.tuples(st.just("fork"), st.permutations(range(BATCH))),
    st.tuples(st.just("truncate"), st.lists(st.integers(0, 16), min_size=BATCH, max_size=BATCH)),
    st.tuples(st.just("reset"), st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)),
)


@settings(max_examples=20)
@given(st.lists(OPERATIONS, min_size=1, max_size=12))
def test_agrees_with_a_model_in_python(operations: list) -> None:
    rng = np.random.default_rng(0)
    cache = empty()
    model: list[list[np.ndarray]] = [[] for _ in range(BATCH)]
    for name, argument in operations:
        if name == "append":
            new, counts = tokens(rng, 3), argument
            grown = [
                m + list(np.asarray(new[b, :c]))
                for b, (m, c) in enumerate(zip(model, counts, strict=True))
            ]
            # A pool of 9 pages always holds 3 rows of 12 slots.
            if any(len(g) > 3 * PAGE_LEN for g in grown):
                continue
            cache, model = append(cache, new, 2 * new, jnp.asarray(counts)), grown
        elif name == "fork":
            source, target = argument[0], argument[1]
            cache = fork(cache, jnp.asarray([source]), jnp.asarray([target]))
            model[target] = list(model[source])
        elif name == "truncate":
            cache = truncate(cache, jnp.asarray(argument))
            model = [m[:n] for m, n in zip(model, argument, strict=True)]
        else:
            cache = reset(cache, jnp.asarray(argument))
            model = [[] if gone else m for m, gone in zip(model, argument, strict=True)]
        check(cache, model)


def test_exhausted_pool_drops_and_says_so() -> None:
    rng = np.random.default_rng(1)
    cache = empty(pages=4)
    new = tokens(rng, 8)  # 3 rows of 2 pages want 6 pages
    cache = append(cache, new, new)
    np.testing.assert_array_equal(cache.overflowed(), [False, False, True])
    assert not bool(jnp.any(cache.free_pages()))
    np.testing.assert_array_equal(held(cache, 1), new[1])
    query = tokens(rng, 1)
    out = jax_tkg.attention_tkg(query, cache)
    np.testing.assert_array_equal(out[2], 0)  # none of its tokens was kept
    assert bool(jnp.all(jnp.isfinite(out)))
    cache = reset(cache, jnp.asarray([True, False, True]))
    assert int(jnp.sum(cache.free_pages())) == 2
    assert not bool(jnp.any(cache.overflowed()))


def test_row_past_its_pages_overflows() -> None:
    cache = empty(pages=30)
    new = tokens(np.random.default_rng(2), PER_ROW * PAGE_LEN)
    cache = append(cache, new, new)
    assert not bool(jnp.any(cache.overflowed()))
    cache = append(cache, new[:, :1], new[:, :1])
    assert bool(jnp.all(cache.overflowed()))
    full = np.asarray(cache.kv.dense(np.dtype(np.float32))[0])
    np.testing.assert_array_equal(np.moveaxis(full, 1, 2), new)


def test_forked_rows_go_separate_ways() -> None:
    rng = np.random.default_rng(3)
    cache = empty()
    prompt = tokens(rng, 6)  # one full page and a half
    cache = append(cache, prompt, prompt, jnp.asarray([6, 0, 0]))
    cache = fork(cache, jnp.asarray([0, 0]), jnp.asarray([1, 2]))
    table = np.asarray(cache.page_table)
    assert len(set(table[:, 0])) == 1
    assert len(set(table[:, 1])) == 3
    new = tokens(rng, 1)
    cache = append(cache, new, new)
    for row in range(BATCH):
        np.testing.assert_array_equal(held(cache, row)[:6], prompt[0])
        np.testing.assert_array_equal(held(cache, row)[6], new[row, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8])
def test_attends_like_a_contiguous_cache(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(4)
    scales = {"k_scale": 0.05, "v_scale": 0.02} if np.dtype(dtype).itemsize == 1 else {}
    paged = empty(dtype=dtype, **scales)
    plain = jax_tkg.KVCache.create(BATCH, 16, HEADS, WIDTH, dtype=dtype, **scales)
    for counts in ([3, 1, 5], [2, 5, 0], [1, 1, 1]):
        key, value = tokens(rng, 5), tokens(rng, 5)
        paged = append(paged, key, value, jnp.asarray(counts))
        plain = plain.append(key, value, jnp.asarray(counts))
    query = jnp.asarray(rng.standard_normal((BATCH, 2, 4, WIDTH), np.float32))
    want, lse = jax_tkg.attention_tkg(query, plain, return_residual=True)
    got, got_lse = jax_tkg.attention_tkg(query, paged, return_residual=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5)
