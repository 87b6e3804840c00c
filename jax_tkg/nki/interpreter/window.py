"""From a view to the bytes it touches: bounds, run-time offsets, the record of what was written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jax_tkg.nki.interpreter.contents import all_set
from jax_tkg.nki.interpreter.errors import (
    NkiValidationError,
    OutOfBoundsError,
    UninitializedReadError,
)
from jax_tkg.nki.interpreter.races import Touched
from jax_tkg.nki.interpreter.storage import Box
from jax_tkg.nki.interpreter.tensor import NkiTensor


class Window(NamedTuple):
    """The bytes of a view whose run-time offset, if any, is known.

    Attributes:
        tensor: the view.
        partition, byte: of the first element, in the storage.
        steps: bytes between neighbours on each axis but that of partitions.
        box: the smallest box around all elements.
    """

    tensor: NkiTensor
    partition: int
    byte: int
    steps: tuple[int, ...]
    box: Box

    def array(self) -> np.ndarray:
        """The elements, as a NumPy view."""
        t = self.tensor
        return t.contents.array(t.dtype, self.partition, self.byte, t.shape, self.steps)

    def flags(self, which: np.ndarray) -> np.ndarray:
        """The elements' entries of a byte map."""
        t = self.tensor
        return t.contents.flags(
            which, t.dtype.itemsize, self.partition, self.byte, t.shape, self.steps
        )

    @property
    def is_dense(self) -> bool:
        """Every byte of the box is an element's, if no two elements share one."""
        box, size = self.box, self.tensor.size * self.tensor.dtype.itemsize
        return (box.p1 - box.p0) * (box.b1 - box.b0) == size

    @property
    def touched(self) -> Touched:
        """All bytes, of a tensor in HBM."""
        t = self.tensor
        return Touched((self.byte,), t.shape, self.steps, t.dtype.itemsize)

    def check_written(self) -> None:
        """Refuses to read bytes that nobody wrote."""
        if self.is_written():
            return
        t, written = self.tensor, self.tensor.contents.written
        assert written is not None
        missing = np.argwhere(~_all_bytes(self.flags(written)))[0]
        raise UninitializedReadError(
            "memory.never-written",
            f"reads {t!r}, of which element {tuple(int(i) for i in missing)} was never written "
            f"(declared at {t.storage.source}). Write it first, by a memset, a copy or a load of "
            "the whole tile, or read only the part that was written.",
        )

    def is_written(self, kept: np.ndarray | None = None) -> bool:
        """Whether all elements were written, or those of a `[partitions, elements]` choice."""
        written = self.tensor.contents.written
        if written is None:
            return True
        whole = _all_bytes(self.flags(written))
        return bool(whole.all() if kept is None else whole.reshape(kept.shape)[kept].all())

    def mark_written(self) -> None:
        """Notes that these bytes hold values."""
        storage, contents = self.tensor.storage, self.tensor.contents
        if contents.written is None:
            return
        whole = self.box.b1 - self.box.b0 == storage.row_bytes and (
            self.box.p1 - self.box.p0 == storage.partitions
        )
        size = self.tensor.size * self.tensor.dtype.itemsize
        if whole and size == storage.size:
            contents.written = None  # all of it, each element once: strides of 0 are refused
            return
        flags = self.flags(contents.written)
        flags[...] = all_set(flags)
        if whole and contents.written.all():
            contents.written = None


def _all_bytes(flags: np.ndarray) -> np.ndarray:
    """Which elements have the flags of all their bytes set."""
    return flags == all_set(flags)


def window(tensor: NkiTensor, extra: int = 0) -> Window:
    """The bytes of a view, moved by `extra` elements.

    Raises:
        OutOfBoundsError: if some are outside its storage.
    """
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    offset = tensor.offset + extra
    first_free = 1 if tensor.is_on_chip else 0
    shape, strides = tensor.shape[first_free:], tensor.strides[first_free:]
    partition, start = 0, tensor.offset
    if first_free:
        partition, start = divmod(start, tensor.row_elements)
    start += extra  # a run-time index moves within the partition
    last = lowest = start
    for n, stride in zip(shape, strides, strict=True):
        if stride >= 0:
            last += (n - 1) * stride
        else:
            lowest += (n - 1) * stride
    partitions = tensor.shape[0] if first_free else 1
    if (
        lowest < 0
        or last >= tensor.row_elements
        or partition < 0
        or partition + partitions > storage.partitions
    ):
        raise OutOfBoundsError(
            "memory.out-of-bounds",
            f"{tensor!r} with pattern {tensor.get_pattern()} from offset {offset} leaves "
            f"{storage.name} of shape {list(storage.shape)} (declared at {storage.source}): it "
            f"reaches elements {lowest} to {last} of {tensor.row_elements}"
            + (f" of partitions {partition} to {partition + partitions - 1}" * first_free)
            + ".",
        )
    box = Box(partition, partition + partitions, lowest * itemsize, (last + 1) * itemsize)
    steps = tuple(s * itemsize for s in strides)
    return Window(tensor, partition, start * itemsize, steps, box)


def index_value(index: Any) -> int:
    """The value of a run-time index of one element: a register or a tensor in SBUF."""
    if isinstance(index, NkiTensor):
        if index.size != 1:
            raise NkiValidationError(
                "dma.scalar-offset", f"{index!r} as one offset for all: needs one element."
            )
        where = window(index)
        where.check_written()
        return int(where.array().reshape(-1)[0])
    return int(index.register_value)


def scalar_shift(tensor: NkiTensor) -> int:
    """Elements by which the run-time offset of a view moves it.

    Raises:
        OutOfBoundsError: if the index leaves its axis.
    """
    indirect = tensor.indirect_offset
    if indirect is None:
        return 0
    if indirect.is_vector:
        raise NkiValidationError(
            "view.vector-offset", f"{tensor!r}: an offset for each row works in DMA only."
        )
    value = index_value(indirect.index)
    if not 0 <= value < indirect.limit:
        raise OutOfBoundsError(
            "memory.run-time-index",
            f"run-time index {value} of {tensor!r}; it must be 0 to {indirect.limit - 1}.",
        )
    return value * indirect.stride


@dataclass(frozen=True)
class ChosenRows:
    """The rows that a view with an offset a row touches, once the offsets are known.

    Attributes:
        tensor: the view.
        rows: `[n]`, the row of each; 0 where the offset is outside.
        inside: `[n]`, which offsets are inside their axis.
    """

    tensor: NkiTensor
    rows: np.ndarray
    inside: np.ndarray

    def _all(self, make: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
        """`make` over every row that an offset may choose, `[rows, ...]`."""
        t, indirect = self.tensor, self.tensor.indirect_offset
        assert indirect is not None
        size = t.dtype.itemsize
        reach = sum((n - 1) * s for n, s in zip(t.shape[1:], t.strides[1:], strict=True))
        left = t.storage.row_bytes // size - 1 - reach - t.offset
        fitting = left // max(1, indirect.stride) + 1  # an axis of one row has stride 0
        count = min(indirect.limit, fitting)
        if self.inside.any() and int(self.rows.max()) >= count:
            raise OutOfBoundsError(
                "memory.out-of-bounds", f"row {int(self.rows.max())} of {t!r} leaves it."
            )
        steps = tuple(s * size for s in (indirect.stride, *t.strides[1:]))
        return make(*args, 0, t.offset * size, (count, *t.shape[1:]), steps)

    def all_values(self) -> np.ndarray:
        """Every row, a view of memory."""
        return self._all(self.tensor.contents.array, self.tensor.dtype)

    def all_flags(self, which: np.ndarray) -> np.ndarray:
        """Every row's entries of a byte map."""
        return self._all(self.tensor.contents.flags, which, self.tensor.dtype.itemsize)

    def restricted(self, which: np.ndarray) -> "ChosenRows":
        """With fewer rows inside."""
        return ChosenRows(self.tensor, self.rows, self.inside & which)

    @property
    def box(self) -> Box:
        """Around the rows inside."""
        t, indirect = self.tensor, self.tensor.indirect_offset
        assert indirect is not None
        starts = t.offset + self.rows[self.inside] * indirect.stride
        reach = sum((n - 1) * s for n, s in zip(t.shape[1:], t.strides[1:], strict=True))
        size = t.dtype.itemsize
        return Box(0, 1, int(starts.min()) * size, (int(starts.max()) + reach + 1) * size)

    @property
    def touched(self) -> Touched:
        """All bytes of the rows inside."""
        t, indirect, size = self.tensor, self.tensor.indirect_offset, self.tensor.dtype.itemsize
        assert indirect is not None
        starts = (t.offset + self.rows[self.inside] * indirect.stride) * size
        return Touched(starts, t.shape[1:], tuple(s * size for s in t.strides[1:]), size)


def chosen_rows(tensor: NkiTensor) -> ChosenRows:
    """What the offsets of a view with an offset a row choose."""
    indirect = tensor.indirect_offset
    assert indirect is not None
    assert indirect.is_vector
    where = window(indirect.index)
    where.check_written()
    rows = where.array().T.reshape(-1)[: tensor.shape[0]].astype(np.int64)
    if rows.size < tensor.shape[0]:
        raise NkiValidationError(
            "dma.vector-offset", f"{rows.size} offsets for {tensor.shape[0]} rows of {tensor!r}."
        )
    inside = (rows >= 0) & (rows < indirect.limit)
    return ChosenRows(tensor, np.where(inside, rows, 0), inside)


def repeats_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices of a view mean one element."""
    axes = sorted((abs(stride), n) for n, stride in zip(shape, strides, strict=True) if n > 1)
    reach = 0
    for stride, n in axes:
        if stride <= reach or stride == 0:
            break
        reach += stride * (n - 1)
    else:
        return False
    offsets = np.array([0])
    for stride, n in axes:
        offsets = np.add.outer(offsets, np.arange(n) * stride).ravel()
    return bool(np.unique(offsets).size < offsets.size)


def contiguous_run(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of the longest piece, from the last axis inwards out, that lies in one run."""
    run = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if stride != run:
            break
        run *= n
    return min(run, math.prod(shape))


__all__ = [
    "ChosenRows",
    "Window",
    "chosen_rows",
    "contiguous_run",
    "index_value",
    "repeats_elements",
    "scalar_shift",
    "window",
]
