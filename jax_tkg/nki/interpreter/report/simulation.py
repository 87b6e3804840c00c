"""When each instruction of a run would start and end: the machinery of `timing`."""

import heapq
from collections import defaultdict
from dataclasses import dataclass, field, replace

from jax_tkg.nki.interpreter.hardware import Target
from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.record import Instruction
from jax_tkg.nki.interpreter.report.constants import CONSTANTS
from jax_tkg.nki.interpreter.report.costs import QUEUES, Cost, Lane, clock_ghz, cost
from jax_tkg.nki.interpreter.report.dependences import dependences, written_memories

GPSIMD_DMA = QUEUES  # the number of the queue that stands for the DMA engines inside GpSimd


@dataclass(frozen=True)
class Busy:
    """A DMA queue at work for one transfer, in nanoseconds."""

    queue: int
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Timed:
    """When an instruction runs, in nanoseconds from the start of the kernel.

    Attributes:
        step: the instruction.
        cost: what it takes.
        start: its lane issues it.
        released: its lane is free again.
        end: its results are there.
        queues: the DMA queues it keeps busy.
        waited: the instruction before which it could not start, or not move its data; None for
            the start of the kernel.
        begin: the moment when that one let it go.
    """

    step: Instruction
    cost: Cost
    start: float
    released: float
    end: float
    queues: tuple[Busy, ...]
    waited: "Timed | None"
    begin: float

    @property
    def latency(self) -> float:
        """What of the time from `begin` to the end is not work: semaphores, the start of a DMA."""
        return max(0.0, self.end - self.begin - self.cost.work)


def simulate(run: Run) -> tuple[tuple[Timed, ...], ...]:
    """The times of all instructions, by core, in program order.

    Raises:
        ValueError: if instructions wait for each other in a circle.
    """
    simulation = _Simulation(run.options.target, [[0.0] * (QUEUES + 1) for _ in run.programs])
    written = written_memories(run.programs)
    for program in run.programs:
        simulation.enter(program, written)
    simulation.place_all()
    return tuple(tuple(simulation.placed[step] for step in program) for program in run.programs)


@dataclass
class _Waiting:
    """An instruction that has no time yet.

    Attributes:
        step: the instruction.
        cost: what it takes.
        missing: how many of those it waits for have no time either.
        ready: when it can start, as far as is known.
        waited: which instruction decides that.
        begin: when that one lets it go.
        offered: it is among those that can start.
    """

    step: Instruction
    cost: Cost
    missing: int = 0
    ready: float = 0.0
    waited: Timed | None = None
    begin: float = 0.0
    offered: bool = False

    def let_go(self, by: Timed, begin: float, latency: float) -> None:
        """One that it waited for has its time."""
        self.missing -= 1
        if self.waited is None or begin + latency > self.ready:
            self.ready, self.waited, self.begin = begin + latency, by, begin


@dataclass
class _Simulation:
    """Gives instructions their times in the order in which their work could begin.

    For DMAs that order never goes back in time, as the fixed part of each is longer than what a
    trigger can be behind another: their queues are taken first come, first served.
    """

    target: Target
    queues: list[list[float]]  # of each core: when each is free
    waiting: dict[Instruction, _Waiting] = field(default_factory=dict)
    next_in_lane: dict[Instruction, Instruction] = field(default_factory=dict)
    consumers: dict[Instruction, list[tuple[Instruction, bool]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    last_user: dict[tuple[int, int], Timed] = field(default_factory=dict)
    placed: dict[Instruction, Timed] = field(default_factory=dict)
    can_start: list[tuple[float, int, int, Instruction]] = field(default_factory=list)

    def enter(self, program: tuple[Instruction, ...], written: set[object]) -> None:
        """Notes what the instructions of one core wait for."""
        last: dict[Lane, Instruction] = {}
        for step, needs in zip(program, dependences(program, written), strict=True):
            mine = self.waiting[step] = _Waiting(step, cost(step, self.target), len(needs))
            for need in needs:
                self.consumers[program[need.producer]].append((step, need.is_result))
            if mine.cost.lane in last:
                self.next_in_lane[last[mine.cost.lane]] = step
                mine.missing += 1
            last[mine.cost.lane] = step

    def place_all(self) -> None:
        """Gives every instruction its time."""
        for step in list(self.waiting):
            self._offer(step)
        while self.can_start:
            *_, step = heapq.heappop(self.can_start)
            both = [s for s in (step, step.peer) if s is not None]
            made = [self._place(self.waiting.pop(s)) for s in both]
            end = max(t.end for t in made)
            for timed in made:
                self._settle(replace(timed, end=end))
        if self.waiting:
            stuck = next(iter(self.waiting))
            raise ValueError(
                f"instructions wait for each other in a circle; one of them is {stuck}"
            )

    def _offer(self, step: Instruction) -> None:
        """It can start once nothing is missing, an exchange once both sides are there."""
        mine = self.waiting[step]
        sides = [mine] if step.peer is None else [mine, self.waiting[step.peer]]
        if mine.offered or any(side.missing for side in sides):
            return
        later = max(sides, key=lambda side: side.ready)
        for side in sides:
            side.offered = True
            side.ready, side.waited, side.begin = later.ready, later.waited, later.begin
        works = mine.ready + mine.cost.fixed
        heapq.heappush(self.can_start, (works, step.core, step.index, step))

    def _place(self, mine: _Waiting) -> Timed:
        """The time of an instruction, and of the queues it takes."""
        price, core, start = mine.cost, mine.step.core, mine.ready
        moving = start + price.fixed
        queues = self._take(core, price, moving)
        waited, begin, end = mine.waited, mine.begin, moving + price.work
        if queues:
            last = max(queues, key=lambda busy: busy.end)
            end = last.end
            if last.start > moving:  # it moves its data late: another transfer held it up
                waited, begin = self.last_user[core, last.queue], last.start
        return Timed(mine.step, price, start, start + price.held, end, queues, waited, begin)

    def _take(self, core: int, price: Cost, moving: float) -> tuple[Busy, ...]:
        """The queues that are free first, from when they are."""
        free = self.queues[core]
        if price.gpsimd_dma:
            chosen = [GPSIMD_DMA]
        elif price.queues in (0, QUEUES):
            chosen = list(range(price.queues))
        else:
            chosen = sorted(range(QUEUES), key=free.__getitem__)[: price.queues]
        taken = []
        for queue in chosen:
            start = max(free[queue], moving)
            free[queue] = start + price.work
            taken.append(Busy(queue, start, free[queue]))
        return tuple(taken)

    def _settle(self, timed: Timed) -> None:
        """Lets go what waited for it."""
        step = timed.step
        self.placed[step] = timed
        for busy in timed.queues:
            self.last_user[step.core, busy.queue] = timed
        for consumer, is_result in self.consumers.pop(step, ()):
            theirs = self.waiting[consumer]
            latency = self._semaphore(timed, theirs.cost.lane, is_result=is_result)
            theirs.let_go(timed, timed.end, latency)
            self._offer(consumer)
        if step in self.next_in_lane:
            follower = self.next_in_lane.pop(step)
            self.waiting[follower].let_go(timed, timed.released, 0.0)
            self._offer(follower)

    def _semaphore(self, producer: Timed, lane: Lane, *, is_result: bool) -> float:
        """From the end of a producer to the start of what waits for it in `lane`.

        The start of a DMA includes it. An engine follows itself at once, but for results that it
        reads back; the Tensor engine accumulates in PSUM without waiting.
        """
        same_engine = producer.cost.lane is lane and not producer.queues
        if lane.is_dma or (same_engine and (lane is Lane.tensor or not is_result)):
            return 0.0
        return CONSTANTS["semaphore"].value / clock_ghz(lane, self.target)
