"""A KV cache of pages that rows take from a common pool, share, and give back.

The page table is the only record of who uses what: a page is free when no entry names it, so there
is no free list and no count that could disagree with it. Everything has static shapes, and nothing
that Neuron cannot run: no sort, no branch, scatters that only overwrite.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jax_tkg._typing import Array, Bool, Int
from jax_tkg.cache import sharded
from jax_tkg.cache.checks import check_sizes
from jax_tkg.cache.kv_cache import KVCache, cache_dtypes, register_cache
from jax_tkg.cache.paged import NO_PAGE, Paged
from jax_tkg.cache.storage import Scale, head_scale
from jax_tkg.cache.writing import Writer
from jax_tkg.sharding.spec import AttentionSharding


@register_cache
@dataclass(frozen=True)
class PagedKVCache(KVCache):
    """A cache whose rows take pages from a pool as they grow; slot s holds position s.

    Entry e of a row's page table names the page of its slots e * L to (e + 1) * L - 1. Rows may
    share pages (`fork`), but never the one that a row writes next: a page that is not full belongs
    to one row.

    When the pool has no page left, an append drops the tokens that would be in it and the row is
    `overflowed`, also if it finds pages for later tokens. Earlier rows are served first. Pages go
    back to the pool with `reset` and `truncate`; one that other rows share stays theirs. A row
    that `truncate` leaves to end within a shared page gets a copy of it; if there is no free page
    for that, the tokens in it are lost and the row is `overflowed`.

    On a mesh, the axes that split the rows split the pool with them: the pages of a row, and the
    free ones it can take, are those of its shard. Page numbers count the pages of the whole pool.
    """

    splittable: ClassVar[str] = "BPK"

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
        sharding: AttentionSharding | None = None,
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
            sharding: as for `KVCache.create`, without axes for `keys`.

        Raises:
            ValueError: for a scale that does not fit, a number of pages or slots below 1, or what
                the mesh does not divide.
            TypeError: for a dtype a cache cannot have.
        """
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_sizes(batch=batch, num_pages=num_pages, page_len=page_len)
        check_sizes(pages_per_sequence=pages_per_sequence, num_kv_heads=num_kv_heads)
        check_sizes(head_dim=head_dim, value_head_dim=value_head_dim)
        _check_pool(num_pages, sharding)
        logical, stored = cache_dtypes(dtype, as_bits)
        new = sharded.Maker(sharding, batch=batch, num_kv_heads=num_kv_heads)
        sizes = {"B": batch, "S": pages_per_sequence, "P": num_pages, "K": num_kv_heads}
        sizes |= {"L": page_len, "H": head_dim}
        value_sizes = sizes | {"H": value_head_dim}
        kv = Paged(
            key=new.full("PKLH", sizes, 0, stored),
            value=new.full("PKLH", value_sizes, 0, stored),
            k_scale=new.placed("1K", head_scale(k_scale, logical, num_kv_heads, "k_scale")),
            v_scale=new.placed("1K", head_scale(v_scale, logical, num_kv_heads, "v_scale")),
            dtype=logical,
            page_indices=new.full("BS", sizes, NO_PAGE, np.dtype(np.int32)),
        )
        lengths, starts = (new.full("B", sizes, 0, np.dtype(np.int32)) for _ in range(2))
        return cls(kv, lengths, starts, sharding)

    @property
    def page_table(self) -> Int[Array, "B pages_per_sequence"]:
        """The page of each L slots of each row, -1 for none."""
        return self._paged.page_indices

    def free_pages(self) -> Bool[Array, " P"]:
        """Which pages of the pool no row uses."""
        free: Array = sharded.run(type(self)._free_pages, self, result="P")
        return free

    def num_free_pages(self) -> Int[Array, ""]:
        """How many pages of the pool no row uses."""
        return jnp.sum(self.free_pages(), dtype=jnp.int32)

    def fork(self, source: Int[Array, "..."] | int, target: Int[Array, "..."] | int) -> Self:
        """Makes rows `target` continue what rows `source` hold, sharing all their full pages.

        What the targets held is forgotten. A last page that is not full is copied, unless its other
        users are forgotten with this call; if there is no free page for the copy, the target is
        `overflowed`. Sources are read before any target changes: in a beam search, with `parent`
        the row each beam continues, `fork(parent, jnp.arange(batch))` moves all of them.

        On a mesh that splits the rows, a target whose source is in another shard is emptied and
        `overflowed`: pages do not move between devices.

        Args:
            source: the rows to continue, `[n]`, or one.
            target: as many rows, each named once.

        Raises:
            ValueError: for what are not row numbers, as far as their values are known; for another
                number of sources than of targets; for two ints that are rows of different shards.
        """
        batch = self.lengths.shape[0]
        sharded.check_same_shard(self, source, target)
        source, target = _rows(source, batch, "source"), _rows(target, batch, "target")
        if source.shape != target.shape:
            raise ValueError(
                f"fork needs as many sources as targets; got {source.size} and {target.size}."
            )
        row = jnp.arange(batch, dtype=jnp.int32)
        parent = row.at[target].set(source)
        return sharded.run(type(self)._fork, self, (row, "B"), (parent, "B"))

    def overflowed(self) -> Bool[Array, " B"]:
        """Rows that were given more tokens than they, or the pool, could hold."""
        missing = self._used_entries() & (self.page_table < 0)
        return jnp.any(missing, axis=1) | (self.lengths > self.capacity)

    # What each device does to its shard; page numbers are its own.

    def _on_shard(self) -> Self:
        return self._numbered_from(-sharded.part(self.sharding, "batch") * self._num_pages)

    def _of_whole(self) -> Self:
        return self._numbered_from(sharded.part(self.sharding, "batch") * self._num_pages)

    def _numbered_from(self, first: Array | int) -> Self:
        if isinstance(first, int):  # nothing is split
            return self
        table = self.page_table
        return self._with_table(jnp.where(table >= 0, table + first, NO_PAGE))

    def _append(self, key: Array, value: Array, counts: Array, tried: tuple[Writer, ...]) -> Self:
        return super(PagedKVCache, self._with_pages_for(counts, key.shape[1]))._append(
            key, value, counts, tried
        )

    def _reset(self, rows: Array) -> Self:
        table = jnp.where(rows[:, None], NO_PAGE, self.page_table)
        return super()._reset(rows)._with_table(table)

    def _truncate(self, lengths: Array) -> Self:
        shorter = super()._truncate(lengths)
        table = jnp.where(shorter._used_entries(), self.page_table, NO_PAGE)
        return shorter._with_table(table)._with_own_last_pages()

    def _fork(self, row: Array, parent: Array) -> Self:
        """Row `row[b]` of the whole is row b here, and continues row `parent[b]` of the whole."""
        local = parent - row[0]
        is_here = (local >= 0) & (local < row.shape[0])
        lengths, starts, table = (
            jnp.take(x, local, axis=0, mode="clip")
            for x in (self.lengths, self.starts, self.page_table)
        )
        too_long = jnp.int32(self.capacity + 1)
        forked = replace(self, lengths=jnp.where(is_here, lengths, too_long), starts=starts)
        table = jnp.where(is_here[:, None], table, NO_PAGE)
        return forked._with_table(table)._with_own_last_pages()

    def _free_pages(self) -> Bool[Array, " P"]:
        pages = self._num_pages
        # One entry more than there are pages takes what is NO_PAGE: no index is out of bounds.
        named = jnp.where(self.page_table >= 0, self.page_table, pages).ravel()
        return jnp.ones(pages + 1, bool).at[named].set(False)[:pages]

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
        pages, free = self._num_pages, self._free_pages()
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
        at = (jnp.int32(row), jnp.clip(entry, 0, kv.page_indices.shape[1] - 1))
        old = kv.page_indices[at]
        is_partial = (length % kv.page_len > 0) & (length < self.capacity) & (old >= 0)
        is_shared = is_partial & (jnp.sum(kv.page_indices == old, dtype=jnp.int32) > 1)
        number = jnp.arange(pages, dtype=jnp.int32)
        free = jnp.min(jnp.where(self._free_pages(), number, pages))
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


def _check_pool(num_pages: int, sharding: AttentionSharding | None) -> None:
    if sharding is None:
        return
    if sharding.names("keys"):
        raise ValueError(
            f"the slots of a PagedKVCache cannot be split, and this sharding has keys="
            f"{sharding.keys!r}: name those axes as batch or heads, or use a KVCache."
        )
    if num_pages % sharding.size("batch"):
        raise ValueError(
            f"num_pages = {num_pages} does not divide into {sharding.size('batch')} parts, one for "
            f"each part of the rows (batch={sharding.batch!r})."
        )


def _rows(given: Array | int, batch: int, name: str) -> Array:
    rows = given if isinstance(given, jax.Array) else np.asarray(given)
    if not jnp.issubdtype(rows.dtype, jnp.integer) or rows.ndim > 1:
        raise ValueError(f"{name} must be a row number, or a list of them; got {given!r}.")
    known = rows.ravel().tolist() if isinstance(rows, np.ndarray) else []
    if not all(0 <= row < batch for row in known):
        raise ValueError(f"{name} must be a row of this cache, 0 to {batch - 1}; got {given!r}.")
    return jnp.atleast_1d(jnp.asarray(rows, jnp.int32))
