"""A FlaxLlama with the weights of a model file."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from jax_tkg._typing import Array
from jax_tkg.flax_layers.from_gguf import ModelWeights
from jax_tkg.models.metadata import LlamaConfig


def flax_llama_from_gguf(
    model: ModelWeights, *, dtype: Dtype = jnp.float32
) -> tuple[Any, dict[str, Any]]:
    """The FlaxLlamaForCausalLM of transformers with the weights of a model file.

    Its rotation ignores the file's base: put `rope_of_config()` around its calls.

    Args:
        model: from `jax_tkg.models.read_gguf`.
        dtype: of the weights and the computation.

    Returns:
        The model, and its parameters, to be given to its calls as `params=`.

    Raises:
        ImportError: without transformers 4.57, the last with Flax.
        ValueError: for sizes that FlaxLlama cannot have.
    """
    config = flax_llama_config(model.config)
    client = _transformers().FlaxLlamaForCausalLM(config, dtype=dtype, _do_init=False)
    return client, flax_llama_params(model.weights, model.config, dtype)


def _transformers() -> Any:
    return importlib.import_module("transformers")


def flax_llama_config(sizes: LlamaConfig) -> Any:
    """The LlamaConfig of transformers.

    Raises:
        ValueError: if heads do not share the model's width evenly, as FlaxLlama assumes.
    """
    if sizes.head_dim * sizes.num_heads != sizes.hidden_size:
        raise ValueError(
            f"FlaxLlama needs num_heads * head_dim = hidden_size; the file has {sizes.num_heads}, "
            f"{sizes.head_dim} and {sizes.hidden_size}."
        )
    return _transformers().LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.mlp_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=sizes.context_length,
        rms_norm_eps=sizes.rms_eps,
        rope_theta=sizes.rope_base,
        tie_word_embeddings=sizes.tie_embeddings,
    )


def flax_llama_params(
    weights: Mapping[str, np.ndarray], sizes: LlamaConfig, dtype: Dtype = jnp.float32
) -> dict[str, Any]:
    """The parameters of `FlaxLlamaForCausalLM`, whose kernels are `[in, out]`.

    Args:
        weights: as `GGUFModel.weights`, without biases.
        sizes: of the model.
        dtype: of the parameters.
    """

    def array(name: str) -> Array:
        return jnp.asarray(weights[name], dtype)

    def kernels(prefix: str, names: Mapping[str, str]) -> dict[str, Any]:
        return {theirs: {"kernel": array(prefix + ours).T} for theirs, ours in names.items()}

    def layer(i: int) -> dict[str, Any]:
        at = f"layers.{i}."
        return {
            "self_attn": kernels(at, {f"{n}_proj": n for n in "qkvo"}),
            "mlp": kernels(at, {f"{n}_proj": n for n in ("gate", "up", "down")}),
            "input_layernorm": {"weight": array(f"{at}attn_norm")},
            "post_attention_layernorm": {"weight": array(f"{at}mlp_norm")},
        }

    head = "embed" if sizes.tie_embeddings else "lm_head"
    return {
        "model": {
            "embed_tokens": {"embedding": array("embed")},
            "layers": {str(i): layer(i) for i in range(sizes.num_layers)},
            "norm": {"weight": array("final_norm")},
        },
        "lm_head": {"kernel": array(head).T},
    }
