"""A decoder with the weights of a model file."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from jax_tkg._typing import Array
from jax_tkg.flax_layers.config import AttentionConfig
from jax_tkg.flax_layers.decoder import DecoderConfig, LlamaDecoder
from jax_tkg.models.metadata import LlamaConfig
from jax_tkg.rope import RotaryEmbedding


@runtime_checkable
class ModelWeights(Protocol):
    """What is read of a `jax_tkg.models.GGUFModel`."""

    @property
    def config(self) -> LlamaConfig:
        """Sizes and constants."""

    @property
    def weights(self) -> Mapping[str, np.ndarray]:
        """Arrays by name, matrices as `[out, in]`; the names are those of `GGUFModel.weights`."""


def decoder_from_gguf(model: ModelWeights, *, dtype: Dtype = jnp.float32) -> LlamaDecoder:
    """Puts the weights of a model file into a decoder.

    Args:
        model: from `jax_tkg.models.read_gguf`.
        dtype: of the weights and the computation.

    Returns:
        A decoder whose weights are on the default device.

    Raises:
        ValueError: if weights are missing, left over, or of another shape than the sizes ask for.
    """
    config = decoder_config(model)
    decoder = nnx.eval_shape(
        lambda: LlamaDecoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    weights = _Weights(model.weights, dtype)
    params = _parameters(weights, config)
    _check_shapes(nnx.to_pure_dict(nnx.state(decoder)), params, weights.unused())
    nnx.update(decoder, params)
    return decoder


def decoder_config(model: ModelWeights) -> DecoderConfig:
    """The configuration of the decoder that `decoder_from_gguf` makes."""
    sizes = model.config
    return DecoderConfig(
        vocab_size=sizes.vocab_size,
        num_layers=sizes.num_layers,
        mlp_dim=sizes.mlp_size,
        norm_eps=sizes.rms_eps,
        tie_embeddings=sizes.tie_embeddings,
        attention=AttentionConfig(
            model_dim=sizes.hidden_size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            qkv_bias="layers.0.q_bias" in model.weights,
            rope=RotaryEmbedding(base=sizes.rope_base),
        ),
    )


class _Weights:
    """Looks weights up by name and remembers which."""

    def __init__(self, weights: Mapping[str, np.ndarray], dtype: Dtype) -> None:
        self._weights, self._dtype, self._used = weights, dtype, set[str]()

    def __call__(self, name: str) -> Array:
        if name not in self._weights:
            raise ValueError(f"the model has no weight {name!r}, which its sizes ask for.")
        self._used.add(name)
        return jnp.asarray(self._weights[name], self._dtype)

    def linear(self, name: str, bias: str | None = None) -> dict[str, Array]:
        """The parameters of an `nnx.Linear`, whose kernel is `[in, out]`."""
        with_bias = {} if bias is None else {"bias": self(bias)}
        return {"kernel": self(name).T, **with_bias}

    def norm(self, name: str) -> dict[str, Array]:
        """The parameter of an `RMSNorm`."""
        return {"scale": self(name)}

    def unused(self) -> set[str]:
        """Names that nobody asked for."""
        return set(self._weights) - self._used


def _parameters(weights: _Weights, config: DecoderConfig) -> dict[str, Any]:
    params: dict[str, Any] = {
        "embedding": weights("embed"),
        "final_norm": weights.norm("final_norm"),
        "layers": {i: _layer(weights, config, f"layers.{i}.") for i in range(config.num_layers)},
    }
    if not config.tie_embeddings:
        params["lm_head"] = weights("lm_head")
    return params


def _layer(weights: _Weights, config: DecoderConfig, prefix: str) -> dict[str, Any]:
    biased = config.attention.qkv_bias
    attention = {
        name: weights.linear(f"{prefix}{name}", f"{prefix}{name}_bias" if biased else None)
        for name in "qkv"
    }
    return {
        "attention": {**attention, "out": weights.linear(f"{prefix}o")},
        "attention_norm": weights.norm(f"{prefix}attn_norm"),
        "mlp_norm": weights.norm(f"{prefix}mlp_norm"),
        **{name: weights.linear(f"{prefix}{name}") for name in ("gate", "up", "down")},
    }


def _check_shapes(expected: Any, given: Any, unused: set[str]) -> None:
    if unused:
        raise ValueError(
            f"the model has weights that this decoder has no use for: {sorted(unused)}."
        )
    shapes = [jax.tree.map(lambda leaf: tuple(leaf.shape), tree) for tree in (expected, given)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the weights do not have the shapes that the sizes ask for: {shapes[0]}; "
            f"got {shapes[1]}."
        )
