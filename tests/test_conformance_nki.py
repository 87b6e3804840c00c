"""The NKI kernel in the interpreter passes every case, on one program and on two."""

import pytest

from jax_tkg.implementations import Implementation
from jax_tkg.nki.implementation import NkiInterpret
from tests.cases import BY_HAND, GRID, PAIRWISE, Case
from tests.conformance import check, parameters

FORMS = (NkiInterpret(programs=1), NkiInterpret(), NkiInterpret(exchange="every tile"))

# Each case in one form, in turn: all forms would take too long.
IN_TURN = [(case, FORMS[i % 3]) for i, case in enumerate((*BY_HAND, *PAIRWISE))]


@pytest.mark.parametrize(("case", "form"), IN_TURN, ids=str)
def test_nki_interpret(case: Case, form: Implementation) -> None:
    check(case, form)


@pytest.mark.parametrize("case", parameters(GRID))
def test_nki_interpret_on_the_grid(case: Case) -> None:
    check(case, "nki_interpret")
