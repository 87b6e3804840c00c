"""Flax layers on `jax_tkg.attention_tkg`: attention for nnx and linen, and a decoder.

`Attention` and `LinenAttention` keep their KV cache outside, as an argument and a result.
`AttentionFn` plugs into the `MultiHeadAttention` of Flax itself. `jax_tkg.flax_layers.swap` puts
the op into decoders that other people wrote.
"""

from jax_tkg.flax_layers.config import AttentionConfig
from jax_tkg.flax_layers.decoder import DecoderConfig, DecoderLayer, LlamaDecoder
from jax_tkg.flax_layers.drop_in import AttentionFn, attention_fn
from jax_tkg.flax_layers.from_gguf import decoder_from_gguf
from jax_tkg.flax_layers.linen_attention import LinenAttention, LinenRMSNorm
from jax_tkg.flax_layers.nnx_attention import Attention, RMSNorm
from jax_tkg.flax_layers.partition import decoder_shardings, shard_decoder

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionFn",
    "DecoderConfig",
    "DecoderLayer",
    "LinenAttention",
    "LinenRMSNorm",
    "LlamaDecoder",
    "RMSNorm",
    "attention_fn",
    "decoder_from_gguf",
    "decoder_shardings",
    "shard_decoder",
]
