"""The online softmax passes every case, in the form of every platform."""

import pytest

from jax_tkg.implementations import Implementation
from tests.cases import CASES, GRID, Case
from tests.conformance import InTiles, check, parameters

# Each case in two other forms than its own: one of either pair, in turn.
FORMS = ((InTiles("cpu", 3), InTiles("tpu", 5)), (InTiles("tpu", 1), InTiles("neuron", 3)))
SMALL = [case for case in CASES if case not in GRID]
IN_TURN = [(case, form) for i, case in enumerate(SMALL) for form in FORMS[i % 2]]


@pytest.mark.parametrize("case", parameters(CASES))
def test_xla(case: Case) -> None:
    check(case, "xla")


@pytest.mark.parametrize(
    ("case", "form"), IN_TURN, ids=[f"{case.name}-{form.name}" for case, form in IN_TURN]
)
def test_xla_in_the_form_of(case: Case, form: Implementation) -> None:
    check(case, form)
