"""How a cache keeps its numbers: which array dtype stands for which values.

A cache has a *logical* dtype (what the numbers mean) and a *stored* dtype (what the array holds).
They differ when the logical type is bfloat16 or an 8-bit float and the cache keeps the raw bits in
a same-width unsigned integer. XLA:CPU has no arithmetic in those types: it rewrites a whole
bfloat16 cache to float32 to update one token, and hoists a float32 copy of it out of a loop that
reads one tile. On raw bits it does neither. A bitcast is free where the hardware knows the type.
float16 has no such trouble, and reads as fast as its bits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jax_tkg._typing import Array, Num

Scale = Array | npt.ArrayLike | None
"""A scale as users give it: a number, an array `[]` or `[K]`, or None."""

INT8_MAX = 127.0

_BFLOAT16 = np.dtype(jnp.bfloat16)
_E4M3 = np.dtype(jnp.float8_e4m3)
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
    has_bits = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.dtype(f"uint{8 * dtype.itemsize}") if as_bits and has_bits else dtype


def cpu_needs_bits(dtype: np.dtype) -> bool:
    """Whether XLA:CPU does not compute in `dtype`, so that only its bits can be read fast there."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != np.float16


def encode(values: Num[Array, "..."], dtype: np.dtype, stored: np.dtype) -> Array:
    """Rounds `values` to the logical `dtype` (8-bit types saturate) and returns stored numbers."""
    if stored != dtype or dtype == np.int8:
        values = _without_gradient(values, dtype)
    if dtype == np.int8:
        wide = values.astype(jnp.float32)
        return jnp.clip(jnp.round(wide), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    if is_quantised(dtype):
        top = float(jnp.finfo(dtype).max)
        values = jnp.clip(values.astype(jnp.float32), -top, top)
    rounded = values.astype(dtype)
    return rounded if stored == dtype else lax.bitcast_convert_type(rounded, stored)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_gradient(values: Array, dtype: np.dtype) -> Array:
    """`values`; asking for a gradient through them is an error, as it would be silently 0."""
    del dtype
    return values


@_without_gradient.defjvp
def _refuse_gradient(dtype: np.dtype, primals: Any, tangents: Any) -> Any:
    del primals, tangents
    kept = "int8 numbers" if dtype == np.int8 else f"raw {dtype.name} bits (as_bits)"
    raise TypeError(
        f"no gradient passes to the keys and values written into a cache of {kept}. Use a cache of "
        "floats with as_bits=False, or jax.lax.stop_gradient(...) on them if none is wanted."
    )


def logical(stored: Num[Array, "..."], dtype: np.dtype) -> Array:
    """Stored numbers as an array of the logical `dtype` (a bitcast, or nothing)."""
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)


def decode(stored: Num[Array, "..."], dtype: np.dtype, target: np.dtype) -> Array:
    """Stored numbers as values of the `target` float dtype, without their scale.

    Bits are shifted to where float32 or float16 have them: fused with the read of a strided tile,
    XLA:CPU's own conversion of 8-bit floats takes 3 times as long.
    """
    if target == np.float32 and stored.dtype != dtype:
        if dtype == _BFLOAT16:  # the upper half of a float32
            return lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
        if dtype == _E5M2:  # the upper half of a float16
            return _half_to_float(stored.astype(jnp.uint16) << 8)
        if dtype in (_E4M3FN, _E4M3):
            return _e4m3_to_float(stored, has_inf=dtype == _E4M3)
    return logical(stored, dtype).astype(target)


def _half_to_float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _e4m3_to_float(stored: Array, *, has_inf: bool) -> Array:
    """Places the 4 exponent bits in float16's 5: the bias differs by 8, subnormals stay right."""
    bits = stored.astype(jnp.uint16)
    magnitude = bits & 0x7F
    sign = (bits & 0x80) << 8
    value = _half_to_float(sign | (magnitude << 7)) * jnp.float32(256.0)
    if not has_inf:
        return jnp.where(magnitude == 0x7F, jnp.float32(jnp.nan), value)
    # The largest exponent is for infinity and NaN: it keeps its mantissa and becomes the largest.
    special = _half_to_float(sign | (magnitude << 7) | 0x7C00)
    return jnp.where(magnitude >= 0x78, special, value)


def head_scale(scale: Scale, dtype: np.dtype, num_kv_heads: int, name: str) -> Array | None:
    """A scale given as a number or `[K]`, as float32 `[1, K]`; 1 for an 8-bit type without one.

    Raises:
        ValueError: if it has another shape, is known not to be positive, or the dtype has
            no scale.
    """
    if not is_quantised(dtype):
        if scale is not None:
            raise ValueError(
                f"{name} is for int8 and 8-bit float caches; this one is {dtype.name}. Drop it."
            )
        return None
    array = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
    if array.shape not in ((), (1,), (num_kv_heads,)):
        raise ValueError(
            f"{name} must be a number or one per KV head ({num_kv_heads},); got {array.shape}."
        )
    if scale is not None and not isinstance(scale, jax.Array):
        numbers = np.asarray(scale, np.float32)
        if not np.all((numbers > 0) & np.isfinite(numbers)):
            raise ValueError(f"{name} must be positive and finite; got {scale}.")
    return jnp.broadcast_to(array, (1, num_kv_heads))


def absmax_scale(values: Num[Array, "B T K H"], dtype: np.dtype, *, per_head: bool = True) -> Array:
    """The scale that maps the largest magnitude of `values` to the largest number of `dtype`.

    Args:
        values: keys or values `[B, T, K, H]`, any float dtype.
        dtype: int8 or an 8-bit float.
        per_head: one scale per KV head `[K]`; otherwise one for the tensor, shape `[]`.

    Returns:
        float32 scale (never 0), to be given as `k_scale` or `v_scale`.

    Raises:
        ValueError: if the dtype is not an 8-bit one.
    """
    dtype = np.dtype(dtype)
    if dtype not in CACHE_DTYPES or not is_quantised(dtype):
        raise ValueError(f"scales are for int8 and 8-bit floats; got {dtype.name}.")
    top = INT8_MAX if dtype == np.int8 else float(jnp.finfo(dtype).max)
    axes = (0, 1, 3) if per_head else (0, 1, 2, 3)
    largest = jnp.max(jnp.abs(values.astype(jnp.float32)), axis=axes)
    return jnp.maximum(largest / top, jnp.float32(jnp.finfo(jnp.float32).tiny))
