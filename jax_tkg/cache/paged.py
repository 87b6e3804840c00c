"""The paged layout: a pool of pages that all sequences share, and a table of whose is which."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Bool, Float, Int, Leaf, Num
from jax_tkg.cache import storage
from jax_tkg.cache.axes import slice_in_loop, slots_of_tokens
from jax_tkg.cache.layouts import KVLayout, KVShape, fold_axis, fold_scale, register_layout

NO_PAGE = -1
"""An entry of `page_indices` behind which there is no page; its slots are never seen."""

UNROLLED_PAGES = 4
"""A tile of up to this many pages is read without a loop. Measured on XLA:CPU (S=8192, H=64 and
128, 1 to 8 heads, float32 and bfloat16 bits): a loop of copies takes 0.5 to 0.95 of the time of a
gather, which goes element by element; unrolled it takes 0.75 to 0.95 of the loop for up to 4 pages,
and as much or more from 8 to 16 on."""


@register_layout
@dataclass(frozen=True)
class Paged(KVLayout):
    """Pages `[P, K, L, H]` of L slots; slot s of row b is in page `page_indices[b, s // L]`.

    Pages may lie in any order and may be shared between rows. `page_indices` is int32
    `[B, pages_per_sequence]`, -1 for an unused entry.
    """

    page_indices: Leaf = field(kw_only=True)

    name: ClassVar[str] = "paged"
    heads_contiguous: ClassVar[bool] = False
    has_holes: ClassVar[bool] = True

    @property
    def page_len(self) -> int:
        """Slots in a page."""
        return int(self.key.shape[2])

    @property
    def shape(self) -> KVShape:
        """Sizes; S is the number of slots the page table can name."""
        batch, pages = self.page_indices.shape
        return KVShape(
            batch, pages * self.page_len, self.key.shape[1], self.key.shape[3], self.value.shape[3]
        )

    @property
    def slot_multiple(self) -> int:
        """Tiles are whole pages."""
        return self.page_len

    def row_tile(
        self, batch: Array, head: Array, start: Array, size: int
    ) -> tuple[Float[Array, "size H"], Float[Array, "size Hv"]]:
        """See `KVLayout.row_tile`."""
        count = size // self.page_len
        first = start // self.page_len
        pages = lax.dynamic_slice(self.page_indices, (batch, first), (1, count))[0]
        return (
            self._gather_head(self.key, pages, head),
            self._gather_head(self.value, pages, head),
        )

    def _gather_head(self, pool: Array, pages: Array, head: Array) -> Array:
        """The slots of some pages one after another, `[len(pages) * L, H]`."""
        _, _, page_len, width = pool.shape
        count = pages.shape[0]
        pages = jnp.maximum(pages, 0).astype(jnp.int32)
        head = head.astype(jnp.int32)

        def read(i: Array | int) -> Array:
            return slice_in_loop(pool, "PKLH", {"P": (pages[i], 1), "K": (head, 1)})[0, 0]

        def copy(i: Array, tile: Array) -> Array:
            at = i.astype(jnp.int32) * page_len  # also where JAX counts in 64 bits
            return lax.dynamic_update_slice(tile, read(i), (at, jnp.int32(0)))

        if count <= UNROLLED_PAGES:
            stored = jnp.concatenate([read(i) for i in range(count)])
        else:
            tile = jnp.zeros((count * page_len, width), jax.eval_shape(read, 0).dtype)
            stored = lax.fori_loop(0, count, copy, tile)
        return storage.decode(stored, self.dtype, np.dtype(np.float32))

    def block(
        self, start: Array | int, size: int, dtype: np.dtype
    ) -> tuple[Float[Array, "B K size H"], Float[Array, "B K size Hv"]]:
        """See `KVLayout.block`."""
        first = jnp.asarray(start, jnp.int32) // self.page_len
        count = size // self.page_len
        pages = lax.dynamic_slice_in_dim(self.page_indices, first, count, axis=1)
        return self._gather(self.key, pages, dtype), self._gather(self.value, pages, dtype)

    def _gather(self, pool: Array, pages: Array, dtype: np.dtype) -> Array:
        taken = jnp.take(pool, jnp.maximum(pages, 0), axis=0, mode="clip")  # [B, pages, K, L, H]
        by_head = jnp.moveaxis(taken, 1, 2)
        batch, heads, count, page_len, width = by_head.shape
        return storage.decode(
            by_head.reshape(batch, heads, count * page_len, width), self.dtype, dtype
        )

    def letters(self) -> Self:
        """See `KVLayout.letters`; L slots of a page."""
        letters: dict[str, Any] = {"key": "PKLH", "value": "PKLH", "page_indices": "BS"}
        return replace(self, **letters, **self._scale_letters())

    def usable(self) -> Bool[Array, "B S"]:
        """False for the slots of unused entries of the page table."""
        return jnp.repeat(self.page_indices >= 0, self.page_len, axis=1)

    def check(self) -> None:
        """See `KVLayout.check`."""
        key, value, table = self.key.shape, self.value.shape, self.page_indices
        if len(key) != 4 or len(value) != 4 or key[:3] != value[:3]:
            raise ValueError(
                "key_pages and value_pages must be [P, K, L, H] and agree on P, K and L; "
                f"got {tuple(key)} and {tuple(value)}."
            )
        if table.ndim != 2:
            raise ValueError(
                f"page_indices must be [B, pages_per_sequence], got shape {tuple(table.shape)}."
            )
        if not jnp.issubdtype(table.dtype, jnp.integer):
            raise TypeError(f"page_indices must be integers, got {table.dtype}.")
        if self.key.dtype != self.value.dtype:
            raise TypeError(
                f"key and value must have one dtype; got {self.key.dtype} and {self.value.dtype}."
            )

    def write(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
    ) -> Self:
        """See `KVLayout.write`: one in-place update per token, dropped where there is no page.

        A page that two rows share must not be written; `PagedKVCache` sees to that.
        """
        new_key, new_value = self.encode(key, value)
        batch, num_tokens = keep.shape
        num_slots = self.shape.kv_len
        zero = jnp.zeros((), jnp.int32)

        def write_token(i: Array, pools: tuple[Array, Array]) -> tuple[Array, Array]:
            b, t = i // num_tokens, i % num_tokens
            slot = slots[b] + t
            page = self.page_indices[b, jnp.clip(slot, 0, num_slots - 1) // self.page_len]
            inside = (slot >= 0) & (slot < num_slots) & (page >= 0) & keep[b, t]
            at = (jnp.maximum(page, 0), zero, slot % self.page_len, zero)
            return tuple(  # type: ignore[return-value]
                _write_token(pool, new[b, t], at, inside)
                for pool, new in zip(pools, (new_key, new_value), strict=True)
            )

        pools = lax.fori_loop(0, batch * num_tokens, write_token, (self.key, self.value))
        return replace(self, key=pools[0], value=pools[1])

    def write_split(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
        *,
        in_bounds: bool,
    ) -> Self:
        """See `KVLayout.write_split`: one scatter into the pool."""
        if in_bounds:
            return self.write(key, value, slots, keep)
        at, inside = slots_of_tokens(slots, keep, self.shape.kv_len)
        column = jnp.clip(at, 0, self.shape.kv_len - 1) // self.page_len
        page = jnp.take_along_axis(self.page_indices, column, axis=1, mode="clip")
        # What is dropped goes behind the last page, each token to a page of its own.
        behind = self.key.shape[0] + jnp.arange(keep.size, dtype=jnp.int32).reshape(keep.shape)
        page = jnp.where(inside & (page >= 0), page, behind)
        where = jnp.stack([page, at % self.page_len], axis=-1)
        dims = lax.ScatterDimensionNumbers((2, 3), (0, 2), (0, 2))
        key, value = (
            lax.scatter(pool, where, new, dims, mode="drop", unique_indices=True)
            for pool, new in zip((self.key, self.value), self.encode(key, value), strict=True)
        )
        return replace(self, key=key, value=value)

    def fold_batch(self, axes: KVLayout, size: int) -> Self:
        """See `KVLayout.fold_batch`: mapped pools are laid end to end, a shared pool stays one."""
        assert isinstance(axes, Paged)
        table_shape = list(self.page_indices.shape)
        if axes.page_indices is not None:
            del table_shape[int(axes.page_indices)]
        batch = table_shape[0]
        tables = fold_axis(self.page_indices, axes.page_indices, 0, size)
        key, value = self.key, self.value
        if axes.key is not None or axes.value is not None:
            key = fold_axis(key, axes.key, 0, size)
            value = fold_axis(value, axes.value, 0, size)
            offset = jnp.repeat(jnp.arange(size, dtype=jnp.int32) * (key.shape[0] // size), batch)
            tables = jnp.where(tables >= 0, tables + offset[:, None], NO_PAGE)
        return replace(
            self,
            key=key,
            value=value,
            page_indices=tables,
            k_scale=fold_scale(self.k_scale, axes.k_scale, size, batch),
            v_scale=fold_scale(self.v_scale, axes.v_scale, size, batch),
        )


def _write_token(pool: Array, new: Array, at: tuple[Array, ...], inside: Array) -> Array:
    block = new[None, :, None, :]
    old = lax.dynamic_slice(pool, at, block.shape)
    return lax.dynamic_update_slice(pool, jnp.where(inside, block, old), at)
