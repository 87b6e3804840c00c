"""What is kept of every instruction that ran: enough for counters, times, drawings and checks."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from jax_tkg.nki.interpreter.errors import Source
from jax_tkg.nki.interpreter.storage import Box, Storage


class Engine(enum.Enum):
    """`nki.isa.engine`: the engines of a core."""

    unknown = 0
    tensor = 1
    scalar = 2
    gpsimd = 3
    dma = 4
    vector = 5
    sync = 6


class Access(NamedTuple):
    """Bytes of a storage that an instruction touched: the smallest box around them."""

    storage: Storage
    box: Box

    def overlaps(self, other: "Access") -> bool:
        """The boxes share memory: the same storage, or two with addresses in one memory."""
        if self.storage is other.storage:
            return self.box.overlaps(other.box)
        mine, theirs = self.storage, other.storage
        if mine.address is None or theirs.address is None or mine.memory != theirs.memory:
            return False
        return self.box.moved(*mine.address).overlaps(other.box.moved(*theirs.address))


@dataclass(frozen=True)
class Transfer:
    """What a DMA moved.

    Attributes:
        route: such as `hbm->sbuf`.
        bytes: written at the destination.
        run_bytes: longest piece that is contiguous on both sides; one descriptor moves one.
        descriptors: pieces.
        partitions: on the on-chip side, or 1.
        software_dge: descriptors come from GpSimd.
    """

    route: str
    bytes: int
    run_bytes: int
    descriptors: int
    partitions: int
    software_dge: bool = False


@dataclass(eq=False, slots=True)
class Instruction:
    """One instruction of one core.

    Attributes:
        core: the core's index.
        index: its place in the core's program.
        op: the name in `nki.isa`.
        engine: which engine runs it.
        name: the kernel's name for it, or "".
        source: the kernel's line.
        shapes: of its operands, destinations first, with their dtypes.
        reads, writes: the memory it touched.
        elements: per partition, as the cost table counts them.
        cycles: of its engine's clock.
        macs: multiply-accumulates.
        transfer: what a DMA moved.
        peer: sendrecv and barrier: the other core's instruction, once they met.
        after: instructions this one was told to wait for.
    """

    core: int
    index: int
    op: str
    engine: Engine
    name: str
    source: Source
    shapes: tuple[str, ...] = ()
    reads: list[Access] = field(default_factory=list)
    writes: list[Access] = field(default_factory=list)
    elements: int = 0
    cycles: float = 0.0
    macs: int = 0
    transfer: Transfer | None = None
    peer: "Instruction | None" = None
    exchange: str = ""
    after: list["Instruction"] = field(default_factory=list)

    def depends_on(self, *producers: "Instruction") -> "Instruction":
        """Adds scheduling dependences; returns itself."""
        self.after += producers
        return self

    @property
    def signature(self) -> tuple[str, tuple[str, ...]]:
        """What two cores of one launch must agree on."""
        return self.op, self.shapes

    def __str__(self) -> str:
        """Operation, operands and line."""
        return f"{self.op}({', '.join(self.shapes)}) at {self.source}"
