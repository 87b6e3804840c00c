"""Moving partitions within quadrants: `nc_stream_shuffle`."""

from collections.abc import Sequence

import numpy as np

from jax_tkg.nki.interpreter.hardware import QUADRANT
from jax_tkg.nki.interpreter.isa.operands import cycles
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

KEEP = 255  # in the mask: this partition stays as it is


@instruction
def nc_stream_shuffle(
    step: Step, dst: NkiTensor, src: NkiTensor, shuffle_mask: Sequence[int]
) -> None:
    """dst[q + i] = src[q + shuffle_mask[i]] in each quadrant q; 255 leaves dst[q + i] alone."""
    dst, src = step.tile("dst", dst), step.tile("src", src)
    if dst.dtype != src.dtype or dst.free_size != src.free_size:
        step.refuse("shape", f"dst {dst!r}, src {src!r}: one type, as many elements a partition.")
    _check_start(step, dst, src)
    mask = list(shuffle_mask)
    if len(mask) != QUADRANT or any(m != KEEP and not 0 <= m < QUADRANT for m in mask):
        step.refuse("mask", f"shuffle_mask {mask}: needs 32 numbers of 0 to 31, or 255.")
    rows = np.arange(dst.shape[0])
    picks = np.asarray(mask)[rows % QUADRANT]
    sources = rows // QUADRANT * QUADRANT + picks
    moved = picks != KEEP
    if sources[moved].max(initial=0) >= src.shape[0]:
        row = int(rows[moved & (sources >= src.shape[0])][0])
        step.refuse(
            "source-partition",
            f"partition {row} of dst {dst!r} takes partition {sources[row]}, which src {src!r} "
            "does not have.",
        )
    values = step.bits(src)[np.where(moved, sources, 0)]
    edges = np.flatnonzero(np.diff(moved, prepend=False, append=False))
    for first, end in edges.reshape(-1, 2).tolist():  # runs of partitions that are written
        step.put(dst.slice(0, first, end), values[first:end])
    step.runs_on(Engine.vector, cycles(dst.free_size), dst.free_size)


def _check_start(step: Step, dst: NkiTensor, src: NkiTensor) -> None:
    """Both tiles start where one of the size of the larger may."""
    active = -(-max(dst.shape[0], src.shape[0]) // QUADRANT) * QUADRANT
    unit = {32: 32, 64: 64}.get(active, 128)
    for role, tile in (("dst", dst), ("src", src)):
        if tile.start_partition % unit:
            step.refuse(
                "start-partition",
                f"{role} {tile!r} starts at partition {tile.start_partition}: with {active} active "
                f"partitions it must be a multiple of {unit}.",
            )
