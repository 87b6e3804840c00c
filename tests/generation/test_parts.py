"""The compiled parts called directly: what does not fit is one clear error, as from `generate`.

Every case changes one argument of a call that is right; the right ones are traced too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import Greedy, KVCache, RingKVCache, Sample
from jax_tkg.generation import (
    DecodeState,
    DraftModel,
    Drafts,
    PromptLookup,
    SpeculativeState,
    TokenPolicy,
    decode,
    decode_scored,
    decode_speculatively,
    decode_step,
    decode_undrafted,
    generate,
    last_real,
    pad_prompts,
    prefill,
    prefill_chunk,
    speculative_step,
    token_log_probs,
)

pytestmark = pytest.mark.usefixtures("no_shape_checks", "compile_quickly")

B, V, S = 2, 7, 8
GREEDY, SAMPLED = TokenPolicy(Greedy()), TokenPolicy(Sample())
PROMPTS = pad_prompts([[1, 2, 3], [4]], None)


@partial(jax.tree_util.register_dataclass, data_fields=["embed"], meta_fields=["vocab_size"])
@dataclass(frozen=True)
class Last:
    """Its logits are of the newest token; the cache only counts."""

    embed: Any
    vocab_size: int | None = V

    def init_caches(self, batch: int, capacity: int, *, ring: bool = False) -> KVCache:
        return (RingKVCache if ring else KVCache).create(batch, capacity, 1, 1)

    def next_token_logits(self, tokens: Any, cache: Any, counts: Any = None) -> Any:
        logits, cache = self(tokens, cache, counts)
        return last_real(logits, counts), cache

    def __call__(self, tokens: Any, cache: Any, counts: Any = None) -> Any:
        new = jnp.zeros((*tokens.shape, 1, 1))
        return self.embed[tokens], cache.append(new, new, counts)


def model_of(vocab_size: int | None, ids: int = V) -> Last:
    return Last(jnp.eye(ids), vocab_size)


MODEL = model_of(V)


def decoding(batch: int = B) -> DecodeState:
    rows = jnp.zeros(batch, jnp.int32)
    return DecodeState(MODEL.init_caches(batch, S), rows, rows > 0, jnp.int32(1))


def speculating(drafting: Any = ()) -> SpeculativeState:
    return SpeculativeState.start(decoding(), drafting, PROMPTS, capacity=S, max_new_tokens=4)


def chunk(tokens: Any = np.ones((B, 3), np.int32), counts: Any = (3, 1)) -> Any:  # noqa: B008
    return prefill_chunk.eval_shape(MODEL, MODEL.init_caches(B, S), tokens, jnp.array(counts))


def chunks(*pairs: Any, held: int = 0, **options: Any) -> Any:
    cache = MODEL.init_caches(B, S, **options)
    return prefill(MODEL, replace(cache, lengths=cache.lengths + held), pairs)


def block(width: int = 3, counts: Any = (3, 1), ids: int = 1, rows: int = B) -> Any:
    return np.full((rows, width), ids, np.int32), np.array(counts, np.int32)


def plain(loop: Any = decode, model: Any = MODEL, state: Any = None, key: Any = None, **c: Any):
    static = {"policy": GREEDY, "num_steps": 2} | c
    return loop.eval_shape(model, decoding() if state is None else state, key, **static)


def drafted(drafter: Any = PromptLookup(2), model: Any = MODEL, state: Any = None, **c: Any):  # noqa: B008
    static = {"policy": GREEDY, "num_steps": 2} | c
    given = speculating() if state is None else state
    return decode_speculatively.eval_shape(model, drafter, given, **static)


def start(first: Any = None, prompts: Any = PROMPTS, **changes: Any) -> Any:
    sizes = {"capacity": S, "max_new_tokens": 4} | changes
    return SpeculativeState.start(decoding() if first is None else first, (), prompts, **sizes)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wrong:
    """A drafter that gives other shapes than it says."""

    tokens: tuple[int, ...] = (B, 2)
    counts: tuple[int, ...] = (B,)
    log_probs: tuple[int, ...] | None = None
    max_tokens: int = 2

    def start(self, *_: Any) -> tuple[()]:
        return ()

    def draft(self, *_: Any, **__: Any) -> Any:
        tokens, counts = jnp.zeros(self.tokens, jnp.int32), jnp.zeros(self.counts, jnp.int32)
        scores = None if self.log_probs is None else jnp.zeros(self.log_probs)
        return Drafts(tokens, counts, scores), ()


def test_what_is_right_is_traced() -> None:
    assert chunk()[0].shape == (B, V)
    for loop in (decode, decode_scored):
        assert plain(loop)[0].shape == (B, 2)
        assert plain(loop, policy=SAMPLED, key=jax.random.key(0))[0].shape == (B, 2)
    assert plain(decode_undrafted, state=speculating())[0].tokens.shape == (2, B, 1)
    for drafter in (PromptLookup(2), Wrong()):
        assert drafted(drafter)[0].tokens.shape == (2, B, 3)
    sure = Wrong(log_probs=(B, 2, V))
    assert drafted(sure, policy=SAMPLED, key=jax.random.key(0))[0].tokens.shape == (2, B, 3)


def test_a_prompt_may_fill_the_caches() -> None:
    assert chunks(*[block(4, (4, 3))] * 2)[1].lengths.tolist() == [8, 6]
    assert chunks(block(4, (4, 1)), held=4)[1].lengths.tolist() == [8, 5]
    assert chunks(block(9, (9, 9)), ring=True)[1].lengths.tolist() == [9, 9]


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "tokens of one axis": (lambda: chunk(np.ones(B, int)), r"integers \[B, T\] .* got int32 \(2,"),
    "no token": (lambda: chunk(np.ones((B, 0), int)), r"T at least 1.* got int32 \(2, 0\)"),
    "float tokens": (lambda: chunk(np.ones((B, 3))), r"tokens must be integers"),
    "a list": (lambda: chunk([[1], [2]]), r"tokens must be an integer array .* got list"),
    "three rows": (lambda: chunk(np.ones((3, 2), int), (1,) * 3), "has 3 rows and the caches have"),
    "counts": (lambda: chunk(counts=(1, 1, 1)), r"counts must be integers of shape \(2,\)"),
    "too wide": (lambda: chunk(np.ones((B, 9), int)), "cannot append 9 tokens to a cache of 8"),
    "no chunk": (chunks, "given no chunk"),
    "no pair": (lambda: chunks(np.ones((B, 3), int)), "chunk must be a pair .* got ndarray"),
    "no counts": (lambda: chunks((np.ones((B, 3), int), None)), "chunk must be a pair"),
    "listed counts": (lambda: chunks((np.ones((B, 3), int), [3, 1])), "counts must be .* got list"),
    "no chunks": (lambda: prefill(MODEL, MODEL.init_caches(B, S), None), "chunks .* got None"),
    "a late row": (lambda: chunks(block(3, (3, 0)), block()), "row 1 has no token in the first"),
    "other rows": (
        lambda: prefill(MODEL, (), [block(), block(3, (1, 1, 1), rows=3)]),
        r"the same rows; got \[2, 3\]",
    ),
    "no room": (lambda: chunks(block(7, (7, 7)), block(2, (1, 2))), "row 1 would have 9 tokens, 9"),
    "no room after": (
        lambda: chunks(block(), held=6),
        "row 0 would have 9 tokens, 3 of them new, .* room for 8: make them",
    ),
    "unknown id": (lambda: chunks(block(ids=V)), "token id 7, but the model's vocabulary has 7"),
    "negative id": (lambda: chunks(block(ids=-1)), "prompt 0 must be token ids .* got -1"),
    "no steps": (lambda: plain(num_steps=0), "num_steps must be at least 1, got 0"),
    "steps as text": (lambda: plain(num_steps="4"), r"num_steps must be an int, got '4'"),
    "scored steps": (lambda: plain(decode_scored, num_steps=2.5), r"num_steps .* got 2.5"),
    "no policy": (lambda: plain(policy=Greedy()), "policy must be a TokenPolicy.* got Greedy"),
    "no model": (lambda: plain(model=jnp.ones(3)), "has no init_caches and no next_token_logits"),
    "another state": (lambda: plain(state=speculating()), "a DecodeState, .* got SpeculativeState"),
    "its tokens": (
        lambda: plain(state=replace(decoding(), tokens=jnp.zeros((B, 1), jnp.int32))),
        r"state.tokens must have a number for each of the 2 rows .* got shape \(2, 1\)",
    ),
    "its caches": (
        lambda: plain(state=replace(decoding(), caches=MODEL.init_caches(3, S))),
        r"state has 2 rows and the caches have 3: .* init_caches\(2, capacity\)",
    ),
    "a step": (
        lambda: decode_step(MODEL, decoding(), None, policy=SAMPLED),
        r"needs a random key; give key=jax.random.key\(0\)",
    ),
    "a number as key": (lambda: plain(policy=SAMPLED, key=7), "key must come from .* got int32"),
    "keys": (
        lambda: plain(policy=SAMPLED, key=jax.random.split(jax.random.key(0))),
        r"a single key; got an array of keys of shape \(2,\)",
    ),
    "logits of other rows": (
        lambda: DecodeState.start(MODEL.init_caches(B, S), jnp.ones((3, V)), policy=GREEDY),
        "logits has 3 rows and the caches have 2",
    ),
    "start without policy": (
        lambda: DecodeState.start(MODEL.init_caches(B, S), jnp.ones((B, V)), policy=None),
        "policy must be a TokenPolicy",
    ),
    "scores of other rows": (
        lambda: token_log_probs(jnp.ones((B, V)), jnp.ones(3, jnp.int32)),
        r"one for each row of logits .* shape \(2,\); got \(3,\)",
    ),
    "no first state": (lambda: start(speculating()), "a DecodeState, .* got SpeculativeState"),
    "prompts as lists": (lambda: start(prompts=[[1], [2]]), "must be PaddedPrompts, .* got list"),
    "more prompts": (lambda: start(prompts=pad_prompts([[1]] * 3, None)), "prompts has 3 rows and"),
    "no new tokens": (lambda: start(max_new_tokens=0), "max_new_tokens must be at least 1"),
    "too many new tokens": (
        lambda: start(max_new_tokens=7),
        "prompt has 3 tokens and max_new_tokens is 7: .* capacity of 9, got 8",
    ),
    "another capacity": (
        lambda: start(capacity=9),
        "capacity is 9, but the caches have 8 slots a row",
    ),
    "no such state": (lambda: drafted(state=decoding()), "a SpeculativeState, .* got DecodeState"),
    "undrafted": (lambda: plain(decode_undrafted), "a SpeculativeState, .* got DecodeState"),
    "no drafter": (lambda: drafted(None), r"drafter must be PromptLookup\(\), .* got None"),
    "a step without": (
        lambda: speculative_step(MODEL, PromptLookup, speculating(), None, policy=GREEDY),
        r"drafter must be PromptLookup\(\), .* got type",
    ),
    "too many drafts": (lambda: drafted(PromptLookup(8)), "cannot append 9 tokens to a cache of 8"),
    "drafting from nothing": (
        lambda: drafted(DraftModel(MODEL)),
        "state of a DraftModel must come from its method start; got tuple",
    ),
    "too few drafts": (
        lambda: drafted(Wrong(tokens=(B, 1))),
        r"of 2 tokens for 2 rows must give tokens of shape \[2, 2\]; got \(2, 1\)",
    ),
    "counts of drafts": (
        lambda: drafted(Wrong(counts=(3,))),
        r"give counts of shape \[2\]; got \(3,",
    ),
    "their distribution": (
        lambda: drafted(
            Wrong(log_probs=(B, 2, 5)), model_of(None), policy=SAMPLED, key=jax.random.key(0)
        ),
        "drawn from 5 tokens, but the model gives logits of 7",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_clear_error(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=message) as found:
        call()
    assert found.value.__cause__ is None


# A draft model of another vocabulary


def test_drafts_of_another_vocabulary() -> None:
    """Drafts were looked up as the nearest id, and when sampling failed in the midst of tracing."""
    message = "DraftModel has a vocabulary of 5 ids and the model one of 7.* 7 ids, or PromptLookup"
    with pytest.raises(ValueError, match=f"speculate: the {message}"):
        generate(MODEL, [[1]], max_new_tokens=2, speculate=DraftModel(model_of(5, 5)))
    with pytest.raises(ValueError, match=f"drafter: the {message}"):
        drafted(DraftModel(model_of(5, 5)))


@pytest.mark.parametrize(("model", "draft"), [(7, 7), (None, 5), (7, None)])
def test_drafts_of_the_same_or_an_unknown_vocabulary(model: int | None, draft: int | None) -> None:
    drafter = DraftModel(model_of(draft), max_tokens=2)
    result = generate(model_of(model), [[3]], max_new_tokens=4, speculate=drafter)
    assert result.tokens.tolist() == [[3] * 4]
    assert result.acceptance.accepted.tolist() == [2]
