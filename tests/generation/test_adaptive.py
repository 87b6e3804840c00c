"""Speculation that pauses where it does not pay: the rule alone, and the texts it leaves alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import Generated, KVCache, Sample, generate, neuron, stream
from jax_tkg.generation import (
    Adaptive,
    DecodeState,
    DraftModel,
    Pace,
    PromptLookup,
    SpeculativeState,
    TokenPolicy,
    decode_undrafted,
    last_real,
    prefill,
)
from jax_tkg.generation.prompts import pad_prompts
from jax_tkg.sampling import Greedy
from tests.generation.test_compilations import Count

pytestmark = pytest.mark.usefixtures("compile_quickly")

# The rule

RULE = Adaptive(PromptLookup(), break_even=1.5, window=4, pause=8, longest_pause=20)


def paces(rule: Adaptive, gains: list[float], size: int = 2, rows: int = 2) -> list[bool]:
    """Whether each call of `size` steps drafts; where it does, a step gives a row `gains[call]`."""
    pace, found = Pace(rule), []
    for gain in gains:
        found.append(pace.speculates)
        tokens = round((gain if pace.speculates else 1) * size * rows)
        pace.took(steps=size, row_steps=size * rows, tokens=tokens)
    return found


def test_it_goes_on_while_drafts_are_accepted() -> None:
    assert all(paces(RULE, [1.5] * 20))
    assert all(paces(RULE, [2, 1] * 10))  # a window is two calls


def test_it_pauses_after_a_bad_window_and_tries_again() -> None:
    # Tries of 2 calls, pauses of 8, 16, 20 and 20 steps: twice as long each time, up to the limit.
    expected: list[bool] = []
    for pause in (8, 16, 20, 20, 20):
        expected += [True] * 2 + [False] * (pause // 2)
    assert paces(RULE, [1.25] * len(expected)) == expected


def test_a_good_window_resets_the_pause() -> None:
    good = [1.0] * (2 + 4 + 2 + 8) + [3.0] * 2 + [1.0] * 8
    assert paces(RULE, good) == (
        [True] * 2 + [False] * 4 + [True] * 2 + [False] * 8 + [True] * 4 + [False] * 4 + [True] * 2
    )


def test_it_counts_what_rows_got_not_how_many_rows_there_are() -> None:
    """A call in which a row ends counts the steps that the row took."""
    pace = Pace(RULE)
    pace.took(steps=4, row_steps=5, tokens=8)  # 1.6 a step; over the 8 places of two rows, 1
    assert pace.speculates
    pace.took(steps=4, row_steps=8, tokens=8)
    assert not pace.speculates


def test_calls_longer_than_a_window_or_a_pause() -> None:
    assert paces(RULE, [1.0] * 6, size=20) == [True, False] * 3
    assert str(Pace(RULE)) == "drafting, 0 tokens in 0 steps of this window"


def test_a_break_even_of_one_never_pauses() -> None:
    assert all(paces(replace(RULE, break_even=1), [1.0] * 50))


class Stubborn:
    """A drafter that cannot be paused."""

    max_tokens = 1

    def start(self, *_: Any) -> tuple[()]:
        return ()

    def draft(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"break_even": 0.9}, ValueError, "break_even must be at least 1, got 0.9"),
        ({"break_even": float("nan")}, ValueError, "break_even must be a number, got nan"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"pause": 0}, ValueError, "pause must be at least 1"),
        (
            {"longest_pause": 7},
            ValueError,
            "longest_pause must be at least 8, got 7. The first pause",
        ),
        ({"drafter": Stubborn()}, TypeError, "Stubborn cannot be paused; it needs .* follow"),
    ],
)
def test_what_is_no_rule(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(RULE, **change)


# Texts

VOCAB, COUNT, DRAFTED = 12, 30, 3
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 4, 8], [5, 6, 7, 8, 9]]
# With calls of two steps: tries of one call, pauses of one, two, four, ... calls.
OFTEN = {"window": 2, "pause": 2, "longest_pause": 8}


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Trigrams:
    """What follows two tokens, of which the earlier is read from the cache: quick to compile."""

    table: Any

    @classmethod
    def random(cls, seed: int = 0) -> Trigrams:
        return cls(
            jnp.asarray(np.random.default_rng(seed).standard_normal((VOCAB,) * 3), "float32")
        )

    def init_caches(self, batch: int, capacity: int, **options: Any) -> KVCache:
        return KVCache.create(batch, capacity, 1, 1, layout="BKSH", **options)

    def __call__(self, tokens: Any, cache: KVCache, counts: Any = None) -> Any:
        new = tokens[:, :, None, None].astype(jnp.float32)
        before = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32) - 1
        cache = cache.append(new, new, counts)
        held: Any = cache.kv.key[:, 0, :, 0]
        earlier = jnp.take_along_axis(held, jnp.maximum(before, 0), axis=1, mode="clip")
        earlier = jnp.where(before >= 0, earlier, 0).astype(jnp.int32)
        return self.table[earlier, tokens], cache

    def next_token_logits(self, tokens: Any, cache: KVCache, counts: Any = None) -> Any:
        logits, cache = self(tokens, cache, counts)
        return last_real(logits, counts), cache

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids, table = [0, *prompt], np.asarray(self.table)
        for _ in range(count):
            ids.append(int(table[ids[-2], ids[-1]].argmax()))
        return ids[len(prompt) + 1 :]


MODEL = Trigrams.random()


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [MODEL.greedy(prompt, COUNT) for prompt in PROMPTS]


def options(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": COUNT, "prefill_chunk": 16, "steps_per_call": 2, **more}


def paused(result: Generated) -> int:
    assert result.acceptance is not None
    return int(result.acceptance.undrafted.sum())


def test_the_text_is_the_same_with_pauses(expected: list[list[int]]) -> None:
    drafter = PromptLookup(max_tokens=DRAFTED)
    for break_even, some in ((1.4, True), (4.0, True), (1.0, False)):
        rule = Adaptive(drafter, break_even=break_even, **OFTEN)
        result = generate(MODEL, PROMPTS, **options(speculate=rule))
        assert result.tokens.tolist() == expected
        assert bool(paused(result)) is some
        assert result.acceptance is not None
        assert result.acceptance.drafted.sum() > 0
        assert (result.acceptance.accepted <= result.acceptance.drafted).all()
    columns = stream(MODEL, PROMPTS, **options(speculate=replace(rule, break_even=2.0)))
    assert np.stack(list(columns), axis=1).tolist() == expected


def test_the_choice_is_that_of_the_rule(expected: list[list[int]]) -> None:
    """Drafts that are always right never pause, and those that are always wrong do at once."""
    del expected
    right = Adaptive(DraftModel(MODEL, max_tokens=DRAFTED), break_even=2.5, **OFTEN)
    assert paused(generate(MODEL, PROMPTS, **options(speculate=right))) == 0
    result = generate(
        MODEL, PROMPTS[:1], **options(speculate=Adaptive(Wrong(max_tokens=1), **OFTEN))
    )
    # 29 tokens: a call of 2 drafting, 2 without, 2, 4, 2, 8, 2, and the last 7 of 8 without.
    assert paused(result) == 2 + 4 + 8 + 7
    assert str(result.acceptance).endswith(", 21 of 29 steps without drafts")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wrong(PromptLookup):
    """Drafts what is no token."""

    def draft(self, *arguments: Any, **keywords: Any) -> Any:
        drafts, state = super().draft(*arguments, **keywords)
        return replace(drafts, tokens=drafts.tokens * 0 - 1, counts=drafts.counts * 0 + 1), state


def test_a_draft_model_goes_on_after_a_pause(expected: list[list[int]]) -> None:
    """Its caches follow the text: the same model drafts nothing wrong, before a pause or after."""
    other = Trigrams(MODEL.table + 0.5 * Trigrams.random(1).table)
    rule = Adaptive(DraftModel(MODEL, max_tokens=DRAFTED), break_even=4.5, **OFTEN)
    result = generate(MODEL, PROMPTS, **options(speculate=rule))
    assert result.tokens.tolist() == expected
    assert paused(result) > 0
    assert result.acceptance is not None
    assert result.acceptance.rate == 1
    # One that is wrong at times has rejected drafts in its caches when the pause begins.
    rule = replace(rule, drafter=DraftModel(other, max_tokens=DRAFTED))
    result = generate(MODEL, PROMPTS, **options(speculate=rule))
    assert result.tokens.tolist() == expected
    assert result.acceptance is not None
    assert 0 < result.acceptance.rate < 1


def test_a_seed_reproduces_a_sampled_run() -> None:
    rule = Adaptive(PromptLookup(max_tokens=DRAFTED), break_even=1.4, **OFTEN)
    sampled = options(speculate=rule, selector=Sample(temperature=2.0, top_k=3))
    runs = [generate(MODEL, PROMPTS, **sampled, key=jax.random.key(seed)) for seed in (1, 1, 2)]
    assert paused(runs[0]) > 0
    np.testing.assert_array_equal(runs[0].tokens, runs[1].tokens)
    assert str(runs[0].acceptance) == str(runs[1].acceptance)
    assert (runs[0].tokens != runs[2].tokens).any()


def test_log_probabilities_in_both_kinds_of_call(expected: list[list[int]]) -> None:
    rule = Adaptive(PromptLookup(max_tokens=DRAFTED), break_even=1.4, **OFTEN)
    result = generate(MODEL, PROMPTS, **options(speculate=rule, return_log_probs=True))
    assert paused(result) > 0
    plain = generate(MODEL, PROMPTS, **options(return_log_probs=True))
    assert result.log_probs is not None
    assert plain.log_probs is not None
    np.testing.assert_allclose(result.log_probs, plain.log_probs, atol=1e-4)


def test_neither_pauses_nor_their_number_compile_anything(expected: list[list[int]]) -> None:
    rule = Adaptive(PromptLookup(max_tokens=DRAFTED), break_even=1.4, **OFTEN)
    generate(MODEL, PROMPTS, **options(speculate=rule))
    with Count() as compiled:
        for change in ({"break_even": 1.0}, {"break_even": 3.0}, {"pause": 6}):
            result = generate(MODEL, PROMPTS, **options(speculate=replace(rule, **change)))
            assert result.tokens.tolist() == expected
    assert compiled.all == 0


@pytest.mark.parametrize("selector", [Greedy(), Sample(top_p=0.9)])
def test_neuron_can_run_the_call_without_drafts(selector: Any) -> None:
    prompts, policy = pad_prompts(PROMPTS, None), TokenPolicy(selector, eos_ids=(VOCAB - 1,))
    key = jax.random.key(0, impl="unsafe_rbg")
    logits, caches = prefill(MODEL, MODEL.init_caches(4, 64), prompts.chunks(32))
    first = DecodeState.start(caches, logits, key, policy=policy)
    state = SpeculativeState.start(first, (), prompts, capacity=64, max_new_tokens=8)

    def call(model: Any, state: Any, key: Any) -> Any:
        return decode_undrafted(model, state, key, policy=policy, num_steps=3, with_log_probs=True)

    assert neuron.check(call, MODEL, state, key) == ()
