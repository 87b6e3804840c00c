"""Runs made by hand: instructions with the memory they touch, without a kernel."""

from dataclasses import dataclass, field

from jax_tkg.nki.interpreter.dtypes import FLOAT32
from jax_tkg.nki.interpreter.errors import Source
from jax_tkg.nki.interpreter.hardware import TRN2, Target
from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.machine import Options
from jax_tkg.nki.interpreter.record import Access, Engine, Instruction, Transfer
from jax_tkg.nki.interpreter.storage import Box, MemoryRegion, Storage


def storage(
    name: str = "tile",
    region: MemoryRegion = MemoryRegion.sbuf,
    partitions: int = 128,
    row_bytes: int = 4096,
    address: tuple[int, int] | None = None,
) -> Storage:
    """A declaration; there are no bytes."""
    shape = (partitions, row_bytes // 4) if region.is_on_chip else (row_bytes // 4,)
    declared = Source("kernel.py", 1, "kernel")
    return Storage(region, shape, FLOAT32, name, declared, 0, address, row_bytes)


def hbm(name: str = "hbm", size: int = 1 << 20, *, shared: bool = True) -> Storage:
    region = MemoryRegion.shared_hbm if shared else MemoryRegion.private_hbm
    return storage(name, region, row_bytes=size)


def part(of: Storage, p0: int = 0, p1: int = 0, b0: int = 0, b1: int = 0) -> Access:
    """Partitions [p0, p1) and bytes [b0, b1); all where the end is 0."""
    return Access(of, Box(p0, p1 or of.partitions, b0, b1 or of.row_bytes))


def accesses(given: tuple[Storage | Access, ...]) -> list[Access]:
    return [part(g) if isinstance(g, Storage) else g for g in given]


@dataclass
class Program:
    """One core's instructions, appended by method calls."""

    core: int = 0
    steps: list[Instruction] = field(default_factory=list)

    def add(
        self,
        op: str,
        engine: Engine,
        reads: tuple[Storage | Access, ...],
        writes: tuple[Storage | Access, ...],
    ) -> Instruction:
        source = Source("kernel.py", len(self.steps) + 1, "kernel")
        step = Instruction(self.core, len(self.steps), op, engine, "", source)
        step.reads, step.writes = accesses(reads), accesses(writes)
        self.steps.append(step)
        return step

    def compute(
        self,
        engine: Engine,
        cycles: float,
        reads: tuple[Storage | Access, ...] = (),
        writes: tuple[Storage | Access, ...] = (),
        op: str = "tensor_copy",
    ) -> Instruction:
        step = self.add(op, engine, reads, writes)
        step.cycles, step.elements = cycles, int(cycles)
        return step

    def dma(
        self,
        size: int,
        run: int = 32768,
        route: str = "hbm->sbuf",
        partitions: int = 128,
        reads: tuple[Storage | Access, ...] = (),
        writes: tuple[Storage | Access, ...] = (),
        op: str = "dma_copy",
        software_dge: bool = False,
    ) -> Instruction:
        step = self.add(op, Engine.dma, reads, writes)
        step.transfer = Transfer(route, size, run, -(-size // run), partitions, software_dge)
        return step


def exchange(kind: str, a: Instruction, b: Instruction) -> None:
    """Makes two instructions one exchange of two cores."""
    a.peer, b.peer = b, a
    a.exchange = b.exchange = kind
    if kind == "gpsimd_dma":
        a.engine = b.engine = Engine.gpsimd


def run(*programs: Program, target: Target = TRN2) -> Run:
    return Run(
        outputs=None,
        options=Options(target),
        programs=tuple(tuple(p.steps) for p in programs),
        memory=(),
        captured=(),
        uninitialized={},
        arguments={},
    )
