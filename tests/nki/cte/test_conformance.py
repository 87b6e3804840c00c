"""The prefill kernel, interpreted, passes the prefill cases on one program and on two."""

from dataclasses import replace
from functools import partial

import pytest

from jax_tkg.nki.cte import plan
from jax_tkg.nki.cte.implementation import NkiPrefillInterpret
from tests.cases import Case
from tests.conformance import check, parameters
from tests.prefill.cases import LARGE, QUICK

ALWAYS = ("everything", "short-in-long")
FEW = [case for i, case in enumerate(QUICK) if i % 10 == 0 or case.name in ALWAYS]
OTHERS = [case for case in QUICK if case not in FEW]


@pytest.mark.parametrize("case", parameters(FEW[::2]))
def test_one_program(case: Case) -> None:
    check(case, NkiPrefillInterpret(programs=1))


@pytest.mark.parametrize("case", parameters(FEW[1::2]))
def test_two_programs(case: Case) -> None:
    check(case, "nki_interpret")


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("case", parameters(OTHERS))
def test_the_other_cases(case: Case, programs: int) -> None:
    check(case, NkiPrefillInterpret(programs=programs))


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 2])
def test_a_prompt_padded_on_the_right_visits_live_tiles(programs: int) -> None:
    case = next(case for case in QUICK if case.name == "right-padded")
    check(replace(case, tokens=1200, slots=1200), NkiPrefillInterpret(programs=programs))


@pytest.fixture
def small_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in loops at run time, over groups of one row block and tiles of 128 keys."""
    monkeypatch.setattr(plan, "GROUP_BLOCKS", 1)
    monkeypatch.setattr(plan, "TILE_BYTES", 512)
    monkeypatch.setattr(plan, "make_plan", partial(plan.make_plan, unrolled_steps=0))


def longer(case: Case) -> Case:
    """Of more tokens than a row block."""
    more = 130
    return replace(case, tokens=case.tokens + more, slots=case.slots + (not case.beside) * more)


@pytest.mark.usefixtures("small_loops")
def test_in_loops() -> None:
    case = next(case for case in QUICK if case.name == "chunk-beside")
    check(longer(case), NkiPrefillInterpret(programs=1))


@pytest.mark.slow
@pytest.mark.usefixtures("small_loops")
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("case", parameters(QUICK))
def test_in_loops_all(case: Case, programs: int) -> None:
    check(longer(case), NkiPrefillInterpret(programs=programs))


@pytest.mark.slow
@pytest.mark.parametrize("case", parameters(LARGE))
def test_large(case: Case) -> None:
    check(case, "nki_interpret")
