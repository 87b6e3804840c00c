"""The two programs in pure JAX pass the cases of the suite, with both exchanges."""

import pytest

from jax_tkg.lnc.implementation import XlaLnc
from tests.cases import BY_HAND, GRID, PAIRWISE, Case
from tests.conformance import check, parameters

FORMS = (XlaLnc(), XlaLnc(exchange="every tile"))

# What the split and the exchanges can get wrong: every split of the plan, loops over live tiles,
# halves that meet inside a page, new keys that only one program counts, rows that see nothing.
# The plan is the kernel's, which its own conformance test takes through all cases.
QUICK = {
    "one-head", "T3", "long-wide", "short-in-long-beside", "max-grows-fast", "page8", "page64",
    "ring", "window-far", "everything",
}  # fmt: skip

IN_TURN = [
    pytest.param(
        case,
        FORMS[i % 2],
        id=f"{case.name}-{FORMS[i % 2].exchange}",
        marks=[] if case.name in QUICK else [pytest.mark.slow],  # a second of compilation each
    )
    for i, case in enumerate((*BY_HAND, *PAIRWISE))
]


def test_the_quick_cases_exist() -> None:
    assert {case.name for case in BY_HAND} >= QUICK


@pytest.mark.parametrize(("case", "form"), IN_TURN)
def test_xla_lnc(case: Case, form: XlaLnc) -> None:
    check(case, form)


@pytest.mark.parametrize("case", parameters(case for case in GRID if case.slow))
def test_xla_lnc_on_the_grid(case: Case) -> None:
    check(case, FORMS[0])
