"""How keys and values lie in memory: one type per layout, all read through the same methods.

The maths never asks which layout it has. It asks for the keys and values of some slots, either of
one KV head (`row_tile`, then `row_products`) or of all of them (`block`). Slots count 0..S-1 along
a sequence; which token position a slot holds is the cache's affair, not the layout's.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg import _pytrees
from jax_tkg._typing import Array, Bool, Float, Int, Leaf, Num
from jax_tkg.cache import storage
from jax_tkg.cache.axes import (
    in_order,
    scatter_rows,
    select_rows,
    slice_axes,
    slice_in_loop,
    write_rows,
)

_FLOAT32 = np.dtype(np.float32)
_META_FIELDS = frozenset({"dtype"})


def register_layout(cls: type) -> type:
    """Makes a layout dataclass a pytree whose `dtype` is static."""
    names = [f.name for f in fields(cls)]
    return _pytrees.register(
        cls,
        data_fields=[n for n in names if n not in _META_FIELDS],
        meta_fields=[n for n in names if n in _META_FIELDS],
    )


@dataclass(frozen=True)
class KVLayout(abc.ABC):
    """Keys and values of a batch in some layout.

    Attributes:
        key: stored keys; the axes are the layout's.
        value: stored values; the head size `Hv` may differ from the keys'.
        k_scale: float32 `[1 or B, K]` or None; a key is `stored * k_scale`.
        v_scale: likewise for values.
        dtype: the logical dtype (see `jax_tkg.cache.storage`), by default that of the keys.
    """

    key: Leaf
    value: Leaf
    k_scale: Leaf | None = None
    v_scale: Leaf | None = None
    dtype: np.dtype = None  # type: ignore[assignment]  # until it has been made

    def __post_init__(self) -> None:
        """Takes the dtype as NumPy has it."""
        dtype = self.key.dtype if self.dtype is None else self.dtype
        object.__setattr__(self, "dtype", np.dtype(dtype))

    name: ClassVar[str]
    heads_contiguous: ClassVar[bool]
    keys_transposed: ClassVar[bool] = False
    has_holes: ClassVar[bool] = False

    @property
    def traits(self) -> "LayoutTraits":
        """What a plan needs to know of the layout."""
        return LayoutTraits(
            name=self.name,
            dtype=self.dtype,
            stored_dtype=np.dtype(self.key.dtype),
            heads_contiguous=self.heads_contiguous or self.shape.num_kv_heads == 1,
            keys_transposed=self.keys_transposed,
            slot_multiple=self.slot_multiple,
            has_holes=self.has_holes,
        )

    @abc.abstractmethod
    def check(self) -> None:
        """Raises ValueError or TypeError where the arrays do not fit together."""

    @property
    @abc.abstractmethod
    def shape(self) -> "KVShape":
        """B, S, K, H and Hv."""

    @property
    def slot_multiple(self) -> int:
        """Tiles start at, and have a length of, a multiple of this many slots."""
        return 1

    @abc.abstractmethod
    def row_tile(
        self, batch: Array, head: Array, start: Array, size: int
    ) -> tuple[Float[Array, "_ _"], Float[Array, "size Hv"]]:
        """Keys and values of one KV head, `size` slots from `start`, float32, without scale.

        The keys are as they lie in memory, `[size, H]` or `[H, size]`, to be given to
        `row_products`.
        """

    def row_products(
        self, key: Float[Array, "_ _"], query: Float[Array, "M H"]
    ) -> Float[Array, "size M"]:
        """Dot products of the keys of `row_tile` with queries, float32.

        The key tile is the left operand: XLA:CPU streams it three times as fast as the right one.
        """
        return lax.dot_general(key, query, (((1,), (1,)), ((), ())))

    @abc.abstractmethod
    def block(
        self, start: Array | int, size: int, dtype: np.dtype
    ) -> tuple[Float[Array, "B K size H"], Float[Array, "B K size Hv"]]:
        """Keys and values of all KV heads, `size` slots from `start`, as `dtype`, without scale."""

    @abc.abstractmethod
    def letters(self) -> Self:
        """The layout with the letters of its axes in the place of each array, as "BSKH".

        "P" stands for the pages of a pool, "1" for an axis that is not one of the call's.
        """

    def _scale_letters(self) -> dict[str, Any]:
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return {
            name: None if x is None else "1K" if x.shape[0] == 1 else "BK"
            for name, x in scales.items()
        }

    def usable(self) -> Bool[Array, "B S"] | None:
        """Which slots have memory behind them; None if all do."""
        return None

    @abc.abstractmethod
    def write(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
    ) -> Self:
        """Writes token t of row b at slot `slots[b] + t` where `keep[b, t]`.

        Tokens whose slot lies outside `[0, S)` are dropped, and no other slot changes. `slots` may
        be negative: a part of a sequence drops the tokens of the other parts.
        """

    def write_split(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
        *,
        in_bounds: bool,
    ) -> Self:
        """As `write`, where the compiler may split the cache between devices.

        With `in_bounds` no index reaches beyond an array, as some platforms need.
        """
        del in_bounds
        return self.write(key, value, slots, keep)

    @abc.abstractmethod
    def fold_batch(self, axes: "KVLayout", size: int) -> Self:
        """Joins a mapped axis (vmap) with B; `axes` holds, per leaf, the mapped axis or None."""

    def encode(self, key: Array, value: Array) -> tuple[Array, Array]:
        """New keys and values `[B, T, K, H]` as stored numbers: divided by the scale, rounded."""
        return (
            self._encode_one(key, self.key.dtype, self.k_scale),
            self._encode_one(value, self.value.dtype, self.v_scale),
        )

    def _encode_one(self, new: Array, stored: np.dtype, scale: Array | None) -> Array:
        if scale is not None:
            new = new.astype(jnp.float32) / scale[:, None, :, None]
        return storage.encode(new, self.dtype, stored)

    def dense(self, dtype: np.dtype) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
        """The whole cache as values, scales applied: for the oracle and the backward pass."""
        key, value = self.block(0, self.shape.kv_len, dtype)
        if self.k_scale is not None:
            key = key * self.k_scale[:, :, None, None].astype(dtype)
        if self.v_scale is not None:
            value = value * self.v_scale[:, :, None, None].astype(dtype)
        return key, value


@dataclass(frozen=True)
class LayoutTraits:
    """The static facts of a layout.

    Attributes:
        name: as in errors and reports.
        dtype: the logical dtype.
        stored_dtype: the dtype of the arrays.
        heads_contiguous: the slots of a KV head follow each other in memory, so that all heads can
            be contracted in one dot without a copy.
        keys_transposed: the slots of a key's component follow each other in memory.
        slot_multiple: tiles start at, and have a length of, a multiple of this many slots.
        has_holes: some slots may have no memory behind them.
    """

    name: str
    dtype: np.dtype
    stored_dtype: np.dtype
    heads_contiguous: bool
    keys_transposed: bool
    slot_multiple: int
    has_holes: bool


@dataclass(frozen=True)
class KVShape:
    """Sizes every layout has."""

    batch: int
    kv_len: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int


@dataclass(frozen=True)
class DenseLayout(KVLayout):
    """A contiguous cache: one array for keys, one for values, axes in a fixed order."""

    key_axes: ClassVar[str]
    value_axes: ClassVar[str]

    @property
    def shape(self) -> KVShape:
        """B, S, K, H and Hv, read from the arrays."""
        key = dict(zip(self.key_axes, self.key.shape, strict=True))
        value = dict(zip(self.value_axes, self.value.shape, strict=True))
        return KVShape(key["B"], key["S"], key["K"], key["H"], value["H"])

    def letters(self) -> Self:
        """See `KVLayout.letters`."""
        letters: dict[str, Any] = {"key": self.key_axes, "value": self.value_axes}
        return replace(self, **letters, **self._scale_letters())

    def check(self) -> None:
        """See `KVLayout.check`."""
        given = (
            f"key {tuple(self.key.shape)} [{', '.join(self.key_axes)}] and "
            f"value {tuple(self.value.shape)} [{', '.join(self.value_axes)}]"
        )
        if self.key.ndim != 4 or self.value.ndim != 4:
            raise ValueError(f"key and value must have four dimensions; got {given}.")
        key = dict(zip(self.key_axes, self.key.shape, strict=True))
        value = dict(zip(self.value_axes, self.value.shape, strict=True))
        for axis in "BSK":
            if key[axis] != value[axis]:
                raise ValueError(
                    f"key and value must agree on B, S and K (only the head size may differ); "
                    f"{axis} is {key[axis]} and {value[axis]}: got {given}."
                )
        if self.key.dtype != self.value.dtype:
            raise TypeError(
                f"key and value must have one dtype; got {self.key.dtype} and {self.value.dtype}."
            )

    def row_tile(
        self, batch: Array, head: Array, start: Array, size: int
    ) -> tuple[Float[Array, "_ _"], Float[Array, "size Hv"]]:
        """See `KVLayout.row_tile`."""
        where = {"B": (batch, 1), "K": (head, 1), "S": (start, size)}
        tiles = []
        for array, axes in self._arrays():
            tile = slice_in_loop(array, axes, where)
            tile = tile.reshape([n for a, n in zip(axes, tile.shape, strict=True) if a in "SH"])
            tiles.append(storage.decode(tile, self.dtype, _FLOAT32))
        return tiles[0], tiles[1]

    def block(
        self, start: Array | int, size: int, dtype: np.dtype
    ) -> tuple[Float[Array, "B K size H"], Float[Array, "B K size Hv"]]:
        """See `KVLayout.block`."""
        blocks = []
        for array, axes in self._arrays():
            if not (isinstance(start, int) and start == 0 and size == self.shape.kv_len):
                array = slice_axes(array, axes, {"S": (start, size)})
            blocks.append(in_order(storage.decode(array, self.dtype, dtype), axes, "BKSH"))
        return blocks[0], blocks[1]

    def write(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
    ) -> Self:
        """See `KVLayout.write`: one in-place update of at most T slots per row."""
        return self._write(write_rows, key, value, slots, keep)

    def write_split(
        self,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
        *,
        in_bounds: bool,
    ) -> Self:
        """See `KVLayout.write_split`: one scatter, or a selection among all slots."""
        write = select_rows if in_bounds else scatter_rows
        return self._write(write, key, value, slots, keep)

    def _write(self, write: Any, key: Array, value: Array, slots: Array, keep: Array) -> Self:
        new_key, new_value = self.encode(key, value)
        return replace(
            self,
            key=write(self.key, self.key_axes, new_key, slots, keep),
            value=write(self.value, self.value_axes, new_value, slots, keep),
        )

    def fold_batch(self, axes: "KVLayout", size: int) -> Self:
        """See `KVLayout.fold_batch`."""
        return replace(
            self,
            key=fold_axis(self.key, axes.key, self.key_axes.index("B"), size),
            value=fold_axis(self.value, axes.value, self.value_axes.index("B"), size),
            k_scale=fold_scale(self.k_scale, axes.k_scale, size, self.shape_batch(axes)),
            v_scale=fold_scale(self.v_scale, axes.v_scale, size, self.shape_batch(axes)),
        )

    def shape_batch(self, axes: "KVLayout") -> int:
        """B before folding, when `key` may still carry a mapped axis."""
        shape = list(self.key.shape)
        if axes.key is not None:
            del shape[int(axes.key)]
        return int(shape[self.key_axes.index("B")])

    def _arrays(self) -> tuple[tuple[Array, str], tuple[Array, str]]:
        return (self.key, self.key_axes), (self.value, self.value_axes)


@register_layout
@dataclass(frozen=True)
class BSKH(DenseLayout):
    """Contiguous `[B, S, K, H]`: what jax.nn and Flax use."""

    name: ClassVar[str] = "BSKH"
    key_axes: ClassVar[str] = "BSKH"
    value_axes: ClassVar[str] = "BSKH"
    heads_contiguous: ClassVar[bool] = False


@register_layout
@dataclass(frozen=True)
class BKSH(DenseLayout):
    """Head-major `[B, K, S, H]`: a KV head is one run of memory; the fastest on CPU if wide."""

    name: ClassVar[str] = "BKSH"
    key_axes: ClassVar[str] = "BKSH"
    value_axes: ClassVar[str] = "BKSH"
    heads_contiguous: ClassVar[bool] = True


@register_layout
@dataclass(frozen=True)
class BKHS(DenseLayout):
    """Keys transposed `[B, K, H, S]`, values `[B, K, S, H]`: keys ready for the tensor engine.

    On CPU the fastest for narrow heads.
    """

    name: ClassVar[str] = "BKHS"
    key_axes: ClassVar[str] = "BKHS"
    value_axes: ClassVar[str] = "BKSH"
    heads_contiguous: ClassVar[bool] = True
    keys_transposed: ClassVar[bool] = True

    def row_products(
        self, key: Float[Array, "H size"], query: Float[Array, "M H"]
    ) -> Float[Array, "size M"]:
        """See `KVLayout.row_products`.

        The barrier keeps XLA:CPU from swapping the operands back, and with them transposing the
        tile: measured 5 times as fast.
        """
        products = lax.dot_general(query, key, (((1,), (0,)), ((), ())))
        return lax.optimization_barrier(products).T


def fold_axis(array: Array, axis: Any, batch_axis: int, size: int) -> Array:
    """Moves a mapped axis next to B and joins them; broadcasts where there is none."""
    moved = (
        jnp.moveaxis(array, axis, batch_axis)
        if axis is not None
        else jnp.broadcast_to(
            jnp.expand_dims(array, batch_axis),
            (*array.shape[:batch_axis], size, *array.shape[batch_axis:]),
        )
    )
    shape = moved.shape
    return moved.reshape(
        *shape[:batch_axis], shape[batch_axis] * shape[batch_axis + 1], *shape[batch_axis + 2 :]
    )


def fold_scale(scale: Array | None, axis: Any, size: int, batch: int) -> Array | None:
    """Folds a `[1 or B, K]` operand: it stays `[1, K]` when nothing in it is per row."""
    if scale is None or (axis is None and scale.shape[0] == 1):
        return scale
    moved = jnp.moveaxis(scale, axis, 0) if axis is not None else scale[None]
    full = jnp.broadcast_to(moved, (size, batch, *moved.shape[2:]))
    return full.reshape(size * batch, *moved.shape[2:])


DENSE_LAYOUTS: Mapping[str, type[DenseLayout]] = {c.name: c for c in (BSKH, BKSH, BKHS)}
