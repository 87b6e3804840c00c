"""Nothing in the prefill kernel can be left out or mistaken: a small launch goes wrong.

Statements, operations, scales and biases are found in the sources of the kernel and its steps. Each
is spoilt in turn; a launch that runs it then has to be refused by the interpreter, or to miss the
error budget against float64.
"""

from functools import cache
from typing import Any, NamedTuple

import pytest

from jax_tkg.rope import RotaryEmbedding
from tests.nki.cte.problems import Case, Problem, excess
from tests.nki.mutations import Line, Mutation, is_run, lines_run, mutated, mutations

FILES = (
    "kernel", "plan", "tiles", "load", "load_keys", "logits", "mask", "softmax", "pv", "finalize",
)  # fmt: skip
MODULES = [f"jax_tkg.nki.cte.{name}" for name in FILES]

SHARED = {
    "jax_tkg.nki.mask": ("hidden_by_row", "select_slots"),
    "jax_tkg.nki.rope": ("rotate_tokens", "rotate_heads"),
}
"""Steps of other kernels that this one takes; what else is there their tests spoil."""

SMALL: dict[str, Any] = {"head_dim": 8, "value_head_dim": 8, "tokens": 40, "slots": 40}

LAUNCHES: dict[str, dict[str, Any]] = {
    # Rows that saw no key yet, or never, next to rows that did; few, so that each one counts.
    "short": SMALL | {"batch": 2, "lengths": (40, 0), "tokens": 7},
    "sinks": SMALL | {"batch": 2, "lengths": (40, 0), "sinks": True},
    "first rows see nothing": SMALL | {"tokens": 150, "slots": 10, "heads": 1},
    "state": SMALL | {"normalize": False, "lengths": (11,), "growth": 30.0},
    "ragged": SMALL | {"tokens": 140, "slots": 300, "window": (100, 0), "beside": True,
                       "scale": 0.4, "sinks": True},
    # Keys that grow, over several tiles: the maximum moves, what was summed shrinks.
    "tiles": SMALL | {"slots": 1300, "growth": 40.0, "scale": 0.5, "causal": False},
    "wide": SMALL | {"head_dim": 136, "value_head_dim": 130, "layout": "BKHS", "bias": (1, 2, 1)},
    "logits": SMALL | {"cap": 2.0, "bias": (1, 1, 40), "alibi": True, "mask": (1, 2, 1),
                       "scale": 1.0},
    "ring": SMALL | {"ring": True, "batch": 2, "window": (20, 0), "alibi": True,
                     "causal": False, "mask": (1, 1, 40), "scale": -0.5},
    "window": SMALL | {"tokens": 200, "slots": 200, "window": (30, 12), "causal": False},
    "int8": SMALL | {"stored": "int8", "beside": True, "layout": "BSKH", "heads": 4,
                     "kv_heads": 2},
    "int8, capped": SMALL | {"stored": "int8", "cap": 2.0, "scale": 1.0},
    "pages": SMALL | {"layout": "paged", "page_len": 20, "lengths": (33,)},
    "holes": SMALL | {"layout": "paged", "page_len": 8, "holes": True, "heads": 1},
    "live": SMALL | {"live": True, "slots": 1700, "lengths": (1600,), "growth": 40.0,
                     "causal": False, "alibi": True, "stored": "int8"},
    "live pages": SMALL | {"live": True, "slots": 1056, "lengths": (1000,), "layout": "paged",
                           "page_len": 32, "holes": True, "window": (900, 0)},
    "turned by DMA": SMALL | {"dtype": "bfloat16", "layout": "BSKH"},
    "gathered": SMALL | {"layout": "paged", "page_len": 8, "holes": True, "dtype": "bfloat16",
                         "heads": 1, "slots": 128},
    "rotated": SMALL | {"beside": True, "slots": 30, "rope": RotaryEmbedding(), "tokens": 140},
    "rotated by two": SMALL | {"beside": True, "slots": 30, "rope": RotaryEmbedding(rotary_dim=4),
                               "programs": 2},
    "looped": SMALL | {"looped": True, "heads": 9, "tokens": 260, "slots": 600, "growth": 40.0,
                       "lengths": (590,)},
    "looped diagonal": SMALL | {"looped": True, "heads": 9, "tokens": 270, "slots": 581,
                                "layout": "paged", "page_len": 7, "alibi": True},
    "looped beside": SMALL | {"looped": True, "heads": 9, "tokens": 520, "slots": 20,
                              "beside": True},
    "shared": SMALL | {"tokens": 300, "slots": 300, "programs": 2, "packed": (100, 20, 180)},
}  # fmt: skip
"""Small problems in which, together, everything matters."""

EXPLAINED = {
    "kernel.attend_live_tiles: without drain(place.pipeline, inputs, outputs, plan)": (
        "The compiler builds the body of the loop once: a step still under way would be completed "
        "in every round. The interpreter builds each round anew."
    ),
    "kernel.attend_rounds: without drain(pipeline, inputs, outputs, plan)": "Likewise.",
}
"""What makes no difference to any launch, and why it is there all the same."""


class Launch(NamedTuple):
    """A launch that goes well, and the lines of the kernel that it runs."""

    case: Case
    seen: frozenset[Line]

    def goes_well(self) -> bool:
        """Whether the kernel as it is now is accepted, and right."""
        try:
            return excess(self.case, refuse_uninitialized=True) <= 1
        except Exception:  # whatever a broken kernel runs into
            return False


@cache
def launches() -> tuple[Launch, ...]:
    """All of them."""
    made = []
    for changes in LAUNCHES.values():
        case = Case(Problem(**changes))
        with lines_run([*MODULES, *SHARED]) as seen:
            assert excess(case, refuse_uninitialized=True) <= 1
        made.append(Launch(case, frozenset(seen)))
    return tuple(made)


def survives(mutation: Mutation) -> bool:
    """Whether every launch that runs the mutated line goes well."""
    running = [launch for launch in launches() if is_run(mutation, launch.seen)]
    with mutated(mutation):
        return all(launch.goes_well() for launch in running)


def mutations_of(module: str) -> list[Mutation]:
    """Those of the prefill kernel."""
    found, mine = mutations(module), SHARED.get(module)
    return [m for m in found if mine is None or m.function[0] in mine]


@pytest.mark.parametrize("module", [*MODULES, *SHARED])
def test_every_mutation_is_noticed(module: str) -> None:
    left = {str(mutation) for mutation in mutations_of(module) if survives(mutation)}
    short = module.rpartition(".")[2]
    assert left == {text for text in EXPLAINED if text.startswith(f"{short}.")}


def test_mutations_are_many_and_are_undone() -> None:
    everything = [m for module in MODULES for m in mutations(module)]
    assert len({str(m) for m in everything}) == len(everything) > 80
    assert launches()[0].goes_well()
    with mutated(next(m for m in everything if "accumulate(" in str(m))):
        assert not launches()[0].goes_well()
    assert launches()[0].goes_well()
