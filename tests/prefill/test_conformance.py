"""Every implementation of `attention_cte` passes every prefill case."""

import pytest

from jax_tkg.implementations import Implementation
from jax_tkg.online.plan import Form
from tests.cases import Case
from tests.conformance import check, parameters
from tests.prefill.cases import BY_HAND, LARGE, PAIRWISE, QUICK
from tests.prefill.forms import SmallTiles

FORMS = (
    SmallTiles(Form.ROWS, 16, 16),
    SmallTiles(Form.BLOCKS, 16, 16),
    SmallTiles(Form.ROWS, 24, 7),
    SmallTiles(Form.BLOCKS, 7, 24),
)

# Some cases in one form quickly, and all in all of them slowly.
IN_TURN = [(case, FORMS[i % 4]) for i, case in enumerate((*BY_HAND[::3], *PAIRWISE[::8]))]
ALL = [(case, form) for case in QUICK for form in (*FORMS, "xla", "reference")]


@pytest.mark.parametrize(("case", "form"), IN_TURN, ids=str)
def test_in_one_form(case: Case, form: Implementation) -> None:
    check(case, form)


@pytest.mark.parametrize("case", BY_HAND[5::20], ids=str)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_by_name(case: Case, implementation: str) -> None:
    check(case, implementation)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "form"), ALL, ids=str)
def test_in_all_forms(case: Case, form: str | Implementation) -> None:
    check(case, form)


@pytest.mark.parametrize("case", parameters(LARGE))
def test_large(case: Case) -> None:
    check(case, "xla")
