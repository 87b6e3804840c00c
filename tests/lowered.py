"""Walks lowered programs and finds what Neuron cannot run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jaxlib.mlir import ir

# One operation each of: control flow that depends on data, sorting, and what has no instruction.
UNSUPPORTED = frozenset(
    f"stablehlo.{name}"
    for name in ("case", "if", "sort", "custom_call", "fft", "cholesky", "complex")
) | {"stablehlo.reduce_precision"}


def lower_for_neuron(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Lowers a function, jitted or not, as for a Neuron device; none is needed."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return jitted.trace(*args, **kwargs).lower(lowering_platforms=("neuron",))


def walk(lowered: Any) -> Iterator[ir.Operation]:
    """Every operation of a lowered program, also those inside loops and functions."""
    pending = [lowered.compiler_ir("stablehlo").operation]
    while pending:
        op = pending.pop()
        yield op
        for region in op.regions:
            for block in region.blocks:
                pending += [inner.operation for inner in block.operations]


def operations(lowered: Any) -> Counter[str]:
    """How often each operation occurs."""
    return Counter(op.name for op in walk(lowered))


def hazards(lowered: Any) -> set[str]:
    """What Neuron cannot run, or only by chance; empty for a program that is fine."""
    return {hazard for op in walk(lowered) for hazard in _hazards_of(op)}


def _hazards_of(op: ir.Operation) -> Iterator[str]:
    if op.name in UNSUPPORTED or op.name.startswith("chlo."):
        yield op.name
    if op.name == "func.func" and "threefry" in str(op.attributes["sym_name"]):
        yield "threefry"
    if op.name == "stablehlo.reduce" and len(op.operands) > 2:
        yield "variadic reduce"
    if op.name == "stablehlo.while" and not has_constant_trip_count(op):
        yield "while without constant trip count"
    if op.name == "stablehlo.dot_general" and _is_integer(op.operands[0]):
        yield "integer dot"
    if op.name == "stablehlo.scatter" and _is_integer(op.operands[0]) and _adds(op):
        yield "integer scatter-add"
    if any("f64" in str(result.type) for result in op.results):
        yield "float64"


def has_constant_trip_count(loop: ir.Operation) -> bool:
    """Whether a counter goes from a constant to a constant in constant steps.

    Only such loops do: the condition compares a loop variable with a constant (or with a variable
    that starts as one and never changes), and the body adds a constant to it or subtracts one.
    """
    condition, body = (region.blocks[0] for region in loop.regions)
    test = condition.operations[-1].operands[0].owner
    if _is_block(test) or test.name != "stablehlo.compare":
        return False
    counters = 0
    for side in map(_converted, test.operands):
        if _is_constant(side):
            continue
        if not _is_block(side.owner) or side.owner != condition:
            return False
        index = ir.BlockArgument(side).arg_number
        start, variable = loop.operands[index], body.arguments[index]
        if not _is_constant(start):
            return False
        after = _converted(body.operations[-1].operands[index])
        if after == variable:
            continue
        if not _is_constant_step(after, variable):
            return False
        counters += 1
    return counters == 1


def _is_constant_step(after: ir.Value, variable: ir.Value) -> bool:
    update = after.owner
    if _is_block(update) or update.name not in ("stablehlo.add", "stablehlo.subtract"):
        return False
    left, right = map(_converted, update.operands)
    if update.name == "stablehlo.add" and right == variable:
        left, right = right, left
    return left == variable and _is_constant(right)


def _converted(value: ir.Value) -> ir.Value:
    """What a value was before conversions of its type, most of which change nothing."""
    while not _is_block(value.owner) and value.owner.name == "stablehlo.convert":
        (value,) = value.owner.operands
    return value


def _is_constant(value: ir.Value) -> bool:
    value = _converted(value)
    return not _is_block(value.owner) and value.owner.name == "stablehlo.constant"


def _is_block(owner: Any) -> bool:
    return isinstance(owner, ir.Block)


def _is_integer(value: ir.Value) -> bool:
    return isinstance(ir.ShapedType(value.type).element_type, ir.IntegerType)


def _adds(op: ir.Operation) -> bool:
    return any(inner.operation.name == "stablehlo.add" for inner in op.regions[0].blocks[0])
