"""The GGUF reader against files written by gguf's own writer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_tkg.models import LlamaConfig, UnsupportedModelError, read_gguf, unpermute_rope_rows

OUR_NAMES = {
    "token_embd.weight": "embed",
    "output_norm.weight": "final_norm",
    "attn_norm.weight": "attn_norm",
    "attn_v.weight": "v",
    "attn_output.weight": "o",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}


def llama_cpp_order(head_dim: int, num_heads: int) -> list[int]:
    """For each row of the file, the half-split row it was taken from, one by one."""
    order = []
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + pair + head_dim // 2]
    return order


def rotate_pairs(x: np.ndarray, position: float, first: np.ndarray, second: np.ndarray):
    """RoPE in float64: rotates component first[j] with second[j] by the angle of frequency j."""
    angle = position * 10000.0 ** (-np.arange(first.size) / first.size)
    y = np.empty_like(x)
    y[first] = x[first] * np.cos(angle) - x[second] * np.sin(angle)
    y[second] = x[first] * np.sin(angle) + x[second] * np.cos(angle)
    return y


@settings(deadline=None)
@given(
    num_heads=st.integers(1, 9),
    half=st.integers(1, 32),
    trailing=st.sampled_from([(), (3,), (2, 5)]),
)
def test_unpermute_inverts_llama_cpp_permutation(
    num_heads: int, half: int, trailing: tuple[int, ...]
) -> None:
    rows = np.arange(num_heads * 2 * half * int(np.prod(trailing)), dtype=np.float32)
    rows = rows.reshape(num_heads * 2 * half, *trailing)
    stored = rows[llama_cpp_order(2 * half, num_heads)]
    np.testing.assert_array_equal(unpermute_rope_rows(stored, num_heads), rows)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), query_pos=st.integers(0, 8191), key_pos=st.integers(0, 8191))
def test_unpermuted_rows_give_the_same_scores_with_half_split_rope(
    seed: int, query_pos: int, key_pos: int
) -> None:
    stored = np.random.default_rng(seed).standard_normal((2, 16)).astype(np.float32)
    index = np.arange(8)
    interleaved = [
        rotate_pairs(row.astype(np.float64), position, 2 * index, 2 * index + 1)
        for row, position in zip(stored, (query_pos, key_pos), strict=True)
    ]
    half_split = [
        rotate_pairs(
            unpermute_rope_rows(row, 1).astype(np.float64), position, index, index + index.size
        )
        for row, position in zip(stored, (query_pos, key_pos), strict=True)
    ]
    np.testing.assert_allclose(
        half_split[0] @ half_split[1], interleaved[0] @ interleaved[1], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0"])
def test_weights_and_config(tiny_file: Any, tmp_path: Path, quantization: str) -> None:
    tiny_file.quantization = GGMLQuantizationType[quantization]
    if quantization == "Q8_0":  # Rows of 48 do not fit its blocks of 32.
        del tiny_file.scalars["attention.key_length"]
        tiny_file.scalars |= {"attention.head_count": 4}
        for i in range(2):
            for name in ("attn_q", "attn_output"):
                values = tiny_file.tensors[f"blk.{i}.{name}.weight"]
                tiny_file.tensors[f"blk.{i}.{name}.weight"] = values[:32, :32]
    model = read_gguf(tiny_file.write(tmp_path / "tiny.gguf"))
    num_heads = 4 if quantization == "Q8_0" else 6

    assert model.config == LlamaConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=num_heads,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=64,
        rope_base=5000.0,
        rms_eps=2.0**-17,
        context_length=128,
        vocab_size=len(tiny_file.tokenizer.tokens),
        tie_embeddings=True,
    )
    assert len(model.weights) == 2 + 2 * 9
    for name, values in model.weights.items():
        assert type(values) is np.ndarray, name
        assert values.dtype == np.float32, name
        assert values.flags.c_contiguous, name
    for source, stored in tiny_file.tensors.items():
        *block, short = source.split(".", 2) if source.startswith("blk") else [source]
        prefix = f"layers.{block[1]}." if block else ""
        if short in OUR_NAMES:
            np.testing.assert_array_equal(model.weights[prefix + OUR_NAMES[short]], stored)
    for i in range(2):
        for ours, source, heads in (("q", "attn_q", num_heads), ("k", "attn_k", 2)):
            stored = tiny_file.tensors[f"blk.{i}.{source}.weight"]
            np.testing.assert_array_equal(
                model.weights[f"layers.{i}.{ours}"][llama_cpp_order(8, heads)], stored
            )


def test_weights_do_not_keep_the_file_mapped(tiny_file: Any, tmp_path: Path) -> None:
    path = tiny_file.write(tmp_path / "tiny.gguf")
    weights = read_gguf(path).weights
    assert str(path) not in Path("/proc/self/maps").read_text()
    weights["final_norm"][0] = 7.0  # Writable: nobody else's memory.


def test_untied_embedding_and_biases(tiny_file: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lm_head = rng.standard_normal(tiny_file.tensors["token_embd.weight"].shape).astype(np.float32)
    tiny_file.tensors["output.weight"] = lm_head
    biases = {}
    for i in range(2):
        for name, size in (("q", 48), ("k", 16), ("v", 16)):
            biases[i, name] = rng.standard_normal(size).astype(np.float32)
            order = list(range(16)) if name == "v" else llama_cpp_order(8, size // 8)
            tiny_file.tensors[f"blk.{i}.attn_{name}.bias"] = biases[i, name][order]
    model = read_gguf(tiny_file.write(tmp_path / "tiny.gguf"))
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.weights["lm_head"], lm_head)
    for (i, name), bias in biases.items():
        np.testing.assert_array_equal(model.weights[f"layers.{i}.{name}_bias"], bias)


def test_tokenizer_metadata(tiny_file: Any, tmp_path: Path) -> None:
    expected = dataclasses.replace(tiny_file.tokenizer, end_of_turn_id=0, add_bos=True)
    tiny_file.tokenizer = expected
    assert read_gguf(tiny_file.write(tmp_path / "tiny.gguf")).tokenizer_metadata == expected


def test_optional_tokenizer_metadata_may_be_absent(tiny_file: Any, tmp_path: Path) -> None:
    expected = dataclasses.replace(
        tiny_file.tokenizer,
        bos_id=None,
        eos_id=None,
        unknown_id=None,
        padding_id=None,
        chat_template=None,
    )
    tiny_file.tokenizer = expected
    assert read_gguf(tiny_file.write(tmp_path / "tiny.gguf")).tokenizer_metadata == expected


def refuses(tiny_file: Any, tmp_path: Path, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_gguf(tiny_file.write(tmp_path / "tiny.gguf"))


def test_refuses_another_architecture(tiny_file: Any, tmp_path: Path) -> None:
    tiny_file.architecture = "gemma3"
    refuses(tiny_file, tmp_path, r"architecture 'gemma3'.*'llama'")


@pytest.mark.parametrize(("field", "value"), [("tokenizer_model", "llama"), ("tokenizer_pre", "x")])
def test_refuses_another_tokenizer(tiny_file: Any, tmp_path: Path, field: str, value: str) -> None:
    setattr(tiny_file, field, value)
    refuses(tiny_file, tmp_path, f"unsupported tokenizer: .*={value!r}.*Supported: .*'smollm'")


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_k.weight"])
def test_refuses_missing_tensors(tiny_file: Any, tmp_path: Path, name: str) -> None:
    del tiny_file.tensors[name]
    refuses(tiny_file, tmp_path, f"lacks tensors: {name}")


def test_counts_many_missing_tensors(tiny_file: Any, tmp_path: Path) -> None:
    tiny_file.scalars["block_count"] = 3
    refuses(tiny_file, tmp_path, r"lacks tensors: blk\.2\.attn_k.* and 5 more")


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.attn_q_norm.weight", "blk.1.attn_q.bias"]
)
def test_refuses_tensors_it_would_ignore(tiny_file: Any, tmp_path: Path, name: str) -> None:
    tiny_file.tensors[name] = np.ones(8, np.float32)
    refuses(tiny_file, tmp_path, f"does not know: {name}")


def test_refuses_a_wrong_shape(tiny_file: Any, tmp_path: Path) -> None:
    tiny_file.scalars["feed_forward_length"] = 96
    refuses(tiny_file, tmp_path, r"'blk.0.ffn_gate.weight' has shape \(64, 32\).*\(96, 32\)")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.value_length", 4),
        ("rope.dimension_count", 4),
        ("rope.scaling.type", "yarn"),
        ("rope.scale_linear", 2.0),
        ("attention.sliding_window", 64),
        ("expert_count", 8),
    ],
)
def test_refuses_settings_it_would_ignore(
    tiny_file: Any, tmp_path: Path, key: str, value: int | float | str
) -> None:
    tiny_file.scalars[key] = value
    refuses(tiny_file, tmp_path, f"'llama.{key}' is {value!r}")


def test_refuses_missing_metadata(tiny_file: Any, tmp_path: Path) -> None:
    del tiny_file.scalars["feed_forward_length"]
    refuses(tiny_file, tmp_path, r"lacks the metadata 'llama\.feed_forward_length'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count_kv": [2, 1]}, r"head_count_kv' is \[2, 1\].*all layers"),
        ({"attention.head_count": 0}, r"head_count' is 0; needed is one positive"),
        ({"attention.head_count_kv": 4}, "6 query heads cannot share 4"),
        ({"attention.key_length": 7, "attention.value_length": 7}, "dimension_count' is 8"),
        (
            {
                "attention.key_length": 7,
                "attention.value_length": 7,
                "rope.dimension_count": 7,
            },
            "even head_dim; got 7",
        ),
    ],
)
def test_refuses_impossible_heads(
    tiny_file: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny_file.scalars |= changes
    refuses(tiny_file, tmp_path, message)


def test_refuses_the_other_byte_order(tiny_file: Any, tmp_path: Path) -> None:
    tiny_file.endianess = GGUFEndian.BIG
    refuses(tiny_file, tmp_path, "other byte order")


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize("kept", [0, 100, 2000, -64])
def test_refuses_a_damaged_file(tiny_file: Any, tmp_path: Path, kept: int) -> None:
    path = tiny_file.write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UnsupportedModelError, match=r"tiny\.gguf is not a complete GGUF file"):
        read_gguf(path)


def test_refuses_another_format(tmp_path: Path) -> None:
    path = tmp_path / "pointer.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UnsupportedModelError, match="not a complete GGUF file"):
        read_gguf(path)
