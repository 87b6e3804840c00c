"""The online softmax passes every case, in the form of every platform."""

import pytest

from jax_tkg.implementations import Implementation
from tests.cases import CASES, GRID, Case
from tests.conformance import InTiles, check, parameters

FORMS = [InTiles("cpu", 3), InTiles("tpu", 1), InTiles("tpu", 5), InTiles("neuron", 3)]


@pytest.mark.parametrize("case", parameters(CASES))
def test_xla(case: Case) -> None:
    check(case, "xla")


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", parameters(c for c in CASES if c not in GRID))
def test_xla_in_the_form_of(form: Implementation, case: Case) -> None:
    check(case, form)
