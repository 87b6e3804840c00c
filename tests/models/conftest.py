"""A tiny model file, written on the spot, for tests that must not download anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter, quantize
from tokenizers.pre_tokenizers import ByteLevel

from jax_tkg.models import TokenizerMetadata

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# "1 2" and "l Ġ" can only apply if the text is split wrongly: digits are kept apart, and a space
# belongs to the word after it.
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©", "1 2", "l Ġ")
CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "  {% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + ':' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


def make_tokenizer_metadata(**changes: Any) -> TokenizerMetadata:
    """A vocabulary of three control tokens, every byte and a few merges."""
    tokens = (
        *CONTROL_TOKENS,
        *sorted(ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
    )
    metadata = TokenizerMetadata(
        model="gpt2",
        pre="smollm",
        tokens=tokens,
        merges=MERGES,
        token_types=(3,) * len(CONTROL_TOKENS) + (1,) * (len(tokens) - len(CONTROL_TOKENS)),
        bos_id=1,
        eos_id=2,
        end_of_turn_id=None,
        unknown_id=0,
        padding_id=2,
        add_bos=False,
        chat_template=CHAT_TEMPLATE,
    )
    return replace(metadata, **changes)


@dataclass
class TinyFile:
    """A Llama-architecture file: hidden 32, 2 layers, 6 query and 2 KV heads of 8.

    `tensors` are keyed by their name in the file and ordered as llama.cpp stores them. Matrices
    hold integers whose blocks of 32 reach 127, which Q8_0 represents exactly (scale 1).
    """

    architecture: str = "llama"
    scalars: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    tokenizer: TokenizerMetadata = field(default_factory=make_tokenizer_metadata)
    tokenizer_model: str = "gpt2"
    tokenizer_pre: str = "smollm"
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32
    endianess: GGUFEndian = GGUFEndian.LITTLE

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture, endianess=self.endianess)
        for key, value in self.scalars.items():
            add = {
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }[type(value)]
            add(f"{self.architecture}.{key}", value)
        self._write_tokenizer(writer)
        for name, values in self.tensors.items():
            if values.ndim == 1:
                writer.add_tensor(name, values)
            else:
                data = quantize(values, self.quantization)
                writer.add_tensor(name, data, raw_dtype=self.quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _write_tokenizer(self, writer: GGUFWriter) -> None:
        metadata = self.tokenizer
        writer.add_tokenizer_model(self.tokenizer_model)
        writer.add_tokenizer_pre(self.tokenizer_pre)
        writer.add_token_list(list(metadata.tokens))
        writer.add_token_types(list(metadata.token_types))
        writer.add_token_merges(list(metadata.merges))
        writer.add_add_bos_token(metadata.add_bos)
        ids: tuple[tuple[int | None, Callable[[int], None]], ...] = (
            (metadata.bos_id, writer.add_bos_token_id),
            (metadata.eos_id, writer.add_eos_token_id),
            (metadata.end_of_turn_id, writer.add_eot_token_id),
            (metadata.unknown_id, writer.add_unk_token_id),
            (metadata.padding_id, writer.add_pad_token_id),
        )
        for token_id, add in ids:
            if token_id is not None:
                add(token_id)
        if metadata.chat_template is not None:
            writer.add_chat_template(metadata.chat_template)


@pytest.fixture(scope="session")
def make_metadata() -> Callable[..., TokenizerMetadata]:
    return make_tokenizer_metadata


@pytest.fixture
def tiny_file() -> TinyFile:
    tokenizer = make_tokenizer_metadata()
    rng = np.random.default_rng(0)

    def vector(size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = rng.integers(-127, 128, (rows, columns)).astype(np.float32)
        values[:, ::32] = 127
        return values

    vocab = len(tokenizer.tokens)
    tensors = {"token_embd.weight": matrix(vocab, 32), "output_norm.weight": vector(32)}
    for i in range(2):
        layer = {
            "attn_norm.weight": vector(32),
            "attn_q.weight": matrix(48, 32),
            "attn_k.weight": matrix(16, 32),
            "attn_v.weight": matrix(16, 32),
            "attn_output.weight": matrix(32, 48),
            "ffn_norm.weight": vector(32),
            "ffn_gate.weight": matrix(64, 32),
            "ffn_up.weight": matrix(64, 32),
            "ffn_down.weight": matrix(32, 64),
        }
        tensors |= {f"blk.{i}.{name}": values for name, values in layer.items()}
    scalars = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 6,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": 2.0**-17,
        "rope.freq_base": 5000.0,
        "rope.dimension_count": 8,
    }
    return TinyFile(scalars=scalars, tensors=tensors, tokenizer=tokenizer)
