"""Data races between programs on shared HBM.

Each core has a clock per tensor, which `core_barrier(data=tensor)` advances on both cores: an
access is ordered with one of the other core exactly if their clocks for that tensor differ. (With
two cores and a barrier that both must reach, this is the vector clock reduced to one number.) A
`sendrecv` orders the tiles that it moves and nothing else: the DMA queues that write HBM do not
wait for it. Whether an interleaving happened to hide the race does not matter. A write of what is
there already is no race: programs that compute the same may store the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from jax_tkg.nki.interpreter.errors import DataRaceError, Source
from jax_tkg.nki.interpreter.storage import Box, Storage


@dataclass(frozen=True, slots=True)
class Touched:
    """Bytes of a tensor in HBM; all that is kept of a view for later, without the view.

    Attributes:
        starts: of runs of elements, in bytes.
        shape: of each.
        steps: bytes between neighbours on each of its axes.
        itemsize: bytes an element.
    """

    starts: np.ndarray | tuple[int, ...]
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    itemsize: int

    def positions(self) -> np.ndarray:
        """Index of every byte, in the storage."""
        at = np.asarray(self.starts)
        for n, step in zip(self.shape, self.steps, strict=True):
            at = (at[:, None] + np.arange(n) * step).ravel()
        return np.unique(at[:, None] + np.arange(self.itemsize))


@dataclass(frozen=True, slots=True)
class HbmAccess:
    """One access to shared HBM.

    Attributes:
        core: who.
        box: bytes from the first to the last.
        touched: all bytes; only asked where boxes overlap.
        source: the kernel's line.
        is_write: or a read.
        clock: the core's clock for the tensor, filled in by the detector.
    """

    core: int
    box: Box
    touched: Touched
    source: Source
    is_write: bool
    clock: int = 0

    @property
    def verb(self) -> str:
        """What it does."""
        return "writes" if self.is_write else "reads"

    def meets(self, other: "HbmAccess") -> bool:
        """Of two cores, neither ordered before the other, and with a byte in common."""
        return (
            self.core != other.core
            and self.clock == other.clock
            and self.box.overlaps(other.box)
            and bool(np.intersect1d(self.touched.positions(), other.touched.positions()).size)
        )


@dataclass
class _History:
    """Accesses to one tensor that a later one may race with, and the clocks of the cores."""

    reads: list[HbmAccess] = field(default_factory=list)
    writes: list[HbmAccess] = field(default_factory=list)
    clocks: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})

    def forget_ordered(self) -> None:
        """Drops what every core has a barrier after."""
        slowest = min(self.clocks.values())
        self.reads = [a for a in self.reads if a.clock >= slowest]
        self.writes = [a for a in self.writes if a.clock >= slowest]


class RaceDetector:
    """The accesses to shared HBM since the last barrier on each tensor."""

    def __init__(self) -> None:
        self._histories: dict[Storage, _History] = {}

    def barrier(self, core: int, storage: Storage) -> None:
        """Core `core` passed a barrier on the tensor."""
        history = self._histories.setdefault(storage, _History())
        history.clocks[core] += 1
        history.forget_ordered()

    def note(
        self,
        storage: Storage,
        access: HbmAccess,
        changes_nothing: Callable[[], bool] | None = None,
    ) -> None:
        """Remembers an access that is about to happen.

        Args:
            storage: what is accessed.
            access: how.
            changes_nothing: of a write, whether memory holds the values already.

        Raises:
            DataRaceError: if it races with an earlier one of another core.
        """
        history = self._histories.setdefault(storage, _History())
        mine = replace(access, clock=history.clocks[access.core])
        rivals = history.writes + history.reads if mine.is_write else history.writes
        other = next((a for a in rivals if mine.meets(a)), None)
        if other is not None and not (changes_nothing and changes_nothing()):
            raise DataRaceError(
                "programs.data-race",
                f"program {mine.core} {mine.verb} {storage.name}, program {other.core} "
                f"{other.verb} the same bytes at {other.source}, and no core_barrier on "
                f"{storage.name} stands between. Add nisa.core_barrier(data=..., cores=(0, 1)) "
                "after the write, or let each program touch its own part.",
                mine.source,
                other.source,
            )
        (history.writes if mine.is_write else history.reads).append(mine)
