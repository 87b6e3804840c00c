"""What a run did, in numbers that need no model: instructions, elements, bytes, memory."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from jax_tkg.nki.interpreter.hardware import KIB
from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.record import Engine, Instruction, Transfer

# Classes of contiguous runs that the DMA bandwidth guide tells apart, by their least length.
RUN_CLASSES = {
    "runs >= 4 KiB": 4 * KIB,
    "runs 2 to 4 KiB": 2 * KIB,
    "runs 256 B to 2 KiB": 256,
    "runs < 256 B": 0,
}


@dataclass(frozen=True)
class EngineCount:
    """What an engine of a core did.

    Attributes:
        instructions: how many.
        elements: per partition.
        cycles: of its clock.
        macs: multiply-accumulates.
    """

    instructions: int = 0
    elements: int = 0
    cycles: float = 0.0
    macs: int = 0


@dataclass(frozen=True)
class Traffic:
    """Transfers of one kind; bytes as written at the destination."""

    transfers: int = 0
    bytes: int = 0
    descriptors: int = 0


@dataclass(frozen=True)
class CoreCounters:
    """What a core did.

    Attributes:
        core: its index.
        engines: by name.
        routes: DMA without exchanges, by route such as `hbm->sbuf`.
        runs: bytes of these DMAs by class of contiguous run.
        exchanges: sendrecvs by `dma` or `gpsimd_dma`.
        barriers: core_barriers; a sendrecv's own are not counted.
        memory: peak bytes a partition, by memory.
    """

    core: int
    engines: Mapping[str, EngineCount]
    routes: Mapping[str, Traffic]
    runs: Mapping[str, int]
    exchanges: Mapping[str, Traffic]
    barriers: int
    memory: Mapping[str, int]

    def rows(self) -> Iterator[tuple[str, float]]:
        """Every number with its name."""
        for name, engine in self.engines.items():
            for what, number in vars(engine).items():
                yield f"{name} {what}", number
        for group, kinds in (("dma", self.routes), ("sendrecv", self.exchanges)):
            for name, traffic in kinds.items():
                for what, number in vars(traffic).items():
                    yield f"{group} {name} {what}", number
        yield from ((f"dma {name}", number) for name, number in self.runs.items())
        yield "barriers", self.barriers
        yield from ((f"{name} peak bytes", number) for name, number in self.memory.items())


@dataclass(frozen=True)
class Counters:
    """What a run did, by core."""

    name: str
    cores: tuple[CoreCounters, ...]

    def rows(self) -> dict[str, float]:
        """Every number of every core with its name."""
        return {f"core {c.core} {name}": number for c in self.cores for name, number in c.rows()}


def counters(run: Run) -> Counters:
    """Counts what a run did."""
    memory: dict[int, dict[str, int]] = defaultdict(dict)
    for use in run.memory:
        memory[use.core][use.region.value] = use.peak_bytes
    return Counters(
        run.name,
        tuple(_core(core, program, memory[core]) for core, program in enumerate(run.programs)),
    )


def difference(before: Counters, after: Counters) -> dict[str, tuple[float, float]]:
    """The numbers that differ, old and new; what one of them lacks counts as 0."""
    old, new = before.rows(), after.rows()
    return {
        name: (old.get(name, 0), new.get(name, 0))
        for name in old | new
        if old.get(name, 0) != new.get(name, 0)
    }


def run_class(run_bytes: int) -> str:
    """The class of a contiguous run."""
    return next(name for name, least in RUN_CLASSES.items() if run_bytes >= least)


def _core(core: int, program: tuple[Instruction, ...], memory: Mapping[str, int]) -> CoreCounters:
    moves = [(s, s.transfer) for s in program if s.transfer is not None]
    plain = [t for s, t in moves if not s.exchange]
    runs: Counter[str] = Counter()
    for transfer in plain:
        runs[run_class(transfer.run_bytes)] += transfer.bytes
    engines = {engine: [s for s in program if s.engine is engine] for engine in Engine}
    return CoreCounters(
        core,
        {engine.name: _engine(steps) for engine, steps in engines.items() if steps},
        _traffic((t.route, t) for t in plain),
        {name: runs[name] for name in RUN_CLASSES if name in runs},
        _traffic((s.exchange, t) for s, t in moves if s.exchange),
        sum(s.exchange == "barrier" for s in program),
        memory,
    )


def _engine(steps: list[Instruction]) -> EngineCount:
    return EngineCount(
        len(steps),
        sum(s.elements for s in steps),
        sum(s.cycles for s in steps),
        sum(s.macs for s in steps),
    )


def _traffic(transfers: Iterable[tuple[str, Transfer]]) -> dict[str, Traffic]:
    kinds: dict[str, list[Transfer]] = defaultdict(list)
    for kind, transfer in transfers:
        kinds[kind].append(transfer)
    return {
        kind: Traffic(len(ts), sum(t.bytes for t in ts), sum(t.descriptors for t in ts))
        for kind, ts in kinds.items()
    }
