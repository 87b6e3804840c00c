"""`NkiTensor`: a view of a storage, described by shape, strides and offset in elements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.interpreter.contents import Contents
from jax_tkg.nki.interpreter.dtypes import DType, as_dtype
from jax_tkg.nki.interpreter.errors import NkiValidationError, OutOfBoundsError
from jax_tkg.nki.interpreter.objects import NKIObject
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.strides import complete, reshape_strides, row_major


@dataclass(frozen=True)
class DynamicSlice:
    """`nl.ds(start, size)`: `size` elements from `start`, an int or a register."""

    start: Any
    size: int


@dataclass(frozen=True)
class Indirect:
    """An offset known only when the instruction runs.

    Attributes:
        index: a register, an SBUF tensor of one element (one offset for all), or for a vector one
            of `[P, 1]` (an offset for each partition of the result).
        stride: elements that one unit of the index moves.
        limit: units the index may take before it leaves the axis.
        is_vector: one offset a row.
    """

    index: Any
    stride: int
    limit: int
    is_vector: bool


def _refuse(rule: str, message: str) -> NkiValidationError:
    return NkiValidationError(f"view.{rule}", message)


class NkiTensor(NKIObject):
    """A view of memory.

    On-chip tensors keep the partition as axis 0 and at least two axes. `offset` and `strides` count
    elements of `dtype` in the storage read row by row, so a partition is as many elements apart as
    it has.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        contents: Contents,
        buffer: Any = None,
        name: str = "",
        *,
        strides: Sequence[int] | None = None,
        offset: int = 0,
        indirect: Indirect | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype: DType = as_dtype(dtype)
        self.contents, self.storage = contents, contents.storage
        self.buffer: MemoryRegion = self.storage.region
        self.is_on_chip = self.buffer.is_on_chip
        self.name = name or self.storage.name
        self.strides = row_major(self.shape) if strides is None else tuple(strides)
        self.offset = offset
        self.indirect_offset = indirect

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row_elements(self) -> int:
        """Elements of one partition of the storage."""
        return self.storage.row_bytes // self.dtype.itemsize

    @property
    def start_partition(self) -> int:
        """First partition, in the memory."""
        first = self.offset // self.row_elements if self.is_on_chip else 0
        return first + (self.storage.address or (0, 0))[0]

    @property
    def free_size(self) -> int:
        """Elements a partition."""
        return math.prod(self.shape[1:])

    def __repr__(self) -> str:
        """Name, shape, type, place."""
        return f"{self.name}{list(self.shape)} {self.dtype} in {self.buffer.value}"

    def is_contiguous(self) -> bool:
        """Whether the elements lie next to each other; of on-chip tensors in each partition."""
        first = 1 if self.is_on_chip else 0
        axes = [(n, s) for n, s in zip(self.shape, self.strides, strict=True)][first:]
        wanted = 1
        for n, stride in reversed(axes):
            if n != 1 and stride != wanted:
                return False
            wanted *= n
        return True

    def get_pattern(self) -> list[list[int]]:
        """`[[stride, count], ...]`, outermost first."""
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    def is_indirect(self) -> bool:
        """Whether an offset is known only at run time."""
        return self.indirect_offset is not None

    def _view(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        offset: int | None = None,
        indirect: Indirect | None = None,
        dtype: DType | None = None,
    ) -> "NkiTensor":
        return NkiTensor(
            shape,
            dtype or self.dtype,
            self.contents,
            name=self.name,
            strides=strides,
            offset=self.offset if offset is None else offset,
            indirect=indirect or self.indirect_offset,
        )

    # Views along one axis.

    def _axis(self, dim: int) -> int:
        if not -self.ndim <= dim < self.ndim:
            raise _refuse("axis", f"axis {dim} of {self!r}, which has {self.ndim} axes.")
        return dim % self.ndim

    def _not_indirect_axis(self, dim: int) -> None:
        if self.indirect_offset is not None and self.indirect_offset.is_vector and dim == 0:
            raise _refuse(
                "indirect-axis", f"axis 0 of {self!r} is indexed at run time: no view of it."
            )

    def slice(self, dim: int, start: Any, end: Any, step: int = 1) -> "NkiTensor":
        """Elements `start` to `end` (exclusive) of an axis, every `step`-th."""
        dim = self._axis(dim)
        if step < 1 or not 0 <= start < end <= self.shape[dim]:
            raise OutOfBoundsError(
                "view.slice",
                f"[{start}:{end}:{step}] of axis {dim} of {self!r}: needs 0 <= start < end <= "
                f"{self.shape[dim]} and a positive step.",
            )
        if (start, end, step) != (0, self.shape[dim], 1):
            self._not_indirect_axis(dim)
        shape, strides = list(self.shape), list(self.strides)
        shape[dim] = -(-(end - start) // step)
        if self.is_on_chip and dim == 0 and step > 1 and shape[0] > 1:
            raise _refuse(
                "partition-step", f"every {step}th partition of {self!r}: must be neighbours."
            )
        strides[dim] *= step if shape[dim] > 1 else 1
        return self._view(shape, strides, self.offset + start * self.strides[dim])

    def _dynamic(self, dim: int, index: Any, limit: int) -> Indirect:
        if self.indirect_offset is not None:
            raise _refuse("indirect-twice", f"{self!r} is already indexed at run time.")
        if self.is_on_chip and dim == 0:
            raise _refuse("indirect-partition", "the partition axis takes no run-time index.")
        return Indirect(index, self.strides[dim], limit, is_vector=False)

    def _narrow(self, dim: int, start: Any, size: int) -> "NkiTensor":
        """`size` elements from a start that may be a register."""
        if _is_static(start):
            return self.slice(dim, int(start), int(start) + size)
        indirect = self._dynamic(dim, start, self.shape[dim] - size + 1)
        shape = list(self.shape)
        shape[dim] = size
        return self._view(shape, self.strides, indirect=indirect)

    def select(self, dim: int, index: Any) -> "NkiTensor":
        """One element of an axis, without the axis; the index may be a register or a tensor."""
        dim = self._axis(dim)
        if _is_static(index):
            index = int(index)
            if not -self.shape[dim] <= index < self.shape[dim]:
                raise OutOfBoundsError("view.index", f"index {index} of axis {dim} of {self!r}.")
            index %= self.shape[dim]
            self._not_indirect_axis(dim)
            offset, indirect = self.offset + index * self.strides[dim], None
        else:
            offset, indirect = self.offset, self._dynamic(dim, index, self.shape[dim])
        if self.is_on_chip and (dim == 0 or self.ndim == 2):
            shape, strides = list(self.shape), list(self.strides)
            shape[dim] = 1
        else:
            shape = [n for a, n in enumerate(self.shape) if a != dim]
            strides = [s for a, s in enumerate(self.strides) if a != dim]
        return self._view(shape or [1], strides or [1], offset, indirect)

    def vector_select(self, dim: int, vector_offset: "NkiTensor") -> "NkiTensor":
        """Row `vector_offset[p]` of axis 0 for each p."""
        if dim != 0 or self.is_on_chip or self.indirect_offset is not None:
            raise _refuse(
                "vector-select", f"axis {dim} of {self!r}: needs axis 0 of a direct HBM tensor."
            )
        rows = vector_offset.shape[0]
        indirect = Indirect(vector_offset, self.strides[0], self.shape[0], is_vector=True)
        return self._view((rows, *self.shape[1:]), (0, *self.strides[1:]), indirect=indirect)

    def __getitem__(self, key: Any) -> "NkiTensor":
        """NumPy's basic indexing with ints, slices, `...`, `nl.ds` and registers."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if sum(k is Ellipsis for k in keys) > 1 or len(keys) - (Ellipsis in keys) > self.ndim:
            raise _refuse("index", f"index {key} of {self!r}: too many axes.")
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        view = self
        for dim in reversed(range(self.ndim)):
            if keys[dim] != slice(None):
                view = view._index(dim, keys[dim])
        return view

    def _index(self, dim: int, key: Any) -> "NkiTensor":
        if isinstance(key, slice):
            start, stop, step = key.start, key.stop, key.step
            if all(x is None or _is_static(x) for x in (start, stop, step)):
                given = slice(*(None if x is None else int(x) for x in (start, stop, step)))
                if stop is not None and int(stop) > self.shape[dim]:
                    raise OutOfBoundsError(
                        "view.slice", f"[:{int(stop)}] of axis {dim} of {self!r}."
                    )
                return self.slice(dim, *given.indices(self.shape[dim]))
            raise _refuse("index", "a register in a slice: write nl.ds(start, size).")
        if isinstance(key, DynamicSlice):
            return self._narrow(dim, key.start, key.size)
        if _is_static(key) or isinstance(key, NkiTensor) or hasattr(key, "register_value"):
            return self.select(dim, key)
        raise _refuse("index", f"index {key!r} of {self!r}: ints, slices, ..., nl.ds, registers.")

    def __setitem__(self, key: Any, value: Any) -> None:
        """Assignment is not an instruction."""
        raise _refuse(
            "assignment", f"{self!r}[...] = ...: use nki.isa.tensor_copy, memset or dma_copy."
        )

    # Views that change the axes.

    def permute(self, dims: Sequence[int]) -> "NkiTensor":
        """The axes in another order."""
        if sorted(dims) != list(range(self.ndim)):
            raise _refuse("permute", f"{tuple(dims)} is no order of the axes of {self!r}.")
        if dims[0] != 0 and (self.is_on_chip or self._vector_indirect):
            raise _refuse("permute", f"{tuple(dims)} moves the partition axis of {self!r}.")
        return self._view([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    @property
    def _vector_indirect(self) -> bool:
        return self.indirect_offset is not None and self.indirect_offset.is_vector

    def broadcast(self, dim: int, size: int) -> "NkiTensor":
        """An axis of size 1 repeated."""
        dim = self._axis(dim)
        if self.shape[dim] != 1 or (self.is_on_chip and dim == 0):
            raise _refuse("broadcast", f"axis {dim} of {self!r}: needs a free axis of size 1.")
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, 0
        return self._view(shape, strides)

    def expand_dim(self, dim: int) -> "NkiTensor":
        """A new axis of size 1."""
        if not 0 <= dim <= self.ndim or (self.is_on_chip and dim == 0):
            raise _refuse("expand-dim", f"no new axis {dim} in {self!r}.")
        self._not_indirect_axis(dim)
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(dim, 1)
        strides.insert(dim, 0)
        return self._view(shape, strides)

    def squeeze_dim(self, dim: int) -> "NkiTensor":
        """Without an axis of size 1."""
        dim = self._axis(dim)
        if self.shape[dim] != 1 or (self.is_on_chip and (dim == 0 or self.ndim == 2)):
            raise _refuse("squeeze-dim", f"axis {dim} of {self!r} cannot go.")
        self._not_indirect_axis(dim)
        keep = [a for a in range(self.ndim) if a != dim]
        return self._view([self.shape[a] for a in keep], [self.strides[a] for a in keep])

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> "NkiTensor":
        """One axis as several; one size may be -1."""
        dim = self._axis(dim)
        self._not_indirect_axis(dim)
        sizes = complete(shape, self.shape[dim])
        if math.prod(sizes) != self.shape[dim] or min(sizes) < 1:
            raise _refuse("reshape-dim", f"axis {dim} of {self!r} is not {tuple(shape)}.")
        if self.is_on_chip and dim == 0 and sizes[0] != self.shape[0]:
            raise _refuse("reshape-dim", f"the partition axis of {self!r} cannot be split.")
        strides = [s * self.strides[dim] for s in row_major(sizes)]
        return self._view(
            [*self.shape[:dim], *sizes, *self.shape[dim + 1 :]],
            [*self.strides[:dim], *strides, *self.strides[dim + 1 :]],
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> "NkiTensor":
        """Neighbouring axes as one."""
        first, last = self._axis(start_dim), self._axis(end_dim)
        if first > last or (self.is_on_chip and first == 0 and last > 0):
            raise _refuse("flatten", f"axes {first} to {last} of {self!r}.")
        shape = [
            *self.shape[:first],
            math.prod(self.shape[first : last + 1]),
            *self.shape[last + 1 :],
        ]
        return self.reshape(shape)

    def reshape(self, shape: Sequence[int]) -> "NkiTensor":
        """Another shape of as many elements, if these strides can express it."""
        sizes = complete(shape, self.size)
        if math.prod(sizes) != self.size or min(sizes, default=0) < 1:
            raise _refuse("reshape", f"{self!r} has {self.size} elements, not {tuple(shape)}.")
        if (self.is_on_chip or self._vector_indirect) and (
            len(sizes) < 2 or sizes[0] != self.shape[0]
        ):
            raise _refuse("reshape", f"{tuple(shape)} does not keep the partitions of {self!r}.")
        keep = 1 if self.is_on_chip or self._vector_indirect else 0
        free = reshape_strides(self.shape[keep:], self.strides[keep:], sizes[keep:])
        if free is None:
            raise _refuse("reshape", f"strides {self.strides} cannot be seen as {tuple(shape)}.")
        return self._view(sizes, [*self.strides[:keep], *free])

    def rearrange(
        self, src_pattern: Sequence[Any], dst_pattern: Sequence[Any], fixed_sizes: Any = None
    ) -> "NkiTensor":
        """Splits, orders and joins axes by name, as einops does."""
        known = dict(fixed_sizes or {})
        view, names = self, list[str]()
        if len(src_pattern) != self.ndim:
            raise _refuse("rearrange", f"{src_pattern} does not name the axes of {self!r}.")
        for item in src_pattern:
            group = [item] if isinstance(item, str) else list(item)
            axis = len(names)
            sizes = complete([known.get(n, -1) for n in group], view.shape[axis])
            known.update(zip(group, sizes, strict=True))
            view = view.reshape_dim(axis, sizes)
            names += group
        groups = [[i] if isinstance(i, str) else list(i) for i in dst_pattern]
        order = [n for g in groups for n in g]
        if len(set(names)) != view.ndim or sorted(order) != sorted(names):
            raise _refuse("rearrange", f"{src_pattern} to {dst_pattern} of {self!r}.")
        view = view.permute([names.index(n) for n in order])
        return view.reshape([math.prod(known[n] for n in g) for g in groups])

    def view(self, dtype: Any) -> "NkiTensor":
        """The same bytes as another type; the last axis grows or shrinks with its size."""
        dtype = as_dtype(dtype)
        old, new = self.dtype.itemsize, dtype.itemsize
        if dtype == self.dtype:
            return self
        if self.indirect_offset is not None:
            raise _refuse("dtype", f"{self!r} is indexed at run time: no other type.")
        self._check_retype(dtype)
        if old == new:
            return self._view(self.shape, self.strides, dtype=dtype)
        last = self.shape[-1] * old
        fits = self.strides[-1] == 1 or self.shape[-1] == 1
        moving = [s * old for n, s in zip(self.shape[:-1], self.strides, strict=False) if n > 1]
        row = self.storage.row_bytes if self.is_on_chip else 0
        if not fits or any(x % new for x in (self.offset * old, last, row, *moving)):
            raise _refuse("dtype", f"the last axis of {self!r} cannot be read as {dtype}.")
        strides = (*(s * old // new for s in self.strides[:-1]), 1)
        shape = (*self.shape[:-1], last // new)
        return self._view(shape, strides, self.offset * old // new, dtype=dtype)

    reinterpret_cast = view

    def _check_retype(self, dtype: DType) -> None:
        """In exact mode narrow floats lie as float32, and bytes of one element do not adjoin."""
        same_bits = self.dtype.itemsize == dtype.itemsize and (
            dtype.itemsize == 4 or not (self.dtype.is_float or dtype.is_float)
        )
        if self.contents.exact and dtype != self.dtype and not same_bits:
            raise _refuse(
                "dtype", f"{self!r} as {dtype}: exact mode has no bits to be read as another type."
            )

    def _in_elements_of(self, dtype: DType, elements: int) -> int:
        """A distance in elements of this view, in elements of another type."""
        whole, rest = divmod(elements * self.dtype.itemsize, dtype.itemsize)
        if rest:
            raise _refuse("dtype", f"{elements} elements of {self!r}: no whole number of {dtype}.")
        return whole

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int | None = None,
        scalar_offset: Any = None,
        vector_offset: Any = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> "NkiTensor":
        """An access pattern on the storage, `[[stride, count], ...]`, in elements of `dtype`.

        `offset` None keeps this view's offset; a number is added to it, as the docstring of NKI
        says (its guide says otherwise: avoid it on views that have one).
        """
        kind = self.dtype if dtype is None else as_dtype(dtype)
        if self.indirect_offset is not None:
            raise _refuse("indirect-twice", f"{self!r} is indexed at run time: no pattern on it.")
        self._check_retype(kind)
        strides, shape = zip(*pattern, strict=True)
        if scalar_offset is not None and vector_offset is not None:
            raise _refuse("ap", "scalar_offset and vector_offset exclude each other.")
        index = vector_offset if scalar_offset is None else scalar_offset
        indirect = None
        if index is not None:
            is_vector = vector_offset is not None
            if is_vector and (self.is_on_chip or indirect_dim != 0):
                raise _refuse("ap", "vector_offset needs an HBM tensor and indirect_dim=0.")
            found = self._dynamic(self._axis(indirect_dim), index, self.shape[indirect_dim])
            stride = self._in_elements_of(kind, found.stride)
            indirect = Indirect(index, stride, found.limit, is_vector)
            if is_vector:
                strides = (0, *strides[1:])
        view = NkiTensor(
            shape, kind, self.contents, name=self.name, strides=strides,
            offset=self._in_elements_of(kind, self.offset) + (offset or 0), indirect=indirect,
        )  # fmt: skip
        if self.is_on_chip and shape[0] > 1 and strides[0] != view.row_elements:
            raise _refuse(
                "ap-partition-step",
                f"the first step of {pattern} is {strides[0]}, but a partition of "
                f"{self.storage.name} is {view.row_elements} elements of {kind} away.",
            )
        return view

    def indirect(self, index: "NkiTensor", num_elem: int | None = None) -> "NkiTensor":
        """Tensor indirection of trn3."""
        raise NotImplementedError("NkiTensor.indirect (tensor indirection) is not interpreted.")


def _is_static(value: Any) -> bool:
    return isinstance(value, int) or (hasattr(value, "__index__") and not _is_dynamic(value))


def _is_dynamic(value: Any) -> bool:
    return isinstance(value, NkiTensor) or hasattr(value, "register_value")
