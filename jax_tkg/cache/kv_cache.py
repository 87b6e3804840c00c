"""KV caches as pytrees: a layout, and how many tokens each row holds.

A cache is immutable; `append` returns the next one. Under `jax.jit` with the cache donated, or as
the carry of a scan, the update happens in place. Append first, then attend: reading the old arrays
before the write would force a copy.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jax_tkg._typing import Array, Bool, Int, Leaf, Num
from jax_tkg.cache.layouts import BKSH, DENSE_LAYOUTS, DenseLayout, KVLayout
from jax_tkg.cache.storage import CACHE_DTYPES, Scale, cpu_needs_bits, head_scale, stored_dtype
from jax_tkg.masks import NO_POSITION


@partial(jax.tree_util.register_dataclass, data_fields=["kv", "lengths", "starts"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """A contiguous cache in which slot s of a row holds its token at position s.

    Attributes:
        kv: keys and values in their layout.
        lengths: int32 `[B]`, tokens appended to each row.
        starts: int32 `[B]`, first live position of each row (left padding is before it).
    """

    kv: KVLayout
    lengths: Leaf
    starts: Leaf

    @classmethod
    def create(
        cls,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        dtype: npt.DTypeLike = jnp.float32,
        layout: str | type[DenseLayout] = BKSH,
        k_scale: Scale = None,
        v_scale: Scale = None,
        as_bits: bool | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            batch: rows B.
            capacity: slots S of each row.
            num_kv_heads: K.
            head_dim: H.
            value_head_dim: Hv, by default H.
            dtype: float32, bfloat16, float16, int8, float8_e4m3fn, float8_e4m3 or float8_e5m2.
            layout: "BKSH" (the fastest on CPU), "BSKH" or "BKHS", or the class.
            k_scale: for 8-bit types, float32 `[]` or `[K]`: a key is `stored * k_scale`.
            v_scale: likewise for values.
            as_bits: keep bfloat16, float16 and 8-bit floats as raw bits; by default on CPU, where
                it decides the speed, and for float16 nowhere.

        Raises:
            ValueError: for an unknown layout, or a scale that does not fit.
            TypeError: for a dtype a cache cannot have.
        """
        layout_cls = dense_layout(layout)
        logical, stored = cache_dtypes(dtype, as_bits)
        sizes = {"B": batch, "S": capacity, "K": num_kv_heads, "H": head_dim}
        value_sizes = sizes | {"H": head_dim if value_head_dim is None else value_head_dim}
        kv = layout_cls(
            key=jnp.zeros([sizes[a] for a in layout_cls.key_axes], stored),
            value=jnp.zeros([value_sizes[a] for a in layout_cls.value_axes], stored),
            k_scale=head_scale(k_scale, logical, num_kv_heads, "k_scale"),
            v_scale=head_scale(v_scale, logical, num_kv_heads, "v_scale"),
            dtype=logical,
        )
        return cls(kv, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Slots S of each row."""
        return self.kv.shape.kv_len

    def key_positions(self) -> Int[Array, "B S"] | None:
        """The position of the token in each slot, -1 for none; None if slots are positions."""
        return None

    def append(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        counts: Int[Array, " B"] | None = None,
    ) -> Self:
        """Adds tokens after those each row holds.

        Args:
            key: new keys `[B, T, K, H]`, any float dtype; rounded to the cache's.
            value: new values `[B, T, K, Hv]`.
            counts: int `[B]`, how many of the T tokens of each row are real (the first ones); by
                default all. The rest are not written.

        Tokens past the capacity are dropped; `overflowed` tells which rows lost some.

        Raises:
            ValueError: if the shapes do not fit the cache, or T is larger than its capacity.
        """
        counts = self._check_append(key, value, counts)
        return self._write(key, value, counts)

    def prefill(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        lengths: Int[Array, " B"] | None = None,
        starts: Int[Array, " B"] | None = None,
    ) -> Self:
        """Forgets what the rows held and appends a padded prompt.

        Args:
            key: keys `[B, T, K, H]`.
            value: values `[B, T, K, Hv]`.
            lengths: int32 `[B]`, tokens of each row up to its last real one (right padding
                follows).
            starts: int32 `[B]`, left padding before each row's first real token.
        """
        empty = replace(
            self.reset(),
            starts=jnp.zeros_like(self.starts) if starts is None else starts.astype(jnp.int32),
        )
        return empty.append(key, value, lengths)

    def reset(self, rows: Bool[Array, " B"] | None = None) -> Self:
        """Forgets the tokens of the given rows, by default of all."""
        kept = jnp.zeros_like(self.lengths, bool) if rows is None else ~rows
        zero = jnp.zeros((), jnp.int32)
        return replace(
            self,
            lengths=jnp.where(kept, self.lengths, zero),
            starts=jnp.where(kept, self.starts, zero),
        )

    def truncate(self, lengths: Int[Array, " B"]) -> Self:
        """Forgets the tokens from position `lengths` on: rejected speculative tokens."""
        return replace(self, lengths=jnp.clip(lengths.astype(jnp.int32), 0, self.lengths))

    def overflowed(self) -> Bool[Array, " B"]:
        """Rows that were given more tokens than they can hold."""
        return self.lengths > self.capacity

    def _write(self, key: Array, value: Array, counts: Array) -> Self:
        if key.shape[1] > self.capacity:
            raise ValueError(
                f"cannot append {key.shape[1]} tokens to a cache of {self.capacity} slots a row: "
                "give it more, or use a RingKVCache to keep the last ones."
            )
        keep = jnp.arange(key.shape[1], dtype=jnp.int32) < counts[:, None]
        kv = self.kv.write(key, value, self.lengths, keep)
        return replace(self, kv=kv, lengths=self.lengths + counts)

    def _check_append(self, key: Array, value: Array, counts: Array | None) -> Array:
        shape = self.kv.shape
        for name, new, width in (
            ("key", key, shape.head_dim),
            ("value", value, shape.value_head_dim),
        ):
            fits = new.ndim == 4 and new.shape[1] == key.shape[1]
            if not fits or (new.shape[0], *new.shape[2:]) != (
                shape.batch,
                shape.num_kv_heads,
                width,
            ):
                raise ValueError(
                    f"{name} must be [B, T, K, H] = ({shape.batch}, T, {shape.num_kv_heads}, "
                    f"{width}) for this cache; got {tuple(new.shape)}."
                )
        if counts is None:
            return jnp.full((shape.batch,), key.shape[1], jnp.int32)
        if counts.shape != (shape.batch,) or not jnp.issubdtype(counts.dtype, jnp.integer):
            raise ValueError(
                f"counts must be integers of shape ({shape.batch},), the real tokens of each row; "
                f"got {counts.dtype} {tuple(counts.shape)}."
            )
        return jnp.clip(counts.astype(jnp.int32), 0, key.shape[1])


@partial(jax.tree_util.register_dataclass, data_fields=["kv", "lengths", "starts"], meta_fields=[])
@dataclass(frozen=True)
class RingKVCache(KVCache):
    """A cache of the last S tokens: the token at position p is in slot p mod S.

    For sliding windows. A window of w keys needs a capacity of w + T - 1 when T tokens are appended
    before they attend, so that the earliest of them still sees its whole window.
    """

    def key_positions(self) -> Int[Array, "B S"]:
        """The position of the token in each slot, -1 for a slot not yet written."""
        last = self.lengths[:, None] - 1
        slots = jnp.arange(self.capacity, dtype=jnp.int32)
        positions = last - jnp.remainder(last - slots, self.capacity)
        return jnp.where(positions >= 0, positions, NO_POSITION)

    def append(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        counts: Int[Array, " B"] | None = None,
    ) -> Self:
        """Adds tokens, overwriting the oldest; T may exceed the capacity. See `KVCache.append`."""
        counts = self._check_append(key, value, counts)
        cache, size = self, self.capacity
        for begin in range(0, key.shape[1], size):
            part = slice(begin, begin + size)
            left = jnp.clip(counts - begin, 0, size)
            cache = cache._append_wrapped(key[:, part], value[:, part], left)
        return cache

    def _append_wrapped(self, key: Array, value: Array, counts: Array) -> Self:
        keep = jnp.arange(key.shape[1], dtype=jnp.int32) < counts[:, None]
        slots = jnp.remainder(self.lengths, self.capacity)
        kv = self.kv.write(key, value, slots, keep)
        if key.shape[1] > 1:  # what runs over the end goes to the front
            kv = kv.write(key, value, slots - self.capacity, keep)
        return replace(self, kv=kv, lengths=self.lengths + counts)

    def truncate(self, lengths: Int[Array, " B"]) -> Self:
        """Forgets the tokens from position `lengths` on, as `KVCache.truncate`.

        The slots they took held older tokens, which do not come back: `starts` moves past those.
        """
        starts = jnp.maximum(self.starts, self.lengths - self.capacity)
        return replace(super().truncate(lengths), starts=starts)

    def overflowed(self) -> Bool[Array, " B"]:
        """Never: a ring forgets its oldest tokens by design."""
        return jnp.zeros_like(self.lengths, bool)


def dense_layout(layout: str | type[DenseLayout]) -> type[DenseLayout]:
    """The layout class of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(layout, str):
        if layout not in DENSE_LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; there are {', '.join(DENSE_LAYOUTS)}.")
        return DENSE_LAYOUTS[layout]
    return layout


def cache_dtypes(dtype: npt.DTypeLike, as_bits: bool | None) -> tuple[np.dtype, np.dtype]:
    """The logical and the stored dtype of a new cache.

    Raises:
        TypeError: for a dtype a cache cannot have.
    """
    logical = np.dtype(dtype)
    if logical not in CACHE_DTYPES:
        names = ", ".join(d.name for d in CACHE_DTYPES)
        raise TypeError(f"a cache can hold {names}; not {logical.name}.")
    if as_bits is None:
        as_bits = jax.default_backend() == "cpu" and cpu_needs_bits(logical)
    return logical, stored_dtype(logical, as_bits=as_bits)
