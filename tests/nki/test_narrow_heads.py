"""Heads of 64 channels in the decode kernel: two key columns share a matmul."""

from dataclasses import replace

import numpy as np
import pytest

from tests.nki.test_kernel import ALL, CLOSE, PLAIN, Case, planned


def test_two_columns_of_narrow_heads_share_a_matmul() -> None:
    """A loop of 3 tiles of 8 columns for each of 2 sequences of 2 KV heads, then a dirty one."""
    sizes = {"slots": 3072, "max_keys": 1024, "loop": "runtime", "head_dim": 64, "tokens": 1}

    def count(width: int, lengths: list[int]) -> dict[str, float]:
        alike = replace(PLAIN, sees_alike=True)
        case = Case(planned(alike, value_head_dim=width, **sizes), lengths)
        assert case.error(refuse_uninitialized=True) < CLOSE
        names = "compute_qk_matmul", "turn_keys", "compute_pv_matmul"
        steps = [s for s in case.run().programs[0] if s.engine.name == "tensor"]
        return {n: sum(s.source.function == n for s in steps) for n in names}

    pairs = 4
    qk, turned, pv = (pairs * 3 * n for n in (4, 4, 4))
    assert count(64, [3072, 3072]) == {
        "compute_qk_matmul": qk, "turn_keys": turned, "compute_pv_matmul": pv,
    }  # fmt: skip
    assert count(32, [3072, 3072])["compute_pv_matmul"] == 2 * pv
    assert count(64, [1000, 1000]) == {  # dead keys may be NaN
        "compute_qk_matmul": pairs * 8, "turn_keys": pairs * 8, "compute_pv_matmul": pairs * 4,
    }  # fmt: skip


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("loop", ["static", "runtime"])
def test_narrow_keys_and_narrow_values_each_by_itself(
    loop: str, head_dim: int, value_head_dim: int, programs: int
) -> None:
    """Tiles of several pieces, an odd last column, new keys; then loops."""
    sizes = {"slots": 1300, "max_keys": 640, "loop": loop, "programs": programs}
    features = replace(ALL, clears_values=False)
    case = Case(
        planned(features, head_dim=head_dim, value_head_dim=value_head_dim, **sizes), [1300, 700]
    )
    for name in ("key", "value"):
        case.arrays[name] = np.nan_to_num(case.arrays[name], nan=3.0)
    assert case.error(refuse_uninitialized=True) < CLOSE


def test_two_columns_stay_in_a_bank_of_logits() -> None:
    """100 rows leave room for 5 columns in each."""
    sizes = {"batch": 5, "kv_heads": 1, "heads": 20, "slots": 1024, "max_keys": 1024}
    sizes["tokens"] = 1
    plan = planned(replace(PLAIN, clears_values=False, sees_alike=True), **sizes)
    assert plan.shares[0].tiles[0].key_columns == 2
    assert Case(plan, [1024] * 5).error(refuse_uninitialized=True) < CLOSE
