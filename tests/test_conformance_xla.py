"""The online softmax passes every case, in the forms of all platforms."""

import pytest

from jax_tkg.implementations import Implementation
from tests.cases import BY_HAND, GRID, PAIRWISE, Case
from tests.conformance import InTiles, check, parameters

ROWS = ("xla", InTiles("cpu", 3))
BLOCKS = (InTiles("tpu", 5), InTiles("neuron", 3), InTiles("tpu", 1))

# Every case goes row by row or in blocks, those written by hand both: all ways would take too long.
IN_TURN = [
    *((case, form) for i, case in enumerate(BY_HAND) for form in (ROWS[1], BLOCKS[i % 3])),
    *((case, ROWS[i % 4 // 2] if i % 2 else BLOCKS[i % 3]) for i, case in enumerate(PAIRWISE)),
]
THE_OTHER_WAY = [
    (case, BLOCKS[i % 3] if i % 2 else ROWS[i % 4 // 2]) for i, case in enumerate(PAIRWISE)
]


@pytest.mark.parametrize("case", parameters((*BY_HAND, *GRID)))
def test_xla(case: Case) -> None:
    check(case, "xla")


@pytest.mark.parametrize(("case", "form"), IN_TURN, ids=str)
def test_xla_in_the_form_of(case: Case, form: str | Implementation) -> None:
    check(case, form)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "form"), THE_OTHER_WAY, ids=str)
def test_xla_in_the_other_form(case: Case, form: str | Implementation) -> None:
    check(case, form)
