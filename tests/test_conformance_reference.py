"""The package's own oracle passes every case."""

import pytest

from tests.cases import CASES, Case
from tests.conformance import check, parameters


@pytest.mark.parametrize("case", parameters(CASES))
def test_reference(case: Case) -> None:
    check(case, "reference")
