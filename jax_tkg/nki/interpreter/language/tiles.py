"""Whole tiles: creation, loads and stores, transposes, matmul, gathers, random numbers."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter.alu import OPS
from jax_tkg.nki.interpreter.dtypes import FLOAT32, UINT32, as_dtype
from jax_tkg.nki.interpreter.hardware import NUM_PARTITIONS
from jax_tkg.nki.interpreter.language.elementwise import (
    as_tile,
    broadcast_view,
    copy,
    new_tile,
    refuse,
)
from jax_tkg.nki.interpreter.machine import current_core
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.tensor import NkiTensor

SBUF, PSUM = MemoryRegion.sbuf, MemoryRegion.psum
STAGED_ELEMENTS = 4096  # of a partition, on the way from SBUF to a new HBM tensor
# Bits of a random number that the type holds exactly, so that none rounds up to 1.
MANTISSA_BITS = {
    "float32": 24, "tfloat32": 11, "float16": 11, "bfloat16": 8, "float8_e4m3": 4,
    "float8_e4m3fn": 4, "float8_e5m2": 3,
}  # fmt: skip


def full(
    shape: Sequence[int],
    fill_value: Any,
    dtype: Any,
    buffer: MemoryRegion = SBUF,
    name: str = "",
) -> NkiTensor:
    """A new tensor that holds one value everywhere."""
    tensor = current_core().allocate(shape, dtype, buffer, name)
    if tensor.is_on_chip:
        nisa.memset(tensor, fill_value)
        return tensor
    rows = _rows(tensor.size)
    table = tensor.reshape((rows, tensor.size // rows))
    columns = min(table.shape[1], STAGED_ELEMENTS)
    tile = full((rows, columns), fill_value, dtype)
    for start in range(0, table.shape[1], columns):
        count = min(columns, table.shape[1] - start)
        nisa.dma_copy(table[:, start : start + count], tile[:, :count])
    return tensor


def _rows(size: int) -> int:
    """As many partitions as divide a size."""
    return max(n for n in range(1, NUM_PARTITIONS + 1) if size % n == 0)


def zeros(
    shape: Sequence[int], dtype: Any, buffer: MemoryRegion = SBUF, name: str = ""
) -> NkiTensor:
    """A new tensor of zeros."""
    return full(shape, 0, dtype, buffer, name)


def ones(
    shape: Sequence[int], dtype: Any, buffer: MemoryRegion = SBUF, name: str = ""
) -> NkiTensor:
    """A new tensor of ones."""
    return full(shape, 1, dtype, buffer, name)


def zeros_like(
    x: NkiTensor, dtype: Any = None, buffer: MemoryRegion | None = None, name: str = ""
) -> NkiTensor:
    """Zeros of the shape and type of `x`, in SBUF if no buffer is named."""
    return zeros(x.shape, x.dtype if dtype is None else dtype, buffer or SBUF, name)


def empty_like(
    x: NkiTensor, dtype: Any = None, buffer: MemoryRegion | None = None, name: str = ""
) -> NkiTensor:
    """A new tensor of the shape, type and buffer of `x`. It holds nothing until written."""
    kind = x.dtype if dtype is None else dtype
    return current_core().allocate(x.shape, kind, buffer or x.buffer, name)


def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A tile in SBUF with the values of an HBM tensor."""
    _in_hbm("load", "src", src)
    tile = new_tile(src.shape, dtype, src)
    nisa.dma_copy(tile, src)
    return tile


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Writes a tile in SBUF to an HBM tensor."""
    _in_hbm("store", "dst", dst)
    nisa.dma_copy(dst, as_tile("store", value))


def load_transpose2d(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A tile in SBUF with the values of a 2-D HBM tensor, transposed by the DMA."""
    _in_hbm("load_transpose2d", "src", src)
    if src.ndim != 2:
        refuse("load_transpose2d", "rank", f"src {src!r}: must have two axes.")
    tile = new_tile(src.shape[::-1], src.dtype)
    nisa.dma_transpose(tile, src)
    return tile if dtype is None or as_dtype(dtype) == src.dtype else copy(tile, dtype)


def _in_hbm(function: str, role: str, tensor: Any) -> None:
    if not isinstance(tensor, NkiTensor) or tensor.is_on_chip:
        refuse(function, "buffer", f"{role} is {tensor!r}: must be an HBM tensor.")


def expand_dims(x: NkiTensor, axis: int) -> NkiTensor:
    """A view with a new axis of size 1; a negative axis counts from the end of the result."""
    return x.expand_dim(axis + x.ndim + 1 if axis < 0 else axis)


def broadcast_to(x: NkiTensor, shape: Sequence[int], dtype: Any = None) -> NkiTensor:
    """A tile in which the axes of size 1 repeat to a shape of as many axes.

    One partition reaches others by DMA, through HBM.
    """
    x, target = as_tile("broadcast_to", x), tuple(shape)
    kind = x.dtype if dtype is None else as_dtype(dtype)
    if x.shape == target:
        return x if kind == x.dtype else copy(x, kind)
    if x.shape[0] == 1 < target[0]:
        x = _on_partitions(x, target[0])
    return copy(broadcast_view("broadcast_to", x, target), kind)


def _on_partitions(x: NkiTensor, count: int) -> NkiTensor:
    """One partition, copied to many."""
    source = x if x.buffer is SBUF else copy(x)
    passing = current_core().allocate(x.shape, x.dtype, MemoryRegion.private_hbm)
    nisa.dma_copy(passing, source)
    tile = new_tile((count, *x.shape[1:]), x.dtype)
    nisa.dma_copy(tile, passing.broadcast(0, count))
    return tile


def _in_sbuf(x: NkiTensor) -> NkiTensor:
    """What the Tensor engine can read."""
    return x if x.buffer is SBUF else copy(x)


def transpose(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A 2-D tile transposed by the Tensor engine, in PSUM."""
    x = as_tile("transpose", x)
    if x.ndim != 2:
        refuse("transpose", "rank", f"x is {x!r}: must have two axes.")
    result = current_core().allocate(x.shape[::-1], x.dtype, PSUM)
    nisa.nc_transpose(result, _in_sbuf(x))
    if dtype is None or as_dtype(dtype) == x.dtype:
        return result
    converted = current_core().allocate(result.shape, dtype, PSUM)
    nisa.tensor_copy(converted, result)
    return converted


def matmul(x: NkiTensor, y: NkiTensor, transpose_x: bool = False) -> NkiTensor:
    """The product x @ y (x.T @ y if x is given transposed) in float32, in PSUM."""
    x, y = as_tile("matmul", x), as_tile("matmul", y)
    if x.ndim != 2 or y.ndim != 2:
        refuse("matmul", "rank", f"x {x!r} and y {y!r}: must have two axes.")
    stationary = _in_sbuf(x if transpose_x else transpose(x))
    result = current_core().allocate((stationary.shape[1], y.shape[1]), FLOAT32, PSUM)
    nisa.nc_matmul(result, stationary, _in_sbuf(y))
    return result


def gather_flattened(
    data: NkiTensor, indices: NkiTensor, axis: int = 0, dtype: Any = None
) -> NkiTensor:
    """In each partition the elements at `indices` of its free axes read as one."""
    data, indices = as_tile("gather_flattened", data), as_tile("gather_flattened", indices)
    if axis != 0:
        refuse("gather_flattened", "axis", f"axis {axis}: each partition gathers its own, axis=0.")
    if indices.dtype.is_float:
        refuse("gather_flattened", "indices", f"indices {indices!r}: must be integers.")
    if indices.dtype != UINT32:
        indices = copy(indices, UINT32)
    gathered = new_tile(indices.shape, data.dtype)
    nisa.nc_n_gather(gathered, data, indices)
    return gathered if dtype is None or as_dtype(dtype) == data.dtype else copy(gathered, dtype)


def dropout(x: NkiTensor, rate: Any, dtype: Any = None) -> NkiTensor:
    """A copy of x with elements replaced by 0, each with probability `rate`."""
    x = as_tile("dropout", x)
    result = new_tile(x.shape, x.dtype)
    nisa.dropout(result, x, rate)
    return result if dtype is None or as_dtype(dtype) == x.dtype else copy(result, dtype)


def random_seed(seed: NkiTensor) -> None:
    """Makes the numbers that follow depend on a tile of one 32-bit value only."""
    nisa.set_rng_seed(seed)


def rand(
    shape: Sequence[int], dtype: Any, buffer: MemoryRegion = SBUF, name: str = ""
) -> NkiTensor:
    """A new tensor of uniform random numbers, 0 included and 1 not."""
    kind = as_dtype(dtype)
    if kind not in MANTISSA_BITS:
        refuse("rand", "dtype", f"dtype {kind!r}: must be {', '.join(MANTISSA_BITS)}.")
    tensor = current_core().allocate(shape, kind, buffer, name)
    if tensor.is_on_chip:
        _fill_random(tensor)
        return tensor
    rows = _rows(tensor.size)
    table = tensor.reshape((rows, tensor.size // rows))
    for start in range(0, table.shape[1], STAGED_ELEMENTS):
        part = table[:, start : min(start + STAGED_ELEMENTS, table.shape[1])]
        tile = new_tile(part.shape, kind)
        _fill_random(tile)
        nisa.dma_copy(part, tile)
    return tensor


def _fill_random(tile: NkiTensor) -> None:
    """The leading random bits, times the power of two that makes them a fraction."""
    bits = MANTISSA_BITS[tile.dtype]
    drawn, leading = new_tile(tile.shape, UINT32), new_tile(tile.shape, UINT32)
    nisa.rng(drawn)
    nisa.tensor_scalar(leading, drawn, OPS["right_shift"], 32 - bits)
    nisa.tensor_scalar(tile, leading, OPS["multiply"], math.ldexp(1.0, -bits))


def no_reorder() -> contextlib.AbstractContextManager[None]:
    """A region that keeps its order; the interpreter keeps every program's order anyway."""
    return contextlib.nullcontext()
