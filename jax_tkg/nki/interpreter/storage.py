"""Storages: what a tensor's declaration says of its memory, without the bytes.

Instructions, checks and reports refer to storages, and so may outlive the bytes, which belong to
the tensors (`contents.py`).
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple

from jax_tkg.nki.interpreter.dtypes import DType
from jax_tkg.nki.interpreter.errors import Source


class MemoryRegion(enum.Enum):
    """Where a tensor lives."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    def __init__(self, region: str) -> None:
        self.is_on_chip = region in ("sbuf", "psum")  # asked so often that a property is slow


class Box(NamedTuple):
    """A rectangle of bytes: partitions [p0, p1), bytes [b0, b1) of each; HBM has one partition."""

    p0: int
    p1: int
    b0: int
    b1: int

    def overlaps(self, other: "Box") -> bool:
        """Some byte is in both."""
        return (
            self.p0 < other.p1 and other.p0 < self.p1 and self.b0 < other.b1 and other.b0 < self.b1
        )

    def moved(self, partitions: int, offset: int) -> "Box":
        """The same rectangle elsewhere."""
        return Box(self.p0 + partitions, self.p1 + partitions, self.b0 + offset, self.b1 + offset)

    def common(self, other: "Box") -> "Box":
        """What is in both, where they overlap."""
        return Box(
            max(self.p0, other.p0),
            min(self.p1, other.p1),
            max(self.b0, other.b0),
            min(self.b1, other.b1),
        )

    def around(self, other: "Box") -> "Box":
        """The smallest box around both."""
        return Box(
            min(self.p0, other.p0),
            max(self.p1, other.p1),
            min(self.b0, other.b0),
            max(self.b1, other.b1),
        )

    @property
    def rows(self) -> tuple[slice, slice]:
        """The index of its bytes in an array `[partitions, bytes]`."""
        return slice(self.p0, self.p1), slice(self.b0, self.b1)


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """What one `nl.ndarray` declares. On chip it is rows of bytes, one row a partition; in HBM one.

    Attributes:
        region: where.
        shape: as declared; the first axis is the partition of an on-chip tensor.
        dtype: as declared.
        name: the kernel's name for it, or one made from its number.
        source: the line that declares it.
        core: index of the core it belongs to; -1 for HBM shared by all.
        address: (partition, byte) in its memory, if the kernel gave one.
        row_bytes: bytes a partition; all bytes of an HBM tensor.
    """

    region: MemoryRegion
    shape: tuple[int, ...]
    dtype: DType
    name: str
    source: Source
    core: int
    address: tuple[int, int] | None
    row_bytes: int

    @property
    def partitions(self) -> int:
        """Rows of bytes."""
        return self.shape[0] if self.region.is_on_chip else 1

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.partitions * self.row_bytes

    @property
    def box(self) -> Box:
        """All of it, in the coordinates of its memory."""
        p, b = self.address or (0, 0)
        return Box(p, p + self.partitions, b, b + self.row_bytes)

    @property
    def memory(self) -> tuple[int, MemoryRegion] | None:
        """Which memory it has an address in; storages there may share bytes."""
        return None if self.address is None else (self.core, self.region)
