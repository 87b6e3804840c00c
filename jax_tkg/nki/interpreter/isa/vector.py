"""Element by element: two tiles, a tile and scalars, reciprocal, exponential."""

from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.alu import OPS, Kind, Op
from jax_tkg.nki.interpreter.isa.accumulate import VECTOR_COMMANDS, Reduction, reduce_cmd
from jax_tkg.nki.interpreter.isa.copies import pick_engine
from jax_tkg.nki.interpreter.isa.operands import (
    ARITHMETIC,
    apply,
    binary,
    broadcast_operand,
    check_bitvec,
    cycles,
    gpsimd_cycles,
    operator,
    unsigned,
)
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import (
    FIXED_CYCLES,
    PSUM,
    SBUF,
    Step,
    elementwise_cycles,
    instruction,
)
from jax_tkg.nki.interpreter.tensor import NkiTensor

WORDS = ("int32", "uint32")
# Pairs of operators that the Scalar engine runs as tensor_scalar before trn3.
SCALAR_PAIRS = (("multiply", "add"), ("multiply", None), ("add", None))
EXPONENTIAL_SRC = (
    "float8_e4m3", "float8_e5m2", "float16", "bfloat16", "float32",
    "int8", "int16", "int32", "uint8", "uint16", "uint32",
)  # fmt: skip
EXPONENTIAL_DST = (
    "float8_e4m3", "float8_e5m2", "float16", "bfloat16", "float32", "tfloat32",
    "int8", "int16", "int32", "uint8", "uint16",
)  # fmt: skip
EXPONENTIAL_SUM = EXPONENTIAL_DST[:6]


@instruction
def tensor_tensor(
    step: Step,
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Op,
    engine: Engine = Engine.unknown,
) -> None:
    """Sets dst = data1 op data2."""
    dst = step.tile("dst", dst)
    data1, data2 = step.tile("data1", data1), step.tile("data2", data2)
    step.same_layout(dst=dst, data1=data1, data2=data2)
    step.not_all_psum(data1=data1, data2=data2)
    op = binary(step, "op", op)
    tiles = (dst, data1, data2)
    words = all(t.dtype in WORDS for t in tiles) and op.kind is Kind.ARITHMETIC
    if op.name == "power":
        if any(t.buffer is PSUM for t in tiles):
            step.refuse("gpsimd-psum", f"nl.power runs on GpSimd, no tile in PSUM: {tiles!r}.")
        engine = pick_engine(step, engine, (Engine.gpsimd,), *tiles)
    elif words and engine is Engine.unknown and all(t.buffer is SBUF for t in tiles):
        engine = Engine.gpsimd
    else:
        engine = pick_engine(step, engine, (Engine.vector, Engine.gpsimd), *tiles)
    if op.kind is Kind.BITVEC:
        check_bitvec(step, dst=dst, data1=data1, data2=data2)
        result = op.compute(unsigned(step.bits(data1)), unsigned(step.bits(data2)))
        step.put(dst, result.view(dst.dtype.numpy))
    elif words and engine is Engine.gpsimd:
        step.put(dst, _native(op, step.bits(data1), step.bits(data2)))
    else:
        step.put(dst, op.compute(step.float32(data1), step.float32(data2)))
    step.runs_on(engine, _tensor_tensor_cycles(step, engine, dst, data1, data2), dst.free_size)


def _native(op: Op, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """32-bit integers without a detour through float32; results wrap."""
    if op.name == "power":
        return np.asarray(op.compute(x.astype(np.float64), y.astype(np.float64)))
    return np.asarray(op.compute(x.astype(np.int64), y.astype(np.int64)))


def _tensor_tensor_cycles(
    step: Step, engine: Engine, dst: NkiTensor, data1: NkiTensor, data2: NkiTensor
) -> float:
    if engine is Engine.gpsimd:
        return gpsimd_cycles(dst.free_size)
    in_sbuf = data1.buffer is SBUF and data2.buffer is SBUF
    narrow = all(t.dtype.itemsize == 2 for t in (dst, data1, data2))
    fast = not in_sbuf or (narrow and step.core.target.generation >= 3)
    return cycles(dst.free_size if fast else 2 * dst.free_size)


@instruction
def tensor_scalar(
    step: Step,
    dst: NkiTensor,
    data: NkiTensor,
    op0: Op,
    operand0: Any,
    reverse0: bool = False,
    op1: Op | None = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Engine = Engine.unknown,
) -> None:
    """Sets dst = (data op0 operand0) op1 operand1, operands broadcast over the free axes."""
    dst, data = step.tile("dst", dst), step.tile("data", data)
    step.same_layout(dst=dst, data=data)
    op0 = operator(step, "op0", op0)
    stages = [("operand0", op0, operand0, reverse0)]
    if op1 is not None:
        op1 = operator(step, "op1", op1)
        stages.append(("operand1", op1, operand1, reverse1))
        if op1.kind is not op0.kind:
            step.refuse("operators", f"{op0!r} and {op1!r}: both bitvec or both arithmetic.")
    elif operand1 is not None:
        step.refuse("operand1", f"operand1 is {operand1!r} without an op1.")
    tiles = [t for t in (dst, data, operand0, operand1) if isinstance(t, NkiTensor)]
    engine = _tensor_scalar_engine(step, engine, op0, op1, tiles)
    if op0.kind is Kind.BITVEC:
        check_bitvec(step, dst=dst, data=data)
        values = unsigned(step.bits(data))
    else:
        values = step.float32(data)
    for role, op, operand, reverse in stages:
        values = apply(op, values, scalar_operand(step, role, op, operand, data), reverse)
    step.put(dst, values.view(dst.dtype.numpy) if op0.kind is Kind.BITVEC else values)
    step.runs_on(engine, _tensor_scalar_cycles(step, engine, dst, data), dst.free_size)


def _tensor_scalar_cycles(step: Step, engine: Engine, dst: NkiTensor, data: NkiTensor) -> float:
    size, generation = dst.free_size, step.core.target.generation
    if engine is Engine.gpsimd:
        return gpsimd_cycles(size)
    if engine is Engine.vector and generation >= 3:
        return elementwise_cycles(size, dst, data)
    narrow = dst.dtype.itemsize == data.dtype.itemsize == 2
    return cycles(size / 2 if narrow and generation >= 4 else size)


def scalar_operand(step: Step, role: str, op: Op, operand: Any, data: NkiTensor) -> Any:
    """The operand of one stage of a tensor_scalar."""
    if op.is_unary:
        if isinstance(operand, NkiTensor) or operand not in (None, 0):
            step.refuse("unary-operand", f"{role} is {operand!r}: {op!r} needs None or 0.")
        return None
    if op.kind is Kind.ARITHMETIC:
        return broadcast_operand(step, role, operand, data)
    if isinstance(operand, NkiTensor):
        tile = step.vector_operand(role, operand, data)
        check_bitvec(step, data=data, **{role: tile})
        return unsigned(step.bits(tile))
    width = 8 * data.dtype.itemsize
    if not isinstance(operand, int | np.integer) or not -(2 ** (width - 1)) <= operand < 2**width:
        step.refuse("operand", f"{role} is {operand!r}: {op!r} needs an integer of {width} bits.")
    return np.array(int(operand) % 2**width, f"u{data.dtype.itemsize}")


def _tensor_scalar_engine(
    step: Step, engine: Engine, op0: Op, op1: Op | None, tiles: list[NkiTensor]
) -> Engine:
    if op0.kind is Kind.BITVEC:
        return pick_engine(step, engine, (Engine.vector,), *tiles)
    pair = (op0.name, op1.name if op1 else None)
    if engine is Engine.scalar and step.core.target.generation < 4 and pair not in SCALAR_PAIRS:
        step.refuse(
            "scalar-operators",
            f"{pair} on the Scalar engine of {step.core.target.name}, which has multiply then add, "
            "multiply alone and add alone: use the Vector engine.",
        )
    if "rsqrt" not in pair:
        return pick_engine(step, engine, (Engine.vector, Engine.scalar), *tiles)
    if engine is Engine.unknown and all(t.buffer is SBUF for t in tiles):
        return Engine.gpsimd
    return pick_engine(step, engine, (Engine.vector, Engine.gpsimd, Engine.scalar), *tiles)


@instruction
def scalar_tensor_tensor(
    step: Step,
    dst: NkiTensor,
    data: NkiTensor,
    op0: Op,
    operand0: Any,
    op1: Op,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
) -> None:
    """Sets dst = (data op0 operand0) op1 operand1: operand0 a scalar or column, operand1 a tile."""
    dst = step.tile("dst", dst)
    data, operand1 = step.tile("data", data), step.tile("operand1", operand1)
    step.same_layout(dst=dst, data=data, operand1=operand1)
    step.not_all_psum(data=data, operand1=operand1)
    op0, op1 = operator(step, "op0", op0, ARITHMETIC), binary(step, "op1", op1, ARITHMETIC)
    if op0.is_unary:
        first = scalar_operand(step, "operand0", op0, operand0, data)
    else:
        first = broadcast_operand(step, "operand0", operand0, data, any_type=True)
    values = apply(op0, step.float32(data), first, reverse0)
    step.put(dst, apply(op1, values, step.float32(operand1), reverse1))
    narrow = data.dtype == operand1.dtype == "bfloat16" and dst.free_size % 2 == 0
    fast = narrow and (op0.name, op1.name) == ("subtract", "multiply")
    step.runs_on(Engine.vector, cycles(dst.free_size * (1 if fast else 2)), dst.free_size)


@instruction
def reciprocal(step: Step, dst: NkiTensor, data: NkiTensor) -> None:
    """Sets dst = 1 / data."""
    dst, data = step.tile("dst", dst), step.tile("data", data)
    step.same_layout(dst=dst, data=data)
    with np.errstate(all="ignore"):
        step.put(dst, np.float32(1) / step.float32(data))
    step.runs_on(Engine.vector, cycles(8 * dst.free_size), dst.free_size)


@instruction
def exponential(
    step: Step,
    dst: NkiTensor,
    src: NkiTensor,
    max_value: Any = 0.0,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
    reduce_init: Any = 0.0,
) -> None:
    """Sets dst = exp(src - max_value) on the Vector engine of trn3, with sums if told to."""
    if step.core.target.generation < 4:
        step.refuse("target", "needs trn3; on others use activation(op=nl.exp).")
    dst, src = step.tile("dst", dst), step.tile("src", src)
    step.same_layout(dst=dst, src=src)
    for role, tile, allowed in (("src", src, EXPONENTIAL_SRC), ("dst", dst, EXPONENTIAL_DST)):
        if tile.dtype not in allowed:
            step.refuse("dtype", f"{role} is {tile!r}: must be one of {', '.join(allowed)}.")
        if tile.ndim > 4:
            step.refuse("rank", f"{role} is {tile!r}: at most four axes.")
    if isinstance(reduce_res, NkiTensor) and reduce_res.dtype not in EXPONENTIAL_SUM:
        step.refuse("dtype", f"reduce_res is {reduce_res!r}: must be a float type.")
    reduction = Reduction(
        step, Engine.vector, src, OPS["add"], reduce_cmd,
        allowed=VECTOR_COMMANDS, initial=reduce_init, result=reduce_res,
    )  # fmt: skip
    top = broadcast_operand(step, "max_value", max_value, src)
    with np.errstate(all="ignore"):
        values = np.exp(step.float32(src) - top)
    reduction.add(values)
    step.put(dst, values)
    reduction.write()
    extra = 0 if reduce_res is None else FIXED_CYCLES
    step.runs_on(Engine.vector, cycles(dst.free_size / 4) + extra, dst.free_size)
