"""The bytes behind tensors.

A storage is what one `nl.ndarray` declares. On chip it is rows of bytes, one row a partition; in
HBM one row. A storage with an explicit address is a window of the memory it lies in, so that
overlapping tensors really share bytes; one without has bytes of its own, as the compiler would give
it a place that nobody else uses while it lives.

In exact mode every byte of the device has a slot of four bytes here, so that every float type is
kept as float32 at the address it would have.
"""

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.dtypes import DType
from jax_tkg.nki.interpreter.errors import CapacityError, DeadTensorError, Source, kernel_line
from jax_tkg.nki.interpreter.hardware import NUM_PARTITIONS

NEVER_WRITTEN = 0xFF  # every float type reads NaN from these bytes
EXACT_SLOT = 4


class MemoryRegion(enum.Enum):
    """Where a tensor lives."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    @property
    def is_on_chip(self) -> bool:
        """SBUF or PSUM."""
        return self in (MemoryRegion.sbuf, MemoryRegion.psum)


@dataclass(frozen=True)
class Box:
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


@dataclass
class Overwritten:
    """A part of a storage that a write through another one has changed."""

    box: Box
    by: "Storage"
    source: Source


@dataclass(eq=False)
class Storage:
    """What one declaration of a tensor owns.

    Attributes:
        region: where.
        shape: as declared; the first axis is the partition of an on-chip tensor.
        dtype: as declared.
        name: the kernel's name for it, or one made from its number.
        source: the line that declares it.
        core: index of the core it belongs to; -1 for HBM shared by all.
        address: (partition, byte) in its memory, if the kernel gave one.
        row_bytes: bytes a partition; all bytes of an HBM tensor.
        exact: see the module.
        base, origin, pitch: the bytes in this process: a flat array, the index of the first byte,
            the distance of two partitions.
        written: which bytes were written, `[partitions, row_bytes]`; None once all were.
        accumulated: PSUM: which bytes hold the result of a matmul.
        stale: which bytes a write through another storage has changed since they were written.
        overwritten: by whom.
    """

    region: MemoryRegion
    shape: tuple[int, ...]
    dtype: DType
    name: str
    source: Source
    core: int
    address: tuple[int, int] | None
    row_bytes: int
    exact: bool
    base: np.ndarray
    origin: int
    pitch: int
    written: np.ndarray | None
    accumulated: np.ndarray | None = None
    stale: np.ndarray | None = None
    overwritten: dict["Storage", Overwritten] = field(default_factory=dict)
    memory: "Memory | None" = None
    copy_on_write: bool = False
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def partitions(self) -> int:
        """Rows of bytes."""
        return self.shape[0] if self.region.is_on_chip else 1

    @property
    def box(self) -> Box:
        """All of it, in the coordinates of its memory."""
        p, b = self.address or (0, 0)
        return Box(p, p + self.partitions, b, b + self.row_bytes)

    def numpy_dtype(self, dtype: DType) -> np.dtype:
        """What an element of `dtype` is in this process."""
        if not self.exact or dtype.itemsize == 4:
            return dtype.numpy
        return np.dtype(np.float32) if dtype.is_float else dtype.numpy

    def array(
        self, dtype: DType, partition: int, byte: int, shape: tuple[int, ...], steps: Any
    ) -> np.ndarray:
        """A NumPy view of elements of `dtype`.

        Args:
            dtype: their type.
            partition: the first partition.
            byte: the first byte in it.
            shape: of the view.
            steps: bytes of the device between neighbours on each axis but that of partitions.
        """
        scale = EXACT_SLOT if self.exact else 1
        strides = tuple(s * scale for s in steps)
        if self.region.is_on_chip:
            strides = (self.pitch, *strides)
        return np.ndarray(
            shape,
            self.numpy_dtype(dtype),
            buffer=self.base,
            offset=self.origin + partition * self.pitch + byte * scale,
            strides=strides,
        )

    def flags(
        self,
        which: np.ndarray,
        itemsize: int,
        partition: int,
        byte: int,
        shape: tuple[int, ...],
        steps: Any,
    ) -> np.ndarray:
        """The view of a byte map (`written`, `accumulated`) that belongs to `array`'s elements."""
        strides = tuple(steps)
        if self.region.is_on_chip:
            strides = (self.row_bytes, *strides)
        return np.ndarray(
            shape,
            f"u{itemsize}",
            buffer=which,
            offset=partition * self.row_bytes + byte,
            strides=strides,
        )

    def own_bytes(self) -> None:
        """Before the first write to bytes that belong to the caller: takes a copy."""
        if self.copy_on_write:
            self.base, self.copy_on_write = self.base.copy(), False

    def note_write(
        self,
        box: Box,
        flags: Callable[[np.ndarray], np.ndarray],
        source: Source,
        *,
        is_dense: bool,
    ) -> None:
        """Tells storages that lie at the same addresses; what is written here lives again.

        Args:
            box: around the bytes written.
            flags: takes a byte map of this storage to their entries.
            source: the kernel's line.
            is_dense: they are all of the box.
        """
        if self.memory is None or self.address is None:
            return
        if self.stale is not None:
            flags(self.stale)[...] = 0
            if not self.stale.any():
                self.stale, self.overwritten = None, {}
        self.memory.addressed[self] = None
        absolute, touched = box.moved(*self.address), None
        for other in list(self.memory.addressed):
            if other is self or not other.box.overlaps(absolute):
                continue
            if touched is None and not is_dense:
                touched = np.zeros(self.partitions * self.row_bytes, np.uint8)
                flags(touched)[...] = np.iinfo(flags(touched).dtype).max
            other._lose(absolute.common(other.box), self, touched, source)
            assert other.stale is not None
            if other.stale.all():
                del self.memory.addressed[other]

    def _lose(
        self, absolute: Box, by: "Storage", touched: np.ndarray | None, source: Source
    ) -> None:
        """Notes bytes that a write through another storage changed: the box, or those touched."""
        assert self.address is not None
        assert by.address is not None
        if self.stale is None:
            self.stale = np.zeros(self.partitions * self.row_bytes, np.uint8)
        box = absolute.moved(-self.address[0], -self.address[1])
        lost = self.stale.reshape(self.partitions, -1)[box.rows]
        if touched is None:
            lost[...] = 0xFF
        else:
            there = absolute.moved(-by.address[0], -by.address[1])
            lost |= touched.reshape(by.partitions, -1)[there.rows]
        before = self.overwritten.pop(by, None)
        self.overwritten[by] = Overwritten(box.around(before.box) if before else box, by, source)

    def check_alive(self, box: Box, flags: Callable[[np.ndarray], np.ndarray]) -> None:
        """Refuses to read what a write through another tensor has changed.

        Args:
            box: around the bytes read.
            flags: takes a byte map of this storage to their entries.
        """
        if self.stale is None or not flags(self.stale).any():
            return
        changes = list(self.overwritten.values())[::-1]
        change = next((o for o in changes if o.box.overlaps(box)), changes[0])
        raise DeadTensorError(
            "memory.dead-tensor",
            f"reads {self.name} (declared at {self.source}), but {change.by.name} lies at "
            f"the same address and was written at {change.source}. Read it before, or "
            "give one of them another address; to see the same bytes in two ways take a "
            "view of one tensor.",
            kernel_line(),
            change.source,
        )


class Memory:
    """SBUF or PSUM of one core: the bytes that tensors with an address lie in."""

    def __init__(self, region: MemoryRegion, row_bytes: int, *, exact: bool) -> None:
        self.region, self.row_bytes, self.exact = region, row_bytes, exact
        self.addressed: dict[Storage, None] = {}  # those with bytes that are not stale
        self._bytes: np.ndarray | None = None

    @property
    def pitch(self) -> int:
        """Distance of two partitions in this process."""
        return self.row_bytes * (EXACT_SLOT if self.exact else 1)

    def bytes(self) -> np.ndarray:
        """The bytes; they exist from the first tensor with an address on."""
        if self._bytes is None:
            self._bytes = np.full(NUM_PARTITIONS * self.pitch, NEVER_WRITTEN, np.uint8)
        return self._bytes

    def place(self, storage: Storage) -> None:
        """Puts a storage that has an address there.

        Raises:
            CapacityError: if it does not fit.
        """
        assert storage.address is not None
        partition, byte = storage.address
        if (
            min(partition, byte) < 0
            or partition + storage.partitions > NUM_PARTITIONS
            or byte + storage.row_bytes > self.row_bytes
        ):
            raise CapacityError(
                f"memory.{self.region.value}-capacity",
                f"{storage.name} {storage.shape} {storage.dtype} at address {storage.address} "
                f"needs partitions up to {partition + storage.partitions} and bytes up to "
                f"{byte + storage.row_bytes}; {self.region.value} has {NUM_PARTITIONS} partitions "
                f"of {self.row_bytes} bytes. Use a lower address or a smaller tile.",
            )
        storage.base, storage.pitch = self.bytes(), self.pitch
        scale = EXACT_SLOT if self.exact else 1
        storage.origin = partition * self.pitch + byte * scale
        storage.memory = self
