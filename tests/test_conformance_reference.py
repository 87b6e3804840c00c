"""The package's own oracle passes every case that it has the memory for."""

import pytest

from tests.cases import CASES, Case
from tests.conformance import check, parameters

ROOM = 4 * 2**30


def bytes_needed(case: Case) -> int:
    """What the reference materialises: float32 keys and values, repeated for each query head."""
    widths = case.head_dim + (case.value_head_dim or case.head_dim)
    return 4 * case.batch * case.capacity * (case.heads + case.kv_heads) * widths


@pytest.mark.parametrize("case", parameters(CASES))
def test_reference(case: Case) -> None:
    if bytes_needed(case) > ROOM:
        pytest.skip(f"the reference would need {bytes_needed(case) / 2**30:.0f} GiB")
    check(case, "reference")
