"""KV caches as pytrees: a layout, and how many tokens each row holds.

A cache is immutable; `append` returns the next one. Under `jax.jit` with the cache donated, or as
the carry of a scan, the update happens in place. Append first, then attend: reading the old arrays
before the write would force a copy.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jax_tkg import _pytrees
from jax_tkg._typing import Array, Bool, Int, Leaf, Num
from jax_tkg.cache import sharded
from jax_tkg.cache.checks import boolean_per_row, check_new_tokens, check_sizes, integer_per_row
from jax_tkg.cache.layouts import BKHS, BKSH, DENSE_LAYOUTS, DenseLayout, KVLayout
from jax_tkg.cache.storage import CACHE_DTYPES, Scale, cpu_needs_bits, head_scale, stored_dtype
from jax_tkg.cache.writing import Writer, WriterLike, choose_writer, write, writers
from jax_tkg.choice import Choice
from jax_tkg.masks import NO_POSITION
from jax_tkg.sharding.spec import AttentionSharding

register_cache = partial(
    _pytrees.register,
    data_fields=["kv", "lengths", "starts"],
    meta_fields=["sharding"],
)
"""Makes a cache dataclass a pytree whose sharding is static."""

CPU_TRANSPOSED_WIDTH, CPU_TRANSPOSED_BFLOAT16 = 64, 96
"""Widest heads whose keys are better kept transposed on CPU, in general and in bfloat16. Measured,
keys and values of a decode step: float32 1.05 to 1.4 times as fast where all are live, 1.02 to 1.15
where fewer are, but of heads of 80 and 96 0.89 to 1.05; bfloat16 1.0 to 1.06, of heads of 80 and 96
0.98 to 1.13, but of 128 0.91 to 0.98."""


@register_cache
@dataclass(frozen=True)
class KVCache:
    """A contiguous cache in which slot s of a row holds its token at position s.

    Attributes:
        kv: keys and values in their layout.
        lengths: int32 `[B]`, tokens appended to each row.
        starts: int32 `[B]`, first live position of each row (left padding is before it).
        sharding: how the cache lies on a mesh; None for one on a single device, and for arrays on
            an explicit mesh, whose types tell it. Whatever is done to the cache, each device does
            it to its own shard and needs nothing of the others'.
    """

    kv: KVLayout
    lengths: Leaf
    starts: Leaf
    sharding: AttentionSharding | None = None

    splittable: ClassVar[str] = "BKS"
    """Letters of the axes that a mesh can split."""

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
        layout: str | type[DenseLayout] | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        as_bits: bool | None = None,
        sharding: AttentionSharding | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            batch: rows B.
            capacity: slots S of each row.
            num_kv_heads: K.
            head_dim: H.
            value_head_dim: Hv, by default H.
            dtype: float32, bfloat16, float16, int8, float8_e4m3fn, float8_e4m3 or float8_e5m2.
            layout: "BKSH", "BSKH" or "BKHS", or the class; by default BKSH, and BKHS on CPU for
                heads of up to 64 (bfloat16: 96) that no mesh splits.
            k_scale: for 8-bit types, float32 `[]` or `[K]`: a key is `stored * k_scale`.
            v_scale: likewise for values.
            as_bits: keep bfloat16, float16 and 8-bit floats as raw bits; by default on CPU, where
                it decides the speed, and for float16 nowhere.
            sharding: mesh axes that split rows, KV heads and slots; every device makes its own
                shard. Where a `jax.shard_map` over these axes is being traced, the sizes are those
                of a shard.

        Raises:
            ValueError: for an unknown layout, a scale that does not fit, a size below 1, or one
                that the mesh does not divide.
            TypeError: for a dtype a cache cannot have.
        """
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_sizes(batch=batch, capacity=capacity, num_kv_heads=num_kv_heads)
        check_sizes(head_dim=head_dim, value_head_dim=value_head_dim)
        logical, stored = cache_dtypes(dtype, as_bits)
        if layout is None:
            layout = fastest_layout(head_dim, logical, sharding)
        layout_cls = dense_layout(layout)
        new = sharded.Maker(sharding, batch=batch, slots=capacity, num_kv_heads=num_kv_heads)
        sizes = {"B": batch, "S": capacity, "K": num_kv_heads, "H": head_dim}
        value_sizes = sizes | {"H": value_head_dim}
        kv = layout_cls(
            key=new.full(layout_cls.key_axes, sizes, 0, stored),
            value=new.full(layout_cls.value_axes, value_sizes, 0, stored),
            k_scale=new.placed("1K", head_scale(k_scale, logical, num_kv_heads, "k_scale")),
            v_scale=new.placed("1K", head_scale(v_scale, logical, num_kv_heads, "v_scale")),
            dtype=logical,
        )
        lengths, starts = (new.full("B", sizes, 0, np.dtype(np.int32)) for _ in range(2))
        return cls(kv, lengths, starts, sharding)

    @property
    def capacity(self) -> int:
        """Slots S of each row, over all devices."""
        return self.kv.shape.kv_len * sharded.parts(self.sharding, "keys")

    def letters(self) -> Self:
        """The cache with the letters of its axes in the place of each array; see `KVLayout`."""
        letters: dict[str, Any] = {"lengths": "B", "starts": "B"}
        return replace(self, kv=self.kv.letters(), **letters)

    def specs(self) -> Self:
        """The cache with a `PartitionSpec` in the place of each array.

        For `in_specs` and `out_specs` of a `jax.shard_map` of your own over the axes that the
        sharding names. Inside, the cache is one device's shard and is used as usual.

        Raises:
            ValueError: if the cache is on no mesh.
        """
        return jax.tree.map(lambda sharding: sharding.spec, self.shardings())

    def shardings(self) -> Self:
        """The cache with a `NamedSharding` in the place of each array.

        For `jax.device_put` of a cache that came from elsewhere, and for `in_shardings`.

        Raises:
            ValueError: if the cache is on no mesh.
        """
        sharding = sharded.sharding_of(self)
        if sharding is None:
            raise ValueError(
                "this cache is on no mesh: make it with create(..., sharding=AttentionSharding("
                "mesh, batch=..., heads=..., keys=...))."
            )
        named = partial(sharding.named, num_kv_heads=self.kv.shape.num_kv_heads)
        return jax.tree.map(named, self.letters())

    def key_positions(self) -> Int[Array, "B S"] | None:
        """The position of the token in each slot, -1 for none; None if slots are positions."""
        return None

    def append(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        counts: Int[Array, " B"] | None = None,
        *,
        implementation: WriterLike = None,
    ) -> Self:
        """Adds tokens after those each row holds.

        Args:
            key: new keys `[B, T, K, H]`, any float dtype; rounded to the cache's.
            value: new values `[B, T, K, Hv]`.
            counts: int `[B]`, how many of the T tokens of each row are real (the first ones); by
                default all. The rest are not written.
            implementation: what writes them: None tries what fits the platform, in order; "xla" is
                an in-place update, "nki" the append kernel, "nki_interpret" the same kernel on the
                CPU; or a `Writer`, or a sequence. `explain_append` says which and why.

        Tokens past the capacity are dropped; `overflowed` tells which rows lost some.

        Raises:
            ValueError: if the shapes do not fit the cache, or T is larger than its capacity; for an
                unknown implementation.
            NotImplementedError: the implementation asked for cannot do it; with its reason.
        """
        counts = self._check_append(key, value, counts)
        new = ((key, "BTKH"), (value, "BTKH"), (counts, "B"))
        return sharded.run(_Append(writers(implementation)), self, *new)

    def explain_append(
        self,
        num_tokens: int = 1,
        *,
        platform: str | None = None,
        implementation: WriterLike = None,
    ) -> Choice[Writer]:
        """Which implementation `append` writes with, and why those before it do not.

        Args:
            num_tokens: T.
            platform: to be compiled for, by default JAX's own.
            implementation: as for `append`.
        """
        return choose_writer(self.kv, num_tokens, implementation, platform)

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
            starts: int32 `[B]`, left padding before each row's first real token; a negative one
                counts as 0.

        Raises:
            ValueError: as for `append`; if lengths or starts are not integers `[B]`.
        """
        empty, batch = self.reset(), self.lengths.shape[0]
        if starts is not None:
            starts = integer_per_row(starts, batch, "starts", "the left padding of each row")
            empty = sharded.run(_with_starts, empty, (starts, "B"))
        if lengths is not None:
            lengths = integer_per_row(lengths, batch, "lengths", "the tokens of each row")
        return empty.append(key, value, lengths)

    def reset(self, rows: Bool[Array, " B"] | None = None) -> Self:
        """Forgets the tokens of the given rows, by default of all.

        Raises:
            ValueError: if `rows` is not of booleans `[B]`.
        """
        (batch,) = self.lengths.shape
        if rows is None:
            rows = jnp.ones(batch, bool)
        rows = boolean_per_row(rows, batch, "rows", "whether to forget each row")
        return sharded.run(type(self)._reset, self, (rows, "B"))

    def truncate(self, lengths: Int[Array, " B"]) -> Self:
        """Forgets the tokens from position `lengths` on: rejected speculative tokens.

        In a ring the slots they took held older tokens, which do not come back: `starts` moves past
        those.

        Raises:
            ValueError: if `lengths` are not integers `[B]`.
        """
        (batch,) = self.lengths.shape
        lengths = integer_per_row(lengths, batch, "lengths", "the tokens that each row keeps")
        return sharded.run(type(self)._truncate, self, (lengths, "B"))

    def overflowed(self) -> Bool[Array, " B"]:
        """Rows that were given more tokens than they can hold."""
        return self.lengths > self.capacity

    # What each device does to its shard: `capacity` and positions are those of the whole.

    def _on_shard(self) -> Self:
        """The cache in the terms of what is seen of it; `_of_whole` undoes it."""
        return self

    def _of_whole(self) -> Self:
        return self

    def _append(self, key: Array, value: Array, counts: Array, tried: tuple[Writer, ...]) -> Self:
        keep = jnp.arange(key.shape[1], dtype=jnp.int32) < counts[:, None]
        kv = write(self.kv, key, value, self.lengths - self._first_slot(), keep, tried)
        return replace(self, kv=kv, lengths=self.lengths + counts)

    def _reset(self, rows: Array) -> Self:
        lengths, starts = (jnp.where(rows, jnp.int32(0), x) for x in (self.lengths, self.starts))
        return replace(self, lengths=lengths, starts=starts)

    def _truncate(self, lengths: Array) -> Self:
        return replace(self, lengths=jnp.clip(lengths, 0, self.lengths))

    def _first_slot(self) -> Array | int:
        """The first slot that this shard holds."""
        return sharded.part(self.sharding, "keys") * self.kv.shape.kv_len

    def _check_tokens(self, num_tokens: int) -> None:
        if num_tokens > self.capacity:
            raise ValueError(
                f"cannot append {num_tokens} tokens to a cache of {self.capacity} slots a row: "
                "give it more, or use a RingKVCache to keep the last ones."
            )

    def _check_append(self, key: Array, value: Array, counts: Array | None) -> Array:
        check_new_tokens(self.kv.shape, key, value)
        self._check_tokens(key.shape[1])
        batch = self.kv.shape.batch
        if counts is None:
            return jnp.full((batch,), key.shape[1], jnp.int32)
        counts = integer_per_row(counts, batch, "counts", "the real tokens of each row")
        return jnp.clip(counts, 0, key.shape[1])


@register_cache
@dataclass(frozen=True)
class RingKVCache(KVCache):
    """A cache of the last S tokens: the token at position p is in slot p mod S.

    For sliding windows. A window of w keys needs a capacity of w + T - 1 when T tokens are appended
    before they attend, so that the earliest of them still sees its whole window. An append of more
    tokens than the capacity keeps the last ones.
    """

    def key_positions(self) -> Int[Array, "B S"]:
        """The position of the token in each slot, -1 for a slot not yet written."""
        last = self.lengths[:, None] - 1
        slots = self._first_slot() + jnp.arange(self.kv.shape.kv_len, dtype=jnp.int32)
        positions = last - jnp.remainder(last - slots, self.capacity)
        return jnp.where(positions >= 0, positions, NO_POSITION)

    def overflowed(self) -> Bool[Array, " B"]:
        """Never: a ring forgets its oldest tokens by design."""
        return jnp.zeros_like(self.lengths, bool)

    def _append(self, key: Array, value: Array, counts: Array, tried: tuple[Writer, ...]) -> Self:
        cache, size = self, self.capacity
        for begin in range(0, key.shape[1], size):
            part = slice(begin, begin + size)
            left = jnp.clip(counts - begin, 0, size)
            cache = cache._append_wrapped(key[:, part], value[:, part], left, tried)
        return cache

    def _append_wrapped(
        self, key: Array, value: Array, counts: Array, tried: tuple[Writer, ...]
    ) -> Self:
        keep = jnp.arange(key.shape[1], dtype=jnp.int32) < counts[:, None]
        slots = jnp.remainder(self.lengths, self.capacity) - self._first_slot()
        kv = write(self.kv, key, value, slots, keep, tried)
        if key.shape[1] > 1:  # what runs over the end goes to the front
            kv = write(kv, key, value, slots - self.capacity, keep, tried)
        return replace(self, kv=kv, lengths=self.lengths + counts)

    def _truncate(self, lengths: Array) -> Self:
        # The slots they took held older tokens, which do not come back.
        starts = jnp.maximum(self.starts, self.lengths - self.capacity)
        return replace(super()._truncate(lengths), starts=starts)

    def _check_tokens(self, num_tokens: int) -> None:
        del num_tokens  # however many


@dataclass(frozen=True)
class _Append:
    """What `append` does to a shard; equal for equal writers, so that it is compiled once."""

    tried: tuple[Writer, ...]

    def __call__(self, cache: KVCache, key: Array, value: Array, counts: Array) -> KVCache:
        return cache._append(key, value, counts, self.tried)


def _with_starts(cache: KVCache, starts: Array) -> KVCache:
    return replace(cache, starts=jnp.maximum(starts, 0))


def fastest_layout(
    head_dim: int, dtype: np.dtype, sharding: AttentionSharding | None
) -> type[DenseLayout]:
    """The layout of a new cache whose user names none; nothing was measured off the CPU.

    On a mesh of CPUs jax 0.7 copies transposed keys to append to them.
    """
    on_cpu = jax.default_backend() == "cpu" and sharding is None
    widest = CPU_TRANSPOSED_BFLOAT16 if dtype == jnp.bfloat16 else CPU_TRANSPOSED_WIDTH
    return BKHS if on_cpu and head_dim <= widest else BKSH


def dense_layout(layout: str | type[DenseLayout]) -> type[DenseLayout]:
    """The layout class of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(layout, str):
        if layout not in DENSE_LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; there are {', '.join(DENSE_LAYOUTS)}.")
        return DENSE_LAYOUTS[layout]
    if not (isinstance(layout, type) and issubclass(layout, DenseLayout)):
        raise ValueError(
            f"layout must be {', '.join(DENSE_LAYOUTS)}, or the class; got {layout!r}."
        )
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
