"""What one instruction costs in the time model: its lane, its fixed part, its work."""

import enum
from dataclasses import dataclass

from jax_tkg.nki.interpreter.hardware import Target
from jax_tkg.nki.interpreter.record import Engine, Instruction, Transfer
from jax_tkg.nki.interpreter.report.constants import CONSTANTS, run_efficiency

QUEUES = int(CONSTANTS["dma_queues"].value)


class Lane(enum.Enum):
    """What issues instructions in program order.

    DMAs have two: a core has two hardware descriptor generators, and the model gives one to DMAs
    that read HBM and one to those that read SBUF, so that stores, which wait for results, do not
    hold up loads.
    """

    tensor = "Tensor"
    vector = "Vector"
    scalar = "Scalar"
    gpsimd = "GpSimd"
    sync = "Sync"
    dma_in = "DMA triggers, HBM"
    dma_out = "DMA triggers, SBUF"

    @property
    def is_dma(self) -> bool:
        """A descriptor generator."""
        return self in (Lane.dma_in, Lane.dma_out)


_LANE_OF = {
    Engine.tensor: Lane.tensor,
    Engine.vector: Lane.vector,
    Engine.scalar: Lane.scalar,
    Engine.gpsimd: Lane.gpsimd,
}


def lane(step: Instruction) -> Lane:
    """The lane that issues an instruction."""
    transfer = step.transfer
    if transfer is None or step.engine is not Engine.dma:
        return _LANE_OF.get(step.engine, Lane.sync)
    if transfer.software_dge:
        return Lane.gpsimd
    return Lane.dma_in if transfer.route.startswith("hbm") else Lane.dma_out


def clock_ghz(lane: Lane, target: Target) -> float:
    """Cycles a nanosecond."""
    clocks = {
        Lane.tensor: target.tensor_ghz,
        Lane.vector: target.vector_ghz,
        Lane.scalar: target.scalar_ghz,
    }
    return clocks.get(lane, target.gpsimd_ghz)


@dataclass(frozen=True)
class Cost:
    """What an instruction takes, in nanoseconds.

    Attributes:
        lane: issues it.
        held: the lane can issue nothing else for so long.
        fixed: from its start to the start of its work.
        work: of the engine, or of each of its DMA queues.
        queues: how many DMA queues it uses.
        gpsimd_dma: it uses the DMA engines inside GpSimd.
    """

    lane: Lane
    held: float
    fixed: float
    work: float
    queues: int = 0
    gpsimd_dma: bool = False


def cost(step: Instruction, target: Target) -> Cost:
    """The cost of an instruction."""
    where, transfer = lane(step), step.transfer
    computing = step.cycles / clock_ghz(where, target)
    if step.exchange == "barrier":
        fixed = CONSTANTS["barrier"].value
        return Cost(where, fixed + computing, fixed, computing)
    if transfer is None:
        return Cost(where, computing, 0.0, computing)
    if step.exchange == "gpsimd_dma":
        fixed = CONSTANTS["gpsimd_dma_start"].value
        work = transfer.bytes / CONSTANTS["gpsimd_dma"].value
        return Cost(where, fixed, fixed, work, gpsimd_dma=True)
    meeting = CONSTANTS["barrier"].value if step.exchange else 0.0
    making = meeting + _descriptors_ns(transfer, target)
    queues = queues_used(transfer)
    rate = _queue_gbps(transfer, target) * _efficiency(step.op, transfer)
    start = CONSTANTS["dma_start"].value
    fixed = making + start if transfer.software_dge else meeting + start
    return Cost(where, making, fixed, transfer.bytes / queues / rate, queues)


def queues_used(transfer: Transfer) -> int:
    """How many of the DMA queues a transfer spreads over."""
    if transfer.route == "hbm->hbm":
        wanted = -(-transfer.bytes // int(CONSTANTS["hbm_piece"].value))
    else:
        wanted = -(-transfer.partitions // int(CONSTANTS["partitions_per_queue"].value))
    return max(1, min(QUEUES, wanted))


def _descriptors_ns(transfer: Transfer, target: Target) -> float:
    """How long making the descriptors keeps the generator; before trn2 the host makes them."""
    if transfer.software_dge:
        each = CONSTANTS["software_dge_descriptor"].value / target.gpsimd_ghz
        return CONSTANTS["software_dge"].value + transfer.descriptors * each
    return CONSTANTS["hardware_dge"].value if target.generation >= 3 else 0.0


def _queue_gbps(transfer: Transfer, target: Target) -> float:
    """A queue's share of what the DMA queues, and HBM, can do for all of them."""
    sides = transfer.route.count("hbm")
    shared = min(target.dma_gbps, target.hbm_gbps / sides) if sides else target.dma_gbps
    return shared / QUEUES


def _efficiency(op: str, transfer: Transfer) -> float:
    share = run_efficiency(transfer.run_bytes)
    if op == "dma_transpose":
        source = "hbm" if transfer.route.startswith("hbm") else "sbuf"
        share *= CONSTANTS[f"transpose_from_{source}"].value
    return share
