"""What `python -m tests.grid` relies on, on small cases: it itself takes hours."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki.implementation import NkiInterpret
from tests import conformance
from tests.cases import CASES, GRID, Case, inputs
from tests.grid import checking
from tests.grid.__main__ import Record, too_large
from tests.grid.checking import FORMS, Result, check_row, compare, expected, form_name, needed_bytes

NAMES = ("long-bf16", "short-in-long-beside", "short-in-long-paged", "ring", "everything",
         "rows-empty-with-sinks", "T3", "S1-beside", "pairs01-BSKH-bfloat16")  # fmt: skip
SMALL = Case("small", slots=300, tokens=2, beside=True, query_dtype="bfloat16", layout="BKSH")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=str)
def test_one_sequence_at_a_time_is_the_same_answer(case: Case) -> None:
    """Also to the last slot that a length leaves: what is cut off is seen by nobody."""
    given, (exact, *naive) = conformance._expected(case)
    mine, *mine_naive = expected(given)
    for ours, theirs in zip(mine, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    eps = float(np.finfo(np.float32).eps) if given.query.dtype == np.float32 else 2.0**-7
    for rounded, other in zip(mine_naive, naive, strict=True):  # sums of other lengths round apart
        np.testing.assert_allclose(rounded, other, rtol=8 * eps, atol=8 * eps)


def wrong_output(out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return out + np.asarray(0.25, out.dtype), lse


def wrong_lse(out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return out, lse + np.float32(1e-3)


def not_a_number(out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(np.arange(out.shape[0])[:, None, None, None] == 1, np.nan, out), lse


def lost_row(out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return out, np.where(np.arange(lse.shape[0])[:, None, None] == 1, -np.inf, lse)


@pytest.mark.parametrize("spoil", [wrong_output, wrong_lse, not_a_number, lost_row])
def test_wrong_results_are_noticed(spoil: Callable[..., Any]) -> None:
    given = inputs(SMALL)
    wanted = expected(given)
    out, lse = wanted.naive_out, wanted.naive_lse.astype(np.float32)
    compare(given, wanted, out, lse)
    with pytest.raises(AssertionError):
        compare(given, wanted, *spoil(out, lse))


def test_a_row_passes_is_refused_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [r.status for r in check_row(SMALL)] == ["passed", "passed"]
    no = "not this one"
    with monkeypatch.context() as patch:
        patch.setattr(NkiInterpret, "why_not", lambda *_: no)
        assert [(r.status, r.message) for r in check_row(SMALL)] == [("refused", no)] * 2
    monkeypatch.setattr(checking, "run", lambda launch, form: (*zeros(launch), 7))
    results = list(check_row(SMALL))
    assert [r.status for r in results] == ["failed", "failed"]
    assert all("error of the output" in r.message for r in results)


LONG_BUCKETS = (
    Case("1000-in-49152", batch=2, tokens=1, slots=49152, longest=1000, heads=2, kv_heads=1,
         beside=True, query_dtype="bfloat16", layout="BKSH"),
    Case("window-128-in-32768", batch=1, tokens=2, slots=32768, heads=2, kv_heads=1,
         window=(127, 0), beside=True, layout="BKHS"),
)  # fmt: skip


@pytest.mark.parametrize("case", LONG_BUCKETS, ids=str)
def test_few_live_keys_in_a_long_bucket(case: Case) -> None:
    """Whole tiles, and the whole part of a program, are masked."""
    assert [(r.status, r.message) for r in check_row(case)] == [("passed", "")] * 2


def zeros(launch: Any) -> list[np.ndarray]:
    """As of a kernel that does nothing."""
    return [np.zeros(struct.shape, struct.dtype) for struct in launch.result[:2]]


def test_what_does_not_fit_is_listed_with_its_bytes() -> None:
    largest = max(GRID, key=needed_bytes)
    results = too_large(largest, 10**9)
    assert [r.form for r in results] == [form_name(form) for form in FORMS]
    assert all(r.status == "skipped" and f"{needed_bytes(largest):,}" in r.message for r in results)
    assert needed_bytes(largest) > 4 * largest.batch * largest.slots * largest.head_dim


def test_results_of_other_sources_do_not_count(tmp_path: Path) -> None:
    record = Record(tmp_path / "grid.jsonl", "now")
    first, second = GRID[:2]
    done = [Result(first.name, form_name(form), "passed") for form in FORMS]
    replace(record, sources="before").append(done)
    assert list(record.missing(GRID[:2])) == [first, second]
    record.append(done)
    record.append([replace(done[0], case=second.name)])
    assert list(record.missing(GRID[:2])) == [second]
    record.append([replace(done[0], status="failed", message="later")])
    assert [r.status for r in record.results()] == ["failed", "passed", "passed"]


def test_the_command_appends_what_it_finds(tmp_path: Path) -> None:
    file = tmp_path / "results" / "grid.jsonl"
    command = [sys.executable, "-m", "tests.grid", "--rows", "0", "--file", str(file)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert "1 rows of the grid" in done.stdout
    lines = [json.loads(line)["result"] for line in file.read_text().splitlines()]
    assert [(r["case"], r["status"]) for r in lines] == [(GRID[0].name, "passed")] * 2
