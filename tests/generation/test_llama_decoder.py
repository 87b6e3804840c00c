"""Generation from the Flax decoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_tkg import Greedy, RingKVCache, RotaryEmbedding, generate
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder
from jax_tkg.generation import (
    DecodeState,
    DraftModel,
    PromptLookup,
    TokenPolicy,
    as_pytree,
    decode,
)
from tests.compiling import AS_USERS
from tests.hlo import cache_copies

VOCAB, WIDTH, COUNT, CHUNK, WINDOW, DRAFTED = 61, 48, 9, 8, 6, 3
PROMPTS = [[5], list(range(20, 45)), [7, 8, 9, 10]]


def make_decoder(seed: int = 0) -> LlamaDecoder:
    attention = AttentionConfig(
        model_dim=WIDTH, num_heads=6, num_kv_heads=2, head_dim=8, rope=RotaryEmbedding(base=500.0)
    )
    config = DecoderConfig(
        vocab_size=VOCAB,
        num_layers=2,
        mlp_dim=64,
        attention=attention,
        tie_embeddings=False,
        layer_windows=(WINDOW, None),
    )
    return LlamaDecoder(config, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def decoder() -> LlamaDecoder:
    return make_decoder()


def test_tokens_are_the_most_likely_of_one_whole_pass(decoder: LlamaDecoder) -> None:
    tokens = generate(decoder, PROMPTS, max_new_tokens=COUNT, prefill_chunk=CHUNK).tokens
    whole = np.zeros((len(PROMPTS), 64), np.int32)
    for row, prompt, new in zip(whole, PROMPTS, tokens, strict=True):
        row[: len(prompt) + COUNT] = [*prompt, *new]
    forward = nnx.jit(lambda decoder, *args: decoder(*args)[0])
    logits = forward(decoder, jnp.asarray(whole), decoder.init_caches(len(PROMPTS), 64))
    for row, prompt, new in zip(np.asarray(logits), PROMPTS, tokens, strict=True):
        start = len(prompt) - 1
        assert row[start : start + COUNT].argmax(-1).tolist() == new.tolist()
    assert len(set(tokens.ravel().tolist())) > 6


def test_rings_hold_what_windows_need(decoder: LlamaDecoder) -> None:
    options = {"ring_chunk": CHUNK}
    caches = decoder.init_caches(1, 64, **options)
    assert isinstance(caches[0], RingKVCache)
    assert caches[0].capacity < 16
    expected = generate(decoder, PROMPTS, max_new_tokens=30, prefill_chunk=CHUNK)
    result = generate(
        decoder, PROMPTS, max_new_tokens=30, prefill_chunk=CHUNK, cache_options=options
    )
    np.testing.assert_array_equal(result.tokens, expected.tokens)


@pytest.mark.usefixtures("compile_quickly")
def test_rings_forget_rejected_drafts(decoder: LlamaDecoder) -> None:
    expected = generate(decoder, PROMPTS, max_new_tokens=30, prefill_chunk=CHUNK)
    # The smallest rings that the window allows with four tokens a step.
    options = {"prefill_chunk": DRAFTED + 1, "cache_options": {"ring_chunk": DRAFTED + 1}}
    draft_model = DraftModel(make_decoder(seed=1), DRAFTED, options["cache_options"])
    for drafter in (PromptLookup(DRAFTED), draft_model):
        result = generate(decoder, PROMPTS, max_new_tokens=30, speculate=drafter, **options)
        np.testing.assert_array_equal(result.tokens, expected.tokens)
        assert result.acceptance is not None
        accepted, drafted = result.acceptance.accepted.sum(), result.acceptance.drafted.sum()
        assert 0 < accepted < drafted


def test_rings_that_are_too_small_are_refused(decoder: LlamaDecoder) -> None:
    options = {"prefill_chunk": 2, "cache_options": {"ring_chunk": 2}}
    with pytest.raises(ValueError, match="too small for 4 new tokens with a sliding window"):
        generate(decoder, PROMPTS, max_new_tokens=5, speculate=PromptLookup(DRAFTED), **options)


def test_weights_are_arguments_of_the_loop(decoder: LlamaDecoder) -> None:
    options = {"max_new_tokens": COUNT, "prefill_chunk": CHUNK}
    before = generate(decoder, PROMPTS, **options).tokens
    compiled = decode._cache_size()
    changed = nnx.clone(decoder)
    nnx.update(changed, nnx.state(make_decoder(seed=1)))
    after = generate(changed, PROMPTS, **options).tokens
    assert (after != before).any()
    assert decode._cache_size() == compiled
    np.testing.assert_array_equal(generate(decoder, PROMPTS, **options).tokens, before)


def test_as_a_pytree(decoder: LlamaDecoder) -> None:
    model = as_pytree(decoder)
    leaves = jax.tree.leaves(model)
    assert sum(leaf.size for leaf in leaves) == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(decoder))
    )
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.state = None  # type: ignore[misc]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_loop_copies_no_cache(decoder: LlamaDecoder, dtype: str) -> None:
    policy = TokenPolicy(Greedy())
    caches = decoder.init_caches(2, 1 << 16, dtype=dtype)
    state = DecodeState.start(caches, jnp.zeros((2, VOCAB)), policy=policy)
    lowered = decode.lower(as_pytree(decoder), state, policy=policy, num_steps=3)
    assert cache_copies(lowered.compile(AS_USERS), caches) == []
