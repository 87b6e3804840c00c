"""The maths of the layers as pure functions; the nnx and linen modules only hold parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Float, Int
from jax_tkg.attention import attention_tkg
from jax_tkg.cache.kv_cache import KVCache, RingKVCache
from jax_tkg.flax_layers.config import AttentionConfig, ring_capacity
from jax_tkg.prefill.attention import attention_cte

PROMPT_TOKENS = 16
"""So many tokens at once are a prompt or a chunk of one, for the prefill op; fewer are decoded."""


def float32_dot_general(
    lhs: Float[Array, "... rows D"],
    rhs: Float[Array, "..."],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> Float[Array, "..."]:
    """`lax.dot_general` that accumulates in float32, to be given to Flax as `dot_general=`.

    For the matrices of a decode step, which are read once and must be read fast: XLA:CPU converts
    the whole of a 16-bit matrix to float32, 10 times slower, for a 16-bit result or a single row.
    With a float32 result and two rows it reads the matrix as it is.

    Args:
        lhs: activations; the last axis is contracted.
        rhs: the matrix.
        dimension_numbers: as for `lax.dot_general`; no batch dimensions.
        precision: likewise.
        preferred_element_type: dtype of the result, by default that of `lhs`.
        **kwargs: as for `lax.dot_general`.
    """
    dtype = lhs.dtype if preferred_element_type is None else preferred_element_type
    lonely = lhs.size == lhs.shape[-1] and lhs.ndim > 1 and lhs.dtype.itemsize < 4
    if lonely:
        lhs = jnp.concatenate([lhs, lhs], axis=-2)
    out = lax.dot_general(
        lhs, rhs, dimension_numbers, precision, preferred_element_type=jnp.float32, **kwargs
    )
    return (out[..., :1, :] if lonely else out).astype(dtype)


def rms_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*batch D"]:
    """`x / sqrt(mean(x^2) + eps) * weight` in float32, rounded once to the dtype of `x`.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + eps) * weight.astype(jnp.float32)).astype(x.dtype)


def swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]
) -> Float[Array, "*batch F"]:
    """`silu(gate) * up`.

    Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, equation 6.
    """
    return jax.nn.silu(gate) * up


def attention_layer(
    config: AttentionConfig,
    x: Float[Array, "B T D"],
    cache: KVCache,
    counts: Int[Array, " B"] | None = None,
    *,
    q: Callable[[Array], Array],
    k: Callable[[Array], Array],
    v: Callable[[Array], Array],
    out: Callable[[Array], Array],
    q_norm: Callable[[Array], Array] | None = None,
    k_norm: Callable[[Array], Array] | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """The attention layer: project, normalise, rotate, append to the cache, attend, project.

    Args:
        config: sizes and options.
        x: `[B, T, D]`, the new tokens of each row.
        cache: the tokens before them.
        counts: `[B]`, how many of the T tokens of each row are real, the first ones; by default
            all. The outputs of the others are finite and mean nothing.
        q: maps `[B, T, D]` to `[B, T, N * H]`.
        k: maps `[B, T, D]` to `[B, T, K * H]`.
        v: maps `[B, T, D]` to `[B, T, K * Hv]`.
        out: maps `[B, T, N * Hv]` to `[B, T, D]`.
        q_norm: normalises each head of the query.
        k_norm: normalises each head of the key.
        sinks: a logit per query head.

    Returns:
        The output `[B, T, D]`, and the longer cache.

    Raises:
        ValueError: if the cache does not fit.
    """
    batch, tokens = x.shape[:2]
    _check_ring(config, cache, tokens)
    query = q(x).reshape(batch, tokens, config.num_heads, config.head_dim)
    key = k(x).reshape(batch, tokens, config.num_kv_heads, config.head_dim)
    value = v(x).reshape(batch, tokens, config.num_kv_heads, config.value_dim)
    query = query if q_norm is None else q_norm(query)
    key = key if k_norm is None else k_norm(key)
    # Not bottom-right from the new length: that is the last real token's, not the T-th's.
    positions = cache.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    is_prompt = tokens >= PROMPT_TOKENS
    attend = partial(
        attention_cte if is_prompt else attention_tkg,
        query_positions=None if counts is None else positions,
        scale=config.scale,
        local_window_size=config.local_window_size,
        logits_soft_cap=config.logits_soft_cap,
        sinks=sinks,
        implementation=config.implementation,
    )
    append = partial(cache.append, implementation=config.append_implementation)
    if config.fused_rope and not is_prompt:
        mixed, key = attend(query, cache, new_key=key, new_value=value, rope=config.rope)
        cache = append(key, value, counts)
    else:
        if config.rope is not None:
            angles = config.rope.cos_sin(positions, config.head_dim)
            query, key = config.rope.rotate(query, *angles), config.rope.rotate(key, *angles)
        cache = append(key, value, counts)
        mixed = attend(query, cache)
    return out(mixed.reshape(batch, tokens, -1)), cache


def _check_ring(config: AttentionConfig, cache: KVCache, tokens: int) -> None:
    if not isinstance(cache, RingKVCache):
        return
    if config.sliding_window is None:
        raise ValueError(
            "this layer has no sliding window and sees every token, but a RingKVCache forgets the "
            f"oldest after {cache.capacity}. Use a KVCache, or set sliding_window."
        )
    needed = ring_capacity(config.sliding_window, tokens)
    if cache.capacity < needed:
        raise ValueError(
            f"a RingKVCache of {cache.capacity} slots is too small for {tokens} new tokens with a "
            f"sliding window of {config.sliding_window}: the first would lose keys to the last. "
            f"Make it {needed} slots (init_cache with ring_chunk={tokens}), or append fewer."
        )
