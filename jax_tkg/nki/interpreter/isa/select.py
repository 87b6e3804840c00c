"""Choosing between values by a condition, and counting: the instructions that make masks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.alu import OPS, Op
from jax_tkg.nki.interpreter.dtypes import FLOAT32, convert
from jax_tkg.nki.interpreter.isa.accumulate import VECTOR_COMMANDS, Reduction, reduce_cmd
from jax_tkg.nki.interpreter.isa.operands import (
    COMPARISONS,
    FLOAT32_MIN,
    broadcast_operand,
    cycles,
    gpsimd_cycles,
    number,
    one_of,
)
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import FIXED_CYCLES, SBUF, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

RANGE_COMPARISONS = ("equal", "less", "less_equal", "greater", "greater_equal")
EXACT_INDICES = 2**24  # float32 holds all integers up to here
COMMANDS = tuple(c for c in VECTOR_COMMANDS if c is not reduce_cmd.load_reduce)


def _affine(
    step: Step, tile: NkiTensor, pattern: Sequence[Sequence[Any]], offset: Any, multiplier: Any
) -> np.ndarray:
    """Offset + partition * multiplier + sum of index * step, in int32, `[P, elements]`."""
    counts = [n for _, n in pattern]
    if not 1 <= len(counts) <= 4 or math.prod(counts) != tile.free_size:
        step.refuse(
            "pattern",
            f"pattern {list(pattern)} has {math.prod(counts)} elements on {len(counts)} axes: "
            f"needs the {tile.free_size} of {tile!r} on one to four.",
        )
    numbers = [offset, multiplier, *(x for axis in pattern for x in axis)]
    for x in numbers:
        if not isinstance(x, int | np.integer) or not -(2**31) <= x < 2**31:
            step.refuse("int32", f"{x!r} in offset, channel_multiplier or pattern: needs an int32.")
    values = offset + multiplier * np.arange(tile.shape[0], dtype=np.int64)[:, None]
    for stride, count in pattern:
        values = (values[:, :, None] + stride * np.arange(count)).reshape(len(values), -1)
    return values.astype(np.int32)


@instruction
def iota(
    step: Step,
    dst: NkiTensor,
    pattern: Sequence[Sequence[Any]],
    offset: Any = 0,
    channel_multiplier: Any = 0,
) -> None:
    """Sets dst = offset + partition * channel_multiplier + index * step, summed over the axes."""
    dst = step.tile("dst", dst, regions=(SBUF,))
    step.put(dst, _affine(step, dst, pattern, offset, channel_multiplier))
    step.runs_on(Engine.gpsimd, gpsimd_cycles(dst.free_size), dst.free_size)


@instruction
def affine_select(
    step: Step,
    dst: NkiTensor,
    pattern: Sequence[Sequence[Any]],
    channel_multiplier: Any,
    on_true_tile: NkiTensor,
    on_false_value: Any,
    cmp_op: Op = OPS["equal"],
    offset: Any = 0,
) -> None:
    """Sets dst = on_true_tile where cmp_op(affine value, 0), else the value; see `iota`."""
    dst = step.tile("dst", dst, regions=(SBUF,))
    source = step.tile("on_true_tile", on_true_tile, regions=(SBUF,))
    step.same_layout(dst=dst, on_true_tile=source)
    cmp_op = one_of(step, "cmp_op", cmp_op, COMPARISONS)
    other = number(step, "on_false_value", on_false_value)
    chosen = cmp_op.compute(_affine(step, dst, pattern, offset, channel_multiplier), 0) != 0
    if dst.dtype == source.dtype and dst.dtype.is_integer:
        filler = convert(np.array([other]), dst.dtype)
        step.put(dst, np.where(chosen, step.bits(source), filler))
    else:
        step.put(dst, np.where(chosen, step.float32(source), other))
    step.runs_on(Engine.gpsimd, gpsimd_cycles(dst.free_size), dst.free_size)


@instruction
def range_select(
    step: Step,
    dst: NkiTensor,
    on_true_tile: NkiTensor,
    comp_op0: Op,
    comp_op1: Op,
    bound0: NkiTensor,
    bound1: NkiTensor,
    reduce_cmd: reduce_cmd = reduce_cmd.reset_reduce,
    reduce_res: NkiTensor | None = None,
    reduce_op: Op = OPS["maximum"],
    range_start: Any = 0,
    on_false_value: Any = FLOAT32_MIN,
) -> None:
    """Sets dst = on_true_tile where the index compares so with both bounds, else FP32_MIN."""
    if step.core.target.generation < 3:
        step.refuse("target", "needs trn2 or newer; on trn1 use affine_select.")
    dst, source = step.tile("dst", dst), step.tile("on_true_tile", on_true_tile)
    step.same_layout(dst=dst, on_true_tile=source)
    if not source.dtype.is_float:
        step.refuse("dtype", f"on_true_tile is {source!r}: must be of a float type.")
    if not isinstance(range_start, int) or abs(range_start) + source.free_size > EXACT_INDICES:
        step.refuse(
            "range-start",
            f"range_start {range_start!r} and {source.free_size} elements: needs an int, and "
            "indices within 2^24, beyond which float32 skips integers.",
        )
    if np.float32(on_false_value) != np.float32(FLOAT32_MIN):
        step.refuse("on-false-value", f"on_false_value is {on_false_value!r}: must be FP32_MIN.")
    tests = [
        one_of(step, role, op, RANGE_COMPARISONS)
        for role, op in (("comp_op0", comp_op0), ("comp_op1", comp_op1))
    ]
    reduce_op = one_of(step, "reduce_op", reduce_op, ("maximum",))
    reduction = Reduction(
        step, Engine.vector, source, reduce_op, reduce_cmd, allowed=COMMANDS, result=reduce_res
    )
    indices = np.arange(range_start, range_start + source.free_size).astype(np.float32)
    inside = [
        test.compute(indices, _bound(step, role, bound, source)) != 0
        for test, role, bound in zip(tests, ("bound0", "bound1"), (bound0, bound1), strict=True)
    ]
    values = np.where(inside[0] & inside[1], step.float32(source), np.float32(FLOAT32_MIN))
    reduction.add(values)
    step.put(dst, values)
    reduction.write()
    step.runs_on(Engine.vector, _cycles(dst, reduce_res), dst.free_size)


def _bound(step: Step, role: str, bound: Any, source: NkiTensor) -> Any:
    tile = step.tensor(role, bound)
    if tile.dtype != FLOAT32:
        step.refuse("bound-dtype", f"{role} is {tile!r}: must be float32.")
    return broadcast_operand(step, role, tile, source)


def _cycles(dst: NkiTensor, reduce_res: NkiTensor | None) -> float:
    return cycles(dst.free_size) + (0 if reduce_res is None else FIXED_CYCLES)


@instruction
def select_reduce(
    step: Step,
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: Any,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
    reduce_op: Op = OPS["maximum"],
    reverse_pred: bool = False,
) -> None:
    """Sets dst = on_true where the predicate is not 0 (or is 0, reversed), else on_false."""
    dst, predicate = step.tile("dst", dst), step.tile("predicate", predicate)
    on_true = step.tile("on_true", on_true)
    step.same_layout(dst=dst, predicate=predicate, on_true=on_true)
    step.not_all_psum(on_true=on_true, predicate=predicate)
    if predicate.dtype not in ("int8", "uint8", "int16", "uint16"):
        step.refuse("predicate", f"predicate {predicate!r}: must be int8, uint8, int16 or uint16.")
    if on_true.dtype in ("tfloat32", "int32", "uint32"):
        step.refuse("dtype", f"on_true is {on_true!r}: any type but tfloat32, int32 and uint32.")
    if isinstance(reduce_res, NkiTensor) and not reduce_res.dtype.is_float:
        step.refuse("reduce-res", f"reduce_res is {reduce_res!r}: must be of a float type.")
    reduce_op = one_of(step, "reduce_op", reduce_op, ("maximum",))
    reduction = Reduction(
        step, Engine.vector, on_true, reduce_op, reduce_cmd, allowed=COMMANDS, result=reduce_res
    )
    other = broadcast_operand(step, "on_false", on_false, on_true, any_type=True)
    chosen = (step.bits(predicate) != 0) != reverse_pred
    values = np.where(chosen, step.float32(on_true), other)
    reduction.add(values)
    step.put(dst, values)
    reduction.write()
    step.runs_on(Engine.vector, _cycles(dst, reduce_res), dst.free_size)
