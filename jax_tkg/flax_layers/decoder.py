"""A Llama-style decoder: the attention layer with RMS norms, SwiGLU and an embedding around it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy.typing as npt
from flax import nnx
from flax.typing import Dtype

from jax_tkg._typing import Array, Float, Int
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.cache.layouts import DenseLayout
from jax_tkg.flax_layers.config import AttentionConfig
from jax_tkg.flax_layers.functional import float32_dot_general, swiglu
from jax_tkg.flax_layers.nnx_attention import Attention, RMSNorm

Caches = tuple[KVCache, ...]

_module_list: Any = getattr(nnx, "List", list)  # flax before 0.12 takes plain lists


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder.

    Attributes:
        vocab_size: tokens V.
        num_layers: layers.
        mlp_dim: width F of the gated MLP.
        attention: the attention of every layer; its `model_dim` is the width D of the model.
        norm_eps: epsilon of the RMS norms before attention, MLP and output.
        tie_embeddings: whether the embedding is the output projection too.
        layer_windows: the sliding window of each layer in place of `attention.sliding_window`;
            None in it for a layer that sees everything.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    vocab_size: int
    num_layers: int
    mlp_dim: int
    attention: AttentionConfig
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    layer_windows: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        """Validates the sizes."""
        for name in ("vocab_size", "num_layers", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig: {name} must be at least 1.")
        if self.layer_windows is not None and len(self.layer_windows) != self.num_layers:
            raise ValueError(
                f"DecoderConfig: layer_windows has {len(self.layer_windows)} entries for "
                f"{self.num_layers} layers; give one a layer, None for a layer without a window."
            )

    def layer_attention(self, layer: int) -> AttentionConfig:
        """The attention of one layer, with its own window."""
        if self.layer_windows is None:
            return self.attention
        return replace(self.attention, sliding_window=self.layer_windows[layer])


class DecoderLayer(nnx.Module):
    """`x += attention(norm(x))`, then `x += mlp(norm(x))`."""

    def __init__(
        self,
        config: DecoderConfig,
        attention: AttentionConfig,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes a layer with random weights."""
        width, mlp_dim = config.attention.model_dim, config.mlp_dim
        norm = partial(RMSNorm, width, eps=config.norm_eps, param_dtype=param_dtype)
        project = partial(
            nnx.Linear,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            dot_general=float32_dot_general,
            rngs=rngs,
        )
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(attention, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate, self.up = project(width, mlp_dim), project(width, mlp_dim)
        self.down = project(mlp_dim, width)

    def __call__(
        self, x: Float[Array, "B T D"], cache: KVCache, counts: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """The residual stream after this layer, and the longer cache; see `Attention`."""
        mixed, cache = self.attention(self.attention_norm(x), cache, counts)
        x = x + mixed
        normed = self.mlp_norm(x)
        return x + self.down(swiglu(self.gate(normed), self.up(normed))), cache


class LlamaDecoder(nnx.Module):
    """Tokens to logits, with one KV cache per layer that the caller keeps.

    The caches are a tuple, so that each is updated in place when they are donated or carried by a
    scan; stacked in one array they would be copied. All of them must have the same lengths.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes a decoder with random weights.

        Args:
            config: sizes and options.
            dtype: of the computation; norms, softmax and logits are float32 in any case. On CPU,
                16-bit weights are fast only with the same dtype here.
            param_dtype: of the weights.
            rngs: random number generators, of which `params` is used.
        """
        self.config = config
        self.dtype = dtype
        width = config.attention.model_dim
        table_init = nnx.initializers.normal(stddev=width**-0.5)

        def table() -> nnx.Param[Array]:
            return nnx.Param(table_init(rngs.params(), (config.vocab_size, width), param_dtype))

        self.embedding = table()
        self.layers = _module_list(
            DecoderLayer(
                config,
                config.layer_attention(i),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for i in range(config.num_layers)
        )
        self.final_norm = RMSNorm(width, eps=config.norm_eps, param_dtype=param_dtype)
        self.lm_head = None if config.tie_embeddings else table()

    @property
    def vocab_size(self) -> int:
        """Token ids V; `jax_tkg.generate` refuses others."""
        return self.config.vocab_size

    def init_caches(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: npt.DTypeLike = jnp.float32,
        layout: str | type[DenseLayout] | None = None,
        ring_chunk: int | None = None,
        **options: Any,
    ) -> Caches:
        """Empty caches, one per layer.

        Args:
            batch: rows B.
            capacity: tokens a row can hold.
            dtype: of the caches; see `KVCache.create`.
            layout: likewise.
            ring_chunk: give layers with a sliding window a ring that holds only what the window
                needs when at most this many tokens come at once; see `AttentionConfig.init_cache`.
            **options: `k_scale`, `v_scale`, `as_bits`, the same for every layer.

        Raises:
            ValueError: as `KVCache.create`.
            TypeError: as `KVCache.create`.
        """
        return tuple(
            self.config.layer_attention(i).init_cache(
                batch, capacity, dtype=dtype, layout=layout, ring_chunk=ring_chunk, **options
            )
            for i in range(self.config.num_layers)
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        caches: Caches,
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Caches]:
        """Appends T tokens to each row and computes the logits after each.

        Args:
            tokens: ids `[B, T]`; one outside the vocabulary counts as the nearest id.
            caches: from `init_caches`, or what the last call returned.
            counts: `[B]`, how many of the T tokens of each row are real, the first ones; by default
                all. The logits of the others are finite and mean nothing.

        Returns:
            float32 logits `[B, T, V]`, and the longer caches.

        Raises:
            ValueError: if the caches do not fit.
        """
        hidden, caches = self._hidden(tokens, caches, counts)
        return self._logits(hidden), caches

    def next_token_logits(
        self,
        tokens: Int[Array, "B T"],
        caches: Caches,
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Caches]:
        """As calling the decoder, with the logits after each row's last real token only.

        Of a row without a real token (count 0) the logits mean nothing.
        """
        hidden, caches = self._hidden(tokens, caches, counts)
        if counts is None:
            last = hidden[:, -1:]
        else:
            index = jnp.maximum(counts.astype(jnp.int32) - 1, 0)
            last = jnp.take_along_axis(hidden, index[:, None, None], axis=1, mode="clip")
        return self._logits(last)[:, 0], caches

    def _hidden(
        self, tokens: Array, caches: Caches, counts: Array | None
    ) -> tuple[Float[Array, "B T D"], Caches]:
        if len(caches) != len(self.layers):
            raise ValueError(
                f"this decoder has {len(self.layers)} layers and needs a tuple of as many caches, "
                f"got {len(caches)}; make them with init_caches."
            )
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(self.dtype)
        longer = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache, counts)
            longer.append(cache)
        return x, tuple(longer)

    def _logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        table = self.embedding if self.lm_head is None else self.lm_head
        normed = self.final_norm(hidden)
        return float32_dot_general(
            normed,
            table[...].astype(normed.dtype),
            (((2,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
