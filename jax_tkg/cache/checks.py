"""What the methods of caches are given, checked before anything is traced."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array
from jax_tkg.cache.layouts import KVShape


def check_sizes(**sizes: int) -> None:
    """Refuses a size of a new cache that is not a whole number of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {size!r}.")


def check_new_tokens(shape: KVShape, key: Array, value: Array) -> None:
    """Refuses keys and values that do not fit a cache of the shape."""
    for name, new, width in (("key", key, shape.head_dim), ("value", value, shape.value_head_dim)):
        fits = new.ndim == 4 and new.shape[1] == key.shape[1]
        if not fits or (new.shape[0], *new.shape[2:]) != (shape.batch, shape.num_kv_heads, width):
            raise ValueError(
                f"{name} must be [B, T, K, H] = ({shape.batch}, T, {shape.num_kv_heads}, "
                f"{width}) for this cache; got {tuple(new.shape)}."
            )
        if not (jnp.issubdtype(new.dtype, jnp.floating) or jnp.issubdtype(new.dtype, jnp.integer)):
            raise ValueError(f"{name} must be of real numbers; got {new.dtype}.")


def integer_per_row(given: Any, batch: int, name: str, meaning: str) -> Array:
    """A number for each row, int32 `[B]`.

    Raises:
        ValueError: if it is anything else than B integers.
    """
    return _per_row(given, batch, name, meaning, "integers", jnp.integer).astype(jnp.int32)


def boolean_per_row(given: Any, batch: int, name: str, meaning: str) -> Array:
    """Yes or no for each row, bool `[B]`.

    Raises:
        ValueError: if it is anything else than B booleans, such as row numbers.
    """
    return _per_row(given, batch, name, meaning, "booleans", jnp.bool_)


def _per_row(given: Any, batch: int, name: str, meaning: str, kind: str, dtype: Any) -> Array:
    array = jnp.asarray(given)
    if array.shape != (batch,) or not jnp.issubdtype(array.dtype, dtype):
        raise ValueError(
            f"{name} must be {kind} of shape ({batch},), {meaning}; got {array.dtype} "
            f"{tuple(array.shape)}."
        )
    return array
