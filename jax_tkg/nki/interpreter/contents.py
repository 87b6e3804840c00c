"""The bytes of storages, and what is known of each: was it written, by whom is it lost.

Tensors own them: contents go with the last view of their storage. Those of a storage with an
address are a window of the memory it lies in, so that overlapping tensors really share bytes; one
without has bytes of its own, as the compiler would give it a place that nobody else uses while it
lives.

In exact mode every byte of the device has a slot of four bytes here, so that every float type is
kept as float32 at the address it would have.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.dtypes import DType
from jax_tkg.nki.interpreter.errors import CapacityError, DeadTensorError, Source, kernel_line
from jax_tkg.nki.interpreter.hardware import NUM_PARTITIONS
from jax_tkg.nki.interpreter.storage import Box, MemoryRegion, Storage

NEVER_WRITTEN = 0xFF  # every float type reads NaN from these bytes
EXACT_SLOT = 4


@dataclass(frozen=True)
class Overwritten:
    """A part of a storage that a write through another one has changed."""

    box: Box
    by: Storage
    source: Source


@dataclass(eq=False, slots=True)
class Contents:
    """What a storage holds.

    Attributes:
        storage: whose they are.
        exact: see the module.
        base, origin, pitch: the bytes in this process: a flat array, the index of the first byte,
            the distance of two partitions.
        written: which bytes were written, `[partitions, row_bytes]`; None once all were.
        accumulated: PSUM: which bytes hold the result of a matmul.
        stale: which bytes a write through another storage has changed since they were written.
        overwritten: by whom.
        copy_on_write: the bytes belong to the caller.
    """

    storage: Storage
    exact: bool
    base: np.ndarray
    origin: int
    pitch: int
    written: np.ndarray | None
    accumulated: np.ndarray | None = None
    stale: np.ndarray | None = None
    overwritten: dict[Storage, Overwritten] = field(default_factory=dict)
    copy_on_write: bool = False

    @classmethod
    def new(cls, storage: Storage, *, exact: bool) -> "Contents":
        """Bytes of its own that nobody has written."""
        scale = EXACT_SLOT if exact else 1
        base = np.full(storage.size * scale, NEVER_WRITTEN, np.uint8)
        made = cls(storage, exact, base, 0, storage.row_bytes * scale, _no_flags(storage))
        made._start_psum()
        return made

    @classmethod
    def placed(cls, storage: Storage, memory: "Memory") -> "Contents":
        """The bytes of a memory at the storage's address.

        Raises:
            CapacityError: if it does not fit there.
        """
        origin = memory.find(storage)
        made = cls(storage, memory.exact, memory.bytes(), origin, memory.pitch, _no_flags(storage))
        made._start_psum()
        return made

    @classmethod
    def of_caller(cls, storage: Storage, array: np.ndarray) -> "Contents":
        """The caller's bytes, all of them written."""
        base = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return cls(storage, False, base, 0, storage.row_bytes, None, copy_on_write=True)

    def _start_psum(self) -> None:
        if self.storage.region is MemoryRegion.psum:
            self.accumulated = _no_flags(self.storage)

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
        if self.storage.region.is_on_chip:
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
        strides, row_bytes = tuple(steps), self.storage.row_bytes
        if self.storage.region.is_on_chip:
            strides = (row_bytes, *strides)
        return np.ndarray(
            shape,
            f"u{itemsize}",
            buffer=which,
            offset=partition * row_bytes + byte,
            strides=strides,
        )

    def own_bytes(self) -> None:
        """Before the first write to bytes that belong to the caller: takes a copy."""
        if self.copy_on_write:
            self.base, self.copy_on_write = self.base.copy(), False

    def revive(self, flags: Callable[[np.ndarray], np.ndarray]) -> None:
        """Before their entries are written: they are nobody else's now."""
        if self.stale is not None:
            flags(self.stale)[...] = 0
            if not self.stale.any():
                self.stale, self.overwritten = None, {}

    def lose(self, absolute: Box, by: Storage, touched: np.ndarray | None, source: Source) -> None:
        """Notes bytes that a write through another storage has changed.

        Args:
            absolute: the box around them, in the coordinates of the memory.
            by: the other storage.
            touched: a byte map of it; None where they are all of the box.
            source: the kernel's line.
        """
        mine = self.storage
        assert mine.address is not None
        assert by.address is not None
        if self.stale is None:
            self.stale = _no_flags(mine)
        box = absolute.moved(-mine.address[0], -mine.address[1])
        lost = self.stale.reshape(mine.partitions, -1)[box.rows]
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
            flags: takes a byte map of these contents to their entries.
        """
        if self.stale is None or not flags(self.stale).any():
            return
        changes = list(self.overwritten.values())[::-1]
        change = next((o for o in changes if o.box.overlaps(box)), changes[0])
        raise DeadTensorError(
            "memory.dead-tensor",
            f"reads {self.storage.name} (declared at {self.storage.source}), but {change.by.name} "
            f"lies at the same address and was written at {change.source}. Read it before, or "
            "give one of them another address; to see the same bytes in two ways take a "
            "view of one tensor.",
            kernel_line(),
            change.source,
        )


def all_set(flags: np.ndarray) -> np.generic:
    """What the entries of a byte map, as `Contents.flags` sees it, are where all bytes are set."""
    return np.invert(flags.dtype.type(0))


def _no_flags(storage: Storage) -> np.ndarray:
    """A byte map of a storage, nothing set."""
    return np.zeros(storage.size, np.uint8)


class Memory:
    """SBUF or PSUM of one core: the bytes that tensors with an address lie in."""

    def __init__(self, region: MemoryRegion, row_bytes: int, *, exact: bool) -> None:
        self.region, self.row_bytes, self.exact = region, row_bytes, exact
        self._addressed: dict[Contents, None] = {}  # those with bytes that are not stale
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

    def find(self, storage: Storage) -> int:
        """Index of the first byte of a storage that has an address here.

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
        return partition * self.pitch + byte * (EXACT_SLOT if self.exact else 1)

    def note_write(
        self,
        contents: Contents,
        box: Box,
        flags: Callable[[np.ndarray], np.ndarray],
        source: Source,
        *,
        is_dense: bool,
    ) -> None:
        """Tells those that lie at the same addresses; what is written lives again.

        Args:
            contents: what was written to.
            box: around the bytes written.
            flags: takes a byte map of the contents to their entries.
            source: the kernel's line.
            is_dense: they are all of the box.
        """
        storage = contents.storage
        assert storage.address is not None
        contents.revive(flags)
        self._addressed[contents] = None
        absolute, touched = box.moved(*storage.address), None
        for other in list(self._addressed):
            if other is contents or not other.storage.box.overlaps(absolute):
                continue
            if touched is None and not is_dense:
                touched = _no_flags(storage)
                flags(touched)[...] = all_set(flags(touched))
            other.lose(absolute.common(other.storage.box), storage, touched, source)
            assert other.stale is not None
            if other.stale.all():
                del self._addressed[other]
