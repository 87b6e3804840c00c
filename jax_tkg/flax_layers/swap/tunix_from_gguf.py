"""The weights of a model file as a tunix Llama3, to run both on the same model."""

import importlib
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jax_tkg._typing import Array

if TYPE_CHECKING:
    from jax_tkg.flax_layers.from_gguf import ModelWeights


def tunix_llama3_from_gguf(model: "ModelWeights", *, dtype: Dtype = jnp.float32) -> Any:
    """Puts the weights of a Llama model file into tunix's `Llama3`.

    tunix rotates with base 1,000,000 whatever `config.rope_theta` says; `swap_nnx` warns where that
    is not the model's, and says what to do.

    Args:
        model: from `jax_tkg.models.read_gguf`.
        dtype: of the weights, and so of the computation.

    Returns:
        A `tunix.models.llama3.model.Llama3` with its weights on the default device.

    Raises:
        ImportError: if google-tunix is not installed.
    """
    tunix = importlib.import_module("tunix.models.llama3.model")
    sizes, heads = model.config, (model.config.num_heads, model.config.head_dim)
    kv_heads = (sizes.num_kv_heads, sizes.head_dim)
    config = tunix.ModelConfig(
        num_layers=sizes.num_layers,
        vocab_size=sizes.vocab_size,
        embed_dim=sizes.hidden_size,
        hidden_dim=sizes.mlp_size,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        num_kv_heads=sizes.num_kv_heads,
        rope_theta=sizes.rope_base,
        norm_eps=sizes.rms_eps,
        weight_tying=sizes.tie_embeddings,
    )
    llama = nnx.eval_shape(lambda: tunix.Llama3(config, rngs=nnx.Rngs(0)))

    def matrix(name: str, *shape: int) -> Array:
        """A matrix, which the file has as `[out, in]`, as `[in, out]` or in another shape."""
        transposed = jnp.asarray(model.weights[name], dtype).T
        return transposed.reshape(shape) if shape else transposed

    def vector(name: str) -> dict[str, Array]:
        return {"w": jnp.asarray(model.weights[name], dtype)}

    def layer(i: int) -> dict[str, Any]:
        at, width = f"layers.{i}.", sizes.hidden_size
        return {
            "input_layernorm": vector(f"{at}attn_norm"),
            "post_attention_layernorm": vector(f"{at}mlp_norm"),
            "attn": {
                "q_proj": {"w": matrix(f"{at}q", width, *heads)},
                "k_proj": {"w": matrix(f"{at}k", width, *kv_heads)},
                "v_proj": {"w": matrix(f"{at}v", width, *kv_heads)},
                "o_proj": {"w": matrix(f"{at}o", *heads, width)},
            },
            "mlp": {
                f"{name}_proj": {"kernel": matrix(f"{at}{name}")} for name in ("gate", "up", "down")
            },
        }

    weights: dict[str, Any] = {
        "embedder": {"input_embedding": jnp.asarray(model.weights["embed"], dtype)},
        "layers": {i: layer(i) for i in range(sizes.num_layers)},
        "final_norm": vector("final_norm"),
    }
    if not sizes.tie_embeddings:
        weights["lm_head"] = {"w": matrix("lm_head")}
    nnx.update(llama, weights)
    return llama
