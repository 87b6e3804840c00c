"""Swaps the attention of decoders that people already run; see docs/swap.md.

`swap_linen` for linen decoders, `swap_nnx` for nnx ones, `attention_fn` for Flax's own modules. No
client is imported unless its user has imported it.
"""

import importlib
from typing import Any

from jax_tkg.flax_layers.swap.protocol import CacheVariables, Client, LinenAdapter, LinenCall
from jax_tkg.flax_layers.swap.report import (
    LeftAlone,
    SwapError,
    SwappedLayer,
    SwapReport,
    SwapWarning,
)

__all__ = [
    "CacheVariables",
    "Client",
    "HFDecoder",
    "LeftAlone",
    "LinenAdapter",
    "LinenCall",
    "LinenSwap",
    "NnxAdapter",
    "NnxLayer",
    "NnxSwap",
    "SwapError",
    "SwapReport",
    "SwapWarning",
    "SwappedLayer",
    "TunixDecoder",
    "flax_llama_from_gguf",
    "restore_nnx",
    "rope_of_config",
    "swap_linen",
    "swap_nnx",
    "tunix_llama3_from_gguf",
]

_HOME = {
    "HFDecoder": "hf_decode",
    "LinenSwap": "linen",
    "NnxAdapter": "nnx",
    "NnxLayer": "nnx",
    "NnxSwap": "nnx",
    "TunixDecoder": "tunix_decode",
    "flax_llama_from_gguf": "hf_weights",
    "restore_nnx": "nnx",
    "rope_of_config": "adapters.hf_rope",
    "swap_linen": "linen",
    "swap_nnx": "nnx",
    "tunix_llama3_from_gguf": "tunix_from_gguf",
}


def __getattr__(name: str) -> Any:
    """Imports the linen or the nnx half when a name of it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
