"""Pages are handed out, shared and taken back; none is lost, and none is used for two things."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from jax_tkg.serving.pool import PagePool, PageUsage, RowPages

LEN = 4


def row(pool: PagePool, tokens: list[int]) -> RowPages:
    """A row with all its tokens written."""
    pages = RowPages(pool, tokens)
    assert pages.reserve(len(tokens))
    pages.written(tokens, len(tokens))
    return pages


def test_pages_are_taken_as_needed_and_given_back() -> None:
    pool = PagePool(5, LEN)
    pages = RowPages(pool, [1, 2])
    for tokens, count in [(2, 1), (4, 1), (5, 2), (3, 2), (17, 5)]:
        assert pages.reserve(tokens)
        assert len(set(pages.pages)) == count
    assert not pages.reserve(21)
    assert len(pages.pages) == 5
    pages.release()
    assert pool.usage() == PageUsage(used=0, shared=0, cached=0, free=5)


def test_all_or_none() -> None:
    pool = PagePool(3, LEN)
    first, second = RowPages(pool, [1]), RowPages(pool, [1])
    assert first.reserve(8)
    assert not second.reserve(8)
    assert pool.available == 1
    assert second.pages == []


def test_full_pages_of_a_common_prefix_are_shared() -> None:
    pool = PagePool(10, LEN)
    first = row(pool, list(range(11)))
    same = RowPages(pool, list(range(11)))
    assert same.pages == first.pages[:2]
    assert same.shared_tokens == 8
    other = RowPages(pool, [0, 1, 2, 3, 9, 9, 9, 9, 9])
    assert other.pages == first.pages[:1]
    assert pool.usage() == PageUsage(used=3, shared=2, cached=0, free=7)


def test_the_last_token_is_never_shared() -> None:
    pool = PagePool(10, LEN)
    row(pool, list(range(8)))
    assert RowPages(pool, list(range(8))).shared_tokens == 4
    assert RowPages(pool, list(range(4))).shared_tokens == 0


def test_equal_tokens_after_another_prefix_are_not_the_same_page() -> None:
    pool = PagePool(10, LEN)
    row(pool, [1, 1, 1, 1, 5, 5, 5, 5])
    row(pool, [2, 2, 2, 2])
    assert RowPages(pool, [2, 2, 2, 2, 5, 5, 5, 5, 0]).shared_tokens == 4
    assert RowPages(pool, [5, 5, 5, 5, 0]).shared_tokens == 0


def test_pages_not_yet_written_are_not_shared() -> None:
    pool = PagePool(10, LEN)
    tokens = list(range(12))
    first = RowPages(pool, tokens)
    first.reserve(12)
    assert RowPages(pool, tokens).pages == []
    first.written(tokens, 7)
    assert RowPages(pool, tokens).pages == first.pages[:1]


def test_released_pages_are_found_until_they_are_needed() -> None:
    pool = PagePool(4, LEN)
    tokens = list(range(9))
    row(pool, tokens).release()
    assert pool.usage() == PageUsage(used=0, shared=0, cached=2, free=2)
    again = RowPages(pool, tokens)
    assert again.shared_tokens == 8
    again.release()
    other = RowPages(pool, [50])
    assert other.reserve(3 * LEN)  # one of the cached pages: the end of the prefix goes first
    assert RowPages(pool, tokens).shared_tokens == 4


def test_twins_that_were_computed_at_the_same_time() -> None:
    pool = PagePool(8, LEN)
    tokens = list(range(8))
    first, second = RowPages(pool, tokens), RowPages(pool, tokens)
    for pages in (first, second):
        pages.reserve(8)
    for pages in (first, second):
        pages.written(tokens, 8)
    second.release()
    assert pool.usage() == PageUsage(used=2, shared=0, cached=0, free=6)
    assert RowPages(pool, [*tokens, 1]).pages == first.pages


def test_forget_cached() -> None:
    pool = PagePool(4, LEN)
    row(pool, list(range(8))).release()
    pool.forget_cached()
    assert pool.usage().free == 4
    assert RowPages(pool, list(range(9))).shared_tokens == 0


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_whatever_happens_a_page_holds_what_its_users_think(data: st.DataObject) -> None:
    pool = PagePool(6, 2)
    content: dict[int, tuple[int, ...]] = {}  # page: all tokens up to its end
    rows: list[tuple[RowPages, list[int]]] = []
    for _ in range(data.draw(st.integers(5, 25))):
        if rows and data.draw(st.booleans()):
            rows.pop(data.draw(st.integers(0, len(rows) - 1)))[0].release()
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
            pages = RowPages(pool, tokens)
            shared = len(pages.pages)
            if not pages.reserve(len(tokens)):
                pages.release()
                continue
            for i, page in enumerate(pages.pages[shared:], start=shared):
                assert all(page not in other.pages for other, _ in rows)
                content[page] = tuple(tokens[: 2 * i + 2])
            count = data.draw(st.integers(pages.shared_tokens, len(tokens)))
            pages.written(tokens, count)
            rows.append((pages, tokens[:count]))
        for pages, tokens in rows:
            for i in range(len(tokens) // 2):
                assert content[pages.pages[i]] == tuple(tokens[: 2 * i + 2])
        usage, used = pool.usage(), {p for pages, _ in rows for p in pages.pages}
        assert usage.used == len(used)
        assert usage.used + usage.cached + usage.free == 6
    for pages, _ in rows:
        pages.release()
    assert pool.available == 6


def test_usage_in_words() -> None:
    assert str(PageUsage(3, 1, 2, 5)) == "3 of 10 pages used (1 shared), 2 cached"


@pytest.mark.parametrize("page_len", [1, 16])
def test_page_lengths(page_len: int) -> None:
    pool = PagePool(100, page_len)
    tokens = list(range(33))
    row(pool, tokens)
    assert RowPages(pool, tokens).shared_tokens == 32
