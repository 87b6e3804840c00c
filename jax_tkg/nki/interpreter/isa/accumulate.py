"""Registers in which the Vector and the Scalar engine accumulate reductions, one float32 a lane."""

import enum
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.alu import Op
from jax_tkg.nki.interpreter.hardware import NUM_PARTITIONS
from jax_tkg.nki.interpreter.isa.operands import broadcast_operand, result_tile
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import Step
from jax_tkg.nki.interpreter.tensor import NkiTensor

IDENTITY = {
    "add": 0.0,
    "subtract": 0.0,
    "multiply": 1.0,
    "maximum": -np.inf,
    "minimum": np.inf,
    "abs_max": 0.0,
    "abs_min": np.inf,
}


class reduce_cmd(enum.Enum):  # noqa: N801  (NKI's name)
    """What an instruction does with the registers."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


REDUCES = (reduce_cmd.reduce, reduce_cmd.reset_reduce, reduce_cmd.load_reduce)
VECTOR_COMMANDS = (reduce_cmd.idle, *REDUCES)
SCALAR_COMMANDS = (
    reduce_cmd.idle, reduce_cmd.reset, reduce_cmd.reduce, reduce_cmd.reset_reduce,
)  # fmt: skip


class Accumulator:
    """The registers of one engine. What they hold before the first reset is unknown."""

    def __init__(self) -> None:
        self.values = np.zeros((NUM_PARTITIONS, 1), np.float32)
        self.known = np.zeros(NUM_PARTITIONS, bool)


class Reduction:
    """What one instruction does with the registers of the partitions of a tile.

    Made before the instruction computes, it checks the arguments; `start` and `add` then change
    the registers, and `write` reads them out.
    """

    def __init__(
        self,
        step: Step,
        engine: Engine,
        tile: NkiTensor,
        op: Op | None,
        what: Any,
        *,
        allowed: tuple[reduce_cmd, ...],
        initial: Any = None,
        initial_role: str = "reduce_init",
        result: NkiTensor | None = None,
    ) -> None:
        self.step, self.engine, self.op = step, engine, op
        if what not in allowed:
            names = ", ".join(c.name for c in allowed)
            step.refuse("reduce-cmd", f"reduce_cmd is {what}: must be {names}.")
        self.what = reduce_cmd(what)
        if self.what in REDUCES and op is None:
            step.refuse("reduce-op", f"reduce_cmd is {self.what.name}: needs a reduce_op.")
        self.initial = self._initial(initial_role, initial, tile)
        self.result = None if result is None else result_tile(step, "reduce_res", result, tile)
        first = tile.start_partition
        self.lanes = slice(first, first + tile.shape[0])
        self.registers = step.core.accumulators.setdefault(engine, Accumulator())

    def _initial(self, role: str, given: Any, tile: NkiTensor) -> Any:
        loads = self.what is reduce_cmd.load_reduce
        if loads and given is None:
            self.step.refuse("reduce-init", f"reduce_cmd is load_reduce: needs {role}.")
        if loads:
            return broadcast_operand(self.step, role, given, tile)
        if isinstance(given, NkiTensor) or given not in (None, 0):
            self.step.refuse("reduce-init", f"{role} is {given!r}: only load_reduce loads it.")
        return None

    def start(self) -> None:
        """Resets, loads, or forgets: an idle Vector instruction may change the registers."""
        if self.what is reduce_cmd.idle and self.engine is Engine.vector:
            self.registers.known[:] = False
        elif self.what not in (reduce_cmd.idle, reduce_cmd.reduce):
            identity = 0.0 if self.op is None else IDENTITY[self.op.name]
            start = identity if self.initial is None else self.initial
            self.registers.values[self.lanes] = start
            self.registers.known[self.lanes] = True

    def add(self, values: np.ndarray) -> None:
        """Starts, and reduces the results `[P, N]` onto the registers if told to."""
        self.start()
        if self.what in REDUCES:
            assert self.op is not None
            self.set(self.op.compute(self.read(), fold(self.op, values)))

    def set(self, values: np.ndarray) -> None:
        """New contents, `[P, 1]`."""
        self.registers.values[self.lanes] = values

    def read(self) -> np.ndarray:
        """The contents, `[P, 1]`."""
        if not self.registers.known[self.lanes].all():
            self.step.refuse(
                "accumulator",
                f"what the reduction registers of the {self.engine.name} engine hold is unknown: "
                "begin with reduce_cmd.reset_reduce. An idle instruction of the Vector engine "
                "makes its registers unknown.",
            )
        return self.registers.values[self.lanes].copy()

    def write(self, *, negate: bool = False) -> None:
        """Reads the registers out to the tile that was given for it."""
        if self.result is not None:
            self.step.put(self.result, -self.read() if negate else self.read())


def fold(op: Op, values: np.ndarray) -> np.ndarray:
    """`[P, N]` reduced to `[P, 1]`; abs_max and abs_min give the last of equal magnitudes."""
    if op.reduction is not None:
        return np.asarray(op.reduction(values, axis=1))[:, None]
    sizes = np.abs(values[:, ::-1])
    found = sizes.argmax(axis=1) if op.name == "abs_max" else sizes.argmin(axis=1)
    return np.take_along_axis(values, values.shape[1] - 1 - found[:, None], axis=1)
