"""What a cache must keep and what attention over it must give, in NumPy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

Array = np.ndarray

DTYPES = tuple(
    np.dtype(d)
    for d in (
        *(np.float32, np.float16, np.int8, jnp.bfloat16),
        *(jnp.float8_e4m3fn, jnp.float8_e4m3, jnp.float8_e5m2),
    )
)
BATCH, HEADS, WIDTH, VALUE_WIDTH = 3, 2, 4, 3
K_SCALE, V_SCALE = np.float32([0.25, 2.0]), np.float32([0.5, 0.125])


def scales(dtype: np.dtype) -> dict[str, Any]:
    """The options that give a cache of `dtype` scales, if it has any."""
    return {"k_scale": K_SCALE, "v_scale": V_SCALE} if dtype.itemsize == 1 else {}


def tokens(rng: np.random.Generator, *shape: int) -> tuple[Array, Array]:
    """Keys and values `[*shape, K, H]`, in float32.

    They are float16 numbers: jax 0.7 rounds float32 to 8-bit floats by way of float16.
    """
    sizes = ((*shape, HEADS, WIDTH), (*shape, HEADS, VALUE_WIDTH))
    key, value = (rng.normal(0, 3, s).astype(np.float16).astype(np.float32) for s in sizes)
    return key, value


def kept(new: Array, dtype: np.dtype, scale: Array) -> Array:
    """What a cache of `dtype` makes of `new [..., K, H]`."""
    if dtype.itemsize > 1:
        return new.astype(dtype).astype(np.float32)
    scaled = new / scale[:, None]
    if dtype == np.int8:
        return np.clip(np.rint(scaled), -127, 127) * scale[:, None]
    top = float(ml_dtypes.finfo(dtype).max)
    return np.clip(scaled, -top, top).astype(dtype).astype(np.float32) * scale[:, None]


def attend(query: Array, key: Array, value: Array, seen: Array) -> Array:
    """Attention of one row in float64: `[T, N, H]` to `[S, K, H]` where `seen [T, S]`."""
    group = query.shape[1] // key.shape[1]
    key, value = (np.repeat(x.astype(np.float64), group, axis=1) for x in (key, value))
    key, value = (np.where(seen.any(0)[:, None, None], x, 0) for x in (key, value))
    logits = np.einsum("tnh,snh->nts", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(np.where(seen, logits - logits.max(), -np.inf))
    sums = weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights / np.where(sums == 0, 1, sums), value)
