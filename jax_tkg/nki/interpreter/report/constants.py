"""Every number of the time model that is not in `hardware.Target`, with unit and source.

Sources, all of the AWS Neuron SDK documentation 2.32: [A1] Trainium/Inferentia2 architecture guide,
[A2] Trainium2 architecture guide, [D] NKI DMA bandwidth guide, [G] descriptor generation engine
reference, [O] introduction to DMA with NKI. [assumed] stands where no document gives a number.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import log2


@dataclass(frozen=True)
class Constant:
    """One number of the model.

    Attributes:
        value: in `unit`.
        unit: what it counts.
        source: the document, or [assumed].
        meaning: what the model does with it.
    """

    value: float
    unit: str
    source: str
    meaning: str

    @property
    def is_assumed(self) -> bool:
        """No document gives it."""
        return "[assumed]" in self.source


CONSTANTS = {
    "semaphore": Constant(
        100, "cycles of the waiting engine", "[A1]",
        "from the end of an instruction to the start of one that needs its result; documented for "
        "dependent Vector instructions, taken for all",
    ),
    "dma_start": Constant(
        1300, "ns", "[D]",
        "from the trigger of a DMA to its first byte; the semaphores before it are included",
    ),
    "hardware_dge": Constant(
        600, "ns", "[A2] [G]", "a hardware descriptor generator is busy for one DMA"
    ),
    "software_dge": Constant(
        600, "ns", "[assumed]", "GpSimd is busy for a DMA whose descriptors it makes"
    ),
    "software_dge_descriptor": Constant(
        8, "GpSimd cycles", "[assumed]", "and for each descriptor"
    ),
    "dma_queues": Constant(16, "queues a core", "[O] [D]", "that share the DMA bandwidth equally"),
    "partitions_per_queue": Constant(
        8, "partitions", "[O]", "a transfer uses one queue for so many partitions"
    ),
    "hbm_piece": Constant(
        4096, "bytes", "[assumed]", "a copy within HBM uses one queue for so many bytes"
    ),
    "transpose_from_hbm": Constant(
        0.9, "of the copy's bandwidth", "[A2]", "a DMA transpose that reads HBM"
    ),
    "transpose_from_sbuf": Constant(
        0.5, "of the copy's bandwidth", "[A2]", "a DMA transpose that reads SBUF"
    ),
    "gpsimd_dma": Constant(
        153, "GB/s a direction", "[A2]", "the DMA engines inside GpSimd: sendrecv by gpsimd_dma"
    ),
    "gpsimd_dma_start": Constant(
        500, "ns", "[assumed]", "from the meeting of a sendrecv by gpsimd_dma to its first byte"
    ),
    "barrier": Constant(
        200, "ns", "[assumed]",
        "semaphores of a core_barrier there and back; also before a sendrecv by dma, which has one",
    ),
}  # fmt: skip

# Share of the DMA bandwidth by bytes of a contiguous run, read off the chart of throughput over
# bytes per partition in [O]; its last point, 32 KiB, counts as the full bandwidth.
RUN_EFFICIENCY = {
    32: 0.013,
    64: 0.026,
    128: 0.050,
    256: 0.103,
    512: 0.206,
    1024: 0.422,
    2048: 0.813,
    4096: 0.966,
    8192: 0.983,
    16384: 0.991,
    32768: 1.0,
}


def run_efficiency(run_bytes: int) -> float:
    """Share of the DMA bandwidth that runs of this length reach.

    Between the points of the chart linear in the logarithm of the length; below the first
    proportional to it, as a descriptor then takes the same time whatever it moves.
    """
    shortest, longest = min(RUN_EFFICIENCY), max(RUN_EFFICIENCY)
    if run_bytes <= shortest:
        return RUN_EFFICIENCY[shortest] * run_bytes / shortest
    for (low, slow), (high, fast) in pairwise(RUN_EFFICIENCY.items()):
        if run_bytes <= high:
            return slow + (fast - slow) * log2(run_bytes / low) / log2(high / low)
    return RUN_EFFICIENCY[longest]
