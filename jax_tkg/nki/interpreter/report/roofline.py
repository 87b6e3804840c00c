"""The least HBM traffic of a run: every byte once."""

from collections import defaultdict
from dataclasses import dataclass, field

from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.storage import Box, Storage

Piece = tuple[int, int]


@dataclass
class _Touched:
    """What all transfers together touch of a storage.

    A transfer that moves less than its box holds has gaps in it, and nobody knows where.
    """

    whole: list[Piece] = field(default_factory=list)
    gappy: list[Piece] = field(default_factory=list)
    gappy_bytes: int = 0

    def add(self, box: Box, moved: int) -> None:
        """One transfer."""
        if moved >= box.b1 - box.b0:
            self.whole.append((box.b0, box.b1))
        else:
            self.gappy.append((box.b0, box.b1))
            self.gappy_bytes += moved

    def distinct(self) -> int:
        """Bytes touched at least once: with gaps, at most all that is in the boxes."""
        return min(_union(self.whole) + self.gappy_bytes, _union(self.whole + self.gappy))


def _union(pieces: list[Piece]) -> int:
    total, end = 0, 0
    for first, last in sorted(pieces):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def hbm_bytes(run: Run) -> int:
    """Distinct bytes of HBM that the DMAs of all cores read, plus distinct bytes they write."""
    touched: dict[tuple[Storage, bool], _Touched] = defaultdict(_Touched)
    for step in (step for program in run.programs for step in program):
        if step.transfer is None:
            continue
        for is_write, accesses in ((False, step.reads), (True, step.writes)):
            for access in accesses:
                if not access.storage.region.is_on_chip:
                    touched[access.storage, is_write].add(access.box, step.transfer.bytes)
    return sum(part.distinct() for part in touched.values())
