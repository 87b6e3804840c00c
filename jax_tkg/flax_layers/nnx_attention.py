"""The attention layer for Flax nnx."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jax_tkg._typing import Array, Float, Int
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.flax_layers.config import AttentionConfig
from jax_tkg.flax_layers.functional import attention_layer, float32_dot_general, rms_norm


class RMSNorm(nnx.Module):
    """RMS norm over the last axis, computed in float32; parameter `scale [D]`."""

    def __init__(self, dim: int, *, eps: float, param_dtype: Dtype = jnp.float32) -> None:
        """Makes a norm with scale 1.

        Args:
            dim: D.
            eps: epsilon.
            param_dtype: dtype of the scale.
        """
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The norm, in the dtype of `x`."""
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Multi-head attention with a functional KV cache.

    The cache is an argument and a result: no state is kept in the module, so a decode step can be
    jitted with donated caches, or be the body of a scan, and one set of weights can serve any
    number of batches. Parameters: `q`, `k`, `v`, `out` (`kernel [in, out]` and, where configured,
    `bias`), `q_norm.scale` and `k_norm.scale` `[H]`, `sinks [N]`; `LinenAttention` has the same.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (no state)
        rngs: nnx.Rngs,
    ) -> None:
        """Makes a layer with random weights.

        Args:
            config: sizes and options.
            dtype: of the computation, by default inferred from input and weights.
            param_dtype: of the weights.
            kernel_init: initialiser of the four projections; biases and sinks start at 0.
            rngs: random number generators, of which `params` is used.
        """
        self.config = config
        project = partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            dot_general=float32_dot_general,
            rngs=rngs,
        )
        heads, kv_heads, with_bias = config.num_heads, config.num_kv_heads, config.qkv_bias
        self.q = project(config.model_dim, heads * config.head_dim, use_bias=with_bias)
        self.k = project(config.model_dim, kv_heads * config.head_dim, use_bias=with_bias)
        self.v = project(config.model_dim, kv_heads * config.value_dim, use_bias=with_bias)
        self.out = project(heads * config.value_dim, config.model_dim, use_bias=config.out_bias)
        eps = config.qk_norm_eps
        norm = partial(RMSNorm, config.head_dim, param_dtype=param_dtype)
        self.q_norm = None if eps is None else norm(eps=eps)
        self.k_norm = None if eps is None else norm(eps=eps)
        self.sinks = nnx.Param(jnp.zeros(heads, param_dtype)) if config.use_sinks else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Appends T tokens to each row of the cache and attends from them.

        Token t of a row is at position `cache.lengths + t` and sees the tokens up to itself, from
        `cache.starts` on and within the sliding window.

        Args:
            x: `[B, T, D]`.
            cache: from `config.init_cache`, or what the last call returned. Gradients reach keys
                and values through a cache of floats only, not through raw bits or 8-bit types.
            counts: `[B]`, how many of the T tokens of each row are real, the first ones; by default
                all. The outputs of the others are finite and mean nothing.

        Returns:
            `[B, T, D]`, and the longer cache.

        Raises:
            ValueError: if the cache does not fit.
        """
        return attention_layer(
            self.config,
            x,
            cache,
            counts,
            q=self.q,
            k=self.k,
            v=self.v,
            out=self.out,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            sinks=None if self.sinks is None else self.sinks[...],
        )
