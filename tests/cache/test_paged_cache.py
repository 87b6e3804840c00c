"""The paged cache against a model in plain Python: who holds which tokens, which pages are free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_tkg
from jax_tkg import KVCache, PagedKVCache, neuron
from tests.cache.model import HEADS, VALUE_WIDTH, WIDTH, Array, attend, scales, tokens

BATCH, PAGES, PAGE_LEN, PER_ROW = 4, 7, 2, 3
MOST = 5
"""Tokens in one append."""

small = {"xla_backend_optimization_level": 0}  # most of the time goes to LLVM
append = jax.jit(PagedKVCache.append, compiler_options=small)
fork = jax.jit(PagedKVCache.fork, compiler_options=small)
truncate = jax.jit(PagedKVCache.truncate, compiler_options=small)
reset = jax.jit(PagedKVCache.reset, compiler_options=small)
attention = jax.jit(
    jax_tkg.attention_tkg, static_argnames="return_residual", compiler_options=small
)


def empty(pages: int = PAGES, **options: Any) -> PagedKVCache:
    return PagedKVCache.create(
        BATCH, pages, PAGE_LEN, PER_ROW, HEADS, WIDTH, value_head_dim=VALUE_WIDTH, **options
    )


def new_tokens(seed: int, count: int) -> tuple[jax.Array, jax.Array]:
    key, value = tokens(np.random.default_rng(seed), BATCH, count)
    return jnp.asarray(key), jnp.asarray(value)


@dataclass(eq=False)
class Page:
    """What is in a page, by slot; two rows that share a page hold the same object."""

    tokens: dict[int, Array] = field(default_factory=dict)


@dataclass
class Row:
    """A sequence: its pages (None for one that the pool did not have) and its length."""

    pages: list[Page | None] = field(default_factory=list)
    length: int = 0


@dataclass
class Model:
    """The cache as its documentation has it."""

    rows: list[Row] = field(default_factory=lambda: [Row() for _ in range(BATCH)])

    def pages(self) -> set[Page]:
        return {p for row in self.rows for p in row.pages if p is not None}

    def take(self) -> Page | None:
        return Page() if len(self.pages()) < PAGES else None

    def append(self, key: Array, counts: list[int]) -> None:
        for row, count in zip(self.rows, counts, strict=True):
            while len(row.pages) < min(-(-(row.length + count) // PAGE_LEN), PER_ROW):
                row.pages.append(self.take())
        for row, new, count in zip(self.rows, key, counts, strict=True):
            for at, token in enumerate(new[:count], row.length):
                page = row.pages[at // PAGE_LEN] if at < PER_ROW * PAGE_LEN else None
                if page is not None:
                    page.tokens[at % PAGE_LEN] = token
            row.length += count

    def reset(self, rows: list[bool]) -> None:
        self.rows = [Row() if gone else row for row, gone in zip(self.rows, rows, strict=True)]

    def truncate(self, lengths: list[int]) -> None:
        for row, length in zip(self.rows, lengths, strict=True):
            row.length = min(row.length, length)
            row.pages = row.pages[: -(-row.length // PAGE_LEN)]
        self.own_last_pages()

    def fork(self, sources: list[int], targets: list[int]) -> None:
        before = list(self.rows)
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = Row(list(before[source].pages), before[source].length)
        self.own_last_pages()

    def own_last_pages(self) -> None:
        for row in self.rows:
            last = row.length // PAGE_LEN
            page = row.pages[last] if last < len(row.pages) and row.length % PAGE_LEN else None
            if page is not None and sum(page in other.pages for other in self.rows) > 1:
                copy = self.take()
                if copy is not None:
                    copy.tokens = dict(page.tokens)
                row.pages[last] = copy


def check(cache: PagedKVCache, model: Model) -> None:
    table, pool = np.asarray(cache.page_table), np.asarray(cache.kv.key)
    number: dict[Page, int] = {}
    for b, row in enumerate(model.rows):
        assert int(cache.lengths[b]) == row.length
        np.testing.assert_array_equal(table[b, len(row.pages) :], -1)
        lost = row.length > PER_ROW * PAGE_LEN or None in row.pages
        assert bool(cache.overflowed()[b]) == lost
        for e, page in enumerate(row.pages):
            if page is None:
                assert table[b, e] == -1
                continue
            assert number.setdefault(page, int(table[b, e])) == table[b, e]
            for slot in range(min(PAGE_LEN, row.length - e * PAGE_LEN)):
                np.testing.assert_array_equal(pool[table[b, e], :, slot], page.tokens[slot])
    assert len(set(number.values())) == len(number)  # one page of the pool for each of the model's
    free = [p not in set(number.values()) for p in range(PAGES)]
    np.testing.assert_array_equal(cache.free_pages(), free)
    assert int(cache.num_free_pages()) == sum(free)


def per_row(elements: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(elements, min_size=BATCH, max_size=BATCH)


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), per_row(st.integers(0, MOST))),
    st.tuples(st.just("fork"), per_row(st.integers(0, BATCH - 1))),
    st.tuples(st.just("truncate"), per_row(st.integers(0, PER_ROW * PAGE_LEN))),
    st.tuples(st.just("reset"), per_row(st.booleans())),
)


@settings(max_examples=40)
@given(st.lists(OPERATIONS, min_size=1, max_size=12))
def test_agrees_with_a_model_in_python(operations: list[tuple[str, list[Any]]]) -> None:
    cache, model = empty(), Model()
    for n, (name, numbers) in enumerate(operations):
        if name == "append":
            key, value = new_tokens(n, MOST)
            cache = append(cache, key, value, jnp.int32(numbers))
            model.append(np.asarray(key), numbers)
        elif name == "fork":
            everyone = list(range(BATCH))
            cache = fork(cache, jnp.int32(numbers), jnp.int32(everyone))
            model.fork(numbers, everyone)
        elif name == "truncate":
            cache = truncate(cache, jnp.int32(numbers))
            model.truncate(numbers)
        else:
            cache = reset(cache, jnp.asarray(numbers))
            model.reset(numbers)
        check(cache, model)


def shared_and_ragged() -> tuple[PagedKVCache, Array, Array]:
    """Rows of 5, 5, 3 and 0 tokens, rows 0 and 1 share the pages of the first 4; and the tokens."""
    cache = empty(9)
    nan = [jnp.full_like(x, jnp.nan) for x in (cache.kv.key, cache.kv.value)]
    cache = replace(cache, kv=replace(cache.kv, key=nan[0], value=nan[1]))
    (key, value), (one_key, one_value) = new_tokens(0, 4), new_tokens(1, 1)
    cache = fork(append(cache, key, value, jnp.int32([4, 0, 3, 0])), 0, 1)
    cache = append(cache, one_key, one_value, jnp.int32([1, 1, 0, 0]))
    both = [np.concatenate(x, axis=1) for x in ((key, one_key), (value, one_value))]
    for x in both:
        x[1, :4] = x[0, :4]
    return cache, both[0], both[1]


def test_attention_sees_its_tokens_and_no_other_page() -> None:
    cache, key, value = shared_and_ragged()
    query = new_tokens(2, 2)[0]
    out, lse = attention(query, cache, return_residual=True)
    for b, length in enumerate((5, 5, 3)):
        seen = np.arange(length) <= np.arange(length - 2, length)[:, None]
        wanted = attend(np.asarray(query[b]), key[b, :length], value[b, :length], seen)
        np.testing.assert_allclose(out[b], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[3], 0)
    np.testing.assert_array_equal(lse[3], -np.inf)


def test_the_order_of_pages_does_not_matter() -> None:
    cache = shared_and_ragged()[0]
    order = np.random.default_rng(3).permutation(9)
    table = np.where(cache.page_table >= 0, np.argsort(order)[cache.page_table], -1)
    moved = replace(
        cache.kv,
        key=cache.kv.key[order],
        value=cache.kv.value[order],
        page_indices=jnp.int32(table),
    )
    query = new_tokens(4, 1)[0]
    np.testing.assert_array_equal(
        attention(query, cache), attention(query, replace(cache, kv=moved))
    )


def test_attention_under_vmap() -> None:
    cache = shared_and_ragged()[0]
    caches = jax.tree.map(lambda *x: jnp.stack(x), cache, cache.truncate(jnp.int32([3, 5, 2, 0])))
    query = new_tokens(5, 1)[0]
    for got, i in zip(jax.vmap(attention, in_axes=(None, 0))(query, caches), range(2), strict=True):
        wanted = attention(query, jax.tree.map(itemgetter(i), caches))
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_attends_like_a_contiguous_cache(dtype: Any) -> None:
    options = {"dtype": dtype, **scales(np.dtype(dtype))}
    paged = empty(9, **options)
    plain = KVCache.create(
        BATCH, PER_ROW * PAGE_LEN, HEADS, WIDTH, value_head_dim=VALUE_WIDTH, **options
    )
    for seed, counts in enumerate(([2, 1, 4, 0], [2, 0, 1, 0], [1, 1, 0, 1])):
        key, value = new_tokens(seed, 4)
        paged = append(paged, key, value, jnp.int32(counts))
        plain = plain.append(key, value, jnp.int32(counts))
    assert not bool(jnp.any(paged.overflowed()))
    query = new_tokens(9, 2)[0]
    for got, wanted in zip(
        attention(query, paged, return_residual=True),
        attention(query, plain, return_residual=True),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_exhausted_pool_drops_and_says_so() -> None:
    key, value = new_tokens(0, 4)  # 4 rows of 2 pages
    cache = append(empty(), key, value)
    np.testing.assert_array_equal(cache.overflowed(), [False, False, False, True])
    assert int(cache.num_free_pages()) == 0
    query = new_tokens(1, 1)[0]
    first_page = attend(
        np.asarray(query[3]), *(np.asarray(x[3, :2]) for x in (key, value)), np.ones((1, 2), bool)
    )
    np.testing.assert_allclose(attention(query, cache)[3], first_page, rtol=1e-5, atol=1e-5)


def test_a_lost_beginning_of_a_page_stays_lost() -> None:
    """The page that a later token could have holds what others left there."""
    left = (
        jnp.full((BATCH, 4, HEADS, WIDTH), 100.0),
        jnp.full((BATCH, 4, HEADS, VALUE_WIDTH), 100.0),
    )
    cache = append(empty(2), *left, jnp.int32([4, 0, 0, 0]))
    key, value = new_tokens(1, 1)
    cache = append(cache, key, value, jnp.int32([0, 1, 0, 0]))  # no page left
    cache = reset(cache, jnp.asarray([True, False, False, False]))
    cache = append(cache, key, value, jnp.int32([0, 1, 0, 0]))
    assert bool(cache.overflowed()[1])
    np.testing.assert_array_equal(attention(key, cache)[1], 0)


def test_beams_change_places_in_a_full_pool() -> None:
    """A permutation of rows needs no page, not even for last pages that are not full."""
    key, value = new_tokens(0, 3)
    cache = append(empty(2 * BATCH), key, value)
    assert int(cache.num_free_pages()) == 0
    parent = jnp.int32([1, 2, 3, 0])
    moved = fork(cache, parent, jnp.arange(BATCH))
    np.testing.assert_array_equal(moved.page_table, cache.page_table[parent])
    query = new_tokens(1, 1)[0]
    np.testing.assert_array_equal(
        attention(query, moved), attention(query[jnp.argsort(parent)], cache)[parent]
    )


@pytest.mark.parametrize("row", [-1, BATCH])
def test_fork_refuses_what_is_no_row(row: int) -> None:
    cache = empty()
    with pytest.raises(ValueError, match=f"source must be a row of this cache, 0 to 3; got {row}"):
        cache.fork(row, 0)
    with pytest.raises(ValueError, match=f"target must be a row of this cache, 0 to 3; got {row}"):
        cache.fork(0, row)


@pytest.mark.usefixtures("no_shape_checks")
def test_fork_refuses_what_are_no_rows() -> None:
    cache = empty()
    with pytest.raises(ValueError, match=r"source must be a row number, .*; got 0\.7"):
        cache.fork(0.7, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target must be a row of this cache"):
        cache.fork(np.arange(2), np.array([1, BATCH]))
    with pytest.raises(ValueError, match=r"as many sources as targets; got 1 and 2"):
        cache.fork(0, jnp.arange(2))


def test_everything_runs_on_neuron() -> None:
    cache, rows = empty(), jnp.arange(BATCH)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (PagedKVCache.append, (cache, *new_tokens(0, MOST))),
        (PagedKVCache.fork, (cache, rows, rows)),
        (PagedKVCache.truncate, (cache, rows)),
        (PagedKVCache.reset, (cache, rows > 1)),
    ]
    found = chain.from_iterable(neuron.check(f, *args) for f, args in calls)
    assert list(found) == []
