"""A KV cache of pages that rows take from a common pool, share, and give back.

The page table is the only record of who uses what: a page is free when no entry names it. So there
is no list that could disagree with it. Everything has static shapes and runs inside jit.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

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

    Rows may share pages (`fork`), but never the one a row writes next: a page that is not full
    belongs to one row.
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
            ValueError: for a scale that does not fit.
            TypeError: for a dtype a cache cannot have.
        """
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
        pages = self._paged.key.shape[0]
        # One entry more than there are pages takes what is NO_PAGE: no index is out of bounds.
        named = jnp.where(self.page_table >= 0, self.page_table, pages).ravel()
        return jnp.ones(pages + 1, bool).at[named].set(False)[:pages]

    def append(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        counts: Int[Array, " B"] | None = None,
    ) -> Self:
        """As `KVCache.append`, taking as many free pages as the new tokens need.

        When the pool has no page left, the tokens that would be in it are dropped and the row is
        `overflowed`; later calls may find pages for later tokens.
        """
        counts = self._check_append(key, value, counts)
        page = jnp.arange(self.page_table.shape[1], dtype=jnp.int32)
        needed = -(-(self.lengths + counts) // self._paged.page_len)
        # Only entries that the new tokens touch: what an exhausted pool dropped stays dropped.
        touched = page >= (self.lengths // self._paged.page_len)[:, None]
        wanted = touched & (page < needed[:, None]) & (self.page_table < 0)
        return self._take_pages(wanted)._write(key, value, counts)

    def reset(self, rows: Bool[Array, " B"] | None = None) -> Self:
        """Forgets the tokens of the given rows, by default of all, and gives back their pages.

        A page that other rows share stays theirs.
        """
        emptied = super().reset(rows)
        kept = jnp.zeros_like(self.lengths, bool) if rows is None else ~rows
        return emptied._with_table(jnp.where(kept[:, None], self.page_table, NO_PAGE))

    def truncate(self, lengths: Int[Array, " B"]) -> Self:
        """As `KVCache.truncate`; gives back the pages behind the new end.

        A row that then ends within a page it shares gets a copy of that page.
        """
        shorter = super().truncate(lengths)
        page = jnp.arange(self.page_table.shape[1], dtype=jnp.int32)
        kept = page < (-(-shorter.lengths // self._paged.page_len))[:, None]
        shorter = shorter._with_table(jnp.where(kept, self.page_table, NO_PAGE))
        return shorter._own_last_pages(jnp.ones_like(self.lengths, bool))

    def fork(self, source: Int[Array, " n"], target: Int[Array, " n"]) -> Self:
        """Makes rows `target` continue what rows `source` hold, sharing all their full pages.

        What the targets held is forgotten first. A last page that is not full is copied.

        Args:
            source: rows to continue.
            target: as many other rows, each named once.
        """
        batch = self.lengths.shape[0]
        parent = jnp.arange(batch, dtype=jnp.int32).at[target].set(source.astype(jnp.int32))
        is_target = jnp.zeros(batch, bool).at[target].set(True)
        forked = replace(self, lengths=self.lengths[parent], starts=self.starts[parent])
        return forked._with_table(self.page_table[parent])._own_last_pages(is_target)

    def overflowed(self) -> Bool[Array, " B"]:
        """Rows that were given more tokens than they, or the pool, could hold."""
        page = jnp.arange(self.page_table.shape[1], dtype=jnp.int32)
        used = page < (-(-self.lengths // self._paged.page_len))[:, None]
        missing = jnp.any(used & (self.page_table < 0), axis=1)
        return missing | (self.lengths > self.capacity)

    @property
    def _paged(self) -> Paged:
        assert isinstance(self.kv, Paged)
        return self.kv

    def _with_table(self, table: Array) -> Self:
        return replace(self, kv=replace(self._paged, page_indices=table))

    def _take_pages(self, wanted: Bool[Array, "B pages_per_sequence"]) -> Self:
        """Puts free pages into the wanted entries, the k-th free one into the k-th entry."""
        free = self.free_pages()
        pages = free.shape[0]
        order = jnp.where(free, jnp.cumsum(free, dtype=jnp.int32) - 1, pages)
        number = jnp.arange(pages, dtype=jnp.int32)
        free_list = jnp.full(pages + 1, NO_PAGE, jnp.int32).at[order].set(number)[:pages]
        rank = jnp.cumsum(wanted.ravel(), dtype=jnp.int32).reshape(wanted.shape) - 1
        available = jnp.sum(free, dtype=jnp.int32)
        got = wanted & (rank < available)
        taken = jnp.take(free_list, jnp.clip(rank, 0, pages - 1), mode="clip")
        return self._with_table(jnp.where(got, taken, self.page_table))

    def _own_last_pages(self, rows: Bool[Array, " B"]) -> Self:
        """Gives those of `rows` that share their last, not full page a copy of it."""
        length, page_len = self.lengths, self._paged.page_len
        entry = jnp.clip(length // page_len, 0, self.page_table.shape[1] - 1)
        old = jnp.take_along_axis(self.page_table, entry[:, None], axis=1, mode="clip")[:, 0]
        others = ~jnp.eye(length.shape[0], dtype=bool)
        named = jnp.any(self.page_table[None] == old[:, None, None], axis=2)  # by row b'
        shared = rows & (length % page_len > 0) & (old >= 0) & jnp.any(named & others, axis=1)
        is_last = jnp.arange(self.page_table.shape[1], dtype=jnp.int32) == entry[:, None]
        wanted = shared[:, None] & is_last
        owner = self._with_table(jnp.where(wanted, NO_PAGE, self.page_table))._take_pages(wanted)
        new = jnp.take_along_axis(owner.page_table, entry[:, None], axis=1, mode="clip")[:, 0]
        copy = partial(_copy_pages, old=old, new=new, where=shared & (new >= 0))
        kv = replace(owner._paged, key=copy(self._paged.key), value=copy(self._paged.value))
        return replace(owner, kv=kv)


def _copy_pages(pool: Array, *, old: Array, new: Array, where: Array) -> Array:
    """Copies page `old[b]` to page `new[b]` where asked, in place."""

    def copy(b: Array, pool: Array) -> Array:
        zero = jnp.zeros((), jnp.int32)
        source, target = jnp.maximum(old[b], 0), jnp.where(where[b], new[b], jnp.maximum(old[b], 0))
        page: Any = lax.dynamic_slice(pool, (source, zero, zero, zero), (1, *pool.shape[1:]))
        return lax.dynamic_update_slice(pool, page, (target, zero, zero, zero))

    return lax.fori_loop(0, old.shape[0], copy, pool)
