"""What every instruction of `nki.isa` is built on: operands in, checks, values out, a record.

An instruction is a function whose first parameter is a `Step`. The decorator `instruction` gives
it the kernel-facing signature without it, lets the schedule switch programs, and files the record.
Operands are read as NumPy arrays of shape `[partitions, elements]`, computed with in float32, and
written with one rounding.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from jax_tkg.nki.interpreter.dtypes import FLOAT32, DType, convert, to_float32
from jax_tkg.nki.interpreter.errors import NkiValidationError, kernel_line
from jax_tkg.nki.interpreter.hardware import QUADRANT
from jax_tkg.nki.interpreter.machine import Captured, Core, current_core
from jax_tkg.nki.interpreter.races import HbmAccess
from jax_tkg.nki.interpreter.record import Access, Engine, Instruction, Transfer
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.tensor import NkiTensor
from jax_tkg.nki.interpreter.window import (
    ChosenRows,
    Window,
    repeats_elements,
    scalar_shift,
    window,
)

SBUF, PSUM = MemoryRegion.sbuf, MemoryRegion.psum
FIXED_CYCLES = 64  # an engine needs about as many cycles to start an instruction; [C]


class Step:
    """One instruction on its way through a core."""

    def __init__(self, core: Core, op: str, name: str | None) -> None:
        self.core = core
        self.op = op
        self.record = Instruction(
            core.index, len(core.program), op, Engine.unknown, name or "", kernel_line()
        )

    @property
    def exact(self) -> bool:
        """Floats keep float32."""
        return self.core.machine.options.exact

    def refuse(self, rule: str, message: str) -> NoReturn:
        """Raises: the hardware does not take this."""
        raise NkiValidationError(f"{self.op}.{rule}", f"{self.op}: {message}", self.record.source)

    # Checks of operands.

    def tensor(self, role: str, given: Any) -> NkiTensor:
        """An operand that must be a tensor."""
        if not isinstance(given, NkiTensor):
            self.refuse("operand", f"{role} is {given!r}: needs a tensor.")
        self.core.check_loop(given)
        return given

    def tile(
        self, role: str, given: Any, *, regions: tuple[MemoryRegion, ...] = (SBUF, PSUM)
    ) -> NkiTensor:
        """An operand of a compute engine: on chip, at a partition the engine can start at."""
        tensor = self.tensor(role, given)
        if tensor.buffer not in regions:
            wanted = " or ".join(r.value for r in regions)
            self.refuse("buffer", f"{role} is {tensor!r}: must be in {wanted}.")
        start, count = tensor.start_partition, tensor.shape[0]
        step = 128 if count > 64 else 64 if count > QUADRANT else QUADRANT
        if start % step:
            self.refuse(
                "start-partition",
                f"{role} is {tensor!r}, {count} partitions from partition {start}: more than 64 "
                "start at 0, 33 to 64 at 0 or 64, up to 32 at a multiple of 32. Move the tile.",
            )
        if tensor.ndim > 5:
            self.refuse("rank", f"{role} is {tensor!r}: at most four free axes.")
        return tensor

    def same_layout(self, **tensors: NkiTensor) -> None:
        """Operands must have as many partitions and as many elements in each."""
        sizes = {role: (t.shape[0], t.free_size) for role, t in tensors.items()}
        if len(set(sizes.values())) > 1:
            shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in tensors.items())
            self.refuse(
                "shape", f"{shapes}: must have as many partitions and as many elements in each."
            )

    def not_all_psum(self, **tensors: NkiTensor) -> None:
        """An engine reads PSUM through one port."""
        if all(t.buffer is PSUM for t in tensors.values()):
            roles = " and ".join(tensors)
            self.refuse("psum-port", f"{roles} are both in PSUM: copy one of them to SBUF first.")

    def vector_operand(self, role: str, given: Any, like: NkiTensor) -> Any:
        """A number, or a tile `[P, 1]` of float32: one value for each partition of `like`."""
        if not isinstance(given, NkiTensor):
            return given
        tile = self.tile(role, given)
        if tile.shape[0] != like.shape[0] or tile.free_size != 1:
            self.refuse(
                "vector-operand",
                f"{role} is {tile!r}: must be a number or of shape ({like.shape[0]}, 1).",
            )
        return tile

    # Values.

    def where(self, tensor: NkiTensor) -> Window:
        """The bytes of a view; an index in SBUF is read."""
        indirect = tensor.indirect_offset
        if indirect is not None and isinstance(indirect.index, NkiTensor):
            self.raw(indirect.index)
        return window(tensor, scalar_shift(tensor))

    def raw(self, tensor: NkiTensor) -> np.ndarray:
        """The elements as they are stored, a view of the shape of the tensor; noted as read."""
        where = self.where(tensor)
        self.check_written(where)
        tensor.contents.check_alive(where.box, where.flags)
        self.note_read(where)
        return where.array()

    def check_written(self, where: Window, kept: np.ndarray | None = None) -> None:
        """Reads of memory never written: floats read as NaN and are noted, integers are refused.

        Args:
            where: what is read.
            kept: `[partitions, elements]`, which elements matter; None for all.
        """
        if where.is_written(kept):
            return
        machine = self.core.machine
        if machine.options.refuse_uninitialized or not where.tensor.dtype.is_float:
            where.check_written()
        machine.uninitialized.setdefault(self.record.source, repr(where.tensor))

    def note_read(self, where: Window | ChosenRows) -> None:
        """Files a read, and looks for races."""
        self.record.reads.append(Access(where.tensor.storage, where.box))
        self._note_shared(where)

    def note_write(self, where: Window | ChosenRows, changes_nothing: Callable[[], bool]) -> None:
        """Files a write that is about to happen, and looks for races.

        Args:
            where: what is written.
            changes_nothing: whether memory holds these values already. Two programs that write
                the same values to one place do not race.
        """
        self.record.writes.append(Access(where.tensor.storage, where.box))
        self._note_shared(where, changes_nothing)

    def float32(self, tensor: NkiTensor) -> np.ndarray:
        """The elements in float32, `[partitions, elements]`."""
        if tensor.dtype.is_packed:
            self.refuse("packed", f"{tensor!r}: no arithmetic on packed types; copies and MX only.")
        values = self.raw(tensor)
        return to_float32(values.reshape(values.shape[0], -1))

    def bits(self, tensor: NkiTensor) -> np.ndarray:
        """The elements as they are stored, `[partitions, elements]`."""
        values = self.raw(tensor)
        return values.reshape(values.shape[0], -1)

    def scalar(self, given: Any) -> Any:
        """A number, or a tile `[P, 1]` as float32 `[P, 1]`."""
        return self.float32(given) if isinstance(given, NkiTensor) else np.float32(given)

    def put(self, tensor: NkiTensor, values: np.ndarray) -> None:
        """Writes values, rounded once to the type of the tensor; any shape of as many elements."""
        where = self.where(tensor)
        self.check_destination(tensor)
        tensor.contents.own_bytes()
        if values.dtype.kind == "V" or not tensor.dtype.is_packed:
            values = convert(values, tensor.dtype, exact=self.exact)
        memory, shaped = where.array(), values.reshape(tensor.shape)
        self.note_write(where, lambda: np.array_equal(memory, shaped))
        memory[...] = shaped
        self.wrote(where)

    def check_destination(self, tensor: NkiTensor) -> None:
        """Refuses a destination that would be written twice."""
        if repeats_elements(tensor.shape, tensor.strides):
            self.refuse(
                "broadcast-destination",
                f"dst {tensor!r} with pattern {tensor.get_pattern()} has the same element twice.",
            )

    def wrote(self, where: Window, *, accumulated: bool = False) -> None:
        """After the values of a write are in place: what memory holds now."""
        contents = where.tensor.contents
        where.mark_written()
        if contents.accumulated is not None:
            where.flags(contents.accumulated)[...] = 0xFF if accumulated else 0
        if contents.storage.address is not None:
            self.core.memories[contents.storage.region].note_write(
                contents, where.box, where.flags, self.record.source, is_dense=where.is_dense
            )
        self._capture(where.tensor)

    def _note_shared(
        self, where: Window | ChosenRows, changes_nothing: Callable[[], bool] | None = None
    ) -> None:
        machine, storage = self.core.machine, where.tensor.storage
        if machine.num_programs > 1 and storage.core == -1:
            access = HbmAccess(
                self.core.index, where.box, where.touched, self.record.source,
                is_write=changes_nothing is not None,
            )  # fmt: skip
            machine.races.note(storage, access, changes_nothing)

    def _capture(self, tensor: NkiTensor) -> None:
        machine, name = self.core.machine, tensor.storage.name
        wanted = machine.options.capture
        if wanted and (name in wanted or "*" in wanted):
            whole = NkiTensor(tensor.storage.shape, tensor.storage.dtype, tensor.contents)
            values = window(whole).array().copy()
            machine.captured.append(Captured(self.core.index, name, self.record, values))

    # The record.

    def runs_on(self, engine: Engine, cycles: float, elements: int = 0, macs: int = 0) -> None:
        """The engine and what it costs there, in cycles of its clock."""
        self.record.engine = engine
        self.record.cycles, self.record.elements, self.record.macs = cycles, elements, macs

    def moves(self, transfer: Transfer) -> None:
        """A DMA."""
        self.record.engine = Engine.dma
        self.record.transfer = transfer

    def operands(self, *tensors: Any) -> None:
        """Notes shapes and types, destinations first."""
        self.record.shapes = tuple(
            f"{list(t.shape)} {t.dtype}" for t in tensors if isinstance(t, NkiTensor)
        )


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `f(step, ...)` an instruction of `nki.isa`, called without the step.

    It returns the record, NKI's handle of the instruction.
    """
    parameters = inspect.signature(function)
    op = function.__name__

    @functools.wraps(function)
    def issue(*args: Any, name: str | None = None, **kwargs: Any) -> Any:
        core = current_core()
        core.machine.schedule.maybe_switch(core.index)
        step = Step(core, op, name)
        function(step, *args, **kwargs)
        if not step.record.shapes:
            step.operands(*args, *kwargs.values())
        step.record.index = len(core.program)
        core.program.append(step.record)
        return step.record

    issue.__signature__ = parameters.replace(  # type: ignore[attr-defined]
        parameters=list(parameters.parameters.values())[1:]
    )
    return issue


def elementwise_cycles(elements: int, *tiles: NkiTensor) -> float:
    """Cycles of a copy-like instruction of the Vector engine; [C].

    16-bit tiles that lie contiguously in SBUF go four times as fast, other 16-bit ones or those
    with one side in PSUM twice.
    """
    narrow = all(t.dtype.itemsize == 2 for t in tiles)
    in_sbuf = all(t.buffer is SBUF for t in tiles)
    if narrow and in_sbuf and all(t.is_contiguous() for t in tiles):
        return max(FIXED_CYCLES, elements / 4)
    return max(FIXED_CYCLES, elements / 2) if narrow else max(FIXED_CYCLES, elements)


def is_float32(dtype: DType) -> bool:
    """Float32 or tfloat32: four bytes on the Tensor engine."""
    return dtype in (FLOAT32, "tfloat32")
