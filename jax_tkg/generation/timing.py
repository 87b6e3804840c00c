"""How long a step takes with drafts and without: what `Adaptive(break_even=)` asks for.

Measured beforehand and by a call of its own, not while text is generated: the rule of `Adaptive`
reads no clock, so that a seed reproduces a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax

from jax_tkg._checks import whole_number
from jax_tkg.generation.adaptive import Adaptive
from jax_tkg.generation.api import GREEDY, SPECULATIVE_STEPS, prepare
from jax_tkg.generation.drafts import Drafter
from jax_tkg.generation.model import ScoringModel
from jax_tkg.generation.prompts import PromptLengths, Prompts
from jax_tkg.generation.runs import Speculative
from jax_tkg.sampling import TokenSelector


@dataclass(frozen=True)
class StepTimes:
    """Of a step of the compiled loops, seconds on the wall clock.

    Attributes:
        drafted: with drafts: they are made, and the model takes in all of them at once.
        undrafted: without: the model takes in one token of each row.
    """

    drafted: float
    undrafted: float

    @property
    def break_even(self) -> float:
        """The tokens that a step with drafts must give each row to pay; at least 1."""
        return max(self.drafted / self.undrafted, 1.0)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{1e3 * self.drafted:.2f} ms a step with drafts, {1e3 * self.undrafted:.2f} ms "
            f"without: pays from {self.break_even:.2f} tokens a step"
        )


def step_times(
    model: ScoringModel,
    prompts: Prompts,
    drafter: Drafter,
    *,
    prompt_lengths: PromptLengths = None,
    selector: TokenSelector = GREEDY,
    steps_per_call: int = SPECULATIVE_STEPS,
    cache_options: Mapping[str, Any] | None = None,
    repetitions: int = 5,
) -> StepTimes:
    """Measures the steps between which `Adaptive` chooses, on this model, machine and batch.

        times = step_times(model, prompts, PromptLookup())
        rule = Adaptive(PromptLookup(), break_even=times.break_even)

    The prompts are continued by calls of the two loops in turns, `repetitions` of each after one
    that compiles it; no row ends meanwhile. What counts of the prompts is how many and how long
    they are. On a machine that is busy otherwise, take more repetitions.

    Args:
        model: this and everything not named below is as in `generate`.
        prompts: as many as will be generated from at a time, of usual lengths.
        drafter: one that can be paused (`PausableDrafter`), such as `PromptLookup()`.
        prompt_lengths: as in `generate`.
        selector: as in `generate`.
        steps_per_call: as in `generate`.
        cache_options: as in `generate`; their dtype matters.
        repetitions: calls of each loop that are timed, at least 1.

    Returns:
        The shortest of the repetitions: what else the machine does can only add to it.

    Raises:
        TypeError: as `generate`, or for a drafter that cannot be paused.
        ValueError: as `generate`.
    """
    rounds = 1 + whole_number("repetitions", repetitions, least=1)
    steps = whole_number("steps_per_call", steps_per_call, least=1)
    rule = Adaptive(drafter)
    request, _ = prepare(
        model,
        prompts,
        prompt_lengths,
        selector=selector,
        eos_ids=(),
        pad_id=0,
        key=None,
        # The prompt's, and in each round up to `max_tokens + 1` and one of every step.
        max_new_tokens=1 + rounds * steps * (drafter.max_tokens + 2),
        prefill_chunk=64,
        steps_per_call=steps,
        capacity=None,
        cache_options=cache_options,
        speculate=rule,
        with_log_probs=False,
    )
    decoding = Speculative(rule)
    state, _ = decoding.start(request)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for drafts, found in seconds.items():
            state = jax.block_until_ready(decoding.follow(request, state))
            begin = perf_counter()
            _, state = jax.block_until_ready(decoding.call(request, state, drafts=drafts))
            found.append((perf_counter() - begin) / steps)
    return StepTimes(*(min(found[1:]) for found in seconds.values()))
