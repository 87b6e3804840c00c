"""What the compute instructions share: which operators they take, operands broadcast to a tile."""

from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.alu import Kind, Op
from jax_tkg.nki.interpreter.dtypes import FLOAT32
from jax_tkg.nki.interpreter.step import FIXED_CYCLES, Step
from jax_tkg.nki.interpreter.tensor import NkiTensor

GPSIMD_START = 150  # cycles before GpSimd's first element; [C]
FLOAT32_MIN = float(np.finfo(np.float32).min)
COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
ARITHMETIC = (Kind.ARITHMETIC,)
ALU = (Kind.ARITHMETIC, Kind.BITVEC)


def operator(step: Step, role: str, op: Any, kinds: tuple[Kind, ...] = ALU) -> Op:
    """An operator of one of these kinds that the target has."""
    if not isinstance(op, Op) or op.kind not in kinds:
        wanted = " or ".join(k.value for k in kinds)
        step.refuse("operator", f"{role} is {op!r}: needs an operator of kind {wanted}.")
    target = step.core.target
    if target.generation < op.generation:
        step.refuse("operator-target", f"{role} is {op!r}, which {target.name} does not have.")
    return op


def binary(step: Step, role: str, op: Any, kinds: tuple[Kind, ...] = ALU) -> Op:
    """An operator of two operands."""
    found = operator(step, role, op, kinds)
    if found.is_unary:
        step.refuse("operator", f"{role} is {op!r}: needs an operator of two operands.")
    return found


def one_of(step: Step, role: str, op: Any, names: tuple[str, ...]) -> Op:
    """One of the operators named."""
    if not isinstance(op, Op) or op.name not in names:
        wanted = ", ".join(f"nl.{n}" for n in names)
        step.refuse("operator", f"{role} is {op!r}: must be {wanted}.")
    return op


def number(step: Step, role: str, given: Any) -> np.float32:
    """A number known when the kernel is built."""
    if not isinstance(given, int | float | np.number):
        step.refuse("operand", f"{role} is {given!r}: needs a number.")
    with np.errstate(over="ignore"):
        return np.float32(given)


def broadcast_operand(
    step: Step, role: str, given: Any, like: NkiTensor, *, any_type: bool = False
) -> Any:
    """A number, or a tile of one float32 a partition as a `[P, 1]` array."""
    tile = step.vector_operand(role, given, like)
    if not isinstance(tile, NkiTensor):
        return number(step, role, tile)
    if not any_type and tile.dtype != FLOAT32:
        step.refuse("operand-dtype", f"{role} is {tile!r}: must be float32; tensor_copy it.")
    return step.float32(tile)


def result_tile(step: Step, role: str, given: Any, like: NkiTensor) -> NkiTensor:
    """A destination of one value for each partition of `like`."""
    tile = step.tile(role, given)
    if (tile.shape[0], tile.free_size) != (like.shape[0], 1):
        step.refuse(role.replace("_", "-"), f"{role} is {tile!r}: must be ({like.shape[0]}, 1).")
    return tile


def check_free_size(step: Step, role: str, tile: NkiTensor, low: int, high: int) -> None:
    """Refuses too few or too many elements a partition."""
    if not low <= tile.free_size <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}"
        step.refuse("free-size", f"{role} is {tile!r}: needs {wanted} elements a partition.")


def apply(op: Op, values: np.ndarray, operand: Any, reverse: bool) -> np.ndarray:
    """`values op operand`, or `operand op values`; a unary operator takes the values only."""
    if op.is_unary:
        return np.asarray(op.compute(values))
    return np.asarray(op.compute(operand, values) if reverse else op.compute(values, operand))


def cycles(elements: float) -> float:
    """One element a cycle but not less than starting takes."""
    return max(FIXED_CYCLES, elements)


def gpsimd_cycles(elements: int) -> float:
    """One element a cycle after a long start."""
    return GPSIMD_START + elements


def unsigned(bits: np.ndarray) -> np.ndarray:
    """Integers as bit patterns."""
    return bits.view(f"u{bits.dtype.itemsize}")


def check_bitvec(step: Step, **tiles: NkiTensor) -> None:
    """Bitvec operators see bits: integers of one size."""
    kinds = [t.dtype for t in tiles.values()]
    if not all(k.is_integer for k in kinds) or len({k.itemsize for k in kinds}) > 1:
        given = ", ".join(f"{role} {t!r}" for role, t in tiles.items())
        step.refuse("bitvec-dtype", f"{given}: bitvec operators need integers of one size.")
