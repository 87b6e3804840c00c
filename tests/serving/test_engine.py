"""Requests that join and leave: the same tokens as alone, no page lost, nothing compiled twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg.serving import (
    Completion,
    Engine,
    FinishReason,
    NewToken,
    OutOfPagesError,
    Request,
    SamplingSettings,
    State,
    TextStream,
    Ticket,
    programs,
)
from jax_tkg.serving.rows import decode_arrays, prefill_arrays
from tests.generation.tiny_model import VOCAB
from tests.serving.tiny import (
    CONFIG,
    MODEL,
    SAMPLED,
    Letters,
    alone,
    assert_no_leak,
    letters,
    make_engine,
    prompt,
    tokens_of,
)

_compilations: list[str] = []


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Compiled; a test may use every page, and must give all of them back."""
    engine = make_engine()
    engine.warm_up()
    yield engine
    assert_no_leak(engine)


def mixed(count: int, seed: int, greedy: bool = True) -> list[Request]:
    """Requests of all kinds; a third begin with the same tokens."""
    rng = np.random.default_rng(seed)
    begin = prompt(9, seed=99)
    requests = []
    for i in range(count):
        ids = [*(begin if i % 3 == 0 else []), *prompt(int(rng.integers(1, 25)), seed=seed + i)]
        sampled = not greedy and i % 2
        requests.append(
            Request(
                ids,
                int(rng.integers(1, 15)),
                sampling=replace(SAMPLED, seed=i) if sampled else SamplingSettings(),
                eos_ids=[int(i) for i in rng.integers(0, VOCAB, rng.integers(0, 3))],
            )
        )
    return requests


# The same as alone


def test_50_requests_get_the_tokens_they_get_alone(engine: Engine) -> None:
    requests = mixed(50, seed=1)
    compiled = len(_compilations)
    completions = engine.run(requests)
    assert len(_compilations) == compiled
    assert tokens_of(completions) == [alone(request) for request in requests]
    ends = {c.reason for c in completions}
    assert ends == {FinishReason.LENGTH, FinishReason.EOS}
    # Everything that can happen did.
    assert sum(c.preemptions for c in completions) > 3
    assert sum(c.shared_tokens for c in completions) > 50


def test_sampled_requests_among_them_change_nothing(engine: Engine) -> None:
    requests = mixed(20, seed=2, greedy=False)
    completions = engine.run(requests)
    for request, completion in zip(requests, completions, strict=True):
        if not request.sampling.temperature:
            assert list(completion.tokens) == alone(request)


def test_the_compilations_are_counted(engine: Engine) -> None:
    compiled = len(_compilations)
    engine._first_tokens({}, jnp.zeros((1, VOCAB + 1)))
    assert len(_compilations) > compiled


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=25)
def test_any_schedule(data: st.DataObject) -> None:
    """Arrivals and cancellations at any time; what is cut short is the beginning of the whole."""
    engine = make_engine()
    requests = mixed(12, seed=data.draw(st.integers(0, 3)))
    waiting, tickets = list(requests), []
    for _ in range(60):
        action = data.draw(st.sampled_from(["submit", "step", "step", "cancel"]))
        if action == "submit" and waiting:
            tickets.append(engine.submit(waiting.pop()))
        elif action == "cancel" and tickets:
            engine.cancel(data.draw(st.sampled_from(tickets)))
        else:
            engine.step()
        usage = engine.usage
        assert usage.used + usage.cached + usage.free == CONFIG.pages
    while engine.num_running or engine.num_waiting:
        engine.step()
    for ticket in tickets:
        completion, whole = ticket.completion, alone(ticket.request)
        assert completion is not None
        tokens = list(completion.tokens)
        cancelled = completion.reason is FinishReason.CANCELLED
        assert tokens == (whole[: len(tokens)] if cancelled else whole)
    assert_no_leak(engine)


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    engine = make_engine(replace(CONFIG, prefill_calls=1))
    first = engine.submit(Request(prompt(3), 30))
    engine.step()
    second = engine.submit(Request(prompt(40), 2))  # three chunks of 16
    for state in (State.PREFILL, State.PREFILL, State.DECODING):
        made = len(first.tokens)
        engine.step()
        assert len(first.tokens) == made + CONFIG.steps_per_call
        assert second.state is state or second.completion is not None
    for ticket in (first, second):
        *_, completion = engine.stream(ticket)
        assert isinstance(completion, Completion)
        assert list(completion.tokens) == alone(ticket.request)


def test_several_prompts_in_one_call() -> None:
    engine = make_engine(replace(CONFIG, prefill_rows=2))
    requests = mixed(9, seed=4, greedy=False)
    expected = make_engine().run(requests)
    assert tokens_of(engine.run(requests)) == tokens_of(expected)
    assert_no_leak(engine)


# Seeds


def test_a_seed_gives_the_same_tokens_in_any_company(engine: Engine) -> None:
    request = Request(prompt(10), 14, sampling=SAMPLED)
    expected = engine.run([request])[0].tokens
    assert len(set(expected)) > 5

    # In the last row, beside others.
    *_, last = engine.run([*mixed(2, seed=5, greedy=False), request])
    assert last.tokens == expected
    # Put back by older ones, which need all pages.
    long = [Request(prompt(20, seed=i), 25, sampling=replace(SAMPLED, seed=i)) for i in range(2)]
    *_, last = engine.run([*long, request])
    assert last.preemptions > 0
    assert last.tokens == expected
    # With another seed.
    other = engine.run([replace(request, sampling=replace(SAMPLED, seed=8))])[0].tokens
    assert other != expected


def test_sampled_tokens_are_those_of_the_selector(engine: Engine) -> None:
    """With the documented random state, on the float64 oracle's logits."""
    request = Request(prompt(5), 8, sampling=SAMPLED)
    tokens = list(engine.run([request])[0].tokens)
    ids, select = list(request.prompt), jax.jit(SAMPLED.selector)
    for index, token in enumerate(tokens):
        logits = jnp.asarray(MODEL.oracle_logits(ids), jnp.float32)[None]
        key = jax.random.wrap_key_data(SAMPLED.random_words(index), impl="unsafe_rbg")
        assert int(select(logits, key)[0]) == token
        ids.append(token)


# Log-probabilities


def test_log_probabilities_are_the_oracles(engine: Engine) -> None:
    requests = [
        Request(prompt(6), 6, top_log_probs=2),
        Request(prompt(6), 6, sampling=SAMPLED, top_log_probs=1),
        Request(prompt(6), 6),
    ]
    tickets = [engine.submit(request) for request in requests]
    for ticket in tickets:
        *new, completion = engine.stream(ticket)
        ids = list(ticket.request.prompt)
        for event in new:
            assert isinstance(event, NewToken)
            logits = MODEL.oracle_logits(ids)
            logits -= np.log(np.sum(np.exp(logits)))
            assert event.log_prob == pytest.approx(logits[event.token], abs=1e-4)
            best = np.argsort(-logits)[: ticket.request.top_log_probs].tolist()
            assert [token for token, _ in event.top] == best
            assert [p for _, p in event.top] == pytest.approx(logits[best], abs=1e-4)
            ids.append(event.token)
        assert isinstance(completion, Completion)
        assert completion.log_probs == tuple(event.log_prob for event in new)


# Text


def test_stop_strings_cut_the_text_wherever_tokens_end(engine: Engine) -> None:
    whole = engine.run([Request(prompt(7), 14)])[0]
    assert whole.text == letters(whole.tokens)
    for size in (1, 3):  # of one token, and of several, which may be of two calls
        for at in (0, 2, 5):
            stop = whole.text[at : at + size]
            at = whole.text.index(stop)
            completion = engine.run([Request(prompt(7), 14, stop=["no such", stop])])[0]
            assert completion.reason is FinishReason.STOP
            assert completion.text == whole.text[:at]
            assert completion.tokens == whole.tokens[: at + size]


def test_eos_is_a_token_but_not_text(engine: Engine) -> None:
    whole = engine.run([Request(prompt(7), 14)])[0]
    never = next(iter(set(range(VOCAB)) - set(whole.tokens)))
    for end in (0, 3, 6):
        eos = whole.tokens[end]
        at = whole.tokens.index(eos)
        completion = engine.run([Request(prompt(7), 14, eos_ids=[eos, never])])[0]
        assert completion.reason is FinishReason.EOS
        assert completion.tokens == whole.tokens[: at + 1]
        assert completion.text == whole.text[:at]


def test_streams_in_turns(engine: Engine) -> None:
    requests = mixed(5, seed=8)
    streams = [engine.stream(engine.submit(request)) for request in requests]
    got: list[list[Any]] = [[] for _ in requests]
    for _ in range(20):  # more than any has events
        for events, stream in zip(got, streams, strict=True):
            events += [event for event in [next(stream, None)] if event is not None]
    for request, (*new, completion) in zip(requests, got, strict=True):
        assert [event.token for event in new] == alone(request) == list(completion.tokens)
        assert [event.index for event in new] == list(range(len(new)))
        assert "".join(event.text for event in new) == completion.text


def test_a_step_tells_what_came_of_it(engine: Engine) -> None:
    tickets = [engine.submit(request) for request in mixed(6, seed=9)]
    told: list[Any] = []
    while engine.num_running or engine.num_waiting:
        told += engine.step()
    for ticket in tickets:
        assert [event for event in told if event.number == ticket.number] == ticket.events
    assert engine.step() == []


# Pages


def test_a_common_prefix_is_computed_once(engine: Engine) -> None:
    begin = prompt(18)
    first = engine.submit(Request([*begin, 1], 14))
    engine.step()
    second = engine.submit(Request([*begin, 2, 3], 14))
    engine.step()
    assert engine.usage.shared == 4  # of 18 tokens 4 pages are full
    assert (first.shared_tokens, second.shared_tokens) == (0, 16)
    for ticket in (first, second):
        *_, completion = engine.stream(ticket)
        assert isinstance(completion, Completion)
        assert list(completion.tokens) == alone(ticket.request)
    # A question and its answer are the beginning of the next question.
    longer = Request([*first.request.prompt, *first.tokens, 5], 3)
    completion = engine.run([longer])[0]
    assert completion.shared_tokens == (18 + 1 + 14 - 1) // 4 * 4
    assert list(completion.tokens) == alone(longer)


def test_cancelling_frees_at_once(engine: Engine) -> None:
    tickets = [engine.submit(Request(prompt(24, seed=i), 15)) for i in range(4)]
    assert [ticket.state for ticket in tickets] == [State.WAITING] * 4
    engine.step()
    running = [t for t in tickets if t.state in (State.PREFILL, State.DECODING)]
    assert len(running) == 2
    used = engine.usage.used
    completion = engine.cancel(running[0])
    assert engine.usage.used < used
    assert completion.reason is FinishReason.CANCELLED
    assert completion.text == letters(completion.tokens)
    assert running[0].state is State.FINISHED
    assert engine.cancel(running[0]) is completion
    assert engine.cancel(tickets[-1]).tokens == ()  # it had not begun
    engine.step()
    assert tickets[2].state is not State.WAITING
    for ticket in tickets[1:3]:
        *_, last = engine.stream(ticket)
        assert isinstance(last, Completion)
        assert list(last.tokens) == alone(ticket.request)


def test_older_requests_go_first(engine: Engine) -> None:
    tickets = [engine.submit(Request(prompt(20, seed=i), 20)) for i in range(6)]
    finished: list[Ticket] = []
    while len(finished) < len(tickets):
        engine.step()
        finished += [t for t in tickets if t.completion is not None and t not in finished]
    assert finished == tickets
    assert tickets[0].preemptions == 0
    assert sum(ticket.preemptions for ticket in tickets) > 0


def test_refusing_instead_of_waiting() -> None:
    engine = make_engine(replace(CONFIG, out_of_pages="refuse"))
    taken = [engine.submit(Request(prompt(20), 9)) for _ in range(2)]  # 7 pages each
    with pytest.raises(OutOfPagesError, match=r"may need 3 pages of 4 tokens; of 16 pages 2 are"):
        engine.submit(Request(prompt(8), 3))
    small = engine.submit(Request(prompt(8), 1))  # 2
    engine.cancel(taken[0])
    again = engine.submit(Request(prompt(8), 3))
    for ticket in (taken[1], small, again):
        *_, completion = engine.stream(ticket)
        assert isinstance(completion, Completion)
        assert completion.preemptions == 0
        assert list(completion.tokens) == alone(ticket.request)
    assert_no_leak(engine)


@pytest.mark.parametrize("new", [1, 2, 4, 5, 19])
def test_a_request_may_fill_all_its_pages(engine: Engine, new: int) -> None:
    requests = [Request(prompt(49 - new, seed=i), new) for i in range(3)]
    assert {request.most_tokens for request in requests} == {CONFIG.capacity}
    assert tokens_of(engine.run(requests)) == [alone(request) for request in requests]


def test_tickets_belong_to_an_engine(engine: Engine) -> None:
    ticket = make_engine().submit(Request([1], 1))
    for use in (engine.cancel, lambda ticket: next(engine.stream(ticket))):
        with pytest.raises(ValueError, match="request 0 was submitted to another engine"):
            use(ticket)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": prompt(40), "max_new_tokens": 10}, "40 tokens and .*=10 need 13 .* have 12"),
        ({"eos_ids": range(5)}, "5 eos_ids, but .* is 4"),
        ({"top_log_probs": 3}, "top_log_probs=3, but .* is 2"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    engine: Engine, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(replace(Request([1], 1), **change))


def test_a_pool_too_small_for_a_request() -> None:
    engine = Engine(MODEL, replace(CONFIG, num_pages=5))
    with pytest.raises(ValueError, match=r"need 6 pages of 4; .* and there are 5"):
        engine.submit(Request(prompt(20), 2))
    with pytest.raises(ValueError, match="stop strings need text"):
        engine.submit(Request([1], 1, stop=["x"]))
    engine.submit(Request(prompt(20), 1))


# The calls alone


def test_a_row_reads_and_writes_its_own_pages_alone() -> None:
    ids, mine = prompt(18), [9, 2, 13, 5, 7, 0]
    arrays = prefill_arrays({}, CONFIG)
    arrays["table"][0, : len(mine)] = mine
    pools = programs.make_pools(MODEL, CONFIG, {})
    pools = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), pools)
    for begin in (0, 16):
        part = ids[begin : begin + 16]
        arrays["tokens"][0, : len(part)] = part
        now = {"lengths": np.array([begin], np.int32), "counts": np.array([len(part)], np.int32)}
        logits, pools = programs.prefill(MODEL, pools, **{**arrays, **now})
        jax.block_until_ready(logits)
    np.testing.assert_allclose(logits[0], MODEL.oracle_logits(ids), atol=1e-4)

    # The second row decodes, the others idle; row 2 has pages of its own, which stay as they are.
    rows = decode_arrays([], CONFIG)
    rows.table[1], rows.table[2, :2] = arrays["table"][0], [4, 6]
    first = int(np.argmax(logits[0]))
    rows = replace(
        rows,
        lengths=np.array([0, 18, 7], np.int32),
        tokens=np.array([0, first, 3], np.int32),
        budget=np.array([0, 3, 0], np.int32),
    )
    before = [np.array(x) for x in jax.tree.leaves(pools)]
    chosen, made, pools = programs.decode(MODEL, pools, rows, num_steps=4, top=2)
    assert made.tolist() == [0, 3, 0]
    expected = MODEL.oracle_tokens(ids, 4)
    assert [first, *np.asarray(chosen.tokens)[:3, 1].tolist()] == expected
    for old, new in zip(before, jax.tree.leaves(pools), strict=True):
        new = np.asarray(new)
        changed = [p for p in range(len(old)) if not np.array_equal(old[p], new[p], equal_nan=True)]
        assert set(changed) <= set(mine[4:6])  # of slots 18 to 20
        assert changed

    # The same again, but the second new token ends the row: there the device stops, not the host.
    rows.eos_ids[1, 2] = expected[2]
    _, made, _ = programs.decode(MODEL, pools, rows, num_steps=4, top=2)
    assert made.tolist() == [0, 2, 0]


class Choking(Letters):
    """A decoder that cannot read a token, or end a text, the first time it has to."""

    pushes = flushes = 0

    def push(self, token_id: Any) -> str:
        type(self).pushes -= 1
        if self.pushes == 0:
            raise UnicodeError("no such letter")
        return super().push(token_id)

    def flush(self) -> str:
        type(self).flushes -= 1
        if self.flushes == 0:
            raise UnicodeError("no such end")
        return super().flush()


@pytest.mark.parametrize(("pushes", "flushes"), [(1, 0), (2, 0), (0, 1)])
def test_a_ticket_stays_as_it_is_when_its_decoder_raises(pushes: int, flushes: int) -> None:
    decoder = type("Decoder", (Choking,), {"pushes": pushes, "flushes": flushes})
    ticket = Ticket(0, Request([1], 2), TextStream(decoder()))
    for token in range(2):
        try:
            reason = ticket.add(token, 0.0, [])
        except UnicodeError:
            assert (len(ticket.tokens), len(ticket.events)) == (token, token)
            reason = ticket.add(token, 0.0, [])
    assert reason is FinishReason.LENGTH
    assert (ticket.tokens, len(ticket.events)) == ([0, 1], 2)


@pytest.mark.parametrize("pushes", [1, 2, 7, 12])
def test_a_decoder_that_raises_costs_nobody_a_token(pushes: int) -> None:
    """Its own row goes on where it was, and the rows beside it have what the call gave them."""
    requests = [Request(prompt(n, seed=n), 9) for n in (3, 9, 14)]
    decoder = type("Decoder", (Choking,), {"pushes": pushes})
    engine = Engine(MODEL, replace(CONFIG, prefill_rows=2), decoder=decoder)
    tickets = [engine.submit(request) for request in requests]
    raised = 0
    while engine.num_running or engine.num_waiting:
        try:
            engine.step()
        except UnicodeError:
            raised += 1
    assert raised == 1
    assert [ticket.tokens for ticket in tickets] == [alone(request) for request in requests]
    assert_no_leak(engine)
