"""Indices of gathers and scatters: how far they are known to reach."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from jax_tkg.neuron.loops import is_block
from jax_tkg.neuron.program import Operation, Value

_SAME_NUMBERS = frozenset(
    f"stablehlo.{name}" for name in ("convert", "reshape", "broadcast_in_dim", "transpose")
)


class Range(NamedTuple):
    """Numbers from `low` to `high`, both of which occur."""

    low: int
    high: int


class Access(NamedTuple):
    """Indices into one axis: those known to occur, and those that the axis has."""

    reached: Range
    allowed: Range


def beyond(op: Operation) -> Access | None:
    """The access of a gather or scatter that reaches beyond its array, as far as is known.

    Known are indices that come from iotas and constants, for one axis.
    """
    if op.name == "stablehlo.gather":
        gather = stablehlo.GatherDimensionNumbers(op.attributes["dimension_numbers"])
        axes = gather.start_index_map
        sizes = list(ir.DenseI64ArrayAttr(op.attributes["slice_sizes"]))
    else:
        scatter = stablehlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"])
        axes = scatter.scattered_dims_to_operand_dims
        if len(op.operands) != 3 or list(axes) != list(scatter.inserted_window_dims):
            return None
        sizes = None
    reached = known_range(op.operands[1]) if len(axes) == 1 else None
    if reached is None:
        return None
    axis, shape = axes[0], ir.ShapedType(op.operands[0].type)
    if shape.is_dynamic_dim(axis):
        return None
    allowed = Range(0, shape.get_dim_size(axis) - (sizes[axis] if sizes else 1))
    if allowed.low <= reached.low and reached.high <= allowed.high:
        return None
    return Access(reached, allowed)


def asks_for_fill(gather: Operation) -> bool:
    """Whether the indices of a gather are compared with bounds as well: JAX's mode "fill" does."""
    users = {use.owner.name for use in gather.operands[1].uses}
    return "stablehlo.compare" in users


def direction(compare: Operation) -> str:
    """Such as "LT"."""
    return stablehlo.ComparisonDirectionAttr(compare.attributes["comparison_direction"]).value


def known_range(value: Value) -> Range | None:
    """The least and the greatest number of an integer array, where both are plain to see."""
    op = value.owner
    if is_block(op):
        return None
    if op.name == "stablehlo.constant":
        return _of_constant(op)
    if op.name == "stablehlo.iota":
        axis = ir.IntegerAttr(op.attributes["iota_dimension"]).value
        return Range(0, ir.ShapedType(value.type).get_dim_size(axis) - 1)
    if op.name == "stablehlo.select":
        return _of_wrapped(op)
    if op.name in _SAME_NUMBERS:
        return known_range(op.operands[0])
    return None


def _of_constant(constant: Operation) -> Range | None:
    attribute = constant.attributes["value"]
    dtype = ir.ShapedType(constant.results[0].type).element_type
    if not isinstance(dtype, ir.IntegerType) or len(attribute) == 0:
        return None
    if attribute.is_splat:
        splat: Any = attribute.get_splat_value()
        number = int(splat.value)
        return Range(number, number)
    numbers = [attribute[i] for i in range(len(attribute))]
    return Range(min(numbers), max(numbers))


def _of_wrapped(select: Operation) -> Range | None:
    """Of `where(i < 0, i + n, i)`, by which JAX counts negative indices from the end."""
    test, _, index = select.operands
    if known_range(test) == (0, 0):  # JAX has seen that none is negative
        return known_range(index)
    numbers = known_range(index)
    is_wrapping = (
        not is_block(test.owner)
        and test.owner.name == "stablehlo.compare"
        and direction(test.owner) == "LT"
        and test.owner.operands[0] == index
        and known_range(test.owner.operands[1]) == (0, 0)
    )
    return numbers if is_wrapping and numbers is not None and numbers.low >= 0 else None
