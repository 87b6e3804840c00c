"""The compiled steps: for Neuron, in place, at a cost that follows the live tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg import KVCache, PagedKVCache, RingKVCache, neuron
from jax_tkg.sampling import RowSelection
from jax_tkg.serving import ServingConfig, programs
from jax_tkg.serving.rows import decode_arrays, prefill_arrays
from tests.compiling import AS_USERS
from tests.generation.tiny_model import HEAD_DIM, HEADS, VOCAB, pytree_of_its_own
from tests.hlo import cache_copies
from tests.serving.tiny import CONFIG, MODEL, SAMPLED

# Pages that are large beside everything else.
LARGE = replace(CONFIG, page_len=64, num_pages=2048, pages_per_sequence=256)
PLAIN = replace(LARGE, top_log_probs=0, max_eos_ids=0)
GREEDY_ROWS, SAMPLED_ROWS = False, True


def decode_with(config: ServingConfig) -> Any:
    return partial(programs.decode, num_steps=config.steps_per_call, top=config.top_log_probs)


# Neuron


@pytest.mark.parametrize("sampled", [GREEDY_ROWS, SAMPLED_ROWS])
@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["small", "large"])
def test_neuron_can_run_the_decode_call(config: ServingConfig, sampled: bool) -> None:
    pools = programs.make_pools(MODEL, config, {"dtype": jnp.int8})
    assert (
        neuron.check(decode_with(config), MODEL, pools, decode_arrays([], config, sampled=sampled))
        == ()
    )


@pytest.mark.parametrize("config", [CONFIG, LARGE], ids=["small", "large"])
def test_neuron_can_run_the_prefill_call(config: ServingConfig) -> None:
    pools = programs.make_pools(MODEL, config, {"dtype": jnp.int8})
    assert neuron.check(programs.prefill, MODEL, pools, **prefill_arrays({}, config)) == ()


def test_neuron_can_choose_first_tokens() -> None:
    selection, words = RowSelection.of([SAMPLED.selector]), np.zeros((1, 4), np.uint32)
    first = partial(programs.first_tokens, top=3)
    assert neuron.check(first, jnp.zeros((1, VOCAB)), selection, words) == ()


def test_what_neuron_cannot_run_would_be_found() -> None:
    @pytree_of_its_own
    class Argmax(type(MODEL)):  # type: ignore[misc]
        def next_token_logits(self, *arguments: Any) -> Any:
            logits, caches = super().next_token_logits(*arguments)
            return logits + jnp.argmax(logits, axis=-1).astype(jnp.float32)[:, None], caches

    model = Argmax(MODEL.embed, MODEL.layers, MODEL.output)
    pools = programs.make_pools(model, CONFIG, {})
    assert neuron.check(decode_with(CONFIG), model, pools, decode_arrays([], CONFIG))


# In place


def test_the_decode_call_copies_no_page() -> None:
    pools = programs.make_pools(MODEL, LARGE, {"dtype": "bfloat16"})
    compiled = programs.decode.lower(MODEL, pools, decode_arrays([], LARGE), num_steps=3, top=0)
    assert cache_copies(compiled.compile(AS_USERS), pools) == []


def test_nor_does_the_prefill_call() -> None:
    pools = programs.make_pools(MODEL, LARGE, {"dtype": "bfloat16"})
    compiled = programs.prefill.lower(MODEL, pools, **prefill_arrays({}, LARGE)).compile(AS_USERS)
    assert cache_copies(compiled, pools) == []


def test_a_missing_donation_is_found() -> None:
    pools = programs.make_pools(MODEL, LARGE, {"dtype": "bfloat16"})
    compiled = jax.jit(programs.prefill.__wrapped__).lower(
        MODEL, pools, **prefill_arrays({}, LARGE)
    )
    assert "copy" in cache_copies(compiled.compile(AS_USERS), pools)


# What it costs


def test_attention_stops_at_the_live_length() -> None:
    """The cost follows the tokens of each row, not what its page table could hold."""
    pools = programs.make_pools(MODEL, LARGE, {})
    arrays = prefill_arrays({}, LARGE)
    cache = programs.bound(pools, *(jnp.asarray(arrays[x]) for x in ("table", "lengths")))[0]
    query = jax.ShapeDtypeStruct((1, 1, HEADS, HEAD_DIM), jnp.float32)
    assert "each row to its own length" in str(jax_tkg.explain(query, cache))


# Models


def test_caches_of_every_dtype_and_scale_become_pages() -> None:
    options = {"dtype": jnp.int8, "k_scale": 0.5, "v_scale": jnp.array([1.0, 2.0])}
    pools = programs.make_pools(MODEL, CONFIG, options)
    dense = MODEL.init_caches(1, 4, **options)
    for pages, cache in zip(pools, dense, strict=True):
        assert isinstance(pages, KVCache)
        assert pages.kv.key.shape == (16, 2, 4, HEAD_DIM)
        assert pages.kv.dtype == cache.kv.dtype == np.int8
        np.testing.assert_array_equal(pages.kv.v_scale, [[1.0, 2.0]])


@pytest.mark.parametrize(
    ("caches", "kind"),
    [
        (RingKVCache.create(1, 8, 2, 16), "RingKVCache"),
        ((KVCache.create(1, 8, 2, 16), {"end": jnp.zeros(1)}), "ArrayImpl"),
        (PagedKVCache.create(1, 8, 4, 2, 2, 16), "Paged"),
    ],
    ids=["ring", "array", "paged"],
)
def test_a_model_with_other_caches_is_refused(caches: Any, kind: str) -> None:
    class Other(type(MODEL)):  # type: ignore[misc]
        def init_caches(self, *_: Any, **__: Any) -> Any:
            return caches

    model = Other(MODEL.embed, MODEL.layers, MODEL.output)
    with pytest.raises(TypeError, match=f"makes a {kind}; paging needs"):
        programs.make_pools(model, CONFIG, {})


def test_the_model_is_asked_for_the_longest_request() -> None:
    class Short(type(MODEL)):  # type: ignore[misc]
        def init_caches(self, batch: int, capacity: int, **_: Any) -> Any:
            raise ValueError(f"no positions for {batch} x {capacity}")

    model = Short(MODEL.embed, MODEL.layers, MODEL.output)
    with pytest.raises(ValueError, match="no positions for 1 x 48"):
        programs.make_pools(model, CONFIG, {})
