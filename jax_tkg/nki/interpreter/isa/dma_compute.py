"""`dma_compute`: sums in the DMA engines, in float32, also onto rows chosen at run time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.alu import OPS
from jax_tkg.nki.interpreter.dtypes import to_float32
from jax_tkg.nki.interpreter.isa.dma import (
    check_memory,
    oob_mode,
    source_values,
    store_values,
    transfer,
)
from jax_tkg.nki.interpreter.step import SBUF, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor
from jax_tkg.nki.interpreter.window import window

MAX_SOURCES = 16


@instruction
def dma_compute(
    step: Step,
    dst: NkiTensor,
    srcs: Sequence[NkiTensor],
    reduce_op: Any,
    scales: Sequence[float] | None = None,
    unique_indices: bool = True,
    oob_mode: oob_mode = oob_mode.error,
) -> None:
    """Writes the sum of `srcs`, computed in float32."""
    dst = step.tensor("dst", dst)
    tensors = [step.tensor(f"srcs[{i}]", src) for i, src in enumerate(srcs)]
    check_memory(step, dst=dst, **{f"srcs[{i}]": t for i, t in enumerate(tensors)})
    if not 1 <= len(tensors) <= MAX_SOURCES:
        step.refuse("sources", f"{len(tensors)} sources: must be 1 to {MAX_SOURCES}.")
    if reduce_op is not OPS["add"]:
        step.refuse("operator", f"reduce_op is {reduce_op!r}: only nl.add.")
    if scales is not None and (len(scales) != len(tensors) or any(s != 1.0 for s in scales)):
        step.refuse("scales", f"scales {scales}: must be None, or 1.0 for each source.")
    for tensor in tensors:
        if tensor.size != dst.size:
            step.refuse("size", f"dst {dst!r} and source {tensor!r}: must have as many elements.")
    gathers = any(t.is_indirect() for t in (dst, *tensors))
    if gathers:
        _check_rows(step, dst, tensors, unique_indices=unique_indices)
    step.operands(dst, *tensors)
    parts = [transfer(dst, t, software_dge=gathers) for t in tensors]
    step.moves(dataclasses.replace(parts[0], descriptors=sum(p.descriptors for p in parts)))
    total, rows = np.zeros(dst.shape, np.float32), None
    for tensor in tensors:
        values, inside = source_values(step, tensor, oob_mode)
        total += to_float32(values).reshape(dst.shape)
        rows = inside if rows is None else rows
    store_values(step, dst, total, rows, oob_mode)


def _check_rows(
    step: Step, dst: NkiTensor, tensors: list[NkiTensor], *, unique_indices: bool
) -> None:
    """Rows chosen at run time: dst[rows] += tile, or tile += src[rows]."""
    for tensor in (dst, *tensors):
        if tensor.indirect_offset is not None and not tensor.indirect_offset.is_vector:
            step.refuse("scalar-offset", f"{tensor!r}: offsets known at run time one a row only.")
    if len(tensors) != 2:
        step.refuse("sources", f"{len(tensors)} sources: two where rows are chosen at run time.")
    if not unique_indices:
        step.refuse("unique-indices", "unique_indices=False is not supported by the hardware.")
    chosen = [t for t in tensors if t.is_indirect()]
    others = [t for t in tensors if not t.is_indirect()]
    if len(chosen) != 1 or chosen[0].is_on_chip or others[0].buffer is not SBUF:
        step.refuse("sources", f"{tensors!r}: rows of one in HBM and a tile in SBUF.")
    twin = chosen[0] if dst.is_indirect() else others[0]
    if not _same_view(dst, twin):
        step.refuse("in-place", f"dst {dst!r}: must be the same view as the source {twin!r}.")
    if dst.is_indirect():
        assert dst.indirect_offset is not None
        offsets = window(dst.indirect_offset.index).array().ravel()
        if len(np.unique(offsets)) < len(offsets):
            step.refuse("unique-indices", f"offsets of {dst!r} repeat: each row at most once.")


def _same_view(a: NkiTensor, b: NkiTensor) -> bool:
    mine, theirs = a.indirect_offset, b.indirect_offset
    index = mine.index if mine else None
    return (a.storage, a.shape, a.strides, a.offset, a.dtype) == (
        b.storage, b.shape, b.strides, b.offset, b.dtype
    ) and index is (theirs.index if theirs else None)  # fmt: skip
