"""Nothing in the decode kernel can be left out or mistaken: a small launch goes wrong.

Statements, operations, scales and biases are found in the sources of the kernel and its steps,
whatever these are. Each is spoilt in turn; a launch that runs it then has to be refused by the
interpreter, or to miss the error budget against float64.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import RotaryEmbedding
from jax_tkg.attention import prepare
from jax_tkg.nki.implementation import NkiInterpret
from jax_tkg.nki.plan import Features
from jax_tkg.problem import Op
from tests.cases import Case, inputs
from tests.conformance import jax_arguments
from tests.grid.checking import compare, expected, prepared, run
from tests.nki import test_kernel, test_rope_kernel
from tests.nki.mutations import (
    TOP,
    Line,
    Mutation,
    is_run,
    kernel_modules,
    lines_run,
    mutated,
    mutations,
)

Check = Callable[[], None]
"""Launches a kernel; raises if it is refused or wrong."""

ONE, TWO = NkiInterpret(programs=1), NkiInterpret(programs=2)
FINITE = NkiInterpret(programs=1, unseen_values="finite")
EVERY_TILE = NkiInterpret(programs=2, exchange="every tile")

SHARED: dict[str, Any] = {
    "batch": 2, "tokens": 2, "slots": 700, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "beside": True, "sinks": True, "cap": 6.0, "peak": 3.0,
}  # fmt: skip
LONG: dict[str, Any] = {
    "tokens": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "layout": "BKSH", "beside": True,
}  # fmt: skip
WIDE = LONG | {"head_dim": 128}
FULL: dict[str, Any] = {
    "batch": 1, "tokens": 2, "heads": 64, "kv_heads": 1, "head_dim": 16, "layout": "BKSH",
}  # fmt: skip
NARROW: dict[str, Any] = {"batch": 1, "slots": 1024, "peak": 4.0}
HALVES: dict[str, Any] = NARROW | {"layout": "BKHS", "slots": 10_240, "growth": 30.0}
MORE = FULL | {"heads": 80}
EIGHT_BITS: dict[str, Any] = {"cache_dtype": "float8_e4m3", "scales": "head", "tokens": 2}

LAUNCHES = (
    (Case("short", rows="empty", beside=True, sinks=True), ONE),
    (Case("bf16", query_dtype="bfloat16", layout="BKSH", slots=300, tokens=3, beside=True), ONE),
    (Case("ring", slots=40, positions="ring", holder="cache", window=(24, 0), beside=True), ONE),
    (Case("int8", cache_dtype="int8", scales="tensor", slots=300, beside=True), TWO),
    (Case("pages", layout="paged", page_len=16, query_dtype="bfloat16", slots=400, batch=2,
          mask="full", bias="full", window=(90, 0), **EIGHT_BITS), TWO),
    (Case("pages-bf16", layout="paged", page_len=8, query_dtype="bfloat16", slots=1400, batch=1,
          cache_dtype="bfloat16", tokens=2, head_dim=16, growth=4.0, peak=6.0), ONE),
    # Heads of 64 channels: keys and values of two columns in one matmul.
    (Case("narrow", query_dtype="bfloat16", layout="BKSH", rows="all", **NARROW), ONE),
    (Case("narrow-BSKH", query_dtype="bfloat16", layout="BSKH", rows="all", **NARROW), ONE),
    (Case("narrow-float32", layout="BKSH", rows="all", **NARROW), ONE),
    (Case("narrow-pages", query_dtype="bfloat16", layout="paged", page_len=16, rows="all",
          **NARROW), FINITE),
    (Case("narrow-transposed", rows="all", beside=True, **HALVES), ONE),
    (Case("narrow-columns", rows="all", value_head_dim=32, **HALVES), TWO),
    (Case("narrow-live", longest=10_100, **HALVES), TWO),
    # Two gathers at once, then one of shorter runs, then one that does not fill the partitions.
    (Case("pages-runs", layout="paged", page_len=16, query_dtype="bfloat16", slots=5168, batch=1,
          mask="full", beside=True, growth=4.0, peak=6.0, **EIGHT_BITS), ONE),
    (Case("pages-loop", layout="paged", page_len=16, query_dtype="bfloat16", slots=5120, batch=1,
          cache_dtype="bfloat16", tokens=2, head_dim=16, growth=4.0, peak=6.0), ONE),
    (Case("mask-shared", mask="shared", slots=200, layout="BSKH", peak=3.0), ONE),
    (Case("mask-only", mask="full", rows="all", beside=True, slots=200, layout="BSKH"), ONE),
    (Case("dense-beside", mask="full", bias="full", beside=True, slots=200, **EIGHT_BITS), ONE),
    (Case("wide", head_dim=192, value_head_dim=160, layout="BKHS", mask="full", bias="shared",
          slots=300, positions="given"), ONE),
    (Case("wide-bf16", head_dim=192, layout="BKHS", query_dtype="bfloat16", slots=300), ONE),
    (Case("wide-shared", head_dim=160, layout="BKSH", slots=300, tokens=3, batch=1), TWO),
    # So many sequences of one token that two bytes say which of them see a key.
    (Case("one-token", batch=32, heads=4, kv_heads=1, head_dim=16, slots=2100, beside=True,
          layout="BKSH", mask="full", bias="full"), ONE),
    # Programs that share sequences, in one tile each.
    (Case("shared", **SHARED), TWO),
    (Case("shared-every-tile", **SHARED), EVERY_TILE),
    # More bounds than the Vector engine transposes at once.
    (Case("bounds", batch=20, slots=40, heads=2, kv_heads=1, head_dim=16, window=(24, 0)), ONE),
    # More rows that share keys than there are partitions; several tiles; one tile more for one
    # program than for the other, with the largest logits of some rows in it. Logits so large that
    # any number below a maximum overflows the exponential.
    (Case("many-rows", heads=40, kv_heads=1, tokens=4, slots=300, batch=1, beside=True,
          sinks=True, layout="BKSH"), TWO),
    (Case("tiles", slots=4500, growth=30.0, peak=200.0, **FULL), ONE),
    (Case("tiles-uneven", slots=3100, growth=1.0, rows="all", **MORE), EVERY_TILE),
    # Long enough for any loop over tiles. Keys that grow show what is not rescaled; with keys that
    # all weigh the same, one that is lost or counted twice shows.
    (Case("long", batch=1, slots=9000, growth=30.0, peak=6.0, **LONG), ONE),
    (Case("long-every-tile", batch=1, slots=17000, growth=30.0, peak=6.0, **LONG), EVERY_TILE),
    # Heads so wide that loads decide, where new keys follow the first of several sequences.
    (Case("long-wide", batch=3, slots=2100, rows="starts only", growth=1.0, peak=0.3, **WIDE), ONE),
    (Case("long-flat", batch=2, slots=17000, growth=1.0, peak=0.3, **LONG), TWO),
)  # fmt: skip
"""Small problems in which, together, everything matters."""

EXPLAINED: dict[str, str] = {
    "finalize.find_lse: op0=less_equal in nisa.tensor_scalar("
    "dst=empty, data=total, op0=nl.less, operand0=NO_SUM)": "no sum is so near to NO_SUM",
}
"""What makes no difference to any launch, and why it is there all the same."""


def of_case(case: Case, form: NkiInterpret) -> Check:
    """Output and log-sum-exp of the kernel, launched for a call of the op."""
    given = inputs(case)
    call = prepare(op=Op.TKG, **jax_arguments(case, given))
    launch, wanted = prepared(call, form), expected(given)

    def check() -> None:
        out, lse, _ = run(launch, form)
        compare(given, wanted, out, lse)

    return check


class Interleaved(test_kernel.Case):
    """Rotates pairs of channels side by side, its parent those half the channels apart."""

    def rotated(self, name: str) -> np.ndarray:
        positions = jnp.asarray(self.arrays["query_positions"])
        rotary = RotaryEmbedding(interleaved=True)
        return np.asarray(rotary(jnp.asarray(self.arrays[name]), positions), np.float64)


def rotation(kind: type[test_kernel.Case], rotary: str, **changes: Any) -> None:
    """The kernel rotates queries and new keys itself."""
    features = Features(scale=0.125, has_new_keys=True, rotary=rotary, is_ragged=True)
    case = kind(test_kernel.planned(features, slots=200, **changes), [199, 64])
    assert case.error(refuse_uninitialized=True) < test_kernel.CLOSE
    keys = case.run().outputs[2]
    np.testing.assert_allclose(keys, case.rotated("new_key"), atol=1e-6, rtol=0)


def live(lengths: list[int], window: int | None = None, **changes: Any) -> None:
    """A loop at run time over the live keys; what nobody sees is NaN, unless it must not be."""
    features = replace(test_kernel.PLAIN, has_low=window is not None, **changes)
    case = test_kernel.Case(test_kernel.planned(features, loop="runtime"), lengths, window)
    if not features.clears_values:
        case.arrays |= {name: np.nan_to_num(case.arrays[name], nan=3.0) for name in CACHE}
    assert case.error(refuse_uninitialized=True) < test_kernel.CLOSE


CACHE = ("key", "value")
ROTARY = test_rope_kernel.ROTARIES
CHECKS: tuple[Check, ...] = (
    partial(live, [900, 40]),
    partial(live, [768, 897], 200),
    partial(live, [40, 500], clears_values=False),
    partial(test_kernel.test_pages_that_are_missing_among_live_ones, 40, masked=None, programs=1),
    partial(test_kernel.test_without_the_log_sum_exp, 1),
    partial(rotation, test_kernel.Case, "half"),
    partial(rotation, Interleaved, "interleaved", programs=2),
    partial(test_kernel.test_queries_and_results_in_sbuf, 1, 200, 2, "batch"),
    partial(test_kernel.test_queries_and_results_in_sbuf, 3, 200, 2, "batch"),
    partial(test_rope_kernel.test_rotation, ROTARY[2], np.float32, 1),
    partial(test_rope_kernel.test_angles_are_exact_up_to_a_million, ROTARY[0], np.float32),
    test_rope_kernel.test_the_step_fills_a_tile_of_another_type,
)
"""What the op does not ask of the kernel and its steps."""


SHARED = {"jax_tkg.nki.mask": ("hidden_by_key",)}
"""Steps of another kernel that this one takes; the tests of others spoil what else is there."""


def mutations_of_ours(module: str) -> list[Mutation]:
    """All that can be wrong in what a module has of this kernel."""
    mine = SHARED.get(module)
    return [m for m in mutations(module) if mine is None or m.function[0] in mine]


@dataclass(frozen=True)
class Example:
    """A launch that goes well.

    Attributes:
        check: launches and compares.
        seen: lines of the kernel that it runs.
        seconds: it takes.
    """

    check: Check
    seen: frozenset[Line]
    seconds: float

    def goes_well(self) -> bool:
        """Whether the kernel as it is now is accepted, and right."""
        try:
            self.check()
        except Exception:  # whatever a broken kernel runs into
            return False
        return True


@cache
def examples() -> tuple[Example, ...]:
    """All launches, the quickest first."""
    made = []
    for check in (*(of_case(*launch) for launch in LAUNCHES), *CHECKS):
        with lines_run(kernel_modules()) as seen:
            check()
        begin = time.perf_counter()
        check()
        made.append(Example(check, frozenset(seen), time.perf_counter() - begin))
    return tuple(sorted(made, key=lambda example: example.seconds))


def survives(mutation: Mutation, running: list[Example]) -> bool:
    """Whether every launch that runs the mutated line goes well."""
    with mutated(mutation):
        return all(one.goes_well() for one in running)


@pytest.mark.parametrize("module", kernel_modules())
def test_every_mutation_is_noticed(module: str) -> None:
    left = set()
    for mutation in mutations_of_ours(module):
        running = [one for one in examples() if is_run(mutation, one.seen)]
        if survives(mutation, running):
            left.add(str(mutation))
    short = module.rpartition(".")[2]
    assert left == {text for text in EXPLAINED if text.startswith(f"{short}.")}


def test_mutations_are_many_and_are_undone() -> None:
    everything = [m for module in kernel_modules() for m in mutations_of_ours(module)]
    assert len({str(m) for m in everything}) == len(everything) > 100
    mutation, quickest = next(
        (m, e) for e in examples() for m in everything if m.module == TOP and is_run(m, e.seen)
    )
    with mutated(mutation):
        assert not quickest.goes_well()
    assert quickest.goes_well()
