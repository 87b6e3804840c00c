"""SmolLM2-135M-Instruct end to end, with a plain NumPy decoder. Needs the 93 MB package."""

from __future__ import annotations

import numpy as np
import pytest

from jax_tkg.models import GGUFModel, LlamaConfig, Tokenizer, read_gguf, smollm2_path

pytestmark = pytest.mark.model

PROMPT_IDS = [504, 3575, 282, 4649, 314]
GREEDY_IDS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]
GREEDY_IDS += [32, 33, 40, 29, 32, 33, 29, 34, 34, 216]


@pytest.fixture(scope="module")
def model() -> GGUFModel:
    return read_gguf(smollm2_path())


@pytest.fixture(scope="module")
def tokenizer(model: GGUFModel) -> Tokenizer:
    return Tokenizer(model.tokenizer_metadata)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def rope(x: np.ndarray, base: float) -> np.ndarray:
    """Half-split rotation of `[T, heads, H]` at positions 0 to T-1."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[0]), base ** (-np.arange(half) / half))[:, None]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Causal GQA on `[T, N, H]` and `[T, K, H]`."""
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = np.einsum("tnh,snh->nts", query, key) / np.float32(np.sqrt(query.shape[-1]))
    scores = np.where(np.tri(query.shape[0], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(axis=-1, keepdims=True), value)


def last_logits(config: LlamaConfig, weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The whole decoder on one sequence, without a cache."""
    x = weights["embed"][ids]
    for i in range(config.num_layers):
        layer = {n: weights[f"layers.{i}.{n}"] for n in ("q", "k", "v", "o", "gate", "up", "down")}
        h = rms_norm(x, weights[f"layers.{i}.attn_norm"], config.rms_eps)
        query, key, value = (
            (h @ layer[name].T).reshape(len(ids), -1, config.head_dim) for name in "qkv"
        )
        mixed = attention(rope(query, config.rope_base), rope(key, config.rope_base), value)
        x = x + mixed.reshape(len(ids), -1) @ layer["o"].T
        h = rms_norm(x, weights[f"layers.{i}.mlp_norm"], config.rms_eps)
        gate = h @ layer["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"].T)) @ layer["down"].T
    return rms_norm(x[-1], weights["final_norm"], config.rms_eps) @ weights["embed"].T


def test_config(model: GGUFModel) -> None:
    assert model.config == LlamaConfig(
        num_layers=30,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_size=1536,
        rope_base=100000.0,
        rms_eps=float(np.float32(1e-5)),
        context_length=8192,
        vocab_size=49152,
        tie_embeddings=True,
    )
    assert sum(values.size for values in model.weights.values()) == 134_515_008


def test_greedy_continuation_of_a_plain_decoder(model: GGUFModel) -> None:
    ids = list(PROMPT_IDS)
    for _ in GREEDY_IDS:
        logits = last_logits(model.config, model.weights, ids)
        assert np.isfinite(logits).all()
        ids.append(int(np.argmax(logits)))
    assert ids[len(PROMPT_IDS) :] == GREEDY_IDS


def test_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("The capital of France is") == PROMPT_IDS
    stream = tokenizer.stream()
    text = "".join(map(stream.push, GREEDY_IDS)) + stream.flush()
    assert text == tokenizer.decode(GREEDY_IDS) == " Paris.\n\nThe answer is: 2018-01-22 "
    sample = "Naïve café, 1234 'quotes' we'll 語 🤖\n\n\tdef f(x):  return x"
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_chat(tokenizer: Tokenizer) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert tokenizer.eos_ids == {0, 2}
