"""Which loops have a constant trip count."""

from __future__ import annotations

from jaxlib.mlir import ir

from jax_tkg.neuron.program import Operation, Program, Value

# A constant when all operands are: XLA computes these while it compiles.
_FOLDED = frozenset(
    f"stablehlo.{name}"
    for name in (
        *("add", "subtract", "multiply", "divide", "remainder", "negate", "minimum", "maximum"),
        *("convert", "reshape", "broadcast_in_dim", "compare", "select", "clamp"),
    )
)


def has_constant_trip_count(loop: Operation, program: Program) -> bool:
    """Whether a counter goes from a constant to a constant in constant steps.

    Only such loops do: the condition compares a loop variable with a constant (or with a variable
    that starts as one and never changes), and the body adds a constant to it or subtracts one.
    """
    condition, body = (region.blocks[0] for region in loop.regions)
    test = _last(condition).operands[0].owner
    if is_block(test) or test.name != "stablehlo.compare":
        return False
    counters = 0
    for side in map(_converted, test.operands):
        if is_constant(side, program):
            continue
        if side.owner != condition:
            return False
        index = ir.BlockArgument(side).arg_number
        if not is_constant(loop.operands[index], program):
            return False
        after = _converted(_last(body).operands[index])
        if not _is_constant_step(after, body.arguments[index], program):
            return False
        counters += 1
    return counters == 1


def is_constant(value: Value, program: Program) -> bool:
    """Whether a value is known when the program is compiled.

    Loop variables that never change are what they start as, arguments of functions what all calls
    pass.
    """
    owner = value.owner
    if not is_block(owner):
        if owner.name == "stablehlo.constant":
            return True
        return owner.name in _FOLDED and all(is_constant(x, program) for x in owner.operands)
    parent, index = owner.owner.operation, ir.BlockArgument(value).arg_number
    if parent.name == "func.func":
        passed = program.passed(parent, index)
        return bool(passed) and all(is_constant(x, program) for x in passed)
    if parent.name != "stablehlo.while":
        return False
    body = parent.regions[1].blocks[0]
    unchanged = _last(body).operands[index] == body.arguments[index]
    return unchanged and is_constant(parent.operands[index], program)


def is_block(owner: object) -> bool:
    """Whether the owner of a value is a block, which makes the value an argument of it."""
    return isinstance(owner, ir.Block)


def _is_constant_step(after: Value, variable: Value, program: Program) -> bool:
    update = after.owner
    if is_block(update) or update.name not in ("stablehlo.add", "stablehlo.subtract"):
        return False
    left, right = map(_converted, update.operands)
    if update.name == "stablehlo.add" and right == variable:
        left, right = right, left
    return left == variable and is_constant(right, program)


def _converted(value: Value) -> Value:
    """What a value was before conversions of its type, most of which change nothing."""
    while not is_block(value.owner) and value.owner.name == "stablehlo.convert":
        (value,) = value.owner.operands
    return value


def _last(block: ir.Block) -> Operation:
    return block.operations[len(block.operations) - 1].operation
