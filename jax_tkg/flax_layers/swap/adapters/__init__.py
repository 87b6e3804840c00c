"""One file for each client; importing them imports no client."""

from jax_tkg.flax_layers.swap.adapters.flax_mha_linen import FlaxLinenMultiHeadAttention
from jax_tkg.flax_layers.swap.adapters.hf_gpt2 import HFGPT2
from jax_tkg.flax_layers.swap.adapters.hf_llama import HFLlama
from jax_tkg.flax_layers.swap.adapters.hf_mistral import HFMistral
from jax_tkg.flax_layers.swap.protocol import LinenAdapter

LINEN_ADAPTERS: tuple[LinenAdapter, ...] = (
    HFLlama(),
    HFMistral(),
    HFGPT2(),
    FlaxLinenMultiHeadAttention(),
)
"""What `swap_linen` knows."""
