"""What is wrong with one operation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from jax_tkg.neuron.indices import asks_for_fill, beyond, direction
from jax_tkg.neuron.loops import has_constant_trip_count, is_block
from jax_tkg.neuron.program import Operation, Program, Value, called

Broken: TypeAlias = tuple[str, str]
"""A rule, and a message."""

# Refused wherever they occur, by rule.
_REFUSED: dict[str, tuple[str, str]] = {
    "case": ("conditional", "compute both branches and choose with jnp.where"),
    "if": ("conditional", "compute both branches and choose with jnp.where"),
    "infeed": ("host-callback", "pass the data as an argument"),
    "outfeed": ("host-callback", "return the data"),
    "send": ("host-callback", "return the data"),
    "recv": ("host-callback", "pass the data as an argument"),
    "fft": ("fft", "multiply by the matrix of the transform, or leave it to the host"),
    "cholesky": ("decomposition", "leave it to the host"),
    "triangular_solve": ("decomposition", "leave it to the host, or multiply by an inverse"),
    "reduce_precision": ("reduce-precision", "convert to the narrow dtype and back"),
}
# What the compiler knows (NCC_EVRF015), and what XLA's partitioner takes out before.
_KNOWN_TARGETS = re.compile(
    "AwsNeuron.*|NeuronBoundaryMarker-.*|ResizeNearest|ResizeBilinear|ResizeNearestGrad"
    "|Sharding|SPMDFullToShardShape|SPMDShardToFullShape|xla.sdy.*"
)
_FLOAT8 = frozenset({"f8E4M3", "f8E5M2"})
_ORDERINGS = frozenset({"LT", "LE", "GT", "GE"})


def broken_rules(op: Operation, program: Program) -> Iterator[Broken]:
    """The rules that an operation breaks by itself, not by what is inside it."""
    dialect, _, name = op.name.partition(".")
    if dialect == "chlo":
        yield from _of_chlo(op)
    elif name in _REFUSED:
        rule, instead = _REFUSED[name]
        yield rule, f"Neuron cannot run it; {instead}"
    elif name in _CHECKS:
        yield from _CHECKS[name](op, program)
    if (callee := called(op)) is not None and "threefry" in callee:
        yield (
            "threefry",
            "random bits by threefry; use keys of jax.random.key(seed, impl='unsafe_rbg'), which "
            "split without it",
        )
    yield from _of_types(op)


def _of_while(op: Operation, program: Program) -> Iterator[Broken]:
    if not has_constant_trip_count(op, program):
        yield (
            "dynamic-loop",
            "the trip count is no constant; loop a fixed number of times and mask what is too much",
        )


def _of_custom_call(op: Operation, _: Program) -> Iterator[Broken]:
    target = ir.StringAttr(op.attributes["call_target_name"]).value
    if "callback" in target:
        yield "host-callback", f"{target} calls Python; return the data instead"
    elif not _KNOWN_TARGETS.fullmatch(target):
        yield "custom-call", f"the compiler does not know the target {target}"


def _of_random_bits(op: Operation, _: Program) -> Iterator[Broken]:
    algorithm = stablehlo.RngAlgorithmAttr(op.attributes["rng_algorithm"]).value
    if algorithm != "DEFAULT":
        yield "random-algorithm", f"algorithm {algorithm}; leave it to the compiler (RNG_DEFAULT)"


def _of_sort(op: Operation, _: Program) -> Iterator[Broken]:
    if len(op.operands) > 1:
        yield (
            "multi-operand-sort",
            f"sorts {len(op.operands)} arrays by the first; sort one, or use lax.top_k",
        )
        return
    block = op.regions[0].blocks[0]
    compared = [direction(x) for x in block.operations if x.operation.name == "stablehlo.compare"]
    result = block.operations[len(block.operations) - 1].operation.operands[0].owner
    if is_block(result) or result.name != "stablehlo.compare":
        yield "sort-comparator", "the comparator is not one of <, <=, >, >="
    elif direction(result) not in _ORDERINGS:
        yield "sort-comparator", f"the comparator is {direction(result)}, not <, <=, > or >="
    elif not _ORDERINGS.issuperset(compared):
        yield (
            "float-sort",
            "the comparator also asks for zero and NaN; sort integers of the same order, or use "
            "lax.top_k",
        )


def _of_reduce(op: Operation, _: Program) -> Iterator[Broken]:
    if len(op.operands) > 2:
        yield (
            "variadic-reduce",
            f"reduces {len(op.operands) // 2} arrays at once; reduce them one by one (argmax: the "
            "least index among those of the maximum)",
        )


def _of_dot(op: Operation, _: Program) -> Iterator[Broken]:
    dtype = next(filter(None, map(_integer_of, op.operands)), None)
    if dtype is not None:
        yield "integer-dot", f"multiplies {dtype}; convert to bfloat16 or float32 first"


def _of_gather(op: Operation, _: Program) -> Iterator[Broken]:
    yield from _of_indices(op)
    if asks_for_fill(op):
        yield (
            "out-of-bounds-fill",
            'mode="fill" allows indices out of bounds; use mode="clip" and jnp.where',
        )


def _of_scatter(op: Operation, _: Program) -> Iterator[Broken]:
    yield from _of_indices(op)
    dtype = _integer_of(op.operands[0])
    block = op.regions[0].blocks[0]
    result = block.operations[len(block.operations) - 1].operation.operands[0]
    if dtype is not None and not is_block(result.owner):
        yield "integer-scatter", f"combines {dtype}; convert to float32, or use a one-hot sum"


def _of_indices(op: Operation) -> Iterator[Broken]:
    if (access := beyond(op)) is not None:
        reached, allowed = access
        yield (
            "out-of-bounds",
            f"indices {reached.low} to {reached.high} of an axis that allows {allowed.low} to "
            f"{allowed.high}; clip them",
        )


def _of_collective(op: Operation, _: Program) -> Iterator[Broken]:
    dtype = next(filter(None, map(_integer_of, op.operands)), None)
    if dtype is not None and dtype.endswith(("32", "64")):
        yield "integer-collective", f"sums {dtype} across devices; convert to float32 first"


def _of_shift(op: Operation, _: Program) -> Iterator[Broken]:
    dtype = _integer_of(op.operands[0])
    if dtype is not None and not dtype.endswith("32"):
        yield "narrow-shift", f"shifts {dtype}; convert to int32 first, or shift as unsigned"


def _of_chlo(op: Operation) -> Iterator[Broken]:
    dtype = _integer_of(op.operands[0]) if op.name == "chlo.top_k" else None
    if dtype is not None:
        yield "integer-top-k", f"of {dtype}; convert to float32 first"
    else:
        yield "chlo", "not StableHLO: it depends on the plugin whether the compiler sees it"


_CHECKS: dict[str, Callable[[Operation, Program], Iterator[Broken]]] = {
    "while": _of_while,
    "custom_call": _of_custom_call,
    "rng_bit_generator": _of_random_bits,
    "sort": _of_sort,
    "reduce": _of_reduce,
    "reduce_window": _of_reduce,
    "dot": _of_dot,
    "dot_general": _of_dot,
    "convolution": _of_dot,
    "gather": _of_gather,
    "scatter": _of_scatter,
    "all_reduce": _of_collective,
    "reduce_scatter": _of_collective,
    "shift_right_arithmetic": _of_shift,
}


def _of_types(op: Operation) -> Iterator[Broken]:
    """Types are reported where they arise: at an operation, or as an input of the program."""
    if op.name == "func.func":
        made, given = _inputs(op), []
    elif len(op.regions) or called(op) is not None:
        return  # whatever is inside says so
    else:
        made, given = [x.type for x in op.results], [x.type for x in op.operands]
    known = {broken for type_ in given for broken in _of_type(type_)}
    yield from sorted({broken for type_ in made for broken in _of_type(type_)} - known)


def _inputs(function: Operation) -> list[ir.Type]:
    """The types that a program takes; none for a function that it calls."""
    attributes = function.attributes
    if "sym_visibility" in attributes and "private" in str(attributes["sym_visibility"]):
        return []
    return list(ir.FunctionType(ir.TypeAttr(attributes["function_type"]).value).inputs)


def _of_type(type_: ir.Type) -> Iterator[Broken]:
    if not isinstance(type_, ir.RankedTensorType):
        return
    dtype = str(type_.element_type)
    if not type_.has_static_shape:
        yield "dynamic-shape", "the shape is no constant; pad to a fixed one"
    if dtype.startswith("complex"):
        yield "complex", f"{dtype}; keep real and imaginary parts apart"
    elif dtype == "f64":
        yield "float64", "double precision; leave jax_enable_x64 off"
    elif re.match("f[468]E", dtype) and dtype not in _FLOAT8:
        yield "float8", f"{dtype} on trn2; use float8_e4m3 or float8_e5m2"


def _integer_of(value: Value) -> str | None:
    """The dtype of an array of integers or booleans."""
    element = ir.ShapedType(value.type).element_type
    return str(element) if isinstance(element, ir.IntegerType) else None
