"""GpSimd's gathers and searches; each of its eight cores sees 16 neighbouring partitions of SBUF.

Here are `local_gather`, `nc_n_gather`, `sequence_bounds`, `nonzero_with_count`, `topk`.
"""

from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.errors import OutOfBoundsError
from jax_tkg.nki.interpreter.isa.operands import GPSIMD_START, gpsimd_cycles
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import SBUF, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

CORE_PARTITIONS = 16
ELEMENTS_PER_INDEX = (1, 2, 4, 8, 16, 32)
MAX_INDICES = 4096  # of one core
TOPK_MAX_INPUTS = 65536
TOPK_MAX_RESULTS = 32768
INT32_LIMITS = np.iinfo(np.int32)


def _tiles(step: Step, **given: Any) -> list[NkiTensor]:
    """Operands in SBUF, the only memory that GpSimd reaches."""
    return [step.tile(role, tile, regions=(SBUF,)) for role, tile in given.items()]


def _same_type(step: Step, dst: NkiTensor, src: NkiTensor) -> None:
    if dst.dtype != src.dtype:
        step.refuse(
            "dtype", f"dst {dst!r}: must have the type of {src!r}, a gather converts nothing."
        )


def _check_cores(step: Step, tile: NkiTensor) -> None:
    if tile.shape[0] % CORE_PARTITIONS:
        step.refuse(
            "partitions", f"{tile!r}: must have a multiple of {CORE_PARTITIONS} partitions."
        )


def _check_indices(step: Step, indices: np.ndarray, limit: int, source: NkiTensor) -> None:
    outside = np.argwhere(indices >= limit)
    if len(outside):
        p, i = (int(n) for n in outside[0])
        raise OutOfBoundsError(
            f"{step.op}.index",
            f"{step.op}: index {int(indices[p, i])} (number {i} of partition {p}) is outside of "
            f"{source!r}; it must be 0 to {limit - 1}.",
            step.record.source,
        )


@instruction
def nc_n_gather(step: Step, dst: NkiTensor, data: NkiTensor, indices: NkiTensor) -> None:
    """dst[p, i] = data[p, indices[p, i]], the free axes of data as one."""
    dst, data, indices = _tiles(step, dst=dst, data=data, indices=indices)
    _same_type(step, dst, data)
    step.same_layout(dst=dst, indices=indices)
    if data.shape[0] != dst.shape[0]:
        step.refuse("shape", f"data {data!r}: must have the {dst.shape[0]} partitions of dst.")
    if indices.dtype != "uint32":
        step.refuse("indices", f"indices {indices!r}: must be uint32.")
    found = step.bits(indices).astype(np.int64)
    _check_indices(step, found, data.free_size, data)
    step.put(dst, np.take_along_axis(step.bits(data), found, axis=1))
    step.runs_on(Engine.gpsimd, gpsimd_cycles(dst.free_size), dst.free_size)


@instruction
def local_gather(
    step: Step,
    dst: NkiTensor,
    src_buffer: NkiTensor,
    index: NkiTensor,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
) -> None:
    """In each core of 16 partitions: runs of elements at the indices that the core holds.

    A core reads its indices column by column; each starts `num_elem_per_idx` elements, in every
    one of its partitions.
    """
    dst, source, index = _tiles(step, dst=dst, src_buffer=src_buffer, index=index)
    _same_type(step, dst, source)
    _check_cores(step, source)
    if index.shape[0] != source.shape[0] or dst.shape[0] != source.shape[0]:
        step.refuse("shape", f"{dst!r}, {source!r} and {index!r}: must have as many partitions.")
    if index.dtype != "uint16":
        step.refuse("indices", f"index {index!r}: must be uint16.")
    if num_elem_per_idx not in ELEMENTS_PER_INDEX:
        step.refuse(
            "elements", f"num_elem_per_idx {num_elem_per_idx}: must be one of {ELEMENTS_PER_INDEX}."
        )
    held = CORE_PARTITIONS * index.free_size
    valid = held if num_valid_indices is None else num_valid_indices
    if not 1 <= valid <= min(held, MAX_INDICES):
        step.refuse(
            "valid-indices", f"{valid} indices a core: must be 1 to {min(held, MAX_INDICES)}."
        )
    if dst.free_size != valid * num_elem_per_idx:
        step.refuse(
            "shape", f"dst {dst!r}: must have {valid * num_elem_per_idx} elements a partition."
        )
    cores = source.shape[0] // CORE_PARTITIONS
    indices = step.bits(index).astype(np.int64).reshape(cores, CORE_PARTITIONS, -1)
    starts = indices.transpose(0, 2, 1).reshape(cores, -1)[:, :valid]
    _check_indices(step, starts, source.free_size - num_elem_per_idx + 1, source)
    elements = (starts[..., None] + np.arange(num_elem_per_idx)).reshape(cores, -1)
    values = step.bits(source)
    step.put(dst, np.take_along_axis(values, elements.repeat(CORE_PARTITIONS, axis=0), axis=1))
    step.runs_on(Engine.gpsimd, _local_gather_cycles(dst, num_elem_per_idx), dst.free_size)


def _local_gather_cycles(dst: NkiTensor, run: int) -> float:
    """As printed in [C]."""
    divisor = (28 + 4 * run) / (4 * run) / min(4 / dst.dtype.itemsize, run)
    return GPSIMD_START + dst.free_size / divisor


@instruction
def sequence_bounds(step: Step, dst: NkiTensor, segment_ids: NkiTensor) -> None:
    """For each element where its run of equal ids begins and where it ends (exclusive).

    Id 0 is padding: it begins at the length of the whole and ends at -1.
    """
    dst, ids = _tiles(step, dst=dst, segment_ids=segment_ids)
    n = ids.free_size
    if ids.shape[0] != 1 or dst.shape != (1, 2, n):
        step.refuse("shape", f"dst {dst!r} for segment_ids {ids!r}: must be (1, 2, n) for (1, n).")
    for role, tile in (("dst", dst), ("segment_ids", ids)):
        if tile.dtype not in ("float32", "int32"):
            step.refuse("dtype", f"{role} {tile!r}: must be float32 or int32.")
    values = step.bits(ids)[0]
    if (values < 0).any() or (values != np.trunc(values)).any():
        step.refuse(
            "segment-ids", f"segment_ids {ids!r}: must hold integers that are not negative."
        )
    starts = np.concatenate([[0], 1 + np.flatnonzero(values[1:] != values[:-1])])
    lengths = np.diff(starts, append=n)
    bounds = np.stack([starts.repeat(lengths), (starts + lengths).repeat(lengths)])
    bounds[:, values == 0] = [[n], [-1]]
    step.put(dst, bounds)
    step.runs_on(Engine.gpsimd, gpsimd_cycles(2 * n), 2 * n)


@instruction
def nonzero_with_count(
    step: Step, dst: NkiTensor, src: NkiTensor, index_offset: Any = 0, padding_val: Any = -1
) -> None:
    """Where a partition is not 0: indices, padding, and as last element how many.

    Works on the first of each 16 partitions; dst keeps the others.
    """
    dst, src = _tiles(step, dst=dst, src=src)
    if step.core.target.generation < 3:
        step.refuse("target", "needs trn2 or newer.")
    if src.dtype not in ("float32", "int32"):
        step.refuse("dtype", f"src {src!r}: must be float32 or int32.")
    if dst.dtype != "int32":
        step.refuse("dtype", f"dst {dst!r}: must be int32.")
    size = src.free_size
    if (dst.shape[0], dst.free_size) != (src.shape[0], size + 1):
        step.refuse("shape", f"dst {dst!r}: must be {src.shape[0]} partitions of {size + 1}.")
    for role, value in (("index_offset", index_offset), ("padding_val", padding_val)):
        if not isinstance(value, int) or not INT32_LIMITS.min <= value <= INT32_LIMITS.max:
            step.refuse("value", f"{role} is {value!r}: must be an int32.")
    for p in range(0, src.shape[0], CORE_PARTITIONS):
        found = np.flatnonzero(step.bits(src.slice(0, p, p + 1))[0]) + index_offset
        row = np.full(size + 1, padding_val, np.int64)
        row[: len(found)], row[-1] = found, len(found)
        step.put(dst.slice(0, p, p + 1), row)
    step.runs_on(Engine.gpsimd, gpsimd_cycles(size), size)


@instruction
def topk(step: Step, val_dst: NkiTensor, idx_dst: NkiTensor, src: NkiTensor, n: int) -> None:
    """The largest of the `n` values of 16 partitions, ascending, with their indices.

    Value i lies in partition i % 16, column i // 16; each of the 16 partitions gets the result. Of
    equal values the one of the lower index comes first, here; the documentation does not say.
    """
    val_dst, idx_dst, src = _tiles(step, val_dst=val_dst, idx_dst=idx_dst, src=src)
    _check_cores(step, src)
    k = val_dst.free_size
    for role, tile, dtype in (
        ("val_dst", val_dst, "bfloat16"),
        ("idx_dst", idx_dst, "uint32"),
        ("src", src, "bfloat16"),
    ):
        if tile.dtype != dtype:
            step.refuse("dtype", f"{role} {tile!r}: must be {dtype}.")
        if tile.ndim != 2 or tile.shape[0] != src.shape[0]:
            step.refuse("shape", f"{role} {tile!r}: needs two axes and the partitions of src.")
    step.same_layout(val_dst=val_dst, idx_dst=idx_dst)
    if not 8 <= n < TOPK_MAX_INPUTS or not k <= min(n, TOPK_MAX_RESULTS - 1):
        step.refuse("size", f"the largest {k} of {n}: needs 8 <= n < 65536, k <= n, k < 32768.")
    if src.free_size * CORE_PARTITIONS < n:
        step.refuse("src-size", f"src {src!r}: 16 partitions must hold {n} values.")
    best, places = [], []
    for p in range(0, src.shape[0], CORE_PARTITIONS):
        values = _snake(step, src.slice(0, p, p + CORE_PARTITIONS), n)
        order = np.argsort(values.astype(np.float32), kind="stable")[n - k :]
        best += [values[order]] * CORE_PARTITIONS
        places += [order] * CORE_PARTITIONS
    step.put(val_dst, np.stack(best))
    step.put(idx_dst, np.stack(places))
    step.runs_on(Engine.gpsimd, 4 * n + k, n)


def _snake(step: Step, part: NkiTensor, n: int) -> np.ndarray:
    """The first n values of 16 partitions, column by column; the rest need not be written."""
    columns, rest = divmod(n, CORE_PARTITIONS)
    pieces = [step.bits(part.slice(1, 0, columns)).T.ravel()] if columns else []
    if rest:
        last = part.slice(1, columns, columns + 1).slice(0, 0, rest)
        pieces.append(step.bits(last).ravel())
    return np.concatenate(pieces)
