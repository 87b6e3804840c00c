"""The compiled loop updates donated caches in place; loops that do not are found."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_tkg import Greedy
from jax_tkg.generation import (
    DecodeState,
    DraftModel,
    PromptLookup,
    SpeculativeState,
    TokenPolicy,
    decode,
    decode_speculatively,
    prefill_chunk,
)
from jax_tkg.generation.prompts import pad_prompts
from tests.compiling import AS_USERS
from tests.generation.tiny_model import HEAD_DIM, KV_HEADS, VOCAB, TinyModel
from tests.hlo import cache_copies

DTYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"]
BATCH, CAPACITY, CHUNK = 2, 1 << 15, 16
POLICY = TokenPolicy(Greedy(), eos_ids=(1,))


def start(**cache_options: Any) -> tuple[TinyModel, DecodeState]:
    model = TinyModel.random()
    caches = model.init_caches(BATCH, CAPACITY, **cache_options)
    return model, DecodeState.start(caches, jnp.zeros((BATCH, VOCAB)), policy=POLICY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decode_loop_copies_no_cache(dtype: str) -> None:
    model, state = start(dtype=dtype)
    compiled = decode.lower(model, state, policy=POLICY, num_steps=3).compile(AS_USERS)
    assert cache_copies(compiled, state.caches) == []


@pytest.mark.parametrize("layout", ["BSKH", "BKHS"])
def test_nor_in_another_layout(layout: str) -> None:
    model, state = start(dtype=jnp.bfloat16, layout=layout)
    compiled = decode.lower(model, state, policy=POLICY, num_steps=3).compile(AS_USERS)
    assert cache_copies(compiled, state.caches) == []


def test_nor_does_the_prefill() -> None:
    model, state = start(dtype=jnp.bfloat16)
    tokens, counts = jnp.zeros((BATCH, CHUNK), jnp.int32), jnp.zeros(BATCH, jnp.int32)
    compiled = prefill_chunk.lower(model, state.caches, tokens, counts).compile(AS_USERS)
    assert cache_copies(compiled, state.caches) == []


@pytest.mark.parametrize("by_model", [False, True], ids=["lookup", "model"])
def test_nor_does_the_speculative_loop(by_model: bool) -> None:
    options = {"dtype": jnp.bfloat16}
    model, first = start(**options)
    prompts = pad_prompts([[1, 2]] * BATCH, None)
    drafter = DraftModel(model, 2, options) if by_model else PromptLookup(2)
    drafting = drafter.start(prompts, CAPACITY, CHUNK)
    state = SpeculativeState.start(first, drafting, prompts, capacity=CAPACITY, max_new_tokens=9)
    compiled = decode_speculatively.lower(model, drafter, state, policy=POLICY, num_steps=3)
    assert cache_copies(compiled.compile(AS_USERS), (state.caches, state.drafting)) == []


# Twins: loops that write one slot of a plain array in each step.

CACHE = jnp.zeros((BATCH, KV_HEADS, CAPACITY, HEAD_DIM))
FP8_CACHE = CACHE.astype(jnp.float8_e5m2)
STACK = jnp.stack([CACHE, CACHE])
SLOT, NEW = jnp.int32(5), jnp.ones((BATCH, KV_HEADS, 1, HEAD_DIM))


def write(cache: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, NEW.astype(cache.dtype), slot, axis=2)


def write_by_mask(cache: jax.Array, slot: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(CAPACITY) == slot)[:, None], NEW, cache)


def read_then_write(
    carry: tuple[jax.Array, jax.Array], slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    cache, total = carry
    before = jax.lax.dynamic_slice_in_dim(cache, slot - 1, 3, axis=2)
    return write(cache, slot), total + jnp.sum(before)


def write_in_stack(stack: jax.Array, slot: jax.Array) -> jax.Array:
    layer = slot % 2
    return stack.at[layer].set(write(stack[layer], slot))


def copies_in_loop(step: Any, carry: Any, *, donated: bool = True) -> list[str]:
    loop = jax.jit(
        lambda carry, slot: jax.lax.fori_loop(0, 4, lambda i, c: step(c, slot + i), carry),
        donate_argnums=0 if donated else (),
    )
    one_layer = jax.ShapeDtypeStruct(CACHE.shape, jax.tree.leaves(carry)[0].dtype)
    return cache_copies(loop.lower(carry, SLOT).compile(AS_USERS), one_layer)


def test_a_plain_update_passes() -> None:
    assert copies_in_loop(write, CACHE) == []


@pytest.mark.parametrize(
    ("step", "carry", "sign"),
    [
        (write_by_mask, CACHE, "select"),
        (read_then_write, (CACHE, jnp.zeros(())), "copy"),
        (write, FP8_CACHE, "convert"),
        (write_in_stack, STACK, "temporary bytes"),
    ],
    ids=["mask", "read-first", "narrow-float", "stack"],
)
def test_a_step_that_copies_is_found(step: Any, carry: Any, sign: str) -> None:
    assert any(sign in reason for reason in copies_in_loop(step, carry))


def test_a_missing_donation_is_found() -> None:
    assert copies_in_loop(write, CACHE, donated=False) == ["copy"]
    model, state = start()
    loop = jax.jit(partial(decode.__wrapped__, policy=POLICY, num_steps=3))
    assert "copy" in cache_copies(loop.lower(model, state).compile(AS_USERS), state.caches)
