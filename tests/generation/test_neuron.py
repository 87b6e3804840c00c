"""What generation compiles, lowered for Neuron: it must contain nothing that Neuron cannot run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_tkg import Greedy, Sample, TokenSelector
from jax_tkg.generation import DecodeState, TokenPolicy, decode, portable_key, prefill_chunk
from jax_tkg.neuron import check_module
from tests.generation.tiny_model import LAYERS, VOCAB, TinyModel
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
