"""What generation compiles, lowered for Neuron: it must contain nothing that Neuron cannot run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_tkg import Greedy, Sample, TokenSelector
from jax_tkg.generation import (
    DecodeState,
    DraftModel,
    PromptLookup,
    SpeculativeState,
    TokenPolicy,
    decode,
    decode_scored,
    decode_speculatively,
    portable_key,
    prefill_chunk,
)
from jax_tkg.generation.prompts import pad_prompts
from jax_tkg.neuron import check_module
from tests.generation.tiny_model import LAYERS, VOCAB, PagedModel, TinyModel
from tests.lowered import lower_for_neuron, operations

SELECTORS = [Greedy(), Sample(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05)]
# The scores of the long one are computed in tiles.
CAPACITIES = [256, 1 << 18]
BATCH, CHUNK = 3, 16


def lowered(selector: TokenSelector, capacity: int, key: Any = None) -> Any:
    """The decode loop."""
    model, policy = TinyModel.random(), TokenPolicy(selector, eos_ids=(0, 2))
    caches = model.init_caches(BATCH, capacity, dtype=jnp.int8)
    state = DecodeState.start(caches, jnp.zeros((BATCH, VOCAB)), key, policy=policy)
    return lower_for_neuron(decode, model, state, key, policy=policy, num_steps=7)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("selector", SELECTORS, ids=["greedy", "sample"])
def test_neuron_can_run_the_decode_loop(selector: TokenSelector, capacity: int) -> None:
    program = lowered(selector, capacity, portable_key(jax.random.key(0)))
    assert check_module(program) == ()
    assert operations(program)["stablehlo.dynamic_update_slice"] >= 2


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_neuron_can_run_the_prefill(capacity: int) -> None:
    model = TinyModel.random()
    caches = model.init_caches(BATCH, capacity, dtype=jnp.int8)
    tokens, counts = jnp.zeros((BATCH, CHUNK), jnp.int32), jnp.zeros(BATCH, jnp.int32)
    program = lower_for_neuron(prefill_chunk, model, caches, tokens, counts)
    assert check_module(program) == ()
    assert operations(program)["stablehlo.dynamic_update_slice"] >= 2


@pytest.mark.parametrize("selector", SELECTORS, ids=["greedy", "sample"])
def test_neuron_can_choose_the_first_tokens(selector: TokenSelector) -> None:
    def start(logits: jax.Array, key: jax.Array) -> DecodeState:
        return DecodeState.start((), logits, key, policy=TokenPolicy(selector, (0, 2)))

    program = lower_for_neuron(start, jnp.zeros((BATCH, VOCAB)), portable_key(jax.random.key(0)))
    assert check_module(program) == ()


DRAFTERS = [PromptLookup(max_tokens=3), DraftModel(TinyModel.random(seed=1), max_tokens=3)]


def speculation(drafter: Any, selector: TokenSelector, model: TinyModel, **options: Any) -> Any:
    """The speculative loop."""
    key = portable_key(jax.random.key(0)) if selector.needs_key else None
    policy, prompts = TokenPolicy(selector, eos_ids=(0, 2)), pad_prompts([[1, 2]] * BATCH, None)
    first = DecodeState.start(
        model.init_caches(BATCH, 256), jnp.zeros((BATCH, VOCAB)), key, policy=policy
    )
    drafting = drafter.start(prompts, 256, CHUNK)
    state = SpeculativeState.start(first, drafting, prompts, capacity=256, max_new_tokens=9)
    static = {"policy": policy, "num_steps": 7, **options}
    return lower_for_neuron(decode_speculatively, model, drafter, state, key, **static)


@pytest.mark.parametrize("drafter", DRAFTERS, ids=["lookup", "model"])
@pytest.mark.parametrize("selector", SELECTORS, ids=["greedy", "sample"])
def test_neuron_can_run_the_speculative_loop(drafter: Any, selector: TokenSelector) -> None:
    program = speculation(drafter, selector, TinyModel.random(), with_log_probs=True)
    assert check_module(program) == ()
    assert operations(program)["stablehlo.dynamic_update_slice"] >= 2
    caches = LAYERS if drafter is DRAFTERS[0] else 2 * LAYERS
    assert program.as_text().count("tf.aliasing_output") >= 2 * caches


def test_neuron_can_give_pages_back() -> None:
    model = TinyModel.random()
    program = speculation(
        DRAFTERS[0], Greedy(), PagedModel(model.embed, model.layers, model.output)
    )
    assert check_module(program) == ()


@jax.tree_util.register_static
class Sorting(PromptLookup):
    """A drafter that Neuron cannot run."""

    def draft(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
        return super().draft(jnp.argsort(tokens, axis=1), *args, **kwargs)


def test_a_drafter_that_sorts_is_found() -> None:
    program = speculation(Sorting(max_tokens=3), Greedy(), TinyModel.random())
    assert {x.rule for x in check_module(program)} == {"multi-operand-sort"}


def test_neuron_can_compute_log_probs() -> None:
    model, policy = TinyModel.random(), TokenPolicy(Greedy())
    caches = model.init_caches(BATCH, 256)
    state = DecodeState.start(caches, jnp.zeros((BATCH, VOCAB)), policy=policy)
    program = lower_for_neuron(decode_scored, model, state, policy=policy, num_steps=7)
    assert check_module(program) == ()


def test_a_long_cache_is_read_in_a_loop_within_the_loop() -> None:
    short, long = (
        operations(lowered(Greedy(), capacity))["stablehlo.while"] for capacity in CAPACITIES
    )
    assert 0 < short < long


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_other_keys_would_bring_threefry(impl: str) -> None:
    program = lowered(SELECTORS[1], CAPACITIES[0], jax.random.key(0, impl=impl))
    assert {x.rule for x in check_module(program)} == {"threefry"}


def test_caches_are_donated() -> None:
    text = lowered(Greedy(), CAPACITIES[0]).as_text()
    assert text.count("tf.aliasing_output") >= 2 * LAYERS
