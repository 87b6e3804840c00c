"""`swap_nnx` on small decoders of tunix: the same outputs as tunix's own attention, or better."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_tkg
from jax_tkg.flax_layers.swap import SwapError, SwapWarning, TunixDecoder, restore_nnx, swap_nnx
from jax_tkg.flax_layers.swap.adapters.tunix_attention import Logits, attend
from tests import hlo
from tests.calls import QUICKLY
from tests.clients import tunix_models as tunix
from tests.clients.tunix_models import run, standard_promotion  # noqa: F401

pytestmark = pytest.mark.filterwarnings(tunix.DEPRECATED)

# Which tokens come together: a prompt, a few, one. Every size is a program to compile, twice.
FAMILIES = {
    "llama3": (tunix.tiny_llama3, (64, 4, 1)),
    "qwen3": (tunix.tiny_qwen3, (20, 1)),
    "gemma": (tunix.tiny_gemma, (20, 4)),
    "gemma, one matrix": (functools.partial(tunix.tiny_gemma, num_kv_heads=tunix.HEADS), (4,)),
    # tunix is wrong with several tokens behind cached ones: see the test of windows.
    "gemma3": (tunix.tiny_gemma3, (20, 1)),
}


def swapped(model, **options):
    """The model, swapped; its warnings are looked at elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SwapWarning)
        return swap_nnx(model, **options)


def assert_close(given, expected):
    assert np.abs(expected).max() > 0.5  # so that there is something to be wrong about
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_outputs_and_caches(family):
    make, chunks = FAMILIES[family]
    model, pads = make(), (0, 0) if family.startswith("gemma") else (0, 7)
    tokens = tunix.random_tokens(2, sum(chunks))
    before = run(model, tokens, chunks, slots=80, padding=pads)
    swap = swapped(model, layers=model.config.num_layers)
    after = run(model, tokens, chunks, slots=80, padding=pads)
    for row, pad in enumerate(pads):
        assert_close(after.logits[row, pad:], before.logits[row, pad:])
    if not any(pads):
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
        jax.tree.map(close, after.caches, before.caches)
    assert swap.restore() is None
    assert "Swapped" not in str(nnx.graphdef(model))


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
def test_windows_count_from_the_query(family):
    """Padded and in chunks a row is as alone, at once, in tunix itself; there it is not."""
    model, pad = FAMILIES[family][0](), 7
    tokens = tunix.random_tokens(1, 24)
    alone = run(model, tokens, (24,), slots=24).logits
    padded = np.concatenate([np.zeros((1, pad), tokens.dtype), tokens], axis=1)
    chunks = (27, 4)
    original = run(model, padded, chunks, slots=32, padding=(pad,)).logits[:, pad:]
    assert np.abs(original - alone).max() > 0.1  # what the warning says
    with pytest.warns(SwapWarning, match="misplaces sliding windows"):
        swap_nnx(model)
    assert_close(run(model, padded, chunks, slots=32, padding=(pad,)).logits[:, pad:], alone)


def test_ring_that_wraps():
    model, slots = tunix.tiny_llama3(), 8
    tokens, chunks = tunix.random_tokens(2, 20), (4,) * 5
    before = run(model, tokens, chunks, slots=slots, padding=(0, 2))
    swapped(model)
    after = run(model, tokens, chunks, slots=slots, padding=(0, 2))
    assert_close(after.logits[:, 2:], before.logits[:, 2:])
    assert after.caches["layer_0"]["end_index"].tolist() == [20, 20]


def test_sliding_window_in_a_ring_that_wraps():
    model = tunix.tiny_gemma3()
    tokens = tunix.random_tokens(1, 24)
    swapped(model)
    alone = run(model, tokens, (24,), slots=24).logits
    ring = run(model, tokens, (1,) * 24, slots=8)
    assert_close(ring.logits, alone)


@pytest.mark.parametrize("remat", [tunix.llama3.RematConfig.NONE, tunix.llama3.RematConfig.BLOCK])
def test_without_a_cache_and_with_remat(remat):
    model = tunix.tiny_llama3(remat_config=remat)
    tokens = jnp.asarray(tunix.random_tokens(2, 20))
    arguments = (tokens, jnp.broadcast_to(jnp.arange(20), (2, 20)), None)
    mask = jnp.broadcast_to(jnp.tri(20, dtype=bool), (2, 20, 20))

    def call(mask):
        graphdef, state = nnx.split(model)
        step = jax.jit(
            lambda state: nnx.merge(graphdef, state)(*arguments, mask)[0], compiler_options=QUICKLY
        )
        return step(state), str(step.trace(state).jaxpr)

    before, program = call(mask)
    with swapped(model) as swap:
        after, ours = call(mask)
        graphdef, state = nnx.split(model)
        step = jax.jit(lambda state: nnx.merge(graphdef, state)(*arguments, None)[0])
        assert swap.require_in(step, state) == 1  # without a mask too
    assert_close(after, before)
    assert ("prevent_cse" in ours) == ("prevent_cse" in program) == (remat.name != "NONE")


def test_bfloat16_is_no_further_from_float32():
    tokens, chunks = tunix.random_tokens(2, 20), (20,)
    model = tunix.tiny_llama3()
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    before = run(model, tokens, chunks, slots=32, dtype=jnp.bfloat16).logits
    swapped(model)
    after = run(model, tokens, chunks, slots=32, dtype=jnp.bfloat16)
    restore_nnx(model)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    exact = run(model, tokens, chunks, slots=32).logits
    errors = [np.sqrt(np.mean((x - exact) ** 2)) for x in (before, after.logits)]
    assert 0 < errors[1] < 1.25 * errors[0]
    assert after.caches["layer_0"]["k"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_caches_are_updated_in_place(dtype):
    """One decode step, donated: ours moves no array of a cache's size, tunix's does."""
    S = 4096
    layer = {name: jnp.zeros((1, S, 3, 64), dtype) for name in "kv"}
    caches = [{**layer, "end_index": jnp.zeros(1, jnp.int32)} for _ in range(2)]
    query, new = jnp.ones((1, 1, 9, 64), dtype), jnp.ones((1, 1, 3, 64), dtype)
    mask = jnp.ones((1, 1, S), bool)

    def ours(caches, query):
        out = []
        for cache in caches:
            query, cache = attend(query, new, new, cache, mask, Logits(0.125))
            out.append(cache)
        return query, out

    compiled = jax.jit(ours, donate_argnums=0).lower(caches, query).compile()
    # The bits of bfloat16 are those of an integer: that is part of the update and of the slices.
    assert set(hlo.cache_copies(compiled, caches)) <= {"bitcast-convert"}


def test_tunix_itself_copies_its_caches():
    """The twin: the detector finds what tunix does."""
    model = tunix.tiny_llama3()
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda s, c, *a: nnx.merge(graphdef, s)(a[0], a[1], c, a[2]), donate_argnums=1)
    caches = tunix.new_caches(1, 1, 4096, 2, jnp.float32)
    arguments = (jnp.ones((1, 1), int), jnp.ones((1, 1), int), jnp.ones((1, 1, 4096), bool))
    assert hlo.cache_copies(step.lower(state, caches, *arguments).compile(), caches)


def test_rope_base_that_is_ignored_is_warned_of():
    model = tunix.tiny_llama3(rope_theta=500_000)
    with pytest.warns(SwapWarning, match="ignores config.rope_theta, which is 500000"):
        swap_nnx(model)


def test_rope_base_that_is_set_right_is_not(monkeypatch):
    patched = functools.partial(tunix.llama3.apply_rope, rope_theta=500_000)
    monkeypatch.setattr(tunix.llama3, "apply_rope", patched)
    model, tokens = tunix.tiny_llama3(rope_theta=500_000), tunix.random_tokens(1, 20)
    before = run(model, tokens, (20,), slots=20).logits
    swap_nnx(model)
    assert_close(run(model, tokens, (20,), slots=20).logits, before)


def test_flash_attention_of_qwen3_is_refused():
    model = tunix.tiny_qwen3(use_flash_attention=True)
    with pytest.raises(SwapError, match=r"layers/0/attn .*use_flash_attention is on"):
        swap_nnx(model)


def test_report():
    report = swapped(tunix.tiny_gemma()).report
    sliding, full = report.layers
    assert (sliding.path, full.path) == ("layers/0/attn", "layers/1/attn")
    assert (sliding.num_heads, sliding.num_kv_heads, sliding.head_dim) == (6, 2, 8)
    assert "the last 5 seen" in sliding.cache
    assert "seen" not in full.cache
    assert full.runs[0].problem.logits_soft_cap == 1.5
    assert full.implementations == ("attention_tkg: xla",)
    assert report.adapters == ["tunix_gemma of google-tunix 0.1.7"]


# In our loop


def test_generate():
    """Ragged prompts, chunked: each token is what tunix gives after those before it."""
    model = tunix.tiny_gemma()
    prompts = [tunix.random_tokens(1, 19)[0].tolist(), [7, 8, 9]]
    with swapped(model):
        decoder = TunixDecoder.of(model)
        made = jax_tkg.generate(decoder, prompts, max_new_tokens=6, prefill_chunk=8)
    longest = len(prompts[0]) + 6
    padded = np.zeros((2, longest), int)
    for row, (prompt, new) in enumerate(zip(prompts, made.tokens.tolist(), strict=True)):
        padded[row, : len(prompt) + 6] = prompt + new
    logits = run(model, padded, (longest,), slots=longest).logits
    for row, (prompt, new) in enumerate(zip(prompts, made.tokens.tolist(), strict=True)):
        best = np.argmax(logits[row, len(prompt) - 1 :][:6], axis=-1)
        assert best.tolist() == new


def test_rows_without_new_tokens_stay():
    model = tunix.tiny_llama3()
    swapped(model)
    decoder = TunixDecoder.of(model)
    caches = decoder.init_caches(2, 16, dtype=jnp.bfloat16, layout="BSKH")
    tokens = jnp.asarray(tunix.random_tokens(2, 4))
    step = jax.jit(TunixDecoder.next_token_logits, compiler_options=QUICKLY)
    logits, caches = step(decoder, tokens, caches, jnp.array([4, 2]))
    again, after = step(decoder, tokens, caches, jnp.array([1, 0]))
    assert after["layer_0"].lengths.tolist() == [5, 2]
    assert logits.shape == again.shape == (2, tunix.VOCAB)
    kept, was = (c["layer_0"].kv.key[1] for c in (after, caches))
    np.testing.assert_array_equal(kept, was)


def test_model_that_is_not_swapped_is_refused():
    model = tunix.tiny_llama3()
    with pytest.raises(SwapError, match="layers/0/attn is not swapped; call swap_nnx"):
        TunixDecoder.of(model)
    with pytest.raises(SwapError, match="Linear has no layers with attn modules"):
        TunixDecoder.of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("make", [tunix.tiny_llama3, tunix.tiny_qwen3, tunix.tiny_gemma])
def test_ids_of_another_vocabulary(make):
    """tunix looks such an id up as its last one."""
    model = make()
    swapped(model)
    decoder, size = TunixDecoder.of(model), tunix.VOCAB
    assert decoder.vocab_size == size
    for arguments in ({"prompts": [[1], [size]]}, {"prompts": [[1]], "eos_ids": [size]}):
        with pytest.raises(ValueError, match=rf"has token id {size}, but .* has {size} ids"):
            jax_tkg.generate(decoder, max_new_tokens=1, **arguments)
