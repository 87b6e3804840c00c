"""The machine a launch runs on: cores with their memories, HBM, exchanges, and the record."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.contents import Contents, Memory
from jax_tkg.nki.interpreter.dtypes import DType, as_dtype
from jax_tkg.nki.interpreter.errors import (
    DivergenceError,
    NkiValidationError,
    Source,
    kernel_line,
)
from jax_tkg.nki.interpreter.hardware import NUM_PARTITIONS, PSUM_BYTES, TRN2, Target
from jax_tkg.nki.interpreter.races import RaceDetector
from jax_tkg.nki.interpreter.record import Instruction
from jax_tkg.nki.interpreter.schedule import Schedule
from jax_tkg.nki.interpreter.storage import MemoryRegion, Storage
from jax_tkg.nki.interpreter.tensor import NkiTensor


@dataclass(frozen=True)
class Options:
    """How to run a kernel.

    Attributes:
        target: trn1, trn2 or trn3.
        exact: keep every float as float32: shows errors of the algorithm without rounding.
        seed: None runs each program until it waits; a number interleaves them at random.
        capture: names of tensors whose contents are kept after every write to them; "*" for all
            that have a name of their own.
        refuse_uninitialized: also refuse to read floats that were never written; else they read as
            NaN, and the run says where.
        print: where `nl.device_print` writes.
    """

    target: Target = TRN2
    exact: bool = False
    seed: int | None = None
    capture: tuple[str, ...] = ()
    refuse_uninitialized: bool = False
    print: Callable[[str], None] = print


@dataclass(frozen=True)
class Captured:
    """A named tensor after one of the writes to it."""

    core: int
    name: str
    instruction: Instruction
    values: np.ndarray


@dataclass
class Machine:
    """Everything that the programs of one launch share. It does not know its cores: no circles."""

    options: Options
    num_programs: int
    schedule: Schedule
    races: RaceDetector = field(default_factory=RaceDetector)
    shared: list[Contents] = field(default_factory=list)
    exchanges: dict[Any, Any] = field(default_factory=dict)
    captured: list[Captured] = field(default_factory=list)
    uninitialized: dict[Source, str] = field(default_factory=dict)

    def hbm_input(self, array: np.ndarray, name: str, source: Source) -> NkiTensor:
        """A kernel argument: the caller's bytes, copied only if the kernel writes to them."""
        dtype = as_dtype(array.dtype)
        storage = _in_hbm(MemoryRegion.shared_hbm, array.shape, dtype, name, source, -1)
        if not self.options.exact or dtype.itemsize == 4:
            return NkiTensor(array.shape, dtype, Contents.of_caller(storage, array))
        contents = Contents.new(storage, exact=True)
        tensor = NkiTensor(array.shape, dtype, contents)
        steps = [s * dtype.itemsize for s in tensor.strides]
        contents.array(dtype, 0, 0, array.shape, steps)[...] = array
        contents.written, contents.copy_on_write = None, True
        return tensor


@dataclass(frozen=True)
class Decision:
    """What a register decided: how often a loop on the device runs, or whether it goes on."""

    source: Source
    outcome: str


@dataclass(eq=False)
class Core:
    """One program's core.

    Attributes:
        machine: what it is a part of.
        index: 0 or 1; `nl.program_id`.
        program: the instructions it has issued.
        storages: what its kernel declared, in order.
        decisions: of its loops on the device, in order.
        loops: numbers of the runtime loops it is in, outermost first.
        generators: of random numbers, by engine.
        accumulators: reduction registers of its engines.
        memories: its SBUF and PSUM.
    """

    machine: Machine
    index: int
    program: list[Instruction] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    loops: tuple[int, ...] = ()
    generators: dict[Any, Any] = field(default_factory=dict)
    accumulators: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        exact = self.machine.options.exact
        self._shared_count, self._names = 0, dict[str, Any]()
        self._loop_of: dict[Storage, tuple[int, ...]] = {}
        self.memories = {
            MemoryRegion.sbuf: Memory(
                MemoryRegion.sbuf, self.target.sbuf_usable_bytes, exact=exact
            ),
            MemoryRegion.psum: Memory(MemoryRegion.psum, PSUM_BYTES, exact=exact),
        }

    @property
    def target(self) -> Target:
        """The hardware it is."""
        return self.machine.options.target

    def allocate(
        self,
        shape: Sequence[int],
        dtype: Any,
        region: MemoryRegion,
        name: str = "",
        address: tuple[int, int] | None = None,
    ) -> NkiTensor:
        """`nl.ndarray`: new memory, filled with what reads as NaN."""
        kind, sizes, source = as_dtype(dtype), _sizes(shape, region), kernel_line()
        declaration = source, self.loops[:1]
        known = self._names.get(name) if name else None
        is_next_trip = bool(self.loops) and known == declaration
        if known is not None and not is_next_trip:
            raise NkiValidationError(
                "memory.name", f"a second tensor named {name!r}; names must be unique."
            )
        self._names[name] = declaration
        if region is MemoryRegion.shared_hbm:
            contents = self._shared(sizes, kind, name, source)
        elif region is MemoryRegion.private_hbm:
            name = name or f"private{len(self.storages)}"
            storage = _in_hbm(region, sizes, kind, name, source, self.index)
            contents = Contents.new(storage, exact=self.machine.options.exact)
        else:
            contents = self._on_chip(sizes, kind, region, name, source, address)
        self.storages.append(contents.storage)
        self._loop_of[contents.storage] = self.loops
        return NkiTensor(sizes, kind, contents)

    def _on_chip(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        region: MemoryRegion,
        name: str,
        source: Source,
        address: tuple[int, int] | None,
    ) -> Contents:
        if address is not None and address[1] % dtype.itemsize:
            raise NkiValidationError(
                "memory.alignment",
                f"address {address} of a {dtype} tensor: the byte must be a multiple of "
                f"{dtype.itemsize}.",
            )
        storage = Storage(
            region, shape, dtype, name or f"{region.value}{len(self.storages)}", source,
            self.index, address, math.prod(shape[1:]) * dtype.itemsize,
        )  # fmt: skip
        if address is not None:
            return Contents.placed(storage, self.memories[region])
        return Contents.new(storage, exact=self.machine.options.exact)

    def _shared(self, shape: tuple[int, ...], dtype: DType, name: str, source: Source) -> Contents:
        """The n-th shared tensor of one program is the n-th of the other."""
        shared, n = self.machine.shared, self._shared_count
        self._shared_count += 1
        if n == len(shared):
            storage = _in_hbm(MemoryRegion.shared_hbm, shape, dtype, name or f"hbm{n}", source, -1)
            shared.append(Contents.new(storage, exact=self.machine.options.exact))
        first = shared[n].storage
        if (first.shape, first.dtype) != (shape, dtype):
            raise DivergenceError(
                "programs.shared-tensor",
                f"program {self.index} declares shared_hbm tensor number {n} as {shape} {dtype}, "
                f"the other as {first.shape} {first.dtype} at {first.source}. All programs "
                "declare the same shared tensors in the same order.",
                source,
                first.source,
            )
        return shared[n]

    def check_loop(self, tensor: NkiTensor) -> None:
        """Refuses a tensor declared in the body of a runtime loop that has ended."""
        declared = self._loop_of.get(tensor.storage, ())
        if declared and declared != self.loops[: len(declared)]:
            raise NkiValidationError(
                "loop.local-tensor",
                f"{tensor!r} was declared in the body of a runtime loop at "
                f"{tensor.storage.source} and is used outside of it: declare it before the loop.",
            )


def _sizes(shape: Sequence[int], region: MemoryRegion) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in shape)
    if not sizes or any(n < 1 for n in sizes):
        raise NkiValidationError("memory.shape", f"shape {sizes}: needs positive sizes.")
    if region.is_on_chip and len(sizes) < 2:
        raise NkiValidationError(
            "memory.rank", f"shape {sizes} in {region.value}: needs (partitions, elements, ...)."
        )
    if region.is_on_chip and sizes[0] > NUM_PARTITIONS:
        raise NkiValidationError(
            "memory.partitions",
            f"shape {sizes} in {region.value}: axis 0 is the partition, of which there are "
            f"{NUM_PARTITIONS}; tile it.",
        )
    return sizes


def _in_hbm(
    region: MemoryRegion,
    shape: Sequence[int],
    dtype: DType,
    name: str,
    source: Source,
    core: int,
) -> Storage:
    size = math.prod(shape) * dtype.itemsize
    return Storage(region, tuple(shape), dtype, name, source, core, None, size)


_current: contextvars.ContextVar[Core] = contextvars.ContextVar("nki_core")


def current_core() -> Core:
    """The core whose program is running.

    Raises:
        RuntimeError: outside a kernel.
    """
    core = _current.get(None)
    if core is None:
        raise RuntimeError(
            "nki.isa and nki.language work inside a kernel: call it through "
            "jax_tkg.nki.interpreter.run(kernel, *arrays), or decorate it with nki.jit."
        )
    return core


@contextlib.contextmanager
def running_on(core: Core) -> Iterator[None]:
    """Makes a core the current one."""
    token = _current.set(core)
    try:
        yield
    finally:
        _current.reset(token)
