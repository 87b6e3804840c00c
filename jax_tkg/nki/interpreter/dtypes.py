"""NKI's data types: names, sizes, how values are rounded into them."""

import functools
from typing import Any

import ml_dtypes
import numpy as np

_FLOATS: dict[str, tuple[int, Any]] = {
    "float32": (4, np.float32),
    "tfloat32": (4, np.float32),
    "bfloat16": (2, ml_dtypes.bfloat16),
    "float16": (2, np.float16),
    "float8_e4m3": (1, ml_dtypes.float8_e4m3),
    "float8_e4m3fn": (1, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": (1, ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": (1, ml_dtypes.float8_e8m0fnu),
}
_INTEGERS: dict[str, tuple[int, Any]] = {
    name: (np.dtype(name).itemsize, np.dtype(name).type)
    for name in ("int8", "int16", "int32", "uint8", "uint16", "uint32")
}
_PACKED: dict[str, tuple[int, Any]] = {
    "float8_e5m2_x4": (4, np.uint32),
    "float8_e4m3fn_x4": (4, np.uint32),
    "float4_e2m1fn_x4": (2, np.uint16),
}
_BOOL: dict[str, tuple[int, Any]] = {"bool": (1, np.uint8)}


class DType(str):
    """A data type of NKI: its name, as NKI writes it.

    Attributes:
        itemsize: bytes on the device.
        numpy: the NumPy dtype of its bits.
        is_float: one of the unpacked float types.
    """

    __slots__ = ("is_float", "itemsize", "numpy")
    itemsize: int
    numpy: np.dtype
    is_float: bool

    def __new__(cls, name: str) -> "DType":
        """The type of this name."""
        self = super().__new__(cls, name)
        self.itemsize, kind = _ALL[name]
        self.numpy = np.dtype(kind)
        self.is_float = name in _FLOATS
        return self

    @property
    def is_packed(self) -> bool:
        """Several values in one element."""
        return str(self) in _PACKED

    @property
    def is_integer(self) -> bool:
        """An integer type; booleans are uint8."""
        return not self.is_float and not self.is_packed

    def __repr__(self) -> str:
        """As in a kernel's source."""
        return f"nl.{self}"


_ALL = _FLOATS | _INTEGERS | _PACKED | _BOOL
BY_NAME = {name: DType(name) for name in _ALL}
FLOAT32, INT32, UINT32, UINT8 = (BY_NAME[n] for n in ("float32", "int32", "uint32", "uint8"))


def as_dtype(given: Any) -> DType:
    """A DType from one, its name, or what NumPy or JAX calls it.

    Raises:
        TypeError: if NKI has no such type.
    """
    if isinstance(given, DType):
        return given
    name = given if isinstance(given, str) else np.dtype(given).name
    name = {"bool_": "bool"}.get(name, name)
    if name not in BY_NAME:
        raise TypeError(f"NKI has no data type {given!r}; it has {', '.join(BY_NAME)}.")
    return BY_NAME[name]


@functools.cache
def _of_bytes(dtype: np.dtype) -> np.ndarray:
    """The values of all bytes, of a type of 8 bits."""
    return np.arange(256).astype(np.uint8).view(dtype).astype(np.float32)


def to_float32(values: np.ndarray) -> np.ndarray:
    """Numbers as an engine reads them.

    To convert 8-bit floats one by one takes ten times as long as to look them up; bfloat16 is fast
    only where it lies contiguously.
    """
    if values.dtype == np.float32:
        return values
    if values.dtype.itemsize == 1 and values.dtype.kind in "fV":
        return _of_bytes(values.dtype).take(values.view(np.uint8))
    return (values if values.flags.c_contiguous else values.copy()).astype(np.float32)


def round_tfloat32(values: np.ndarray) -> np.ndarray:
    """Float32 values with a mantissa of 10 bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(
        0xFFFFE000
    )
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(np.float32)


def convert(values: np.ndarray, dtype: DType, *, exact: bool = False) -> np.ndarray:
    """Values as an engine writes them to a destination of `dtype`: one rounding.

    Floats round to nearest even. Floats become integers by rounding to nearest even and saturate;
    NaN becomes 0. Integers become floats through float32.

    Args:
        values: what the engine computed.
        dtype: the destination's.
        exact: float destinations keep float32.
    """
    if dtype.is_float:
        if values.dtype == dtype.numpy and dtype != "tfloat32":
            return values
        with np.errstate(over="ignore", invalid="ignore"):
            wide = to_float32(values)
            if exact:
                return wide
            return round_tfloat32(wide) if dtype == "tfloat32" else wide.astype(dtype.numpy)
    if values.dtype == dtype.numpy:
        return values
    if values.dtype.kind in "iub":
        return values.astype(dtype.numpy)
    limits = np.iinfo(dtype.numpy)
    nearest = np.clip(np.rint(values.astype(np.float64)), limits.min, limits.max)
    return np.where(np.isnan(nearest), 0.0, nearest).astype(dtype.numpy)
