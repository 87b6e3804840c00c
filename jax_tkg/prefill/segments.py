"""Key bounds of sequences that are packed one after another into a row."""

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Int


def segment_key_bounds(segments: Int[Array, "B T"]) -> Int[Array, "B T 2"]:
    """The `key_bounds` of packed sequences: each query sees those of its own sequence.

    Args:
        segments: int `[B, T]`, a number for each token that is the same within a sequence and
            differs from that of the next one; negative for padding, which sees nothing.

    Returns:
        int32 `[B, T, 2]`, the first position of the token's sequence and the one behind the last,
        for `attention_cte(query, key, value, key_bounds=...)` with T = S.
    """
    tokens = segments.shape[1]
    at = jnp.arange(tokens, dtype=jnp.int32)
    changes = segments[:, 1:] != segments[:, :-1]
    edge = jnp.ones((segments.shape[0], 1), jnp.bool_)
    first = lax.cummax(jnp.where(jnp.concatenate([edge, changes], 1), at, 0), axis=1)
    ends = jnp.where(jnp.concatenate([changes, edge], 1), at + 1, tokens)
    behind = lax.cummin(ends, axis=1, reverse=True)
    return jnp.where((segments < 0)[..., None], 0, jnp.stack([first, behind], axis=2))
