"""The operators that instructions take as `op`: names, NumPy meaning, where they are allowed.

Tables "Supported Math Operators" and "Supported Activation Functions" of the NKI ISA documentation.
An operator is also a function of `nki.language`, as in `nl.add(x, y)`.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter import activations as act

Function = Callable[..., Any]


class Kind(enum.Enum):
    """What an operator works on."""

    ARITHMETIC = "arithmetic"  # float32
    BITVEC = "bitvec"  # integer bits
    ACTIVATION = "activation"  # float32, Scalar engine only
    REDUCTION = "reduction"  # float32, folds an axis only
    COMPOSED = "composed"  # a function of nki.language only; no engine has it


@dataclass(frozen=True)
class Range:
    """Inputs that the Scalar engine evaluates correctly, ends included.

    Attributes:
        low, high: the ends.
        of_magnitude: of the absolute value.
        slack: how far outside is let pass: where the function goes on smoothly and the usual
            reduction of the argument misses the end by a rounding.
    """

    low: float
    high: float
    of_magnitude: bool = False
    slack: float = 0.0

    def holds(self, x: np.ndarray) -> np.ndarray:
        """Which inputs are inside; NaN is."""
        size = np.abs(x) if self.of_magnitude else x
        low, high = np.float32(self.low - self.slack), np.float32(self.high + self.slack)
        return ~((size < low) | (size > high))

    def __str__(self) -> str:
        """`[low, high]`."""
        return f"{'+-' if self.of_magnitude else ''}[{self.low:.6g}, {self.high:.6g}]"


@dataclass(frozen=True, eq=False)
class Op:
    """One operator.

    Attributes:
        name: in `nki.language`.
        kind: see `Kind`.
        compute: on NumPy arrays.
        is_unary: takes one operand; as `op0` its scalar operand must be None or 0.
        reduction: the ufunc that folds an axis, where allowed as a reduction.
        activation: the Scalar engine's function of this name, where there is one.
        valid: inputs the Scalar engine evaluates correctly.
        generation: the first that has it.
    """

    name: str
    kind: Kind
    compute: Function
    is_unary: bool = False
    reduction: Function | None = None
    activation: Function | None = None
    valid: Range | None = None
    generation: int = 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`nl.name(x, dtype=None)` or `nl.name(x, y, dtype=None)`: a new tile."""
        from jax_tkg.nki.interpreter.language.elementwise import call

        return call(self, *args, **kwargs)

    def __repr__(self) -> str:
        """As in a kernel's source."""
        return f"nl.{self.name}"


def _truth(f: Function) -> Function:
    """A comparison gives 1.0 or 0.0."""
    return lambda *xs: f(*xs).astype(np.float32)


def _logical(f: Function) -> Function:
    return lambda *xs: f(*(np.asarray(x) != 0 for x in xs)).astype(np.float32)


def _quiet(f: Function) -> Function:
    """Engines give inf and NaN without a word."""

    def computed(*xs: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return f(*xs, **kwargs)

    return computed


def _fold(f: np.ufunc) -> Function:
    return _quiet(f.reduce)


def _subtract_fold(values: np.ndarray, axis: Any) -> np.ndarray:
    """The first element minus all others."""
    ordered = np.moveaxis(values, axis, 0)
    return ordered[0] - ordered[1:].sum(axis=0)


def _rsqrt(x: np.ndarray) -> np.ndarray:
    return np.float32(1) / np.sqrt(x)


def _reciprocal(x: np.ndarray) -> np.ndarray:
    return np.float32(1) / x


def _abs_max(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The operand of the larger magnitude with its sign; y of two equal ones."""
    return np.where(np.abs(x) > np.abs(y), x, y)


def _abs_min(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The operand of the smaller magnitude with its sign; y of two equal ones."""
    return np.where(np.abs(x) < np.abs(y), x, y)


def _average(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x + y) / np.float32(2)


def _same(x: Any) -> Any:
    return x


def _logical_fold(f: np.ufunc) -> Function:
    return lambda x, axis: f.reduce(x != 0, axis=axis).astype(np.float32)


# Maximum and minimum give NaN where a side is NaN, as NumPy does; what the hardware gives is
# documented nowhere. A NaN of memory never written is refused before it gets here.
_BINARY: dict[str, tuple[Function, Function | None]] = {
    "add": (np.add, _fold(np.add)),
    "subtract": (np.subtract, _quiet(_subtract_fold)),
    "multiply": (np.multiply, _fold(np.multiply)),
    "maximum": (np.maximum, _fold(np.maximum)),
    "minimum": (np.minimum, _fold(np.minimum)),
    "power": (np.power, None),
}
_MAGNITUDES: dict[str, Function] = {"abs_max": _abs_max, "abs_min": _abs_min}
_COMPARISONS: dict[str, Function] = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}
_LOGICAL: dict[str, np.ufunc] = {
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
_BITS: dict[str, tuple[Function, Function | None]] = {
    "bitwise_and": (np.bitwise_and, np.bitwise_and.reduce),
    "bitwise_or": (np.bitwise_or, np.bitwise_or.reduce),
    "bitwise_xor": (np.bitwise_xor, np.bitwise_xor.reduce),
    "left_shift": (np.left_shift, None),
    "right_shift": (np.right_shift, None),
}
# Unary functions that the Vector engine has as well.
_UNARY: dict[str, tuple[Function, Range | None]] = {
    "abs": (np.abs, None),
    "square": (np.square, None),
    "relu": (act.relu, None),
    "rsqrt": (_rsqrt, Range(2.0**-87, 2.0**97)),
    "reciprocal": (_reciprocal, Range(2.0**-42, 2.0**42, of_magnitude=True)),
}
_COMPOSED: dict[str, Function] = {"divide": np.divide, "mod": np.mod}
_ACTIVATIONS: dict[str, tuple[Function, Range | None]] = {
    "copy": (_same, None),
    "exp": (np.exp, None),
    "log": (np.log, Range(2.0**-64, 2.0**64)),
    "sin": (np.sin, Range(-math.pi, math.pi, slack=2.0**-8)),
    "arctan": (np.arctan, Range(-math.pi / 2, math.pi / 2)),
    "sqrt": (np.sqrt, Range(2.0**-116, 2.0**118)),
    "tanh": (np.tanh, None),
    "sigmoid": (act.sigmoid, None),
    "erf": (act.erf, None),
    "erf_dx": (act.erf_dx, None),
    "gelu": (act.gelu, None),
    "gelu_dx": (act.gelu_dx, None),
    "gelu_apprx_tanh": (act.gelu_apprx_tanh, None),
    "gelu_apprx_sigmoid": (act.gelu_apprx_sigmoid, None),
    "gelu_apprx_sigmoid_dx": (act.gelu_apprx_sigmoid_dx, None),
    "silu": (act.silu, None),
    "silu_dx": (act.silu_dx, None),
    "softplus": (act.softplus, None),
    "mish": (act.mish, None),
    "sign": (np.sign, None),
    "prelu": (act.prelu, None),
}


def _all_ops() -> list[Op]:
    arithmetic, bitvec, activation = Kind.ARITHMETIC, Kind.BITVEC, Kind.ACTIVATION
    ops = [Op(n, arithmetic, _quiet(f), reduction=r) for n, (f, r) in _BINARY.items()]
    ops += [Op(n, arithmetic, _truth(_quiet(f))) for n, f in _COMPARISONS.items()]
    ops += [Op(n, arithmetic, _logical(f), reduction=_logical_fold(f)) for n, f in _LOGICAL.items()]
    ops += [Op(n, arithmetic, _quiet(f), generation=4) for n, f in _MAGNITUDES.items()]
    ops += [Op(n, Kind.COMPOSED, _quiet(f)) for n, f in _COMPOSED.items()]
    ops.append(Op("logical_not", Kind.COMPOSED, _logical(np.logical_not), is_unary=True))
    ops.append(Op("average", Kind.REDUCTION, _quiet(_average), reduction=_quiet(np.mean)))
    ops.append(Op("bypass", arithmetic, _same, is_unary=True))
    ops += [Op(n, bitvec, f, reduction=r) for n, (f, r) in _BITS.items()]
    ops.append(Op("invert", bitvec, np.invert, is_unary=True))
    for kind, table in ((arithmetic, _UNARY), (activation, _ACTIVATIONS)):
        for name, (f, valid) in table.items():
            computed = _quiet(f)
            ops.append(Op(name, kind, computed, is_unary=True, activation=computed, valid=valid))
    return ops


OPS: dict[str, Op] = {op.name: op for op in _all_ops()}
