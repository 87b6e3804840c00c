"""Slices and updates of arrays whose axes have letters: "BKSH" is `[B, K, S, H]`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array
from jax_tkg.cache import storage


def in_order(array: Array, axes: str, order: str) -> Array:
    """`array` with its axes transposed to another order."""
    return array if axes == order else jnp.transpose(array, [axes.index(a) for a in order])


def slice_axes(array: Array, axes: str, where: Mapping[str, tuple[Any, int]]) -> Array:
    """A slice: `where` gives the start (traced or not) and size along some of the axes."""
    return lax.dynamic_slice(array, *_starts_and_sizes(array, axes, where))


def slice_in_loop(array: Array, axes: str, where: Mapping[str, tuple[Any, int]]) -> Array:
    """As `slice_axes`, for XLA:CPU and a loop over an array that the loop does not change.

    XLA:CPU does not compute in bfloat16 and 8-bit floats: it would convert the whole captured array
    to float32 ahead of the loop. So these come as the bits they are, and the barrier keeps XLA from
    moving the bitcast out of the loop, where it is a copy.
    """
    starts, sizes = _starts_and_sizes(array, axes, where)
    if storage.cpu_needs_bits(array.dtype):
        array, *starts = lax.optimization_barrier((array, *starts))
        array = lax.bitcast_convert_type(array, storage.stored_dtype(array.dtype, as_bits=True))
    return lax.dynamic_slice(array, starts, sizes)


def _starts_and_sizes(
    array: Array, axes: str, where: Mapping[str, tuple[Any, int]]
) -> tuple[list[Array], list[int]]:
    pairs = [where.get(a, (0, n)) for a, n in zip(axes, array.shape, strict=True)]
    return [jnp.asarray(start, jnp.int32) for start, _ in pairs], [size for _, size in pairs]


def write_rows(array: Array, axes: str, new: Array, slots: Array, keep: Array) -> Array:
    """Writes `new [B, T, K, H]` into `array`, one block of at most T slots per row.

    Token t of row b goes to slot `slots[b] + t` where `keep[b, t]`, and nowhere if that is outside.
    The old block is read and merged into the written one, so the write depends on the read and XLA
    keeps the update in place.
    """
    num_tokens, num_slots = new.shape[1], array.shape[axes.index("S")]
    size = min(num_tokens, num_slots)

    def write_row(b: Array, array: Array) -> Array:
        base = jnp.clip(slots[b], 0, num_slots - size)
        token = jnp.arange(size, dtype=jnp.int32) + base - slots[b]
        inside = (token >= 0) & (token < num_tokens)
        token = jnp.clip(token, 0, num_tokens - 1)
        row = lax.dynamic_index_in_dim(new, b, 0)
        block = in_order(jnp.take(row, token, axis=1, mode="clip"), "BSKH", axes)
        inside &= jnp.take(keep[b], token, mode="clip")
        starts = [jnp.asarray({"B": b, "S": base}.get(a, 0), jnp.int32) for a in axes]
        old = lax.dynamic_slice(array, starts, block.shape)
        shape = [size if a == "S" else 1 for a in axes]
        return lax.dynamic_update_slice(array, jnp.where(inside.reshape(shape), block, old), starts)

    return lax.fori_loop(0, new.shape[0], write_row, array)


def scatter_rows(array: Array, axes: str, new: Array, slots: Array, keep: Array) -> Array:
    """As `write_rows`, for an array that the compiler may split between devices.

    A loop over rows updates one device's part of the array after the other, for which the compiler
    gathers it; of a scatter each device does what falls on its part, and skips the rest: those
    indices reach beyond its part.
    """
    num_slots = array.shape[axes.index("S")]
    order = ["B", "T", *(a for a in axes if a not in "BS")]
    updates = jnp.transpose(new, ["BTKH".index(a) for a in order])
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, len(order))),
        inserted_window_dims=(axes.index("S"),),
        scatter_dims_to_operand_dims=(axes.index("S"),),
        operand_batching_dims=(axes.index("B"),),
        scatter_indices_batching_dims=(0,),
    )
    at, inside = slots_of_tokens(slots, keep, num_slots)
    # What is dropped goes behind the end, each token to an index of its own.
    at = jnp.where(inside, at, num_slots + jnp.arange(keep.shape[1], dtype=jnp.int32))
    return lax.scatter(array, at[..., None], updates, dims, mode="drop", unique_indices=True)


def select_rows(array: Array, axes: str, new: Array, slots: Array, keep: Array) -> Array:
    """As `scatter_rows` with no index beyond the array, which is read and written as a whole."""
    num_slots, num_tokens = array.shape[axes.index("S")], keep.shape[1]
    token = jnp.arange(num_slots, dtype=jnp.int32) - slots[:, None]
    inside = (token >= 0) & (token < num_tokens)
    token = jnp.clip(token, 0, num_tokens - 1)
    inside &= jnp.take_along_axis(keep, token, axis=1, mode="clip")
    taken = jnp.take_along_axis(new, token[..., None, None], axis=1, mode="clip")
    inside = in_order(inside[..., None, None], "BSKH", axes)
    return jnp.where(inside, in_order(taken, "BSKH", axes), array)


def slots_of_tokens(slots: Array, keep: Array, num_slots: int) -> tuple[Array, Array]:
    """Slot of each token of each row `[B, T]`, and whether it is to be written there."""
    at = slots[:, None] + jnp.arange(keep.shape[1], dtype=jnp.int32)
    return at, keep & (at >= 0) & (at < num_slots)
