"""Reductions along the free axes and across partitions."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.alu import Kind, Op
from jax_tkg.nki.interpreter.isa.accumulate import REDUCES, Reduction, reduce_cmd
from jax_tkg.nki.interpreter.isa.operands import (
    ARITHMETIC,
    apply,
    broadcast_operand,
    check_bitvec,
    cycles,
    gpsimd_cycles,
    one_of,
    operator,
    unsigned,
)
from jax_tkg.nki.interpreter.isa.vector import scalar_operand
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import FIXED_CYCLES, SBUF, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

PARTITION_REDUCTIONS = ("add", "average", "maximum", "bitwise_or", "bitwise_and")
SCALAR_REDUCTIONS = ("add", "multiply", "maximum", "minimum")
CUMULATIVE: dict[str, Callable[..., Any]] = {
    "add": np.cumsum,
    "multiply": np.cumprod,
    "maximum": np.maximum.accumulate,
    "minimum": np.minimum.accumulate,
}
CUMULATIVE_TYPES = (
    "bfloat16", "float16", "float32", "float8_e4m3", "float8_e5m2", "float8_e4m3fn",
    "uint8", "uint16", "int8", "int16",
)  # fmt: skip


def _reduced_axes(step: Step, axis: Any, data: NkiTensor) -> int:
    """How many axes are reduced: the last ones."""
    given = [axis] if isinstance(axis, int) else list(axis)
    axes = sorted(a + data.ndim if a < 0 else a for a in given)
    if not axes or axes != list(range(data.ndim - len(axes), data.ndim)) or axes[0] < 1:
        step.refuse(
            "axis",
            f"axis {axis} of {data!r}: must be the last free axes, as {data.ndim - 1} or "
            f"{tuple(range(1, data.ndim))}; not the partition.",
        )
    return len(axes)


@instruction
def tensor_reduce(
    step: Step,
    dst: NkiTensor,
    op: Op,
    data: NkiTensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
) -> None:
    """Sets dst = the last free axes of data folded with op.

    `keepdims` changes nothing: dst is any tile with as many elements as are left.
    """
    dst, data = step.tile("dst", dst), step.tile("data", data)
    op = operator(step, "op", op)
    if op.reduction is None:
        step.refuse("operator", f"op is {op!r}: no reduction operator.")
    kept = data.shape[1 : data.ndim - _reduced_axes(step, axis, data)]
    left = int(np.prod(kept, dtype=int))
    if (dst.shape[0], dst.free_size) != (data.shape[0], left):
        step.refuse("shape", f"dst {dst!r}: {data!r} leaves {left} on {data.shape[0]} partitions.")
    if op.kind is Kind.BITVEC:
        check_bitvec(step, dst=dst, data=data)
        if negate:
            step.refuse("negate", f"negate with {op!r}: arithmetic operators only.")
        values = unsigned(step.bits(data))
    else:
        values = step.float32(data)
    result = np.asarray(op.reduction(values.reshape(data.shape[0], left, -1), axis=2))
    if op.kind is Kind.BITVEC:
        result = result.view(dst.dtype.numpy)
    step.put(dst, -result if negate else result)
    fast = data.dtype == dst.dtype == "bfloat16" and op.name in ("add", "maximum")
    step.runs_on(Engine.vector, cycles(data.free_size / (2 if fast else 1)), data.free_size)


@instruction
def tensor_partition_reduce(step: Step, dst: NkiTensor, op: Op, data: NkiTensor) -> None:
    """dst[1, ...] = the partitions of data folded with op, on GpSimd."""
    dst, data = step.tile("dst", dst, regions=(SBUF,)), step.tile("data", data, regions=(SBUF,))
    op = one_of(step, "op", op, PARTITION_REDUCTIONS)
    if (dst.shape[0], dst.free_size) != (1, data.free_size):
        step.refuse("shape", f"dst {dst!r}: needs 1 partition of {data.free_size} elements.")
    assert op.reduction is not None
    if op.kind is Kind.BITVEC:
        check_bitvec(step, dst=dst, data=data)
        folded = np.asarray(op.reduction(unsigned(step.bits(data)), axis=0))
        step.put(dst, folded.view(dst.dtype.numpy))
    else:
        step.put(dst, np.asarray(op.reduction(step.float32(data), axis=0)))
    step.runs_on(Engine.gpsimd, gpsimd_cycles(data.free_size), data.free_size)


@instruction
def tensor_scalar_reduce(
    step: Step,
    dst: NkiTensor,
    data: NkiTensor,
    op0: Op,
    operand0: Any,
    reduce_op: Op,
    reduce_res: NkiTensor | None = None,
    reverse0: bool = False,
    reduce_cmd: reduce_cmd = reduce_cmd.reset_reduce,
    reduce_init: Any = None,
    reduce_res_negate: bool = False,
) -> None:
    """Sets dst = data op0 operand0, folded over the free axes into the registers and reduce_res."""
    dst, data = step.tile("dst", dst), step.tile("data", data)
    step.same_layout(dst=dst, data=data)
    op0 = operator(step, "op0", op0, ARITHMETIC)
    reduce_op = one_of(step, "reduce_op", reduce_op, SCALAR_REDUCTIONS)
    if reverse0:
        step.refuse("reverse0", "reverse0=True is not supported: swap by other operators.")
    reduction = Reduction(
        step, Engine.vector, data, reduce_op, reduce_cmd,
        allowed=REDUCES, initial=reduce_init, result=reduce_res,
    )  # fmt: skip
    operand = scalar_operand(step, "operand0", op0, operand0, data)
    values = apply(op0, step.float32(data), operand, reverse=False)
    reduction.add(values)
    step.put(dst, values)
    reduction.write(negate=reduce_res_negate)
    step.runs_on(Engine.vector, cycles(dst.free_size) + FIXED_CYCLES, dst.free_size)


@instruction
def tensor_scalar_cumulative(
    step: Step,
    dst: NkiTensor,
    src: NkiTensor,
    op0: Op,
    op1: Op,
    imm0: Any,
    imm1: Any = None,
    reduce_cmd: reduce_cmd = reduce_cmd.reset_reduce,
) -> None:
    """dst[i] = (src[i] op0 imm0) op1 dst[i-1], which begins with the registers."""
    dst, src = step.tile("dst", dst), step.tile("src", src)
    step.same_layout(dst=dst, src=src)
    for role, tile in (("dst", dst), ("src", src)):
        if tile.dtype not in CUMULATIVE_TYPES:
            step.refuse("dtype", f"{role} is {tile!r}: not a type of this instruction.")
    op0 = operator(step, "op0", op0, ARITHMETIC)
    op1 = one_of(step, "op1", op1, (*CUMULATIVE, "subtract"))
    reduction = Reduction(
        step, Engine.vector, src, op1, reduce_cmd,
        allowed=REDUCES, initial=imm1, initial_role="imm1",
    )  # fmt: skip
    operand = scalar_operand(step, "imm0", op0, imm0, src)
    values = apply(op0, step.float32(src), operand, reverse=False)
    reduction.start()
    result = _cumulative(op1, reduction.read(), values)
    reduction.set(result[:, -1:])
    step.put(dst, result)
    step.runs_on(Engine.vector, cycles(dst.free_size), dst.free_size)


def _cumulative(op: Op, first: np.ndarray, values: np.ndarray) -> np.ndarray:
    """r[i] = values[i] op r[i-1]; a subtraction is a sum whose signs alternate."""
    signs = np.ones(1, np.float32)
    if op.name == "subtract":
        signs = np.where(np.arange(values.shape[1] + 1) % 2, -1, 1).astype(np.float32)
    every = np.concatenate([first, values], axis=1) * signs
    with np.errstate(all="ignore"):
        folded = CUMULATIVE["add" if op.name == "subtract" else op.name](every, axis=1)
    return np.asarray((folded * signs)[:, 1:])


@instruction
def tensor_tensor_scan(
    step: Step,
    dst: NkiTensor,
    data0: NkiTensor,
    data1: NkiTensor,
    initial: Any,
    op0: Op,
    op1: Op,
    reverse0: bool = False,
    reverse1: bool = False,
) -> None:
    """dst[i] = (data0[i] op0 dst[i-1]) op1 data1[i], which begins with `initial`."""
    dst = step.tile("dst", dst)
    data0, data1 = step.tile("data0", data0), step.tile("data1", data1)
    step.same_layout(dst=dst, data0=data0, data1=data1)
    step.not_all_psum(data0=data0, data1=data1)
    ops = [operator(step, r, op, ARITHMETIC) for r, op in (("op0", op0), ("op1", op1))]
    if any(op.is_unary for op in ops):
        step.refuse("operator", f"op0 {op0!r}, op1 {op1!r}: operators of two operands.")
    begin = broadcast_operand(step, "initial", initial, data0, any_type=True)
    left, right = step.float32(data0), step.float32(data1)
    result = np.empty(left.shape, np.float32)
    state = np.broadcast_to(begin, (left.shape[0], 1))[:, 0]
    for i in range(left.shape[1]):  # each needs the one before
        state = apply(ops[0], left[:, i], state, reverse0)
        state = result[:, i] = apply(ops[1], state, right[:, i], reverse1)
    step.put(dst, result)
    step.runs_on(Engine.vector, cycles(2 * dst.free_size), dst.free_size)
