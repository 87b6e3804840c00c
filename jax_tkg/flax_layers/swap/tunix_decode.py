"""A swapped tunix decoder as a model for `jax_tkg.generate`, with caches of this library.

    swap_nnx(llama)
    result = jax_tkg.generate(TunixDecoder.of(llama), prompts, max_new_tokens=20)

tunix hands its layers' caches through without looking into them. So here each is a `KVCache`, in
the layout and dtype of one's choice, that knows the length of every row: prompts of different
lengths need no padding on the left, and no mask is made.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from jax_tkg._typing import Array, Float, Int, Leaf
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.flax_layers.swap.adapters.tunix_attention import TUNIX, Logits
from jax_tkg.flax_layers.swap.nnx import adapter_of
from jax_tkg.flax_layers.swap.report import SwapError

Caches = dict[str, KVCache]
"""One cache for each layer, under tunix's names: layer_0, layer_1, ..."""


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "counts"], meta_fields=[])
@dataclass(frozen=True)
class LayerCache:
    """What a swapped layer is given in place of tunix's dictionary.

    Attributes:
        cache: the layer's keys and values.
        counts: int32 `[B]`, how many of the new tokens of each row are real; None for all.
    """

    cache: KVCache
    counts: Leaf | None

    def append_and_attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        logits: Logits,
    ) -> tuple[Float[Array, "B T N H"], Self]:
        """See `tunix_attention.AppendAndAttend`."""
        positions = new_positions(self.cache, query.shape[1])
        cache = self.cache.append(key, value, self.counts)
        window = None if logits.window is None else (logits.window - 1, 0)
        # Positions only where they are not the last of the row: else the op knows them.
        given = None if self.counts is None else positions
        out = logits.attend(query, cache, query_positions=given, local_window_size=window)
        return out, replace(self, cache=cache)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["graphdef", "layers", "dtype", "vocab_size"],
)
@dataclass(frozen=True)
class TunixDecoder:
    """A `DecodeModel`: the weights are its leaves, all else is static. Made by `of`.

    Attributes:
        state: the model's variables.
        graphdef: its structure, the swapped classes among it.
        layers: KV heads and head_dim of each layer.
        dtype: of new caches, if none is asked for.
        vocab_size: token ids V that it has embeddings for; `jax_tkg.generate` refuses others.
    """

    state: Any
    graphdef: Any
    layers: tuple[tuple[int, int], ...]
    dtype: np.dtype
    vocab_size: int

    @classmethod
    def of(cls, model: nnx.Module) -> Self:
        """A decoder of tunix, swapped by `swap_nnx`; it shares the model's weights.

        Raises:
            SwapError: if it is not one of tunix's, or a layer of it is not swapped.
        """
        layers = [
            _swapped_layer(f"layers/{i}/attn", getattr(layer, "attn", None))
            for i, layer in enumerate(getattr(model, "layers", ()))
        ]
        if not layers:
            raise SwapError(
                f"{type(model).__name__} has no layers with attn modules, as tunix's decoders do."
            )
        graphdef, state = nnx.split(model)
        sizes = tuple((layer.num_kv_heads, layer.head_dim) for layer in layers)
        embedding: Any = model.embedder.input_embedding  # type: ignore[attr-defined]
        return cls(state, graphdef, sizes, np.dtype(layers[0].dtype), embedding.value.shape[0])

    def init_caches(
        self, batch: int, capacity: int, *, dtype: npt.DTypeLike | None = None, **options: Any
    ) -> Caches:
        """Empty caches.

        Args:
            batch: rows B.
            capacity: tokens a row can hold.
            dtype: by default that of the weights; see `KVCache.create`.
            **options: `layout` and others of `KVCache.create`, the same for every layer.
        """
        dtype = self.dtype if dtype is None else dtype
        return {
            f"layer_{i}": KVCache.create(batch, capacity, heads, width, dtype=dtype, **options)
            for i, (heads, width) in enumerate(self.layers)
        }

    def next_token_logits(
        self, tokens: Int[Array, "B T"], caches: Caches, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], Caches]:
        """See `jax_tkg.generation.DecodeModel.next_token_logits`."""
        logits, caches = self(tokens, caches, counts)
        if counts is None:
            return logits[:, -1], caches
        index = jnp.maximum(counts.astype(jnp.int32) - 1, 0)[:, None, None]
        return jnp.take_along_axis(logits, index, axis=1, mode="clip")[:, 0], caches

    def __call__(
        self, tokens: Int[Array, "B T"], caches: Caches, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T V"], Caches]:
        """As `next_token_logits`, with the logits after every new token: `[B, T, V]`."""
        given = {name: LayerCache(cache, counts) for name, cache in caches.items()}
        positions = new_positions(caches["layer_0"], tokens.shape[1])
        model = nnx.merge(self.graphdef, self.state)
        logits, after = model(tokens, positions, given, None)
        return logits, {name: layer.cache for name, layer in after.items()}


def new_positions(cache: KVCache, tokens: int) -> Int[Array, "B T"]:
    """The positions of the next tokens of each row."""
    return cache.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)


def _swapped_layer(path: str, module: Any) -> Any:
    adapter = adapter_of(module)
    if adapter is None:
        raise SwapError(f"{path} is not swapped; call swap_nnx(model) first.")
    if adapter.client != TUNIX:
        raise SwapError(f"{path} is attention of {adapter.client.package}, not of tunix.")
    return adapter.layer(module)
