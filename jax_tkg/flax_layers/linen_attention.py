"""The attention layer for Flax linen: the twin of `jax_tkg.flax_layers.Attention`."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jax_tkg._typing import Array, Float, Int
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.flax_layers.config import AttentionConfig
from jax_tkg.flax_layers.functional import attention_layer, float32_dot_general, rms_norm


class LinenRMSNorm(nn.Module):
    """RMS norm over the last axis, computed in float32; parameter `scale [D]`.

    Attributes:
        eps: epsilon.
        param_dtype: dtype of the scale.
    """

    eps: float
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The norm, in the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return rms_norm(x, scale, self.eps)


class LinenAttention(nn.Module):
    """Multi-head attention with a functional KV cache.

    Parameters have the names and shapes of those of `jax_tkg.flax_layers.Attention`, so
    `nnx.to_pure_dict(nnx.state(attention, nnx.Param))` is this module's `params` collection.

    Attributes:
        config: sizes and options.
        dtype: of the computation, by default inferred from input and weights.
        param_dtype: of the weights.
        kernel_init: initialiser of the four projections; biases and sinks start at 0.
    """

    config: AttentionConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    def setup(self) -> None:
        """Makes the projections, norms and sinks."""
        config = self.config
        project = partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            dot_general=float32_dot_general,
        )
        heads, kv_heads, with_bias = config.num_heads, config.num_kv_heads, config.qkv_bias
        self.q = project(heads * config.head_dim, use_bias=with_bias)
        self.k = project(kv_heads * config.head_dim, use_bias=with_bias)
        self.v = project(kv_heads * config.value_dim, use_bias=with_bias)
        self.out = project(config.model_dim, use_bias=config.out_bias)
        eps = config.qk_norm_eps
        self.q_norm = None if eps is None else LinenRMSNorm(eps, self.param_dtype)
        self.k_norm = None if eps is None else LinenRMSNorm(eps, self.param_dtype)
        zeros, shape = nn.initializers.zeros, (heads,)
        self.sinks = (
            self.param("sinks", zeros, shape, self.param_dtype) if config.use_sinks else None
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Appends T tokens to each row of the cache and attends from them.

        Arguments, result and errors are those of `jax_tkg.flax_layers.Attention`.
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
            sinks=self.sinks,
        )
