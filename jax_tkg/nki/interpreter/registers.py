"""Registers and the loops that run on the device."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from jax_tkg.nki.interpreter.errors import NkiValidationError, kernel_line
from jax_tkg.nki.interpreter.machine import Decision, current_core
from jax_tkg.nki.interpreter.objects import NKIObject
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import PSUM, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

_loop_numbers = itertools.count(1)


class VirtualRegister(NKIObject):
    """A 32-bit scalar known at run time.

    Python does not see its value: no arithmetic, comparison or branch on it, except `while reg:`,
    which the compiler turns into a loop on the device.
    """

    def __init__(self, state: int | None = None, frozen: bool = False) -> None:
        self._value, self._frozen = state, frozen

    @property
    def register_value(self) -> int:
        """The value, for the interpreter."""
        if self._value is None:
            raise NkiValidationError(
                "register.uninitialized", "a register is read before anything was moved into it."
            )
        return self._value

    def set_register(self, value: int) -> None:
        """Gives it a value, for the interpreter."""
        if self._frozen:
            raise NkiValidationError(
                "register.induction", "the register of a loop cannot be written."
            )
        self._value = int(value)

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            "a register has no value while the kernel is built: no arithmetic, comparison, int() "
            "or range() on it. Compute in SBUF and register_load, or use it as an index or loop "
            "bound."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __index__ = _refuse

    def __bool__(self) -> bool:
        """For `while reg:`."""
        goes_on = self.register_value != 0
        _decide("goes on in a loop" if goes_on else "leaves a loop")
        return goes_on


def register_alloc(x: int | None = None) -> VirtualRegister:
    """A new register, holding `x` if given."""
    if x is not None and not isinstance(x, int):
        raise NkiValidationError(
            "register_alloc.value", f"{x!r}: needs an int or None; use register_load for a tensor."
        )
    return VirtualRegister(x)


@instruction
def register_move(step: Step, dst: VirtualRegister, src: Any) -> None:
    """Moves an int or another register's value into a register."""
    step.runs_on(Engine.sync, 1)
    dst.set_register(src.register_value if isinstance(src, VirtualRegister) else int(src))


def _check_scalar(step: Step, role: str, given: Any) -> None:
    tensor = step.tensor(role, given)
    if tensor.size != 1:
        step.refuse("size", f"{role} is {tensor!r}: needs one element.")
    if tensor.buffer is PSUM:
        step.refuse("buffer", f"{role} is {tensor!r}: must be in SBUF or HBM.")
    if not tensor.dtype.is_integer:
        step.refuse("dtype", f"{role} is {tensor!r}: registers hold integers.")


@instruction
def register_load(step: Step, dst: VirtualRegister, src: NkiTensor) -> None:
    """Loads one element of SBUF or HBM into a register."""
    _check_scalar(step, "src", src)
    step.runs_on(Engine.sync, 64)
    dst.set_register(int(step.raw(src).reshape(-1)[0]))


@instruction
def register_store(step: Step, dst: NkiTensor, src: VirtualRegister) -> None:
    """Stores a register into one element of SBUF or HBM."""
    _check_scalar(step, "dst", dst)
    step.runs_on(Engine.sync, 64)
    step.put(dst, np.array([src.register_value], np.int64))


def _bound(value: Any) -> int:
    return value.register_value if isinstance(value, VirtualRegister) else int(value)


def _decide(outcome: str) -> None:
    current_core().decisions.append(Decision(kernel_line(), outcome))


@contextlib.contextmanager
def _in_loop() -> Iterator[None]:
    core = current_core()
    outside = core.loops
    core.loops = (*outside, next(_loop_numbers))
    try:
        yield
    finally:
        core.loops = outside


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any], Any], step: int = 1) -> None:
    """Runs `body_fun(i)` for i from lower to upper; the bounds may be registers."""
    for i in dynamic_range(lower, upper, step):
        body_fun(i)


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[VirtualRegister]:
    """A loop on the device, written as `for` (deprecated in favour of `fori_loop`)."""
    first, last = (0, start) if stop is None else (start, stop)
    if not isinstance(step, int) or step < 1:
        raise NkiValidationError("loop.step", f"step {step!r}: needs a positive int.")
    trips = range(_bound(first), _bound(last), step)
    _decide(f"runs a loop {len(trips)} times")
    with _in_loop():
        for i in trips:
            yield VirtualRegister(i, frozen=True)


def while_loop(init: VirtualRegister, body_fun: Callable[[Any], Any]) -> None:
    """Runs `r = body_fun(r)` while the register r is not zero."""
    register = init
    with _in_loop():
        while register:
            register = body_fun(VirtualRegister(register.register_value))
            if not isinstance(register, VirtualRegister):
                raise NkiValidationError(
                    "loop.condition", f"the body returned {register!r}: needs the next register."
                )
