"""Element by element: operators of `nki.language` as functions, and what is built of them.

Each function declares a tile in SBUF and issues the instructions that fill it. `alu.Op.__call__`
comes here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter.alu import OPS, Kind, Op
from jax_tkg.nki.interpreter.dtypes import FLOAT32, INT32, UINT8, DType, as_dtype
from jax_tkg.nki.interpreter.errors import NkiValidationError
from jax_tkg.nki.interpreter.machine import current_core
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.tensor import NkiTensor

ALL_INTEGERS_FROM = 2.0**23  # float32 has no fractions from here on
# 2 pi in three parts, the first two so short that small multiples of them are exact.
TWO_PI_PARTS = (6.28125, 1.93500518798828125e-3, 3.0199159819567e-7)


def refuse(function: str, rule: str, message: str) -> NoReturn:
    """Raises: `nl.function` does not take this."""
    raise NkiValidationError(f"{function}.{rule}", f"nl.{function}: {message}")


def new_tile(shape: Sequence[int], dtype: Any, like: NkiTensor | None = None) -> NkiTensor:
    """A tile in SBUF; of the type of `like` where `dtype` is None."""
    kind = like.dtype if dtype is None and like is not None else as_dtype(dtype)
    return current_core().allocate(shape, kind, MemoryRegion.sbuf)


def as_tile(function: str, given: Any) -> NkiTensor:
    """An argument that must be a tile."""
    if not isinstance(given, NkiTensor):
        refuse(function, "operand", f"takes a tile, not {given!r}.")
    if not given.is_on_chip:
        refuse(function, "buffer", f"takes tiles on chip, not {given!r}: nl.load it first.")
    return given


def common_dtype(x: DType, y: DType) -> DType:
    """The type of a result of two: floats before integers, then the wider one, then float32."""
    if x == y:
        return x
    if x.is_float != y.is_float:
        return x if x.is_float else y
    if x.itemsize != y.itemsize:
        return x if x.itemsize > y.itemsize else y
    return FLOAT32 if x.is_float else x


def _one(x: Any, dtype: Any = None) -> tuple[list[Any], Any]:
    return [x], dtype


def _two(x: Any, y: Any, dtype: Any = None) -> tuple[list[Any], Any]:
    return [x, y], dtype


def call(op: Op, *args: Any, **kwargs: Any) -> NkiTensor:
    """`nl.op(x, dtype=None)` or `nl.op(x, y, dtype=None)`."""
    operands, dtype = (_one if op.is_unary else _two)(*args, **kwargs)
    return apply(op, operands, dtype)


def apply(op: Op, operands: Sequence[Any], dtype: Any = None) -> NkiTensor:
    """A new tile in SBUF with the operator applied.

    Args:
        op: the operator.
        operands: a tile, or two operands, one of which may be a number.
        dtype: of the result; None takes that of the tile or, of two, the `common_dtype`.
    """
    if op.name in COMPOSED:
        return COMPOSED[op.name](*operands, dtype)
    if op.is_unary:
        x = as_tile(op.name, operands[0])
        dst = new_tile(x.shape, dtype, x)
        nisa.activation(dst, op, x)
        return dst
    x, y = operands
    return _binary(op, x, y, dtype)


def _binary(op: Op, x: Any, y: Any, dtype: Any) -> NkiTensor:
    if not isinstance(x, NkiTensor):
        return _with_scalar(op, as_tile(op.name, y), x, dtype, reverse=True)
    if not isinstance(y, NkiTensor):
        return _with_scalar(op, as_tile(op.name, x), y, dtype)
    x, y = as_tile(op.name, x), as_tile(op.name, y)
    dtype = common_dtype(x.dtype, y.dtype) if dtype is None else dtype
    if _is_column(op, y, x):
        return _with_scalar(op, x, y, dtype)
    if _is_column(op, x, y):
        return _with_scalar(op, y, x, dtype, reverse=True)
    x, y = _same_shape(op.name, x, y)
    dst = new_tile(x.shape, dtype)
    nisa.tensor_tensor(dst, x, y, op)
    return dst


def _is_column(op: Op, y: NkiTensor, x: NkiTensor) -> bool:
    """Whether y holds one value for each partition of x, as `tensor_scalar` takes it."""
    fits = op.kind is Kind.ARITHMETIC and y.dtype == FLOAT32 and y.shape[0] == x.shape[0]
    return fits and y.free_size == 1 < x.free_size


def _with_scalar(
    op: Op, x: NkiTensor, scalar: Any, dtype: Any, *, reverse: bool = False
) -> NkiTensor:
    dst = new_tile(x.shape, dtype, x)
    nisa.tensor_scalar(dst, x, op, scalar, reverse0=reverse)
    return dst


def _same_shape(function: str, x: NkiTensor, y: NkiTensor) -> tuple[NkiTensor, NkiTensor]:
    """Two tiles in one shape: free axes of size 1 repeat, one value a partition fits all."""
    if x.ndim != y.ndim and x.free_size == 1:
        x = x.reshape((x.shape[0], *(1 for _ in y.shape[1:])))
    elif x.ndim != y.ndim and y.free_size == 1:
        y = y.reshape((y.shape[0], *(1 for _ in x.shape[1:])))
    target = tuple(map(max, x.shape, y.shape))
    return broadcast_view(function, x, target), broadcast_view(function, y, target)


def broadcast_view(function: str, x: NkiTensor, shape: Sequence[int]) -> NkiTensor:
    """A view with the free axes of size 1 repeated to a shape."""
    fits = x.ndim == len(shape) and x.shape[0] == shape[0]
    if not fits or any(n not in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        refuse(
            function,
            "shape",
            f"{x!r} does not repeat to {list(shape)}: must have as many axes and partitions, and "
            "free axes of that size or of 1.",
        )
    for dim, size in enumerate(shape):
        x = x if x.shape[dim] == size else x.broadcast(dim, size)
    return x


def copy(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A copy of a tile in SBUF."""
    x = as_tile("copy", x)
    dst = new_tile(x.shape, dtype, x)
    nisa.tensor_copy(dst, x)
    return dst


def _reciprocal(x: NkiTensor, dtype: Any) -> NkiTensor:
    x = as_tile("reciprocal", x)
    dst = new_tile(x.shape, dtype, x)
    nisa.reciprocal(dst, x)
    return dst


def _divide(x: Any, y: Any, dtype: Any) -> NkiTensor:
    """The engines have no division: x times 1/y."""
    if not isinstance(y, NkiTensor):
        return _binary(OPS["multiply"], x, 1.0 / y, dtype)
    kinds = [t.dtype for t in (x, y) if isinstance(t, NkiTensor)]
    kind = common_dtype(kinds[0], kinds[-1]) if dtype is None else dtype
    return _binary(OPS["multiply"], x, _reciprocal(y, FLOAT32), kind)


def _invert(x: NkiTensor, dtype: Any) -> NkiTensor:
    x = as_tile("invert", x)
    unsigned = str(x.dtype).startswith("u")
    ones = 2 ** (8 * x.dtype.itemsize) - 1 if unsigned else -1
    return _with_scalar(OPS["bitwise_xor"], x, ones, dtype)


def _logical_not(x: NkiTensor, dtype: Any) -> NkiTensor:
    return _with_scalar(OPS["logical_xor"], as_tile("logical_not", x), 1.0, dtype)


def negative(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """-x."""
    return _with_scalar(OPS["multiply"], as_tile("negative", x), -1.0, dtype)


def _nearest(x: NkiTensor) -> NkiTensor:
    """The nearest integers in float32, by way of int32; for values that int32 holds."""
    integers = new_tile(x.shape, INT32)
    nisa.tensor_copy(integers, x)
    return copy(integers, FLOAT32)


def _without_fraction(x: NkiTensor, dtype: Any, function: str) -> NkiTensor:
    """Floor, ceil or trunc: the nearest integer, mended by one where it is on the wrong side.

    Values that have no fractions, infinities and NaN stay.
    """
    x = as_tile(function, x)
    if not x.dtype.is_float:
        return copy(x, dtype)
    less, add, multiply = OPS["less"], OPS["add"], OPS["multiply"]
    magnitude = apply(OPS["abs"], (x,), FLOAT32) if function == "trunc" else copy(x, FLOAT32)
    nearest = _nearest(magnitude)
    if function == "ceil":
        whole = _binary(add, nearest, _binary(less, nearest, magnitude, None), None)
    else:
        whole = _binary(OPS["subtract"], nearest, _binary(less, magnitude, nearest, None), None)
    if function == "trunc":
        whole = _binary(multiply, whole, apply(OPS["sign"], (x,), FLOAT32), None)
    result, small = copy(x, FLOAT32), new_tile(x.shape, UINT8)
    nisa.tensor_scalar(small, apply(OPS["abs"], (x,), FLOAT32), less, ALL_INTEGERS_FROM)
    nisa.tensor_copy_predicated(result, whole, small)
    kind = x.dtype if dtype is None else as_dtype(dtype)
    return result if kind == FLOAT32 else copy(result, kind)


def floor(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """The largest integers that are not above x."""
    return _without_fraction(x, dtype, "floor")


def ceil(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """The smallest integers that are not below x."""
    return _without_fraction(x, dtype, "ceil")


def trunc(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """The value without its fraction."""
    return _without_fraction(x, dtype, "trunc")


def _remainder(x: Any, y: Any, dtype: Any, function: str) -> NkiTensor:
    """What is left of x after multiples of y, mended where the quotient was rounded."""
    kinds = [t.dtype for t in (x, y) if isinstance(t, NkiTensor)]
    if not kinds:
        refuse(function, "operand", f"takes a tile, not {x!r} and {y!r}.")
    kind = common_dtype(kinds[0], kinds[-1]) if dtype is None else dtype
    multiply, subtract = OPS["multiply"], OPS["subtract"]
    # Magnitudes first, signs later: |x| mod |y| is fmod but for the sign of x.
    top = _magnitude(x)
    bottom = _magnitude(y)
    quotient = floor(_divide(top, bottom, FLOAT32))
    rest = _binary(subtract, top, _binary(multiply, quotient, bottom, FLOAT32), FLOAT32)
    below = _binary(multiply, _binary(OPS["less"], rest, 0.0, None), bottom, FLOAT32)
    rest = _binary(OPS["add"], rest, below, FLOAT32)
    reached = _binary(OPS["greater_equal"], rest, bottom, None)
    rest = _binary(subtract, rest, _binary(multiply, reached, bottom, FLOAT32), FLOAT32)
    rest = _binary(multiply, rest, _sign(x), FLOAT32)
    if function == "mod":
        # The sign of y: where they differ and something is left, y is added.
        differs = _binary(OPS["less"], _binary(multiply, rest, _sign(y), FLOAT32), 0.0, None)
        rest = _binary(OPS["add"], rest, _binary(multiply, differs, y, FLOAT32), FLOAT32)
    return rest if kind == FLOAT32 else copy(rest, kind)


def _magnitude(x: Any) -> Any:
    return apply(OPS["abs"], (x,), FLOAT32) if isinstance(x, NkiTensor) else abs(x)


def _sign(x: Any) -> Any:
    if isinstance(x, NkiTensor):
        return apply(OPS["sign"], (x,), FLOAT32)
    return math.copysign(1.0, x)


def fmod(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """The remainder of x / y with the sign of x."""
    return _remainder(x, y, dtype, "fmod")


def _mod(x: Any, y: Any, dtype: Any) -> NkiTensor:
    """The remainder with the sign of y."""
    return _remainder(x, y, dtype, "mod")


def _sine(x: NkiTensor, dtype: Any, shift: float = 0.0) -> NkiTensor:
    """sin(x + shift), the argument brought into the [-pi, pi] that the Scalar engine evaluates."""
    add, multiply = OPS["add"], OPS["multiply"]
    turns = new_tile(x.shape, FLOAT32)
    nisa.tensor_scalar(turns, x, multiply, 1 / math.tau, op1=add, operand1=shift / math.tau)
    turns = _nearest(turns)
    reduced = x
    for part in TWO_PI_PARTS:
        closer = new_tile(x.shape, FLOAT32)
        nisa.scalar_tensor_tensor(closer, turns, multiply, -part, add, reduced)
        reduced = closer
    if shift:
        reduced = _binary(add, reduced, shift, FLOAT32)
    inside = new_tile(x.shape, FLOAT32)
    nisa.tensor_scalar(
        inside, reduced, OPS["minimum"], math.pi, op1=OPS["maximum"], operand1=-math.pi
    )
    dst = new_tile(x.shape, dtype, x)
    nisa.activation(dst, OPS["sin"], inside)
    return dst


def _sin(x: NkiTensor, dtype: Any) -> NkiTensor:
    return _sine(as_tile("sin", x), dtype)


def cos(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """The cosine: a sine a quarter turn later."""
    return _sine(as_tile("cos", x), dtype, math.pi / 2)


def tan(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """The tangent: sine through cosine."""
    x = as_tile("tan", x)
    kind = x.dtype if dtype is None else dtype
    return _divide(_sine(x, FLOAT32), _sine(x, FLOAT32, math.pi / 2), kind)


def _arctan(x: NkiTensor, dtype: Any) -> NkiTensor:
    """arctan(x), and sign(x) pi/2 - arctan(1/x) beyond 1, where the Scalar engine ends."""
    x = as_tile("arctan", x)
    multiply, sign = OPS["multiply"], apply(OPS["sign"], (x,), FLOAT32)
    clipped = new_tile(x.shape, FLOAT32)
    nisa.tensor_scalar(clipped, x, OPS["minimum"], 1.0, op1=OPS["maximum"], operand1=-1.0)
    result = new_tile(x.shape, FLOAT32)
    nisa.activation(result, OPS["arctan"], clipped)
    magnitude = _binary(OPS["maximum"], apply(OPS["abs"], (x,), FLOAT32), 1.0, FLOAT32)
    inverse = _binary(multiply, _reciprocal(magnitude, FLOAT32), sign, FLOAT32)
    turned, beyond = new_tile(x.shape, FLOAT32), new_tile(x.shape, UINT8)
    nisa.activation(turned, OPS["arctan"], inverse)
    far = new_tile(x.shape, FLOAT32)
    nisa.scalar_tensor_tensor(far, sign, multiply, math.pi / 2, OPS["subtract"], turned)
    nisa.tensor_scalar(beyond, magnitude, OPS["greater"], 1.0)
    nisa.tensor_copy_predicated(result, far, beyond)
    kind = x.dtype if dtype is None else as_dtype(dtype)
    return result if kind == FLOAT32 else copy(result, kind)


def where(condition: NkiTensor, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """Takes x where the condition is not 0, else y; one of them may be a number."""
    condition = as_tile("where", condition)
    kinds = [t.dtype for t in (x, y) if isinstance(t, NkiTensor)]
    if not kinds:
        refuse("where", "operand", f"takes a tile for x or y, not {x!r} and {y!r}.")
    kind = common_dtype(kinds[0], kinds[-1]) if dtype is None else as_dtype(dtype)
    shape = tuple(map(max, *(t.shape for t in (condition, x, y) if isinstance(t, NkiTensor))))
    chosen = new_tile(condition.shape, UINT8)
    nisa.tensor_scalar(chosen, condition, OPS["not_equal"], 0.0)
    result = new_tile(shape, kind)
    if isinstance(y, NkiTensor):
        nisa.tensor_copy(result, broadcast_view("where", as_tile("where", y), shape))
    else:
        nisa.memset(result, y)
    if isinstance(x, NkiTensor):
        x = as_tile("where", x) if x.dtype == kind else copy(x, kind)
        x = broadcast_view("where", x, shape)
    nisa.tensor_copy_predicated(result, x, broadcast_view("where", chosen, shape))
    return result


# Operators whose function is more than the one instruction that takes them as `op`.
COMPOSED: dict[str, Callable[..., NkiTensor]] = {
    "arctan": _arctan,
    "copy": copy,
    "divide": _divide,
    "invert": _invert,
    "logical_not": _logical_not,
    "mod": _mod,
    "reciprocal": _reciprocal,
    "sin": _sin,
}
