"""The Scalar engine: functions of `data * scale + bias`, with sums in its registers."""

from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.alu import OPS, Op
from jax_tkg.nki.interpreter.isa.accumulate import SCALAR_COMMANDS, Reduction, reduce_cmd
from jax_tkg.nki.interpreter.isa.operands import apply, broadcast_operand, cycles, one_of
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import FIXED_CYCLES, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

# (op0, op1) of activate2.
STAGES = (
    ("multiply", "add"), ("multiply", "subtract"), ("multiply", "bypass"),
    ("add", "bypass"), ("subtract", "bypass"), ("bypass", "bypass"),
)  # fmt: skip
ACTIVATE2_REDUCTIONS = ("add", "maximum", "minimum", "abs_max", "abs_min")


def _function(step: Step, op: Any) -> Op:
    if not isinstance(op, Op) or op.activation is None:
        step.refuse(
            "operator", f"op is {op!r}: needs an activation function such as nl.exp or nl.copy."
        )
    return op


def _evaluate(step: Step, op: Op, x: np.ndarray, **parameters: Any) -> np.ndarray:
    """The function of what it is valid for; NaN passes."""
    if op.valid is not None:
        inside = op.valid.holds(x)
        if not inside.all():
            step.refuse(
                "range",
                f"{op!r} of {x[~inside][0]:.9g}: the Scalar engine evaluates it in {op.valid} "
                f"only ({np.count_nonzero(~inside)} of {x.size} inputs are outside). Clip or "
                "reduce the argument first.",
            )
    assert op.activation is not None
    return np.asarray(op.activation(x, **parameters))


def _bias(step: Step, op: Op, bias: Any, data: NkiTensor) -> Any:
    if bias is None:
        return None
    if step.core.target.generation < 3:
        if not isinstance(bias, NkiTensor):
            step.refuse("bias", f"bias is {bias!r}: trn1 takes a tile of one value a partition.")
        if op.name == "reciprocal":
            step.refuse("bias", "nl.reciprocal takes no bias on trn1.")
    if isinstance(bias, NkiTensor) and bias.dtype == "tfloat32":
        step.refuse("bias", f"bias is {bias!r}: any type but tfloat32.")
    return broadcast_operand(step, "bias", bias, data, any_type=True)


def _scaled(step: Step, op: Op, data: NkiTensor, bias: Any, scale: Any) -> np.ndarray:
    """`data * scale + bias`; a scale of 1 and no bias change nothing and cost nothing."""
    factor, shift = broadcast_operand(step, "scale", scale, data), _bias(step, op, bias, data)
    values = step.float32(data)
    with np.errstate(all="ignore"):
        if isinstance(factor, np.ndarray) or factor != 1:
            values = values * factor
        return values if shift is None else values + shift


def _activate(
    step: Step,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: Any,
    scale: Any,
    reduce_op: Any,
    reduce_res: NkiTensor | None,
    what: reduce_cmd,
) -> None:
    dst, data = step.tile("dst", dst), step.tile("data", data)
    step.same_layout(dst=dst, data=data)
    function = _function(step, op)
    if reduce_op is not None:
        one_of(step, "reduce_op", reduce_op, ("add",))
    reduction = Reduction(
        step, Engine.scalar, data, reduce_op, what, allowed=SCALAR_COMMANDS, result=reduce_res
    )
    values = _evaluate(step, function, _scaled(step, function, data, bias, scale))
    reduction.add(values)
    step.put(dst, values)
    reduction.write()
    extra = 0 if reduce_res is None else FIXED_CYCLES
    step.runs_on(Engine.scalar, cycles(dst.free_size) + extra, dst.free_size)


@instruction
def activation(
    step: Step,
    dst: NkiTensor,
    op: Op,
    data: NkiTensor,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Op | None = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
) -> None:
    """Sets dst = op(data * scale + bias), sums over the free axes into the registers if told to."""
    _activate(step, dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd)


@instruction
def activation_reduce(
    step: Step,
    dst: NkiTensor,
    op: Op,
    data: NkiTensor,
    reduce_op: Op,
    reduce_res: NkiTensor | None,
    bias: Any = None,
    scale: Any = 1.0,
) -> None:
    """`activation` with reduce_cmd.reset_reduce."""
    what = reduce_cmd.reset_reduce
    _activate(step, dst, op, data, bias, scale, reduce_op, reduce_res, what)


@instruction
def activate2(
    step: Step,
    dst: NkiTensor,
    op: Op,
    data: NkiTensor,
    imm0: Any,
    imm1: Any,
    op0: Op | None,
    op1: Op | None,
    relu_param: Any = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: Op | None = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
) -> None:
    """Sets dst = op((data op0 imm0) op1 imm1) on trn3, reduced over the free axes if told to."""
    if step.core.target.generation < 4:
        step.refuse("target", "needs trn3; on others use activation.")
    dst, data = step.tile("dst", dst), step.tile("data", data)
    step.same_layout(dst=dst, data=data)
    function = _function(step, op)
    if reduce_op is not None:
        one_of(step, "reduce_op", reduce_op, ACTIVATE2_REDUCTIONS)
    reduction = Reduction(
        step, Engine.scalar, data, reduce_op, reduce_cmd,
        allowed=SCALAR_COMMANDS, result=reduce_res,
    )  # fmt: skip
    values = _stages(step, data, (op0, op1), (imm0, imm1), (reverse0, reverse1))
    parameters = {}
    if function is OPS["prelu"]:
        parameters["slope"] = broadcast_operand(step, "relu_param", relu_param, data)
    values = _evaluate(step, function, values, **parameters)
    reduction.add(values)
    step.put(dst, values)
    reduction.write()
    extra = 0 if reduce_res is None else FIXED_CYCLES
    step.runs_on(Engine.scalar, cycles(dst.free_size) + extra, dst.free_size)


def _stages(
    step: Step,
    data: NkiTensor,
    ops: tuple[Any, Any],
    operands: tuple[Any, Any],
    reverse: tuple[bool, bool],
) -> np.ndarray:
    bypass = OPS["bypass"]
    found = [bypass if op is None else op for op in ops]
    names = tuple(op.name if isinstance(op, Op) else repr(op) for op in found)
    if names not in STAGES:
        wanted = ", ".join(f"({a}, {b})" for a, b in STAGES)
        step.refuse("operators", f"op0 and op1 are {names}: must be {wanted}.")
    both = [t.dtype for t in operands if isinstance(t, NkiTensor)]
    if len(set(both)) > 1:
        step.refuse("operand-dtype", f"imm0 {operands[0]!r}, imm1 {operands[1]!r}: one type.")
    values = step.float32(data)
    for i, (op, operand) in enumerate(zip(found, operands, strict=True)):
        if op is not bypass:
            scalar = broadcast_operand(step, f"imm{i}", operand, data, any_type=True)
            values = apply(op, values, scalar, reverse[i])
        elif reverse[i]:
            step.refuse("reverse", f"reverse{i} without an op{i}.")
    return values
