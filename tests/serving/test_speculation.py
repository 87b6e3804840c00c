"""Drafts in the running batch: fewer steps, and not one other token, page or random number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import neuron
from jax_tkg.generation import Adaptive, DraftModel, Drafts, PromptLookup
from jax_tkg.generation.verification import agreeing
from jax_tkg.sampling import RowSelection
from jax_tkg.serving import (
    Completion,
    Engine,
    FinishReason,
    NewToken,
    Request,
    SamplingSettings,
    ServingConfig,
    programs,
    speculation,
)
from jax_tkg.serving.programs import DecodeRows
from jax_tkg.serving.rows import decode_arrays, texts_array
from jax_tkg.serving.speculation import decode_speculatively
from tests.generation.test_compilations import Count
from tests.generation.tiny_model import VOCAB
from tests.hlo import cache_copies
from tests.serving.tiny import CONFIG, MODEL, Letters, alone, assert_no_leak, letters, prompt

LOOKUP = PromptLookup(max_tokens=3)
SPECULATIVE = replace(CONFIG, steps_per_call=2, speculate=LOOKUP)
# Peaked enough that drafts are accepted, and flat enough that others are not.
WARM = SamplingSettings(temperature=0.7, top_k=20, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_engine(config: ServingConfig = SPECULATIVE) -> Engine:
    return Engine(MODEL, config, decoder=Letters)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Compiled; a test may use every page, and must give all of them back."""
    engine = make_engine()
    engine.warm_up()
    yield engine
    assert_no_leak(engine)


def mixed(count: int, seed: int, sampling: SamplingSettings | None = None) -> list[Request]:
    """Prompts that repeat themselves, and others; half of them begin with the same tokens."""
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        phrase = prompt(int(rng.integers(2, 6)), seed=seed + i)
        begin = prompt(8, seed=99) if i % 2 else []
        ids = [*begin, *phrase * int(rng.integers(1, 4))]
        settings = SamplingSettings() if sampling is None or i % 3 else replace(sampling, seed=i)
        eos = [int(i) for i in rng.integers(0, VOCAB, rng.integers(0, 3))]
        requests.append(Request(ids, int(rng.integers(1, 18)), sampling=settings, eos_ids=eos))
    return requests


def drain(engine: Engine) -> None:
    """To the end; between two calls a row has the pages of its tokens and no other."""
    while engine.num_running or engine.num_waiting:
        drafts = engine.speculation.drafted
        engine.step()
        if engine.speculation.drafted > drafts:
            for row in engine._places.rows.values():
                assert len(row.pages.pages) == engine.config.pages_for(row.cached)


# The same tokens


def test_requests_get_the_tokens_they_get_alone(engine: Engine) -> None:
    requests = mixed(24, seed=1)
    with Count() as compiled:
        tickets = [engine.submit(request) for request in requests]
        drain(engine)
    assert compiled.all == 0
    assert [ticket.tokens for ticket in tickets] == [alone(request) for request in requests]
    # Everything that can happen did.
    completions = [ticket.completion for ticket in tickets]
    assert {c.reason for c in completions if c} == {FinishReason.LENGTH, FinishReason.EOS}
    assert sum(ticket.preemptions for ticket in tickets) > 0
    assert sum(ticket.shared_tokens for ticket in tickets) > 20
    usage = engine.speculation
    assert 0 < usage.accepted < usage.drafted
    assert 0 < usage.undrafted < usage.steps  # for want of pages
    # The first token of a request, and each one after a preemption, is that of a prompt.
    of_prompts = len(tickets) + sum(ticket.preemptions for ticket in tickets)
    assert usage.steps + usage.accepted == sum(len(t.tokens) for t in tickets) - of_prompts
    assert usage.tokens_per_step == 1 + usage.accepted / usage.steps
    assert str(usage).startswith(f"{usage.tokens_per_step:.2f} tokens a step, {usage.accepted} of ")


def test_sampled_tokens_are_those_without_drafts(engine: Engine) -> None:
    """With the same seeds, whatever is in the other rows, and with the same log-probabilities."""
    requests = mixed(12, seed=2, sampling=WARM)
    plain = make_engine(replace(SPECULATIVE, speculate=None)).run(requests)
    completions = engine.run(requests)
    assert [c.tokens for c in completions] == [c.tokens for c in plain]
    for ours, theirs in zip(completions, plain, strict=True):
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
    assert engine.speculation.accepted > 0
    longest = max((i for i in range(0, 12, 3)), key=lambda i: len(completions[i].tokens))
    before = engine.speculation.accepted
    (again,) = engine.run([requests[longest]])
    assert again.tokens == completions[longest].tokens
    assert len(set(again.tokens)) > 3
    assert engine.speculation.accepted > before  # sampled ones too
    other = replace(requests[longest], sampling=replace(WARM, seed=77))
    assert engine.run([other])[0].tokens != again.tokens


def test_it_pauses_where_drafts_do_not_pay() -> None:
    """The same requests with a rule that is never content: the same tokens, compiled before."""
    make_engine().warm_up()
    rule = Adaptive(LOOKUP, break_even=3.9, window=2, pause=6, longest_pause=12)
    engine = make_engine(replace(SPECULATIVE, speculate=rule))
    assert engine.speculation.now == "drafting, 0 tokens in 0 steps of this window"
    requests, seen = mixed(8, seed=1), set()
    with Count() as compiled:
        tickets = [engine.submit(request) for request in requests]
        while engine.num_running or engine.num_waiting:
            engine.step()
            seen.add(engine.speculation.now.split(" ")[0])
    assert compiled.all == 0
    assert seen == {"drafting,", "pausing"}
    assert [ticket.tokens for ticket in tickets] == [alone(request) for request in requests]
    usage = engine.speculation
    assert usage.accepted < usage.drafted
    assert usage.steps / 2 < usage.undrafted < usage.steps
    assert_no_leak(engine)


@dataclass(frozen=True)
class Wrong(PromptLookup):
    """Drafts what is no token."""

    def draft(self, *arguments: Any, **keywords: Any) -> Any:
        drafts, state = super().draft(*arguments, **keywords)
        return replace(drafts, tokens=drafts.tokens * 0 - 1), state


@pytest.mark.slow(reason="compiles a step of each of two drafters")
@pytest.mark.parametrize("takes_back", [True, False])
def test_rejected_drafts_are_taken_back(monkeypatch: Any, takes_back: bool) -> None:
    """And if they were not, that would be found."""
    if not takes_back:
        monkeypatch.setattr(speculation, "truncate_caches", lambda model, caches, lengths: caches)
    drafter = Wrong(max_tokens=3, ngram=2 + takes_back)  # of its own, so that it is traced now
    request = Request(prompt(3) * 3, 12)
    engine = make_engine(replace(SPECULATIVE, speculate=drafter))
    assert (list(engine.run([request])[0].tokens) == alone(request)) is takes_back
    assert engine.speculation.accepted == 0 < engine.speculation.drafted


# Distribution


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Chain:
    """A model without caches: each token has its own distribution of the next."""

    table: Any

    def init_caches(self, batch: int, capacity: int) -> tuple[()]:
        return ()

    def next_token_logits(self, tokens: Any, caches: Any, counts: Any = None) -> Any:
        return self.table[tokens[:, -1]], caches

    def __call__(self, tokens: Any, caches: Any, counts: Any = None) -> Any:
        return self.table[tokens], caches


@dataclass(frozen=True)
class Always(PromptLookup):
    """The same drafts everywhere."""

    def draft(self, tokens: Any, lengths: Any, alive: Any, state: Any, **_: Any) -> Any:
        drafted = jnp.tile(jnp.array([[1, 2]], jnp.int32), (len(lengths), 1))
        return Drafts(drafted, jnp.full_like(lengths, 2)), state


SIZE, ROWS = 3, 3000
CHAIN = Chain(jnp.asarray(np.random.default_rng(3).standard_normal((SIZE, SIZE)), jnp.float32))


def deviation(words: np.ndarray) -> float:
    """Of the first three tokens of many rows from the chain, in standard deviations of chi^2."""
    none = np.zeros(ROWS, np.int32)
    rows = DecodeRows(
        table=np.zeros((ROWS, 1), np.int32),
        lengths=none,
        tokens=none,
        budget=none + 9,
        eos_ids=np.zeros((ROWS, 0), np.int32),
        selection=RowSelection.of([SamplingSettings(temperature=1.0).selector] * ROWS),
        words=words,
    )
    texts = np.zeros((ROWS, 10), np.int32)
    verified, _ = decode_speculatively(
        CHAIN, (), rows, texts, drafter=Always(max_tokens=2), num_steps=3, top=0
    )
    tokens, counts = np.asarray(verified.chosen.tokens), np.asarray(verified.counts)
    assert (counts.min(), counts.max()) == (1, 3)
    texts = np.array(
        [np.concatenate([tokens[n, b, : counts[n, b]] for n in range(3)])[:3] for b in range(ROWS)]
    )
    p = np.exp(np.asarray(CHAIN.table, np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = ROWS * (p[0][:, None, None] * p[:, :, None] * p[None])
    found = np.zeros((SIZE,) * 3)
    np.add.at(found, tuple(texts.T), 1)
    statistic = ((found - expected) ** 2 / expected).sum()
    freedom = SIZE**3 - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def test_the_distribution_is_that_of_the_model() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (ROWS, 9, 4), np.uint32)
    assert deviation(words) < 4
    # With one random state for all places of a row, what follows a draft depends on it.
    assert deviation(np.broadcast_to(words[:, :1], words.shape)) > 20


def test_a_draft_is_accepted_if_it_is_chosen() -> None:
    chosen = jnp.array([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]])
    drafted = jnp.array([[5, 6], [5, 7], [7, 6], [5, 6]])
    drafts = Drafts(drafted, jnp.array([2, 2, 2, 1]))
    assert agreeing(drafts, chosen).tolist() == [2, 1, 0, 1]


# What a request gets


def test_log_probabilities_are_the_oracles(engine: Engine) -> None:
    ticket = engine.submit(Request(prompt(3) * 3, 12, top_log_probs=2))
    *new, completion = engine.stream(ticket)
    ids = list(ticket.request.prompt)
    for event in new:
        assert isinstance(event, NewToken)
        logits = MODEL.oracle_logits(ids)
        logits -= np.log(np.sum(np.exp(logits)))
        assert event.log_prob == pytest.approx(logits[event.token], abs=1e-4)
        best = np.argsort(-logits)[:2].tolist()
        assert [token for token, _ in event.top] == best
        ids.append(event.token)
    assert isinstance(completion, Completion)
    assert [event.index for event in new if isinstance(event, NewToken)] == list(range(12))
    assert engine.speculation.accepted > 0


def test_stop_strings_and_eos_in_the_middle_of_drafts(engine: Engine) -> None:
    ids = prompt(3) * 3
    whole = engine.run([Request(ids, 14)])[0]
    for at in range(0, 12, 3):
        stop = whole.text[at : at + 2]
        at = whole.text.index(stop)
        completion = engine.run([Request(ids, 14, stop=[stop])])[0]
        assert completion.reason is FinishReason.STOP
        assert completion.text == whole.text[:at]
        assert completion.tokens == whole.tokens[: at + 2]
        eos = whole.tokens[at]
        completion = engine.run([Request(ids, 14, eos_ids=[eos])])[0]
        assert completion.tokens == whole.tokens[: whole.tokens.index(eos) + 1]


def test_cancelling_and_streaming_in_turns(engine: Engine) -> None:
    requests = [Request(prompt(3, seed=i) * 3, 17) for i in range(4)]
    streams = [engine.stream(engine.submit(request)) for request in requests[:3]]
    doomed = engine.submit(requests[3])
    first = [next(stream) for stream in streams]
    engine.step()
    completion = engine.cancel(doomed)
    assert completion.text == letters(completion.tokens)
    assert list(completion.tokens) == alone(requests[3])[: len(completion.tokens)]
    for request, event, stream in zip(requests, first, streams, strict=False):
        *new, last = [event, *stream]
        assert [e.token for e in new if isinstance(e, NewToken)] == alone(request)
        assert isinstance(last, Completion)


def test_refused_pages_are_never_needed() -> None:
    """Under "refuse" nobody is put back, with drafts as without."""
    engine = make_engine(replace(SPECULATIVE, out_of_pages="refuse"))
    requests = [Request(prompt(3, seed=i) * 3, 10) for i in range(3)]
    completions = engine.run(requests)
    assert [list(c.tokens) for c in completions] == [alone(request) for request in requests]
    assert [c.preemptions for c in completions] == [0, 0, 0]
    assert_no_leak(engine)


# The compiled step

LARGE = replace(SPECULATIVE, page_len=64, num_pages=2048, pages_per_sequence=256)


def call(config: ServingConfig, sampled: bool) -> tuple[Any, tuple[Any, ...]]:
    step = partial(decode_speculatively, drafter=LOOKUP, num_steps=2, top=config.top_log_probs)
    rows = decode_arrays([], config, sampled=sampled, drafting=True)
    return step, (MODEL, programs.make_pools(MODEL, config, {}), rows, texts_array([], config))


@pytest.mark.parametrize("sampled", [False, True])
def test_neuron_can_run_it(sampled: bool) -> None:
    step, arguments = call(SPECULATIVE, sampled)
    assert neuron.check(step, *arguments) == ()


@pytest.mark.slow(reason="compiles the step for large pools; the plain one is tested always")
def test_it_copies_no_page() -> None:
    step, arguments = call(LARGE, sampled=False)
    compiled = decode_speculatively.lower(*arguments, **step.keywords).compile()
    assert cache_copies(compiled, arguments[1]) == []


# Errors


def test_what_cannot_speculate_is_refused() -> None:
    with pytest.raises(TypeError, match="alone, got DraftModel: the pages"):
        replace(CONFIG, speculate=Adaptive(DraftModel(MODEL)))
    with pytest.raises(ValueError, match="48 drafts and a token are more than the 48"):
        replace(CONFIG, speculate=PromptLookup(max_tokens=48))

    @partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=[])
    @dataclass(frozen=True, eq=False)
    class OnlyNext:
        table: Any

        def init_caches(self, batch: int, capacity: int) -> tuple[()]:
            return ()

        def next_token_logits(self, tokens: Any, caches: Any, counts: Any = None) -> Any:
            return jnp.zeros((len(tokens), VOCAB)), caches

    with pytest.raises(TypeError, match="OnlyNext cannot be called: to speculate"):
        Engine(OnlyNext(jnp.zeros(3)), SPECULATIVE)
    assert Engine(OnlyNext(jnp.zeros(3)), CONFIG).speculation.now == "not asked to speculate"
