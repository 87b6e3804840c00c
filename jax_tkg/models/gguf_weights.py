"""Reads a Llama-architecture GGUF file into float32 arrays with the names of our decoder.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Parsing and dequantisation
are those of the `gguf` package.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor
from numpy.typing import NDArray

from jax_tkg.models.metadata import (
    LlamaConfig,
    TokenizerMetadata,
    TokenType,
    UnsupportedModelError,
)

_ARCHITECTURE = "llama"


@dataclass(frozen=True, eq=False)
class GGUFModel:
    """A decoder read from a file.

    Attributes:
        config: Sizes and constants.
        weights: Float32 arrays, matrices as `[out, in]` (so `y = x @ w.T`). With D the hidden
            size, V the vocabulary, N and K the query and key/value heads, H the head_dim and F
            the MLP size: `embed [V,D]`, `final_norm [D]`, `lm_head [V,D]` when the embedding is
            not tied, and for each layer i, under `layers.{i}.`: `attn_norm [D]`, `mlp_norm [D]`,
            `q [N*H,D]`, `k [K*H,D]`, `v [K*H,D]`, `o [D,N*H]`, `gate [F,D]`, `up [F,D]`,
            `down [D,F]`, and in files with attention biases `q_bias [N*H]`, `k_bias [K*H]`,
            `v_bias [K*H]`. Rows of q and k are in the order of half-split RoPE.
        tokenizer_metadata: What `jax_tkg.models.Tokenizer` needs.
    """

    config: LlamaConfig
    weights: dict[str, NDArray[np.float32]]
    tokenizer_metadata: TokenizerMetadata


def read_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Reads configuration, weights and tokenizer of a Llama-architecture GGUF file.

    Args:
        path: A GGUF file of any quantisation that the `gguf` package can dequantise.

    Returns:
        The model; its arrays own their memory (4 bytes a parameter).

    Raises:
        FileNotFoundError: There is no such file.
        UnsupportedModelError: Not a GGUF file, another architecture or tokenizer, a feature that
            the decoder lacks, or tensors that are missing, unknown or of the wrong shape.
    """
    reader = _open(Path(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(fields, tie_embeddings="output.weight" not in tensors)
    # Before the weights: a tokenizer that cannot be used is reported without the long wait.
    tokenizer_metadata = _read_tokenizer(fields)
    layout = _tensor_layout(config, with_bias="blk.0.attn_q.bias" in tensors)
    _check_tensors(tensors, layout)
    weights = {name: _read_tensor(tensors[source], config) for source, (name, _) in layout.items()}
    return GGUFModel(config, weights, tokenizer_metadata)


def unpermute_rope_rows(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Puts query or key rows in the order of half-split RoPE.

    llama.cpp rotates neighbouring pairs (2j, 2j+1) of a head, half-split RoPE the pairs
    (j, j + H/2). Files for llama.cpp therefore store row j + h*H/2 of a head (h is 0 or 1) at
    place 2j + h; this is the inverse.

    Args:
        rows: `[num_heads * H, ...]`, interleaved; a projection matrix `[out, in]` or its bias.
        num_heads: Query heads for a query projection, key/value heads for a key projection.

    Returns:
        The same rows, half-split, with the shape of the input.
    """
    half = rows.shape[0] // num_heads // 2
    pairs = rows.reshape(num_heads, half, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _open(path: Path) -> GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise UnsupportedModelError(
            f"{path} is not a complete GGUF file ({error}). Download it again."
        ) from error
    if reader.byte_order == "S":
        raise UnsupportedModelError(
            f"{path} was written for the other byte order. Convert it for this machine first."
        )
    return reader


def _require(fields: Mapping[str, Any], key: str) -> Any:
    if key not in fields:
        raise UnsupportedModelError(f"the file lacks the metadata {key!r}. Convert it again.")
    return fields[key]


def _read_config(fields: Mapping[str, Any], *, tie_embeddings: bool) -> LlamaConfig:
    architecture = _require(fields, "general.architecture")
    if architecture != _ARCHITECTURE:
        raise UnsupportedModelError(
            f"unsupported architecture {architecture!r}; this reader knows {_ARCHITECTURE!r}."
        )
    llama = {
        key.removeprefix("llama."): value
        for key, value in fields.items()
        if key.startswith("llama.")
    }

    def number(key: str, default: float | None = None) -> float:
        if default is None:
            _require(fields, f"llama.{key}")
        value = llama.get(key, default)
        if not isinstance(value, int | float) or value <= 0:
            raise UnsupportedModelError(
                f"the metadata 'llama.{key}' is {value!r}; needed is one positive number that "
                "holds for all layers."
            )
        return value

    hidden_size = int(number("embedding_length"))
    num_heads = int(number("attention.head_count"))
    head_dim = int(number("attention.key_length", hidden_size // num_heads))
    _refuse_unsupported(llama, head_dim)
    return LlamaConfig(
        num_layers=int(number("block_count")),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=int(number("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        mlp_size=int(number("feed_forward_length")),
        rope_base=float(number("rope.freq_base", 10000.0)),
        rms_eps=float(number("attention.layer_norm_rms_epsilon")),
        context_length=int(number("context_length")),
        vocab_size=len(_require(fields, "tokenizer.ggml.tokens")),
        tie_embeddings=tie_embeddings,
    )


def _refuse_unsupported(llama: Mapping[str, Any], head_dim: int) -> None:
    """Refuses settings that would change the result without a missing or unknown tensor."""
    plain = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.scaling.type": "none",
        "rope.scale_linear": 1.0,
        "attention.sliding_window": 0,
        "expert_count": 0,
    }
    for key, expected in plain.items():
        value = llama.get(key, expected)
        if value != expected:
            raise UnsupportedModelError(
                f"the metadata 'llama.{key}' is {value!r}; this reader supports {expected!r} only."
            )


def _read_tokenizer(fields: Mapping[str, Any]) -> TokenizerMetadata:
    prefix = "tokenizer.ggml."
    tokens = tuple(_require(fields, f"{prefix}tokens"))
    types = fields.get(f"{prefix}token_type", [int(TokenType.NORMAL)] * len(tokens))
    return TokenizerMetadata(
        model=_require(fields, f"{prefix}model"),
        pre=fields.get(f"{prefix}pre", "default"),
        tokens=tokens,
        merges=tuple(fields.get(f"{prefix}merges", ())),
        token_types=tuple(types),
        bos_id=fields.get(f"{prefix}bos_token_id"),
        eos_id=fields.get(f"{prefix}eos_token_id"),
        end_of_turn_id=fields.get(f"{prefix}eot_token_id"),
        unknown_id=fields.get(f"{prefix}unknown_token_id"),
        padding_id=fields.get(f"{prefix}padding_token_id"),
        add_bos=bool(fields.get(f"{prefix}add_bos_token", False)),
        chat_template=fields.get("tokenizer.chat_template"),
    )


_Layout = dict[str, tuple[str, tuple[int, ...]]]


def _tensor_layout(config: LlamaConfig, *, with_bias: bool) -> _Layout:
    """Maps each tensor name in the file to our name and its shape."""
    width, vocab, mlp = config.hidden_size, config.vocab_size, config.mlp_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    layer: _Layout = {
        "attn_norm.weight": ("attn_norm", (width,)),
        "attn_q.weight": ("q", (q_rows, width)),
        "attn_k.weight": ("k", (kv_rows, width)),
        "attn_v.weight": ("v", (kv_rows, width)),
        "attn_output.weight": ("o", (width, q_rows)),
        "ffn_norm.weight": ("mlp_norm", (width,)),
        "ffn_gate.weight": ("gate", (mlp, width)),
        "ffn_up.weight": ("up", (mlp, width)),
        "ffn_down.weight": ("down", (width, mlp)),
    }
    if with_bias:
        layer["attn_q.bias"] = ("q_bias", (q_rows,))
        layer["attn_k.bias"] = ("k_bias", (kv_rows,))
        layer["attn_v.bias"] = ("v_bias", (kv_rows,))
    layout: _Layout = {
        "token_embd.weight": ("embed", (vocab, width)),
        "output_norm.weight": ("final_norm", (width,)),
    }
    if not config.tie_embeddings:
        layout["output.weight"] = ("lm_head", (vocab, width))
    for i in range(config.num_layers):
        for source, (name, shape) in layer.items():
            layout[f"blk.{i}.{source}"] = (f"layers.{i}.{name}", shape)
    return layout


def _check_tensors(tensors: Mapping[str, ReaderTensor], layout: _Layout) -> None:
    if missing := layout.keys() - tensors.keys():
        raise UnsupportedModelError(f"the file lacks tensors: {_listing(missing)}.")
    # An unknown tensor is a part of the model that would silently not be computed.
    if unknown := tensors.keys() - layout.keys():
        raise UnsupportedModelError(
            f"the file has tensors that this reader does not know: {_listing(unknown)}."
        )
    for source, (_, expected) in layout.items():
        shape = tuple(reversed(tensors[source].shape.tolist()))
        if shape != expected:
            raise UnsupportedModelError(
                f"tensor {source!r} has shape {shape}; the metadata asks for {expected}."
            )


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:4])
    return shown if len(ordered) <= 4 else f"{shown} and {len(ordered) - 4} more"


def _read_tensor(tensor: ReaderTensor, config: LlamaConfig) -> NDArray[np.float32]:
    # A plain view: slicing a memmap in the dequantiser's loop costs twice the time.
    stored = np.asarray(tensor.data)
    try:
        values: NDArray[np.float32] = dequantize(stored, tensor.tensor_type)
    except NotImplementedError as error:
        raise UnsupportedModelError(f"tensor {tensor.name!r}: {error}") from error
    if tensor.tensor_type == GGMLQuantizationType.F32:
        values = values.copy()  # Else it would be a window into the mapped file.
    if ".attn_q." in tensor.name:
        return unpermute_rope_rows(values, config.num_heads)
    if ".attn_k." in tensor.name:
        return unpermute_rope_rows(values, config.num_kv_heads)
    return values
