"""SmolLM2 in tunix's Llama3: the same logits and text before and after the swap."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_tkg
from jax_tkg.flax_layers.swap import TunixDecoder, swap_nnx, tunix_llama3_from_gguf
from jax_tkg.models import read_gguf, smollm2_path
from tests.clients import tunix_models as tunix
from tests.clients.tunix_models import standard_promotion  # noqa: F401

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings(tunix.DEPRECATED)]

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
GREEDY = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]
GREEDY += [32, 33, 40, 29, 32, 33, 29, 34, 34, 216]  # the same from several implementations
SHORT = PROMPT[:3]


def greedy(model, count):
    """Logits `[count, 2, V]` and ids `[2, count]` of a left-padded batch."""
    graphdef, state = nnx.split(model)
    pads = np.asarray([0, len(PROMPT) - len(SHORT)])
    slots = len(PROMPT) + count

    @functools.partial(jax.jit, donate_argnums=2)
    def step(state, tokens, caches, at):
        queries = at + jnp.arange(tokens.shape[1])
        seen = (jnp.arange(slots) <= queries[:, None]) & (jnp.arange(slots) >= pads[:, None, None])
        positions = jnp.maximum(queries - pads[:, None], 0)
        logits, caches = nnx.merge(graphdef, state)(tokens, positions, caches, seen)
        return logits[:, -1], caches

    config = model.config
    heads, width = config.num_kv_heads, config.head_dim
    caches = tunix.new_caches(config.num_layers, 2, slots, heads, jnp.float32, width)
    tokens, at, logits = jnp.asarray([PROMPT, [0, 0, *SHORT]]), 0, []
    for _ in range(count):
        out, caches = step(state, tokens, caches, jnp.asarray(at))
        at += tokens.shape[1]
        tokens = jnp.argmax(out, axis=-1)[:, None]
        logits.append(np.asarray(out))
    return np.stack(logits), np.argmax(logits, axis=-1).T


def test_same_logits_and_text(monkeypatch):
    gguf = read_gguf(smollm2_path())
    model = tunix_llama3_from_gguf(gguf)
    base = model.config.rope_theta
    patched = functools.partial(tunix.llama3.apply_rope, rope_theta=base)
    monkeypatch.setattr(tunix.llama3, "apply_rope", patched)
    logits, ids = greedy(model, len(GREEDY))
    assert ids[0].tolist() == GREEDY
    swap = swap_nnx(model, layers=30)
    ours, our_ids = greedy(model, len(GREEDY))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4)
    assert our_ids.tolist() == ids.tolist()
    # In our own loop, where rows have lengths instead of padding.
    made = jax_tkg.generate(TunixDecoder.of(model), [PROMPT, SHORT], max_new_tokens=len(GREEDY))
    assert made.tokens.tolist() == ids.tolist()
    assert len(swap.report) == 30
