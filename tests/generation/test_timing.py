"""What is measured for `Adaptive`, with a clock that only the calls of the two loops advance."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from jax_tkg import generate
from jax_tkg.generation import Adaptive, DraftModel, PromptLookup, StepTimes, step_times, timing
from jax_tkg.generation.runs import Speculative
from tests import odd
from tests.generation.test_adaptive import MODEL, PROMPTS, Stubborn

pytestmark = pytest.mark.usefixtures("compile_quickly")

REPETITIONS, STEPS = 3, 2


class Clock:
    """Seconds of the calls so far; the first call of each loop compiles and takes long."""

    def __init__(self) -> None:
        self.now, self.calls, self.lengths = 0.0, [], []

    def advance(self, drafts: bool) -> None:
        first = drafts not in self.calls
        self.calls.append(drafts)
        # With drafts 8, 6 and 7 seconds, without always 4.
        busy = (8.0, 6.0, 7.0)[self.calls.count(True) % 3 - 2] if drafts else 4.0
        self.now += 1000.0 if first else busy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found, call = Clock(), Speculative.call

    def timed(self: Any, request: Any, state: Any, *, drafts: bool) -> Any:
        found.advance(drafts)
        emitted, state = call(self, request, state, drafts=drafts)
        found.lengths.append(state.lengths.tolist())
        return emitted, state

    monkeypatch.setattr(Speculative, "call", timed)
    monkeypatch.setattr(timing, "perf_counter", lambda: found.now)
    return found


@pytest.mark.parametrize("by_model", [False, True], ids=["lookup", "model"])
def test_the_shortest_without_what_compiles(clock: Clock, by_model: bool) -> None:
    """The draft model is the model: all of its drafts are accepted, and rows are longest."""
    drafter = DraftModel(MODEL, 3) if by_model else PromptLookup(3)
    options = {"steps_per_call": STEPS, "repetitions": REPETITIONS}
    times = step_times(MODEL, PROMPTS, drafter, **options)
    assert clock.calls == [True, False] * (1 + REPETITIONS)
    assert times == StepTimes(6 / STEPS, 4 / STEPS)
    assert times.break_even == 6 / 4
    assert Adaptive(drafter, break_even=times.break_even).can_pause
    # Where all drafts are accepted, every step gave a row all it can: none ended before the last.
    new = clock.lengths[-1][0] - len(PROMPTS[0])
    most = 1 + (1 + REPETITIONS) * STEPS * (4 + 1)
    assert new == most if by_model else new < most


def test_steps_with_drafts_are_never_counted_as_cheaper() -> None:
    times = StepTimes(drafted=0.001, undrafted=0.002)
    assert times.break_even == 1
    assert str(times) == "1.00 ms a step with drafts, 2.00 ms without: pays from 1.00 tokens a step"


def test_what_is_measured_does_not_change_the_model() -> None:
    before = generate(MODEL, PROMPTS, max_new_tokens=8).tokens.tolist()
    times = step_times(MODEL, PROMPTS, PromptLookup(3), steps_per_call=STEPS, repetitions=1)
    assert times.drafted > 0
    assert times.undrafted > 0
    assert generate(MODEL, PROMPTS, max_new_tokens=8).tokens.tolist() == before


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases({"repetitions": odd.NO_SIZES, "steps_per_call": odd.NO_SIZES}),
)
def test_sizes(name: str, value: Any) -> None:
    odd.assert_refused(name, lambda: step_times(MODEL, PROMPTS, PromptLookup(), **{name: value}))


@pytest.mark.usefixtures("no_shape_checks")
def test_what_cannot_be_measured() -> None:
    with pytest.raises(TypeError, match="Stubborn cannot be paused"):
        step_times(MODEL, PROMPTS, Stubborn())
    with pytest.raises(TypeError, match=r"drafter must be PromptLookup\(\)"):
        step_times(MODEL, PROMPTS, None)
    with pytest.raises(TypeError, match="has no init_caches"):
        step_times(jnp.ones(3), PROMPTS, PromptLookup())
