"""Which instructions of a program must wait for which: the memory they share, and `after`.

Two accesses conflict if `Access.overlaps` says so and one of them writes. Boxes are the smallest
around an access, so that interleaved accesses with gaps count as conflicts. Comparing all pairs
would be quadratic: each memory is kept as a row of cells of bytes, and a cell knows only what a
later access can still have to wait for.
"""

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from jax_tkg.nki.interpreter.record import Access, Instruction
from jax_tkg.nki.interpreter.report.costs import lane
from jax_tkg.nki.interpreter.storage import Box, MemoryRegion, Storage


@dataclass(frozen=True)
class Dependence:
    """An instruction that must have ended.

    Attributes:
        producer: its index in the program.
        is_result: the waiting instruction reads what it wrote; else it only must not overtake it.
    """

    producer: int
    is_result: bool


@dataclass(frozen=True)
class _Use:
    """Partitions [p0, p1) of a cell, as an instruction used them."""

    p0: int
    p1: int
    step: int


_Uses = dict[Hashable, _Use]


@dataclass
class _Cell:
    """Bytes that have always been used together."""

    writes: _Uses = field(default_factory=dict)
    reads: _Uses = field(default_factory=dict)

    def copy(self) -> "_Cell":
        return _Cell(dict(self.writes), dict(self.reads))


class _Memory:
    """The bytes of a partition, cut at the ends of all accesses so far."""

    def __init__(self) -> None:
        self._starts, self._cells = [0], [_Cell()]

    def _cut(self, byte: int) -> int:
        at = bisect_left(self._starts, byte)
        if at == len(self._starts) or self._starts[at] != byte:
            self._starts.insert(at, byte)
            self._cells.insert(at, self._cells[at - 1].copy())
        return at

    def read(self, box: Box, key: Hashable, step: int) -> Iterator[Dependence]:
        """Notes a read; gives the writes it must wait for."""
        first, end = self._cut(box.b0), self._cut(box.b1)
        for cell in self._cells[first:end]:
            yield from (Dependence(i, True) for i in _overlapping(cell.writes, box))
            cell.reads[key, box.p0, box.p1] = _Use(box.p0, box.p1, step)

    def write(self, box: Box, key: Hashable, step: int) -> Iterator[Dependence]:
        """Notes a write; gives the reads and writes it must wait for."""
        first, end = self._cut(box.b0), self._cut(box.b1)
        only = True
        for cell in self._cells[first:end]:
            yield from (Dependence(i, False) for i in _overlapping(cell.writes, box))
            yield from (Dependence(i, False) for i in _overlapping(cell.reads, box))
            cell.writes, cell.reads = _uncovered(cell.writes, box), _uncovered(cell.reads, box)
            only = only and not cell.writes and not cell.reads
            cell.writes[key, box.p0, box.p1] = _Use(box.p0, box.p1, step)
        if only:
            del self._starts[first + 1 : end], self._cells[first + 1 : end]


def _overlapping(uses: _Uses, box: Box) -> list[int]:
    return [u.step for u in uses.values() if u.p0 < box.p1 and box.p0 < u.p1]


def _uncovered(uses: _Uses, box: Box) -> _Uses:
    return {k: u for k, u in uses.items() if u.p0 < box.p0 or box.p1 < u.p1}


def _place(access: Access) -> tuple[Hashable, Box]:
    """The memory an access lies in, and its box there."""
    storage = access.storage
    if storage.address is None:
        return storage, access.box
    return storage.memory, access.box.moved(*storage.address)


def written_memories(programs: Iterable[Iterable[Instruction]]) -> set[Hashable]:
    """Memories that some instruction of a launch writes: all others need no waiting."""
    return {_place(w)[0] for program in programs for step in program for w in step.writes}


def dependences(
    program: Iterable[Instruction], written: set[Hashable]
) -> list[tuple[Dependence, ...]]:
    """What each instruction of a program waits for, besides the earlier ones of its lane.

    A `core_barrier` stands between the accesses before and after it to all shared HBM that the
    launch writes.

    Args:
        program: of one core, in order.
        written: from `written_memories`.
    """
    memories = {key: _Memory() for key in written}
    indices: dict[Instruction, int] = {}
    result = []
    for i, step in enumerate(program):
        found: dict[int, bool] = {}
        for edge in _conflicts(step, i, memories):
            found[edge.producer] = edge.is_result or found.get(edge.producer, False)
        found.pop(i, None)
        found.update({indices[a]: True for a in step.after if a in indices})
        indices[step] = i
        result.append(tuple(Dependence(p, r) for p, r in found.items()))
    return result


def _conflicts(
    step: Instruction, i: int, memories: dict[Hashable, _Memory]
) -> Iterator[Dependence]:
    """Notes what an instruction touches; gives what it must wait for, perhaps more than once."""
    # A later use by an engine ends later than an earlier one; DMAs overtake each other.
    key: Hashable = lane(step) if step.transfer is None else i
    for access in step.reads:
        where, box = _place(access)
        if where in memories:
            yield from memories[where].read(box, key, i)
    for access in step.writes:
        where, box = _place(access)
        yield from memories[where].write(box, key, i)
    if step.exchange == "barrier":
        for where, memory in memories.items():
            if isinstance(where, Storage) and where.region is MemoryRegion.shared_hbm:
                yield from memory.write(where.box, key, i)
