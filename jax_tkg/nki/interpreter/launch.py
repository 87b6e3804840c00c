"""Launching kernels: `nki.jit`, `kernel[lnc](...)` and `run`, which also keeps what happened."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.after_run import (
    MemoryUse,
    check_capacity,
    check_programs_agree,
)
from jax_tkg.nki.interpreter.errors import (
    NkiValidationError,
    Source,
    UninitializedReadError,
    kernel_line,
)
from jax_tkg.nki.interpreter.hardware import Target, find_target
from jax_tkg.nki.interpreter.machine import (
    Captured,
    Core,
    Machine,
    Options,
    _current,
    running_on,
)
from jax_tkg.nki.interpreter.objects import NKIObject
from jax_tkg.nki.interpreter.record import Instruction
from jax_tkg.nki.interpreter.schedule import Schedule
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.tensor import NkiTensor
from jax_tkg.nki.interpreter.window import window


@dataclass(frozen=True)
class Run:
    """One finished launch.

    Attributes:
        outputs: what the kernel returned, tensors as NumPy arrays.
        options: how it ran.
        programs: the instructions of each program, in order.
        memory: the peak of each memory of each core.
        captured: named tensors after each write to them (see `Options.capture`).
        uninitialized: lines that read floats which nobody had written, and what they read.
        arguments: the kernel's array arguments after the run, by name.
        name: of the kernel.
    """

    outputs: Any
    options: Options
    programs: tuple[tuple[Instruction, ...], ...]
    memory: tuple[MemoryUse, ...]
    captured: tuple[Captured, ...]
    uninitialized: Mapping[Source, str]
    arguments: Mapping[str, np.ndarray] = field(repr=False)
    name: str = "kernel"


class Kernel:
    """A kernel function and how many programs launch it: what `nki.jit` makes.

    Called from a kernel it is an ordinary function; called with NumPy arrays it runs in the
    interpreter.
    """

    def __init__(self, function: Callable[..., Any], programs: int = 1) -> None:
        functools.update_wrapper(self, function)
        self.function, self.programs = function, programs

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self._written, "__name__", "kernel")

    @property
    def source(self) -> Source:
        """Where the function is defined."""
        code = getattr(self._written, "__code__", None)
        return Source(code.co_filename, code.co_firstlineno, self.name) if code else kernel_line()

    @property
    def _written(self) -> Callable[..., Any]:
        """The function as somebody wrote it, without decorators and bound arguments."""
        function = inspect.unwrap(self.function)
        while isinstance(function, functools.partial):
            function = inspect.unwrap(function.func)
        return function

    def __getitem__(self, grid: Any) -> "Kernel":
        """`kernel[2]`: launched by two programs."""
        programs = grid[0] if isinstance(grid, tuple) and len(grid) == 1 else grid
        if programs not in (1, 2):
            raise ValueError(f"kernel[{grid}]: a logical core has 1 or 2 programs.")
        return Kernel(self.function, int(programs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it; returns its outputs as NumPy arrays."""
        if _current.get(None) is not None:
            return self.function(*args, **kwargs)
        return launch(self, args, kwargs, Options()).outputs


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`nki.jit`, with or without arguments; platform arguments are for the real compiler."""
    if function is None:
        return functools.partial(jit, **options)
    return function if isinstance(function, Kernel) else Kernel(function)


def run(
    kernel: Callable[..., Any],
    *args: Any,
    programs: int | None = None,
    target: str | Target = "trn2",
    exact: bool = False,
    seed: int | None = None,
    capture: str | tuple[str, ...] | list[str] = (),
    refuse_uninitialized: bool = False,
    print: Callable[[str], None] = print,
    **kwargs: Any,
) -> Run:
    """Runs a kernel on NumPy arrays and keeps what happened.

    Args:
        kernel: a function, decorated with `nki.jit` or not.
        *args: its arguments; arrays become HBM tensors, everything else is passed as it is.
        programs: 1 or 2; None takes what `kernel[2]` says, else 1.
        target: trn1, trn2 or trn3.
        exact: keep all floats as float32.
        seed: shuffles the interleaving of two programs.
        capture: names of tensors to keep after every write; "*" for all.
        refuse_uninitialized: refuse to read floats that were never written; else they read as NaN
            and `Run.uninitialized` lists the lines. Integers are always refused.
        print: where `nl.device_print` writes its lines.
        **kwargs: more arguments of the kernel.

    Returns:
        Outputs, instructions, memory peaks, captured tensors.

    Raises:
        NkiError: if the kernel does what the hardware or the language refuses.
    """
    made = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    if programs is not None:
        made = made[programs]
    names = (capture,) if isinstance(capture, str) else tuple(capture)
    options = Options(find_target(target), exact, seed, names, refuse_uninitialized, print)
    return launch(made, args, kwargs, options)


def launch(
    kernel: Kernel, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options
) -> Run:
    """Runs a kernel; see `run`."""
    if kernel.programs == 2 and not options.target.has_sendrecv:
        raise ValueError(f"{options.target.name} has no logical cores of two: launch one program.")
    if _current.get(None) is not None:
        raise NkiValidationError(
            "launch.nested",
            f"a kernel launches {kernel.name}: call it as a function, or launch it from the host.",
        )
    schedule = Schedule(kernel.programs, options.seed)
    machine = Machine(options, kernel.programs, schedule)
    cores = [Core(machine, i) for i in range(kernel.programs)]
    bound = inspect.signature(kernel.function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = _Arguments(machine, kernel.source)
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {n: arguments.enter(n, v) for n, v in value.items()}
        else:
            bound.arguments[name] = arguments.enter(name, value)

    def program(core: Core) -> Any:
        with running_on(core):
            return kernel.function(*bound.args, **bound.kwargs)

    results = schedule.run([functools.partial(program, core) for core in cores])
    check_programs_agree(cores)
    memory = check_capacity(cores)
    outputs = _leave(results[0])
    arguments.update()
    return Run(
        outputs,
        options,
        tuple(tuple(core.program) for core in cores),
        tuple(memory),
        tuple(machine.captured),
        machine.uninitialized,
        {name: values(tensor) for name, (_, tensor) in arguments.tensors.items()},
        kernel.name,
    )


class _Arguments:
    """The arrays among a kernel's arguments, as tensors in HBM."""

    def __init__(self, machine: Machine, source: Source) -> None:
        self._machine, self._source = machine, source
        self.tensors: dict[str, tuple[np.ndarray, NkiTensor]] = {}

    def enter(self, name: str, value: Any) -> Any:
        """An argument as the kernel sees it."""
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            self.tensors[name] = value, self._machine.hbm_input(value, name, self._source)
            return self.tensors[name][1]
        if isinstance(value, list):
            raise NkiValidationError(
                "language.list-argument", f"argument {name} is a list: pass a tuple.", self._source
            )
        if isinstance(value, tuple):
            items = [self.enter(f"{name}[{i}]", v) for i, v in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, dict):
            return {k: self.enter(f"{name}[{k!r}]", v) for k, v in value.items()}
        if isinstance(value, NKIObject):
            inside = copy.copy(value)
            for field_name, v in vars(value).items():
                if not isinstance(v, list):
                    object.__setattr__(inside, field_name, self.enter(f"{name}.{field_name}", v))
            return inside
        return value

    def update(self) -> None:
        """Kernels may write to their arguments: the caller's arrays see it, if writeable."""
        for array, tensor in self.tensors.values():
            if not tensor.contents.copy_on_write and array.flags.writeable:
                array[...] = values(tensor)


def values(tensor: NkiTensor) -> np.ndarray:
    """The contents of an HBM tensor as an array of its own dtype."""
    found = window(tensor).array()
    if tensor.dtype == "bool":
        return found.astype(np.bool_)
    return found if found.dtype == tensor.dtype.numpy else found.astype(tensor.dtype.numpy)


def _leave(result: Any) -> Any:
    """A kernel's result as NumPy arrays."""
    if isinstance(result, tuple | list):
        items = [_leave(r) for r in result]
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
    if isinstance(result, dict):
        return {k: _leave(v) for k, v in result.items()}
    if not isinstance(result, NkiTensor):
        return result
    if result.buffer is not MemoryRegion.shared_hbm:
        raise NkiValidationError(
            "language.output",
            f"returns {result!r}: outputs must be declared with buffer=nl.shared_hbm.",
            result.storage.source,
        )
    where, written = window(result), result.contents.written
    if written is not None and not where.flags(written).all():
        missing = np.argwhere(where.flags(written) == 0)
        raise UninitializedReadError(
            "memory.output-never-written",
            f"returns {result!r}, of which {len(missing)} elements were never written, the first "
            f"at {tuple(int(i) for i in missing[0])}.",
            result.storage.source,
        )
    return values(result).copy()
