"""A KV cache of pages that rows take from a common pool, share, and give back.

The page table is the only record of who uses what: a page is free when no entry names it, so there
is no free list and no count that could disagree with it. Everything has static shapes, and nothing
that Neuron cannot run: no sort, no branch, scatters that only overwrite.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy.typing as npt
from jax import lax

from jax_tkg._typing import Array, Bool, Int, Num
from jax_tkg.cache.kv_cache import KVCache, cache_dtypes
from jax_tkg.cache.paged import NO_PAGE, Paged
from jax_tkg.cache.storage import Scale, head_scale


@partial(jax.tree_util.register_dataclass, data_fields=["kv", "lengths", "starts"], meta_fields=[])
@dataclass(frozen=True)
class PagedKVCache(KVCache):
    """A cache whose rows take pages from a pool as they grow; slot s holds position s.

    Entry e of a row's page table names the page of its slots e * L to (e + 1) * L - 1. Rows may
    share pages (`fork`), but never the one that a row writes next: a page that is not full belongs
    to one row.
    """

    @classmethod
    def create(  # type: ignore[override]  # pages instead of a capacity
        cls,
        batch: int,
        num_pages: int,
        page_len: int,
        pages_per_sequence: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        dtype: npt.DTypeLike = jnp.float32,
        k_scale: Scale = None,
        v_scale: Scale = None,
        as_bits: bool | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            batch: rows B.
            num_pages: pages P in the pool, for all rows together.
            page_len: slots L in a page.
            pages_per_sequence: the most pages one row may have; its capacity is this times L.
            num_kv_heads: K.
            head_dim: H.
            value_head_dim: Hv, by default H.
            dtype: as for `KVCache.create`, like what follows.
            k_scale: for 8-bit types.
            v_scale: likewise.
            as_bits: whether narrow floats are kept as raw bits.

        Raises:
            ValueError: for a scale that does not fit, or a number of pages or slots below 1.
            TypeError: for a dtype a cache cannot have.
        """
        if min(num_pages, page_len, pages_per_sequence) < 1:
            raise ValueError(
                "num_pages, page_len and pages_per_sequence must be at least 1; got "
                f"{num_pages}, {page_len} and {pages_per_sequence}."
            )
        logical, stored = cache_dtypes(dtype, as_bits)
        value_width = head_dim if value_head_dim is None else value_head_dim
        kv = Paged(
            key=jnp.zeros((num_pages, num_kv_heads, page_len, head_dim), stored),
            value=jnp.zeros((num_pages, num_kv_heads, page_len, value_width), stored),
            k_scale=head_scale(k_scale, logical, num_kv_heads, "k_scale"),
            v_scale=head_scale(v_scale, logical, num_kv_heads, "v_scale"),
            dtype=logical,
            page_indices=jnp.full((batch, pages_per_sequence), NO_PAGE, jnp.int32),
        )
        return cls(kv, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    @property
    def page_table(self) -> Int[Array, "B pages_per_sequence"]:
        """The page of each L slots of each row, -1 for none."""
        return self._paged.page_indices

    def free_pages(self) -> Bool[Array, " P"]:
        """Which pages of the pool no row uses."""
        pages = self._num_pages
        # One entry more than there are pages takes what is NO_PAGE: no index is out of bounds.
        named = jnp.where(self.page_table >= 0, self.page_table, pages).ravel()
        return jnp.ones(pages + 1, bool).at[named].set(False)[:pages]

    def num_free_pages(self) -> Int[Array, ""]:
        """How many pages of the pool no row uses."""
        return jnp.sum(self.free_pages(), dtype=jnp.int32)

    def append(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        counts: Int[Array, " B"] | None = None,
    ) -> Self:
        """As `KVCache.append`, taking as many free pages as the new tokens need.

        When the pool has no page left, the tokens that would be in it are dropped and the row is
        `overflowed`, also if it finds pages for later tokens. Earlier rows are served first.
        """
        counts = self._check_append(key, value, counts)
        return self._with_pages_for(counts, key.shape[1])._write(key, value, counts)

    def reset(self, rows: Bool[Array, " B"] | None = None) -> Self:
        """Forgets the tokens of the given rows, by default of all, and gives back their pages.

        A page that other rows share stays theirs.
        """
        kept = jnp.zeros_like(self.lengths, bool) if rows is None else ~rows
        table = jnp.where(kept[:, None], self.page_table, NO_PAGE)
        return super().reset(rows)._with_table(table)

    def truncate(self, lengths: Int[Array, " B"]) -> Self:
        """As `KVCache.truncate`; gives back the pages behind the new end.

        A row that then ends within a page that others share gets a copy of it; if there is no free
        page for that, the tokens in it are lost and the row is `overflowed`.
        """
        shorter = super().truncate(lengths)
        table = jnp.where(shorter._used_entries(), self.page_table, NO_PAGE)
        return shorter._with_table(table)._with_own_last_pages()

    def fork(self, source: Int[Array, "..."] | int, target: Int[Array, "..."] | int) -> Self:
        """Makes rows `target` continue what rows `source` hold, sharing all their full pages.

        What the targets held is forgotten. A last page that is not full is copied, unless its other
        users are forgotten with this call; if there is no free page for the copy, the target is
        `overflowed`. Sources are read before any target changes: in a beam search, with `parent`
        the row each beam continues, `fork(parent, jnp.arange(batch))` moves all of them.

        Args:
            source: the rows to continue, `[n]`, or one.
            target: as many rows, each named once.

        Raises:
            ValueError: for a row number, given as an int, that is not one.
        """
        batch = self.lengths.shape[0]
        source, target = _rows(source, batch, "source"), _rows(target, batch, "target")
        parent = jnp.arange(batch, dtype=jnp.int32).at[target].set(source)
        lengths, starts, table = (
            jnp.take(x, parent, axis=0, mode="clip")
            for x in (self.lengths, self.starts, self.page_table)
        )
        forked = replace(self, lengths=lengths, starts=starts)
        return forked._with_table(table)._with_own_last_pages()

    def overflowed(self) -> Bool[Array, " B"]:
        """Rows that were given more tokens than they, or the pool, could hold."""
        missing = self._used_entries() & (self.page_table < 0)
        return jnp.any(missing, axis=1) | (self.lengths > self.capacity)

    @property
    def _paged(self) -> Paged:
        assert isinstance(self.kv, Paged)
        return self.kv

    @property
    def _num_pages(self) -> int:
        return int(self._paged.key.shape[0])

    def _with_table(self, table: Array) -> Self:
        return replace(self, kv=replace(self._paged, page_indices=table))

    def _used_entries(self) -> Bool[Array, "B pages_per_sequence"]:
        """Entries of the page table whose slots begin before the row's length."""
        entry = jnp.arange(self.page_table.shape[1], dtype=jnp.int32)
        return entry * self._paged.page_len < self.lengths[:, None]

    def _with_pages_for(self, counts: Array, num_tokens: int) -> Self:
        """Puts free pages into the entries that begin within the next `counts` tokens.

        Never into an earlier one: if the pool was exhausted then, its first tokens are lost.
        """
        page_len, table = self._paged.page_len, self.page_table
        batch, width = table.shape
        first, end = (-(-n // page_len) for n in (self.lengths, self.lengths + counts))
        entry = first[:, None] + jnp.arange(-(-num_tokens // page_len), dtype=jnp.int32)
        wanted = (entry < end[:, None]) & (entry < width)
        pages = self._take_free(wanted)
        row = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], entry.shape)
        # A column more takes what is not wanted.
        wider = jnp.concatenate([table, table[:, :1]], axis=1)
        return self._with_table(
            wider.at[row, jnp.where(wanted, entry, width)].set(pages)[:, :width]
        )

    def _take_free(self, wanted: Bool[Array, "B n"]) -> Int[Array, "B n"]:
        """The k-th free page for the k-th true element of `wanted`; -1 elsewhere, or for want."""
        pages, free = self._num_pages, self.free_pages()
        rank = jnp.cumsum(free, dtype=jnp.int32) - 1
        # Entry `pages` always says that there is none, and the one after it takes the used pages.
        free_list = jnp.full(pages + 2, NO_PAGE, jnp.int32)
        free_list = free_list.at[jnp.where(free, rank, pages + 1)].set(
            jnp.arange(pages, dtype=jnp.int32)
        )
        request = jnp.cumsum(wanted.ravel(), dtype=jnp.int32).reshape(wanted.shape) - 1
        found = jnp.take(free_list, jnp.clip(request, 0, pages), mode="clip")
        return jnp.where(wanted, found, NO_PAGE)

    def _with_own_last_pages(self) -> Self:
        """Copies what other rows share of the pages that rows write next."""
        batch = self.lengths.shape[0]
        # One row after another: the last user of a page keeps it.
        return lax.fori_loop(0, batch, lambda b, cache: cache._with_own_last_page(b), self)

    def _with_own_last_page(self, row: Array) -> Self:
        kv, length, pages = self._paged, self.lengths[row], self._num_pages
        entry = length // kv.page_len
        at = (row, jnp.clip(entry, 0, kv.page_indices.shape[1] - 1))
        old = kv.page_indices[at]
        is_partial = (length % kv.page_len > 0) & (length < self.capacity) & (old >= 0)
        is_shared = is_partial & (jnp.sum(kv.page_indices == old, dtype=jnp.int32) > 1)
        number = jnp.arange(pages, dtype=jnp.int32)
        free = jnp.min(jnp.where(self.free_pages(), number, pages))
        copied = is_shared & (free < pages)
        new = jnp.where(is_shared, jnp.where(copied, free, NO_PAGE), old)
        source = jnp.maximum(old, 0)
        target = jnp.where(copied, free, source)  # a row that needs no copy copies onto itself
        return replace(
            self,
            kv=replace(
                kv,
                key=_copy_page(kv.key, source, target),
                value=_copy_page(kv.value, source, target),
                page_indices=lax.dynamic_update_slice(kv.page_indices, new[None, None], at),
            ),
        )


def _copy_page(pool: Array, source: Array, target: Array) -> Array:
    page = lax.dynamic_index_in_dim(pool, source, 0)
    return lax.dynamic_update_index_in_dim(pool, page, target, 0)


def _rows(rows: Array | int, batch: int, name: str) -> Array:
    if isinstance(rows, int) and not 0 <= rows < batch:
        raise ValueError(f"{name} must be a row of this cache, 0 to {batch - 1}; got {rows}.")
    return jnp.atleast_1d(jnp.asarray(rows, jnp.int32))
