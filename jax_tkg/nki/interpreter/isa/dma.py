"""DMA: `dma_copy`, `dma_transpose`."""

import enum
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.contents import all_set
from jax_tkg.nki.interpreter.dtypes import INT32, UINT32, convert, to_float32
from jax_tkg.nki.interpreter.errors import OutOfBoundsError, UninitializedReadError
from jax_tkg.nki.interpreter.record import Engine, Transfer
from jax_tkg.nki.interpreter.step import PSUM, SBUF, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor
from jax_tkg.nki.interpreter.window import (
    ChosenRows,
    chosen_rows,
    contiguous_run,
    index_value,
    repeats_elements,
)

DMA_ELEMENT_BYTES = 64 * 1024  # a descriptor moves at most so much


class dge_mode(enum.Enum):  # noqa: N801  (NKI's name)
    """Who makes the descriptors."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(enum.Enum):  # noqa: N801
    """What happens to a run-time index outside its axis."""

    error = 0
    skip = 1


def check_memory(step: Step, **tensors: NkiTensor) -> None:
    """DMA reaches SBUF and HBM."""
    for role, tensor in tensors.items():
        if tensor.buffer is PSUM:
            step.refuse(
                "psum", f"{role} is {tensor!r}: DMA does not reach PSUM; tensor_copy to SBUF."
            )


def _check_modes(
    step: Step, dge: dge_mode, engine: Engine, priority: Any, tensors: tuple[NkiTensor, ...]
) -> None:
    generation = step.core.target.generation
    if dge is dge_mode.hwdge and generation < 3:
        step.refuse("hwdge", "hardware descriptor generation needs trn2 or newer.")
    if engine is not Engine.unknown and (
        dge is not dge_mode.hwdge or engine not in (Engine.sync, Engine.scalar)
    ):
        step.refuse("engine", f"engine {engine.name}: sync or scalar, with dge_mode.hwdge only.")
    if priority is not None and (generation < 4 or priority not in range(4)):
        step.refuse("priority", f"priority {priority}: 0 to 3, on trn3.")
    for tensor in filter(_has_vector_offset, tensors):
        assert tensor.indirect_offset is not None
        if dge not in (dge_mode.unknown, dge_mode.swdge):
            step.refuse(
                "vector-offset-dge",
                f"{tensor!r} has an offset a row: only software DGE (dge_mode.swdge) gathers.",
            )
        index = tensor.indirect_offset.index
        if not isinstance(index, NkiTensor) or index.buffer is not SBUF:
            step.refuse("vector-offset", f"offsets {index!r}: must be a tensor in SBUF.")
        if index.dtype not in (INT32, UINT32):
            step.refuse("vector-offset", f"offsets {index!r}: must be int32 or uint32.")
    for tensor in tensors:
        if tensor.is_indirect() and dge is dge_mode.none:
            step.refuse(
                "dynamic-dge",
                f"{tensor!r} has a run-time offset: needs dge_mode swdge, hwdge or unknown.",
            )


def _has_vector_offset(tensor: NkiTensor) -> bool:
    return tensor.indirect_offset is not None and tensor.indirect_offset.is_vector


def _is_skipped(oob: oob_mode, *tensors: NkiTensor) -> bool:
    """Whether an offset for all is outside its axis, and the kernel wants such copies left out."""
    if oob is not oob_mode.skip:
        return False
    offsets = [t.indirect_offset for t in tensors if not _has_vector_offset(t)]
    return any(o is not None and not 0 <= index_value(o.index) < o.limit for o in offsets)


def _rows(step: Step, tensor: NkiTensor, oob: oob_mode) -> ChosenRows:
    """The rows that the offsets of a view choose; which may be outside only if skipped."""
    chosen = chosen_rows(tensor)
    assert tensor.indirect_offset is not None
    if not chosen.inside.all() and oob is oob_mode.error:
        rows = np.flatnonzero(~chosen.inside).tolist()
        raise OutOfBoundsError(
            f"{step.op}.run-time-index",
            f"{step.op}: the offsets of rows {rows} of {tensor!r} are outside 0 to "
            f"{tensor.indirect_offset.limit - 1}; mend them, or pass "
            "oob_mode=nisa.oob_mode.skip to leave such rows out.",
            step.record.source,
        )
    step.raw(tensor.indirect_offset.index)
    return chosen


def _note_unwritten(step: Step, src: NkiTensor) -> None:
    """As `Step.check_written` for rows chosen at run time."""
    machine = step.core.machine
    if machine.options.refuse_uninitialized or not src.dtype.is_float:
        raise UninitializedReadError(
            f"{step.op}.never-written",
            f"{step.op}: gathers rows of {src!r} that were never written (declared at "
            f"{src.storage.source}). Write them first, or gather others.",
            step.record.source,
        )
    machine.uninitialized.setdefault(step.record.source, repr(src))


def source_values(
    step: Step, src: NkiTensor, oob: oob_mode
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a DMA reads, and which rows are real (None: all)."""
    if not _has_vector_offset(src):
        return step.raw(src), None
    chosen = _rows(step, src, oob)
    inside, written = chosen.inside, src.contents.written
    if written is not None and not chosen.all_flags(written)[chosen.rows[inside]].all():
        _note_unwritten(step, src)
    if inside.any():
        step.note_read(chosen)
    return chosen.all_values()[chosen.rows], None if inside.all() else inside


def store_values(
    step: Step, dst: NkiTensor, values: np.ndarray, inside: np.ndarray | None, oob: oob_mode
) -> None:
    """Writes what a DMA read; rows that are not inside keep what they held."""
    if _has_vector_offset(dst):
        _scatter(step, dst, values, inside, oob)
    elif inside is None:
        step.put(dst, _rounded(step, dst, values))
    else:
        for row in np.flatnonzero(inside):
            step.put(dst.slice(0, int(row), int(row) + 1), _rounded(step, dst, values[row]))


def _scatter(
    step: Step, dst: NkiTensor, values: np.ndarray, inside: np.ndarray | None, oob: oob_mode
) -> None:
    chosen = _rows(step, dst, oob)
    if inside is not None:
        chosen = chosen.restricted(inside)
    rows = chosen.rows[chosen.inside]
    if not rows.size:
        return
    dst.contents.own_bytes()
    new = _rounded(step, dst, values)
    if not dst.dtype.is_packed:
        new = convert(new, dst.dtype, exact=step.exact)
    new = new.reshape(dst.shape)[chosen.inside]
    memory = chosen.all_values()
    step.note_write(chosen, lambda: np.array_equal(memory[rows], new))
    memory[rows] = new
    if dst.contents.written is not None:
        flags = chosen.all_flags(dst.contents.written)
        flags[rows] = all_set(flags)


def _rounded(step: Step, dst: NkiTensor, values: np.ndarray) -> np.ndarray:
    """DMA converts through float32; the same type is copied bit by bit."""
    same = values.dtype == dst.contents.numpy_dtype(dst.dtype)
    return values if same else to_float32(values)


def transfer(dst: NkiTensor, src: NkiTensor, *, software_dge: bool = False) -> Transfer:
    """How a copy divides into descriptors: pieces contiguous on both sides."""

    def run_elements(tensor: NkiTensor) -> int:
        first = 1 if tensor.is_on_chip or _has_vector_offset(tensor) else 0
        return contiguous_run(tensor.shape[first:], tensor.strides[first:])

    size = dst.size * dst.dtype.itemsize
    run = min(min(map(run_elements, (dst, src))) * dst.dtype.itemsize, DMA_ELEMENT_BYTES)
    route = f"{_place(src)}->{_place(dst)}"
    partitions = max([t.shape[0] for t in (dst, src) if t.is_on_chip], default=1)
    return Transfer(route, size, run, -(-size // run), partitions, software_dge)


def _place(tensor: NkiTensor) -> str:
    return tensor.buffer.value if tensor.is_on_chip else "hbm"


def _is_gather(*tensors: NkiTensor) -> bool:
    return any(map(_has_vector_offset, tensors))


def _is_software(dge: dge_mode, *tensors: NkiTensor) -> bool:
    """Whether GpSimd makes the descriptors: where told to, and for gathers."""
    return dge is dge_mode.swdge or _is_gather(*tensors)


def _check_copy(step: Step, dst: NkiTensor, src: NkiTensor) -> None:
    if dst.size != src.size:
        step.refuse("size", f"dst {dst!r} has {dst.size} elements, src {src!r} {src.size}.")
    if _is_gather(dst, src) and dst.shape[0] != src.shape[0]:
        step.refuse(
            "rows", f"dst {dst!r}, src {src!r}: with an offset a row both need as many rows."
        )
    if dst.dtype != src.dtype and (dst.dtype.is_packed or src.dtype.is_packed):
        step.refuse("packed", f"dst {dst!r}, src {src!r}: packed types are not converted.")
    if _has_vector_offset(dst) and repeats_elements(dst.shape[1:], dst.strides[1:]):
        step.refuse("broadcast-destination", f"dst {dst!r} has the same element twice.")


@instruction
def dma_copy(
    step: Step,
    dst: NkiTensor,
    src: NkiTensor,
    priority: int | None = None,
    oob_mode: oob_mode = oob_mode.error,
    dge_mode: dge_mode = dge_mode.unknown,
    engine: Engine = Engine.unknown,
) -> None:
    """Copies between HBM and SBUF, converting types; gathers and scatters by run-time offsets."""
    dst, src = step.tensor("dst", dst), step.tensor("src", src)
    check_memory(step, dst=dst, src=src)
    _check_modes(step, dge_mode, engine, priority, (dst, src))
    _check_copy(step, dst, src)
    step.operands(dst, src)
    step.moves(transfer(dst, src, software_dge=_is_software(dge_mode, dst, src)))
    if _is_skipped(oob_mode, dst, src):
        return
    values, inside = source_values(step, src, oob_mode)
    store_values(step, dst, values, inside, oob_mode)


TRANSPOSES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


@instruction
def dma_transpose(
    step: Step,
    dst: NkiTensor,
    src: NkiTensor,
    axes: tuple[int, ...] | None = None,
    priority: int | None = None,
    dge_mode: dge_mode = dge_mode.unknown,
    oob_mode: oob_mode = oob_mode.error,
) -> None:
    """Transposes with the DMA engines: 2-D (1,0), 3-D (2,1,0), 4-D (3,1,2,0)."""
    dst, src = step.tensor("dst", dst), step.tensor("src", src)
    check_memory(step, dst=dst, src=src)
    _check_transpose(step, dst, src, axes)
    if _is_gather(src):
        _check_gather_transpose(step, src, dge_mode)
    else:
        _check_direct_transpose(step, src, dge_mode)
    _check_modes(step, dge_mode, Engine.unknown, priority, (dst, src))
    step.operands(dst, src)
    step.moves(transfer(dst, src, software_dge=_is_software(dge_mode, src)))
    if _is_skipped(oob_mode, dst, src):
        return
    values, inside = source_values(step, src, oob_mode)
    order = TRANSPOSES[src.ndim]
    if inside is not None:
        kept = np.flatnonzero(inside)
        for column in kept:
            part = dst.slice(dst.ndim - 1, int(column), int(column) + 1)
            step.put(part, values[column : column + 1].transpose(order))
        return
    step.put(dst, values.transpose(order))


def _check_transpose(step: Step, dst: NkiTensor, src: NkiTensor, axes: Any) -> None:
    if src.ndim not in TRANSPOSES:
        step.refuse("rank", f"src {src!r}: must have 2, 3 or 4 axes.")
    order = TRANSPOSES[src.ndim]
    if axes is not None and tuple(axes) != order:
        step.refuse("axes", f"axes {axes} of {src.ndim} axes: only {order}.")
    wanted = tuple(src.shape[a] for a in order)
    if dst.shape != wanted:
        step.refuse("shape", f"dst {dst!r}: must have shape {list(wanted)} for src {src!r}.")
    if dst.dtype != src.dtype:
        step.refuse("dtype", f"dst {dst!r} and src {src!r} must have one type.")
    if dst.buffer is not SBUF:
        step.refuse("buffer", f"dst {dst!r}: must be in SBUF.")


def _check_direct_transpose(step: Step, src: NkiTensor, dge: dge_mode) -> None:
    if dge not in (dge_mode.unknown, dge_mode.hwdge):
        step.refuse("dge", f"{dge}: a direct transpose takes unknown or hwdge.")
    if dge is not dge_mode.hwdge:
        return
    rows = src.shape[0]
    if src.dtype.itemsize != 2:
        step.refuse("hwdge-dtype", f"src {src!r}: hardware DGE transposes types of 2 bytes.")
    if src.ndim == 2 and rows != 16:
        step.refuse("hwdge-rows", f"src {src!r}: hardware DGE transposes 16 rows.")
    if src.ndim > 2 and (rows not in (1, 2, 4, 8, 16) or rows * src.shape[-2] % 16):
        step.refuse(
            "hwdge-rows",
            f"src {src!r}: hardware DGE needs 1, 2, 4, 8 or 16 rows, and rows times the axis "
            "before the last a multiple of 16.",
        )


def _check_gather_transpose(step: Step, src: NkiTensor, dge: dge_mode) -> None:
    assert src.indirect_offset is not None
    index, rows = src.indirect_offset.index, src.shape[0]
    if step.core.target.generation < 3:
        step.refuse("gather-target", "a gathering transpose needs trn2 or newer.")
    if dge not in (dge_mode.unknown, dge_mode.swdge):
        step.refuse("dge", f"{dge}: a gathering transpose takes unknown or swdge.")
    if src.dtype.itemsize != 2:
        step.refuse("gather-dtype", f"src {src!r}: gathers types of 2 bytes.")
    if src.ndim == 4 and 1 not in src.shape[1:3]:
        step.refuse("gather-shape", f"src {src!r}: axis 1 or 2 must be 1.")
    if index.ndim != 2 or index.dtype != UINT32:
        step.refuse("gather-index", f"offsets {index!r}: must be uint32 with two axes.")
    p, n = index.shape
    if p % 16 or not 16 <= p <= 128 or (n > 1 and p != 128) or p * n < rows or rows % 16:
        step.refuse(
            "gather-index",
            f"offsets {index!r} for {rows} rows: 16 to 128 partitions, a multiple of 16 (128 with "
            "more than one column), as many offsets as rows, rows a multiple of 16.",
        )
