"""Along the free axes: reductions, softmax, RMS norm."""

import math
from collections.abc import Sequence
from typing import Any

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter.alu import OPS, Op
from jax_tkg.nki.interpreter.dtypes import FLOAT32
from jax_tkg.nki.interpreter.language.elementwise import as_tile, new_tile, refuse
from jax_tkg.nki.interpreter.tensor import NkiTensor

add, multiply, subtract = OPS["add"], OPS["multiply"], OPS["subtract"]


def _axes(function: str, x: NkiTensor, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The reduced axes, which must be the last ones and not the partition."""
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(sorted(a + x.ndim if a < 0 else a for a in given))
    if not axes or axes[0] < 1 or axes != tuple(range(x.ndim - len(axes), x.ndim)):
        refuse(
            function,
            "axis",
            f"axis {axis} of {x!r}: must be the last free axes, such as {x.ndim - 1}; transpose "
            "the tile to reduce over its partitions.",
        )
    return axes


def _reduce(function: str, op: Op, x: Any, axis: Any, dtype: Any, *, keepdims: bool) -> NkiTensor:
    x = as_tile(function, x)
    axes = _axes(function, x, axis)
    kept = x.shape[: axes[0]]
    shape = (*kept, *(1 for _ in axes)) if keepdims else kept
    dst = new_tile(shape if len(shape) > 1 else (*kept, 1), dtype, x)
    nisa.tensor_reduce(dst, op, x, axes, keepdims=keepdims)
    return dst


def sum(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """The sum."""
    return _reduce("sum", add, x, axis, dtype, keepdims=keepdims)


def max(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """The maximum."""
    return _reduce("max", OPS["maximum"], x, axis, dtype, keepdims=keepdims)


def min(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """The minimum."""
    return _reduce("min", OPS["minimum"], x, axis, dtype, keepdims=keepdims)


def prod(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """The product."""
    return _reduce("prod", multiply, x, axis, dtype, keepdims=keepdims)


def all(x: NkiTensor, axis: Any, dtype: Any = None) -> NkiTensor:
    """1 where all elements are not 0."""
    return _reduce("all", OPS["logical_and"], x, axis, dtype, keepdims=False)


def mean(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """The mean, from a float32 sum."""
    x = as_tile("mean", x)
    count = math.prod(x.shape[a] for a in _axes("mean", x, axis))
    total = _reduce("mean", add, x, axis, FLOAT32, keepdims=keepdims)
    kind = x.dtype if dtype is None else dtype
    result: NkiTensor = multiply(total, 1.0 / count, dtype=kind)
    return result


def var(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """The variance (of the population). As in NKI the axes stay, whatever `keepdims` says."""
    x = as_tile("var", x)
    _axes("var", x, axis)
    centered = subtract(x, mean(x, axis, FLOAT32, keepdims=True), dtype=FLOAT32)
    kind = x.dtype if dtype is None else dtype
    return mean(OPS["square"](centered), axis, kind, keepdims=True)


def softmax(x: NkiTensor, axis: Any = -1, dtype: Any = None) -> NkiTensor:
    """exp(x - max) / sum(exp(x - max)), in float32."""
    x = as_tile("softmax", x)
    top = _reduce("softmax", OPS["maximum"], x, axis, FLOAT32, keepdims=True)
    powers = OPS["exp"](subtract(x, top, dtype=FLOAT32))
    weight = OPS["reciprocal"](sum(powers, axis, keepdims=True))
    result: NkiTensor = multiply(powers, weight, dtype=x.dtype if dtype is None else dtype)
    return result


def rms_norm(
    x: NkiTensor,
    w: NkiTensor,
    axis: Any,
    n: int,
    epsilon: float = 1e-6,
    dtype: Any = None,
    compute_dtype: Any = None,
) -> NkiTensor:
    """Scales x to x / sqrt(sum(x^2) / n + epsilon) * w.

    Args:
        x: the tile.
        w: weights, of a shape that repeats to that of x.
        axis: the normalized axes.
        n: how many values they hold.
        epsilon: added to the mean square.
        dtype: of the result; None takes that of x.
        compute_dtype: of what lies between; None takes float32.
    """
    x = as_tile("rms_norm", x)
    kind = FLOAT32 if compute_dtype is None else compute_dtype
    total = _reduce("rms_norm", add, OPS["square"](x, dtype=kind), axis, FLOAT32, keepdims=True)
    shifted = new_tile(total.shape, FLOAT32)
    nisa.tensor_scalar(shifted, total, multiply, 1.0 / n, op1=add, operand1=epsilon)
    scaled = multiply(x, OPS["rsqrt"](shifted), dtype=kind)
    result: NkiTensor = multiply(scaled, w, dtype=x.dtype if dtype is None else dtype)
    return result
