"""Small tunix decoders with random weights, and a run of one over its own caches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.calls import QUICKLY

REASON = "google-tunix is not installed; constraints/clients.txt has the versions to test with"
pytest.importorskip("tunix", reason=REASON)

with warnings.catch_warnings():  # of deprecated imports
    warnings.simplefilter("ignore")
    from tunix.models.gemma import model as gemma
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

VOCAB, WIDTH, HEADS, HEAD_DIM, WINDOW = 64, 32, 6, 8, 5

# tunix uses what Flax has deprecated, and mixes integers with floats.
DEPRECATED = "ignore::DeprecationWarning"


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


def random_weights(model: nnx.Module, dtype: Any = jnp.float32) -> nnx.Module:
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), dtype), nnx.state(model)
    )
    nnx.update(model, state)
    return model


def tiny_llama3(**options: Any) -> nnx.Module:
    config = llama3.ModelConfig(**_llama_sizes() | options)
    return random_weights(llama3.Llama3(config, rngs=nnx.Rngs(0)))


def tiny_qwen3(**options: Any) -> nnx.Module:
    config = qwen3.ModelConfig(**_llama_sizes() | options)
    return random_weights(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


def _llama_sizes() -> dict[str, Any]:
    return {
        **{"num_layers": 1, "vocab_size": VOCAB, "embed_dim": WIDTH, "hidden_dim": 48},
        **{"num_heads": HEADS, "head_dim": HEAD_DIM, "num_kv_heads": 2},
        **{"rope_theta": 1_000_000, "norm_eps": 1e-5},
    }


def tiny_gemma(*, num_kv_heads: int = 2, soft_cap: float | None = 1.5) -> nnx.Module:
    """A sliding and a full layer, as Gemma 2; one KV head and no soft cap would be Gemma 1."""
    config = gemma.ModelConfig(
        **_gemma_sizes(num_kv_heads, num_layers=2),
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
        attn_logits_soft_cap=soft_cap,
    )
    return random_weights(gemma.Gemma(config, rngs=nnx.Rngs(0)))


def tiny_gemma3() -> nnx.Module:
    """One sliding layer: the first five of six are."""
    sizes = _gemma_sizes(2, num_layers=1)
    config = gemma3.ModelConfig(**sizes, param_dtype=jnp.float32)
    return random_weights(gemma3.Gemma3(config, rngs=nnx.Rngs(0)))


def _gemma_sizes(num_kv_heads: int, num_layers: int) -> dict[str, Any]:
    return {
        **{"num_layers": num_layers, "num_embed": VOCAB, "embed_dim": WIDTH, "hidden_dim": 48},
        **{"num_heads": HEADS, "head_dim": HEAD_DIM, "num_kv_heads": num_kv_heads},
        "sliding_window_size": WINDOW,
    }


class Run(NamedTuple):
    """Logits of all tokens `[B, total, V]`, and the caches after the last."""

    logits: np.ndarray
    caches: Any


def new_caches(
    layers: int, batch: int, slots: int, num_kv_heads: int, dtype: Any, head_dim: int = HEAD_DIM
) -> Any:
    """Empty caches as tunix's sampler makes them."""
    shape = (batch, slots, num_kv_heads, head_dim)
    return {
        f"layer_{i}": {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "end_index": jnp.zeros(batch, jnp.int32),
        }
        for i in range(layers)
    }


def run(
    model: nnx.Module,
    tokens: np.ndarray,
    chunks: Sequence[int],
    *,
    slots: int,
    padding: Sequence[int] = (0, 0),
    dtype: Any = jnp.float32,
) -> Run:
    """Calls the model chunk after chunk, as tunix's sampler would; one program a chunk size.

    Args:
        model: the model, swapped or not.
        tokens: `[B, total]`, left-padded.
        chunks: tokens of each call.
        slots: of the caches; with fewer than tokens they are rings, and only the last are seen.
        padding: of each row.
        dtype: of the caches.
    """
    graphdef, state = nnx.split(model)

    def call(state: Any, *arguments: Any) -> Any:
        return nnx.merge(graphdef, state)(*arguments)

    step = jax.jit(call, compiler_options=QUICKLY)
    batch, pads = len(tokens), np.asarray(padding[: len(tokens)])
    config = model.config
    caches = new_caches(config.num_layers, batch, slots, config.num_kv_heads, dtype)
    logits, at = [], 0
    for size in chunks:
        queries = at + np.arange(size)
        positions = np.maximum(queries - pads[:, None], 0)
        held = at + size - 1 - (at + size - 1 - np.arange(slots)) % slots
        seen = (held <= queries[:, None]) & (held >= pads[:, None, None])
        out, caches = step(state, tokens[:, at : at + size], positions, caches, seen)
        logits.append(np.asarray(out, np.float32))
        at += size
    return Run(np.concatenate(logits, axis=1), caches)


def random_tokens(batch: int, total: int) -> np.ndarray:
    return np.random.default_rng(1).integers(1, VOCAB, (batch, total))
