"""A model of how long a run would take: not a measurement.

Engines issue in program order and run beside each other; an instruction waits for what it needs.
DMAs share the 16 queues of a core: a transfer takes the queues that are free first, as many as its
partitions ask for. Two cores wait for each other at a `sendrecv` or a `core_barrier`. The numbers
and their sources are in `constants`; no device was ever asked. docs/time-model.md says what is left
out.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.report.costs import QUEUES
from jax_tkg.nki.interpreter.report.roofline import hbm_bytes
from jax_tkg.nki.interpreter.report.simulation import GPSIMD_DMA, Timed, simulate

LATENCY = "latency"  # semaphores, and DMAs that have not begun to move data
DMA_QUEUES = "DMA queues"


@dataclass(frozen=True)
class PathStep:
    """An instruction on the critical path.

    Attributes:
        timed: the instruction and its times.
        until: it let the next one go, in nanoseconds; of the last one, its end.
    """

    timed: Timed
    until: float

    @property
    def latency(self) -> float:
        """Of the time from `timed.begin` to `until`, what is not work."""
        return min(self.timed.latency, self.until - self.timed.begin)

    @property
    def work(self) -> float:
        """Of the time from `timed.begin` to `until`, what is work."""
        return self.until - self.timed.begin - self.latency


@dataclass(frozen=True)
class Timing:
    """The modelled times of a run, in nanoseconds.

    Attributes:
        programs: every instruction of each core, in program order.
        total: the end of the last one.
        busy: the share of the total that each engine of each core works, by core and name; of
            DMA queues, their mean.
        critical_path: the instructions that decide the total, in order: each lets the next one go,
            and their parts add up to the total.
        path_split: how much of the critical path each engine works; the rest is `latency`.
        hbm_bytes: distinct bytes of HBM read, plus distinct bytes written.
        roofline: what these take once, at the HBM bandwidth of all cores that run.
    """

    programs: tuple[tuple[Timed, ...], ...]
    total: float
    busy: Mapping[tuple[int, str], float]
    critical_path: tuple[PathStep, ...]
    path_split: Mapping[str, float]
    hbm_bytes: int
    roofline: float

    @property
    def roofline_share(self) -> float:
        """The roofline's time over the modelled total: 1 is the best there can be."""
        return self.roofline / self.total if self.total else 0.0


def timing(run: Run) -> Timing:
    """The modelled times of a run.

    Raises:
        ValueError: if instructions wait for each other in a circle.
    """
    programs = simulate(run)
    last = max((t for p in programs for t in p), key=lambda t: t.end, default=None)
    path = _critical_path(last)
    distinct = hbm_bytes(run)
    gbps = run.options.target.hbm_gbps * max(1, len(programs))
    total = last.end if last is not None else 0.0
    return Timing(
        programs, total, _busy(programs, total), path, _split(path), distinct, distinct / gbps
    )


def _critical_path(last: Timed | None) -> tuple[PathStep, ...]:
    """Back from the last instruction, to the one that held each up the longest."""
    path: list[PathStep] = []
    while last is not None:
        path.append(PathStep(last, path[-1].timed.begin if path else last.end))
        last = last.waited
    return tuple(reversed(path))


def _split(path: tuple[PathStep, ...]) -> dict[str, float]:
    split: dict[str, float] = defaultdict(float)
    for part in path:
        split[engine_name(part.timed)] += part.work
        split[LATENCY] += part.latency
    return dict(split)


def engine_name(timed: Timed) -> str:
    """What works for an instruction: an engine, or DMA queues."""
    return DMA_QUEUES if timed.queues else timed.cost.lane.value


def _busy(programs: tuple[tuple[Timed, ...], ...], total: float) -> dict[tuple[int, str], float]:
    """Lanes are busy while they are held; DMA lanes only make descriptors."""
    busy: dict[tuple[int, str], float] = defaultdict(float)
    for core, program in enumerate(programs):
        for timed in program:
            busy[core, timed.cost.lane.value] += timed.cost.held
            for queue in timed.queues:
                if queue.queue != GPSIMD_DMA:
                    busy[core, DMA_QUEUES] += (queue.end - queue.start) / QUEUES
    return {engine: time / total for engine, time in busy.items()} if total else {}
