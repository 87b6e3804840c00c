"""Speculative decoding: the same tokens, each row at its own speed, whatever is drafted."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_tkg.generation.model
from jax_tkg import Generated, KVCache, Sample, generate, stream
from jax_tkg.generation import (
    DecodeState,
    DraftModel,
    Drafts,
    PromptLookup,
    SpeculativeState,
    TokenPolicy,
    decode_speculatively,
    prefill,
    truncate_caches,
)
from jax_tkg.generation.prompts import PaddedPrompts, pad_prompts
from jax_tkg.sampling import Greedy
from jax_tkg.sharding import AttentionSharding
from tests.calls import quickly
from tests.generation.test_compilations import Count
from tests.generation.tiny_model import VOCAB, PagedModel, TinyModel, pytree_of_its_own

pytestmark = pytest.mark.usefixtures("compile_quickly")

COUNT, CHUNK, STEPS, DRAFTED = 14, 16, 3, 3
PROMPTS = [[7], list(range(3, 3 + 16)), [11, 4] * 20, [5, 6, 7, 8, 9]]
LENGTHS = np.array([len(prompt) for prompt in PROMPTS], np.int32)


@partial(jax.tree_util.register_dataclass, data_fields=["script"], meta_fields=["max_tokens"])
@dataclass(frozen=True, eq=False)
class Scripted:
    """A drafter of the user's own: drafts what a script `[B, W]` has at the same places."""

    script: jax.Array
    max_tokens: int = DRAFTED

    def start(self, prompts: PaddedPrompts, capacity: int, chunk: int) -> jax.Array:
        assert self.script.shape[0] == len(prompts.lengths)
        return jnp.zeros((), jnp.int32)

    def draft(
        self, tokens: jax.Array, lengths: jax.Array, alive: jax.Array, state: Any, **_: Any
    ) -> tuple[Drafts, Any]:
        ahead = lengths[:, None] + jnp.arange(self.max_tokens, dtype=jnp.int32)
        drafted = jnp.take_along_axis(self.script, ahead, axis=1, mode="clip")
        return Drafts(drafted, jnp.full_like(lengths, self.max_tokens)), state + 1


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture(scope="module")
def expected(model: TinyModel) -> list[list[int]]:
    return [model.oracle_tokens(prompt, COUNT) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def script(expected: list[list[int]]) -> np.ndarray:
    """All rows as they will be."""
    texts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    return np.array([text + [-1] * (64 - len(text)) for text in texts], np.int32)


def speculated(model: Any, speculate: Any, **options: Any) -> Generated:
    defaults = {"max_new_tokens": COUNT, "prefill_chunk": CHUNK, "steps_per_call": STEPS}
    return generate(model, PROMPTS, **{**defaults, **options}, speculate=speculate)


def statistics(result: Generated) -> tuple[list[int], list[int], list[int]]:
    assert result.acceptance is not None
    found = result.acceptance
    return found.steps.tolist(), found.drafted.tolist(), found.accepted.tolist()


# The same tokens


def test_right_drafts_are_all_accepted(
    model: TinyModel, expected: list[list[int]], script: np.ndarray
) -> None:
    result = speculated(model, Scripted(jnp.asarray(script)))
    assert result.tokens.tolist() == expected
    # One token of the prompts, three steps of four, and one for which no draft is left.
    assert statistics(result) == ([4] * 4, [9] * 4, [9] * 4)
    assert result.acceptance is not None
    assert result.acceptance.tokens_per_step == 13 / 4
    assert result.acceptance.rate == 1
    assert str(result.acceptance) == "3.25 tokens a step, 36 of 36 drafts accepted"


def test_wrong_drafts_change_nothing_but_the_speed(
    model: TinyModel, expected: list[list[int]], script: np.ndarray
) -> None:
    wrong, steps = script.copy(), []
    for row, length in enumerate(LENGTHS):
        # Row 0 is right, row 1 wrong in every second token, row 2 in every third, row 3 in all.
        at = np.arange(1, COUNT)
        bad = at[[at < 0, at % 2 == 0, at % 3 == 0, at > 0][row]]
        wrong[row, length + bad] = (wrong[row, length + bad] + 1) % VOCAB
        made, taken = 1, 0
        while made < COUNT:
            hits = 0
            while hits < min(DRAFTED, COUNT - made - 1) and made + hits not in bad:
                hits += 1
            made, taken = made + hits + 1, taken + 1
        steps.append(taken)
    result = speculated(model, Scripted(jnp.asarray(wrong)))
    assert result.tokens.tolist() == expected
    assert statistics(result)[0] == steps
    assert len(set(steps)) == 4
    assert result.finished.tolist() == [False] * 4


@pytest.mark.parametrize("count", [1, 2, 3, 6, 13])
def test_max_new_tokens_in_a_draft(
    model: TinyModel, expected: list[list[int]], script: np.ndarray, count: int
) -> None:
    drafter = Scripted(jnp.asarray(script))
    speculated(model, drafter)
    with Count() as compiled:
        result = speculated(model, drafter, max_new_tokens=count)
    assert compiled.all == 0
    assert result.tokens.tolist() == [row[:count] for row in expected]
    assert result.lengths.tolist() == [count] * 4
    steps, drafted, accepted = statistics(result)
    assert drafted == accepted == [count - 1 - n for n in steps]


@pytest.mark.parametrize("shift", [0, 1], ids=["right", "wrong"])
def test_eos_in_a_draft(
    model: TinyModel, expected: list[list[int]], script: np.ndarray, shift: int
) -> None:
    eos = expected[1][2]  # the second token of the first drafts of row 1
    at = [row.index(eos) if eos in row else COUNT for row in expected]
    assert at[1] == 2
    assert max(at) > 2 + DRAFTED
    drafts = jnp.asarray((script + shift) % VOCAB)
    result = speculated(model, Scripted(drafts), eos_ids=[eos], pad_id=77)
    for row, tokens, end in zip(result.tokens, expected, at, strict=True):
        assert row.tolist() == (tokens[: end + 1] + [77] * COUNT)[:COUNT]
    assert result.finished.tolist() == [end < COUNT for end in at]
    assert result.lengths.tolist() == [min(end + 1, COUNT) for end in at]
    assert statistics(result)[0][1] == [1, 2][shift]


def test_streams_are_what_is_generated(
    model: TinyModel, expected: list[list[int]], script: np.ndarray
) -> None:
    wrong = script.copy()
    wrong[2] += 1  # a row that is slower
    options = {"max_new_tokens": COUNT, "prefill_chunk": CHUNK, "steps_per_call": STEPS}
    columns = stream(model, PROMPTS, **options, speculate=Scripted(jnp.asarray(wrong)))
    assert np.stack(list(columns), axis=1).tolist() == expected


def test_lookup_and_draft_models_give_the_same_tokens(
    model: TinyModel, expected: list[list[int]]
) -> None:
    result = speculated(model, PromptLookup(max_tokens=DRAFTED))
    assert result.tokens.tolist() == expected
    assert sum(statistics(result)[2]) > 0
    result = speculated(model, DraftModel(model, max_tokens=DRAFTED))
    assert result.tokens.tolist() == expected
    assert statistics(result) == ([4] * 4, [9] * 4, [9] * 4)
    # Another model: with half of the first one's weights it is sometimes right.
    other = replace(model, layers=(model.layers[0], TinyModel.random(seed=1).layers[1]))
    result = speculated(model, DraftModel(other, max_tokens=DRAFTED))
    assert result.tokens.tolist() == expected
    assert 0 < sum(statistics(result)[2]) < sum(statistics(result)[1])


def test_new_drafts_and_weights_compile_nothing(model: TinyModel) -> None:
    drafter = DraftModel(TinyModel.random(seed=1), max_tokens=DRAFTED)
    speculated(model, drafter)
    with Count() as compiled:
        speculated(model, DraftModel(TinyModel.random(seed=2), max_tokens=DRAFTED))
        speculated(TinyModel.random(seed=3), drafter, max_new_tokens=5)
    assert compiled.all == 0


def test_sampling_depends_on_the_seed_alone(model: TinyModel) -> None:
    options: dict[str, Any] = {"selector": Sample(temperature=2.0, top_k=3)}
    drafter = PromptLookup(max_tokens=DRAFTED)
    first = speculated(model, drafter, **options)
    again = speculated(model, drafter, **options, key=jax.random.key(0))
    other = speculated(model, drafter, **options, key=jax.random.key(1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).mean() > 0.3


# Caches


def test_caches_hold_what_was_accepted(
    model: TinyModel, expected: list[list[int]], script: np.ndarray
) -> None:
    policy, prompts = TokenPolicy(Greedy()), pad_prompts(PROMPTS, None)
    caches = model.init_caches(4, 256)
    logits, caches = prefill(model, caches, prompts.chunks(CHUNK))
    first = DecodeState.start(caches, logits, policy=policy)
    drafter = Scripted(jnp.asarray(script).at[0].add(1))
    state = SpeculativeState.start(first, jnp.int32(0), prompts, capacity=256, max_new_tokens=COUNT)
    emitted, state = decode_speculatively(model, drafter, state, policy=policy, num_steps=STEPS)
    assert emitted.counts.tolist() == [[1, 4, 4, 4]] * STEPS
    assert state.drafting == STEPS
    for cache in state.caches:
        assert cache.lengths.tolist() == [1 + 3, *(LENGTHS[1:] + 12)]
    assert state.lengths.tolist() == [1 + 4, *(LENGTHS[1:] + 13)]
    held = [
        row[:n].tolist() for row, n in zip(np.asarray(state.tokens), state.lengths, strict=True)
    ]
    assert held == [p + e[:n] for p, e, n in zip(PROMPTS, expected, [4, 13, 13, 13], strict=True)]


@pytree_of_its_own
class Keeping(TinyModel):
    """Takes nothing back."""

    def truncate_caches(self, caches: Any, lengths: jax.Array) -> Any:
        return caches


def as_kind(kind: type[TinyModel], model: TinyModel) -> TinyModel:
    return kind(model.embed, model.layers, model.output)


def test_pages_are_given_back(
    model: TinyModel, expected: list[list[int]], script: np.ndarray
) -> None:
    wrong = script.copy()
    wrong[:, ::3] += 1
    result = speculated(as_kind(PagedModel, model), Scripted(jnp.asarray(wrong)))
    assert result.tokens.tolist() == expected


@pytest.mark.slow  # partitioned programs take long to compile
def test_caches_on_four_devices(model: TinyModel, expected: list[list[int]]) -> None:
    mesh = jax.make_mesh((2, 2), ("rows", "slots"), axis_types=(AxisType.Auto,) * 2)
    sharding = AttentionSharding(mesh, batch="rows", keys="slots")
    options = {"cache_options": {"sharding": sharding}}
    result = speculated(model, PromptLookup(DRAFTED), **options)
    assert result.tokens.tolist() == expected
    assert sum(statistics(result)[2]) > 0


def test_drafts_that_stay_in_the_caches_are_found(
    model: TinyModel, expected: list[list[int]], script: np.ndarray
) -> None:
    wrong = script.copy()
    wrong[:, ::3] += 1
    result = speculated(as_kind(Keeping, model), Scripted(jnp.asarray(wrong)))
    assert result.tokens.tolist() != expected


def test_only_caches_can_be_shortened(model: TinyModel) -> None:
    cache = KVCache.create(2, 8, 1, 4).append(*[jnp.ones((2, 5, 1, 4))] * 2)
    shorter = truncate_caches(model, {"a": [cache]}, jnp.array([2, 9]))
    assert shorter["a"][0].lengths.tolist() == [2, 5]
    with pytest.raises(TypeError, match=r"with a \w+ that is in no jax_tkg cache: .* TinyModel a"):
        truncate_caches(model, (cache, jnp.ones(3)), jnp.array([2, 9]))


# Looking drafts up


def lookup(rows: list[list[int]], **options: Any) -> list[list[int]]:
    tokens = np.full((len(rows), 12), 5, np.int32)  # what follows a row is anything
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.array([len(ids) for ids in rows], jnp.int32)
    find = PromptLookup(**{"max_tokens": 3, **options})
    drafts, _ = quickly(lambda t, n: find.draft(t, n, n > 0, ()))(jnp.asarray(tokens), lengths)
    return [t[:n].tolist() for t, n in zip(np.asarray(drafts.tokens), drafts.counts, strict=True)]


def by_search(ids: list[int], max_tokens: int, ngram: int, min_ngram: int) -> list[int]:
    """The same in plain Python."""
    for size in range(min(ngram, len(ids) - 1), min_ngram - 1, -1):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                text = list(ids)
                while len(text) < len(ids) + max_tokens:
                    text.append(text[len(text) - (len(ids) - end)])
                return text[len(ids) :]
    return []


def test_lookup() -> None:
    assert lookup([[1, 2, 3, 9, 1, 2, 3], [1, 2, 3, 4, 8, 2, 3], [1, 2], [7, 7], [5, 5, 1]]) == [
        [9, 1, 2],  # all three agree
        [4, 8, 2],  # two agree
        [],
        [7, 7, 7],  # it goes on periodically
        [],  # what follows the row is not looked at
    ]
    assert lookup([[1, 2, 8, 1, 2, 9, 3, 1, 2]]) == [[9, 3, 1]]  # the latest
    assert lookup([[1, 2, 8, 4, 2, 9, 3, 1, 2]]) == [[8, 4, 2]]  # the longest before the latest


@pytest.mark.parametrize("options", [{}, {"ngram": 1}, {"ngram": 4, "min_ngram": 2}])
def test_lookup_is_a_search(options: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, rng.integers(2, 13)).tolist() for _ in range(200)]
    settings = {"max_tokens": 3, "ngram": 3, "min_ngram": 1, **options}
    wanted = [by_search(row, **settings) for row in rows]
    assert lookup(rows, **options) == wanted
    assert len({tuple(drafts) for drafts in wanted}) > 15


# Log-probabilities


def test_log_probs(model: TinyModel, script: np.ndarray) -> None:
    eos = range(0, VOCAB, 5)
    options: dict[str, Any] = {"return_log_probs": True, "selector": Sample(2.0, top_k=2)}
    for speculate in (None, Scripted(jnp.asarray(script))):
        result = speculated(model, speculate, eos_ids=eos, **options)
        assert result.log_probs is not None
        assert result.log_probs.dtype == np.float32
        wanted = np.zeros(result.log_probs.shape)
        for row, (prompt, tokens) in enumerate(zip(PROMPTS, result.tokens.tolist(), strict=True)):
            for i, token in enumerate(tokens[: result.lengths[row]]):
                logits = model.oracle_logits([*prompt, *tokens[:i]])
                top = logits.max()
                wanted[row, i] = logits[token] - top - np.log(np.exp(logits - top).sum())
        np.testing.assert_allclose(result.log_probs, wanted, rtol=0, atol=1e-4)
        is_pad = np.arange(COUNT) >= result.lengths[:, None]
        assert ((result.log_probs == 0) == is_pad).all()
        assert 0 < is_pad.sum() < is_pad.size // 2 + COUNT


def test_nothing_is_computed_that_was_not_asked_for(model: TinyModel) -> None:
    result = generate(model, PROMPTS, max_new_tokens=2, prefill_chunk=CHUNK)
    assert result.log_probs is None
    assert result.acceptance is None


# Errors


@dataclass(frozen=True)
class Drawing:
    needs_key = True

    def __call__(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
        raise NotImplementedError


@pytree_of_its_own
class Stored(TinyModel):
    def init_caches(self, batch: int, capacity: int, **options: Any) -> Any:
        return jnp.zeros((batch, capacity))


class Mute:
    init_caches = TinyModel.init_caches
    next_token_logits = TinyModel.next_token_logits


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"speculate": 4}, TypeError, r"speculate must be PromptLookup\(\), .* got 4 \(int\)"),
        ({"model": Mute()}, TypeError, "Mute cannot be called: to speculate, a model needs"),
        ({"selector": Drawing()}, TypeError, "Drawing draws tokens, and speculation must know"),
        ({"speculate": PromptLookup(49), "capacity": 49}, ValueError, "appends 50 tokens to a"),
        ({"capacity": 48}, ValueError, "needs a capacity of 53, got 48"),
    ],
)
def test_errors(
    model: TinyModel, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "capacity" in arguments and arguments["capacity"] == 49:
        arguments = {**arguments, "max_new_tokens": 2}
    with pytest.raises(error, match=message):
        speculated(**{"model": model, "speculate": PromptLookup(), **arguments})


@pytest.mark.usefixtures("no_shape_checks")
def test_caches_without_a_way_back_are_refused(model: TinyModel) -> None:
    with pytest.raises(TypeError, match="to speculate, give Stored a method"):
        speculated(as_kind(Stored, model), PromptLookup())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "PromptLookup: max_tokens must be at least 1, got 0"),
        ({"ngram": 2, "min_ngram": 3}, "min_ngram=3, ngram=2"),
        ({"min_ngram": 0}, "min_ngram must be at least 1, got 0"),
    ],
)
def test_settings_of_the_lookup(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptLookup(**options)


@pytest.mark.usefixtures("no_shape_checks")
def test_draft_models_are_models(model: TinyModel) -> None:
    with pytest.raises(ValueError, match="DraftModel: max_tokens must be at least 1, got 0"):
        DraftModel(model, max_tokens=0)
    with pytest.raises(TypeError, match="int has no init_caches and no next_token_logits"):
        speculated(model, DraftModel(3))


# The documented model


def test_the_example_of_a_model_of_ones_own() -> None:
    text = jax_tkg.generation.model.__doc__
    assert text is not None
    (code,) = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    lines = [line[4:] for line in code.splitlines()]
    scope: dict[str, Any] = {"__name__": "example"}
    exec(compile("\n".join(lines), "model.py", "exec"), scope)
    result = scope["result"]
    plain = generate(scope["model"], [[1, 2, 3]], max_new_tokens=4)
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    assert result.acceptance is not None
