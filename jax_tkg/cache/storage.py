"""How a cache keeps its numbers: which array dtype stands for which values.

A cache has a *logical* dtype (what the numbers mean) and a *stored* dtype (what the array holds).
They differ when the logical type is bfloat16 or an 8-bit float and the cache keeps the raw bits in
a same-width unsigned integer. XLA:CPU has no arithmetic in those types: it rewrites a whole bfloat16
cache to float32 to update one token, and hoists a float32 copy of it out of a loop that reads one
tile. On raw bits it does neither. A bitcast is free where the hardware knows the type.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Num

INT8_MAX = 127.0

_BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}
_BFLOAT16 = np.dtype(jnp.bfloat16)
_E4M3FN = np.dtype(jnp.float8_e4m3fn)
_E5M2 = np.dtype(jnp.float8_e5m2)

CACHE_DTYPES: tuple[np.dtype, ...] = tuple(
    np.dtype(d)
    for d in (
        jnp.float32,
        jnp.bfloat16,
        jnp.float16,
        jnp.int8,
        jnp.float8_e4m3fn,
        jnp.float8_e4m3,
        jnp.float8_e5m2,
    )
)
"""The logical dtypes a cache may have."""


def is_quantised(dtype: np.dtype) -> bool:
    """True for the 8-bit types, whose values are `stored * scale`."""
    return dtype.itemsize == 1


def stored_dtype(dtype: np.dtype, *, as_bits: bool) -> np.dtype:
    """The array dtype that keeps values of the logical `dtype`."""
    keeps_bits = as_bits and dtype in CACHE_DTYPES and dtype != np.int8 and dtype.itemsize < 4
    return _BITS[dtype.itemsize] if keeps_bits else dtype


def encode(values: Num[Array, "..."], dtype: np.dtype, stored: np.dtype) -> Array:
    """Rounds `values` to the logical `dtype` (8-bit types saturate) and returns stored numbers."""
    if dtype == np.int8:
        wide = values.astype(jnp.float32)
        return jnp.clip(jnp.round(wide), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    if is_quantised(dtype):
        top = float(jnp.finfo(dtype).max)
        values = jnp.clip(values.astype(jnp.float32), -top, top)
    rounded = values.astype(dtype)
    return rounded if stored == dtype else lax.bitcast_convert_type(rounded, stored)


def logical(stored: Num[Array, "..."], dtype: np.dtype) -> Array:
    """Stored numbers as an array of the logical `dtype` (a bitcast, or nothing)."""
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)


def decode(stored: Num[Array, "..."], dtype: np.dtype, target: np.dtype) -> Array:
    """Stored numbers as values of the `target` float dtype, without their scale."""
    if target == np.float32 and stored.dtype != dtype:
        if dtype == _BFLOAT16:
            return lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
        if dtype == np.float16:
            return lax.bitcast_convert_type(stored, jnp.float16).astype(jnp.float32)
        if dtype == _E5M2:  # the upper byte of a float16
            return _half_to_float(stored.astype(jnp.uint16) << 8)
        if dtype == _E4M3FN:
            return _e4m3fn_to_float(stored)
    return logical(stored, dtype).astype(target)


def _half_to_float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _e4m3fn_to_float(stored: Array) -> Array:
    """Places the 4 exponent bits in float16's 5: the bias differs by 8, subnormals stay right."""
    bits = stored.astype(jnp.uint16)
    magnitude = bits & 0x7F
    value = _half_to_float(((bits & 0x80) << 8) | (magnitude << 7)) * jnp.float32(256.0)
    return jnp.where(magnitude == 0x7F, jnp.float32(jnp.nan), value)


def absmax_scale(values: Num[Array, "B T K H"], dtype: np.dtype, *, per_head: bool = True) -> Array:
    """The scale that maps the largest magnitude of `values` to the largest number of `dtype`.

    Args:
        values: keys or values `[B, T, K, H]`, any float dtype.
        dtype: int8 or an 8-bit float.
        per_head: one scale per KV head `[K]`; otherwise one for the tensor, shape `[]`.

    Returns:
        float32 scale (never 0), to be given as `k_scale` or `v_scale`.
    """
    dtype = np.dtype(dtype)
    top = INT8_MAX if dtype == np.int8 else float(jnp.finfo(dtype).max)
    axes = (0, 1, 3) if per_head else (0, 1, 2, 3)
    largest = jnp.max(jnp.abs(values.astype(jnp.float32)), axis=axes)
    return jnp.maximum(largest, jnp.float32(jnp.finfo(jnp.float32).tiny)) / top


def prefers_bits() -> bool:
    """Whether a new cache should keep raw bits: true on CPU, where it decides the speed."""
    return jax.default_backend() == "cpu"
