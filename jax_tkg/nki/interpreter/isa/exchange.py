"""What two programs do together: `sendrecv`, `core_barrier`."""

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.errors import NkiValidationError
from jax_tkg.nki.interpreter.record import Engine, Instruction, Transfer
from jax_tkg.nki.interpreter.step import SBUF, Step, instruction
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.tensor import NkiTensor

GPSIMD_DMA_BYTES = {4: 1024, 2: 512, 1: 256}  # most bytes a partition, by element size


class dma_engine(enum.Enum):  # noqa: N801  (NKI's name)
    """How an exchange travels."""

    dma = 1
    gpsimd_dma = 2


@dataclass
class _Offer:
    """What one program brought to a meeting."""

    record: Instruction
    values: np.ndarray | None
    layout: Any


def _meet(step: Step, kind: str, key: Any, offer: _Offer, what: str) -> _Offer:
    """Waits for the other program's offer to the same meeting, and returns it.

    The n-th exchange of a kind on one key meets the other program's n-th: who comes first waits, so
    that a meeting that is there already is the other's.
    """
    core, machine = step.core, step.core.machine
    meeting: dict[int, _Offer] | None = machine.exchanges.pop((kind, key), None)
    if meeting is None:
        meeting = machine.exchanges[kind, key] = {}
    meeting[core.index] = offer
    other = 1 - core.index
    machine.schedule.wait(core.index, lambda: other in meeting, what)
    offer.record.peer = meeting[other].record
    return meeting[other]


def _needs_two(step: Step) -> None:
    if step.core.machine.num_programs != 2:
        step.refuse("programs", "needs two programs: launch the kernel as kernel[2](...).")


@instruction
def sendrecv(
    step: Step,
    src: NkiTensor,
    dst: NkiTensor,
    send_to_rank: int,
    recv_from_rank: int,
    pipe_id: int,
    dma_engine: dma_engine = dma_engine.dma,
) -> None:
    """Sends `src` to the other core while receiving into `dst`."""
    _needs_two(step)
    src, dst = step.tensor("src", src), step.tensor("dst", dst)
    other = 1 - step.core.index
    if (send_to_rank, recv_from_rank) != (other, other):
        step.refuse(
            "rank",
            f"send_to_rank {send_to_rank}, recv_from_rank {recv_from_rank} in program "
            f"{step.core.index}: both must be {other}.",
        )
    for role, tensor in (("src", src), ("dst", dst)):
        if tensor.buffer is not SBUF:
            step.refuse("buffer", f"{role} {tensor!r}: must be in SBUF.")
    if src.dtype != dst.dtype or src.shape != dst.shape:
        step.refuse("shape", f"src {src!r} and dst {dst!r}: must agree in shape and type.")
    _check_gpsimd(step, src, dma_engine)
    step.operands(dst, src)
    values = step.raw(src).copy()
    layout = (src.shape, src.dtype, dma_engine)
    offer = _Offer(step.record, values, layout)
    theirs = _meet(step, "sendrecv", pipe_id, offer, f"sendrecv {src!r} on pipe {pipe_id}")
    if theirs.layout != layout:
        raise NkiValidationError(
            "sendrecv.partner",
            f"sendrecv: program {step.core.index} swaps {list(src.shape)} {src.dtype} by "
            f"{dma_engine.name}, program {other} {list(theirs.layout[0])} {theirs.layout[1]} by "
            f"{theirs.layout[2].name} at {theirs.record.source}: both must swap the same.",
            step.record.source,
            theirs.record.source,
        )
    assert theirs.values is not None
    step.put(dst, theirs.values)
    _cost(step, src, dma_engine)


def _check_gpsimd(step: Step, src: NkiTensor, engine: dma_engine) -> None:
    if engine is not dma_engine.gpsimd_dma:
        return
    limit, size = GPSIMD_DMA_BYTES[src.dtype.itemsize], src.free_size * src.dtype.itemsize
    if size > limit:
        step.refuse(
            "gpsimd-size",
            f"src {src!r} has {size} bytes a partition; gpsimd_dma moves at most {limit} of "
            f"{src.dtype}: split it or use dma_engine.dma.",
        )


def _cost(step: Step, src: NkiTensor, engine: dma_engine) -> None:
    size = src.size * src.dtype.itemsize
    run = src.free_size * src.dtype.itemsize
    step.moves(Transfer("sbuf->sbuf", size, run, src.shape[0], src.shape[0]))
    step.record.exchange = engine.name
    if engine is dma_engine.gpsimd_dma:
        step.record.engine = Engine.gpsimd


@instruction
def core_barrier(
    step: Step, data: NkiTensor, cores: tuple[int, ...], engine: Engine = Engine.gpsimd
) -> None:
    """Both cores reach it before either goes on; orders their accesses to `data`."""
    _needs_two(step)
    data = step.tensor("data", data)
    if data.buffer is not MemoryRegion.shared_hbm:
        step.refuse("data", f"data {data!r}: must be in shared HBM.")
    if tuple(cores) != (0, 1):
        step.refuse("cores", f"cores {cores}: must be (0, 1).")
    step.operands(data)
    step.runs_on(engine, 64)
    step.record.exchange = "barrier"
    theirs = _meet(
        step,
        "barrier",
        None,
        _Offer(step.record, None, data.storage),
        f"core_barrier on {data.name}",
    )
    if theirs.layout is not data.storage:
        raise NkiValidationError(
            "core_barrier.partner",
            f"core_barrier: program {step.core.index} synchronises on {data.name}, the other on "
            f"{theirs.layout.name} at {theirs.record.source}: both must name one tensor.",
            step.record.source,
            theirs.record.source,
        )
    step.core.machine.races.barrier(step.core.index, data.storage)
