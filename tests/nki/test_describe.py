"""A plan in words: the differences between ways to share, and the diagram of two programs."""

from collections.abc import Mapping
from typing import Any

import pytest

from jax_tkg.nki.differences import ASPECTS, SHARINGS, markdown, sharing_of
from jax_tkg.nki.plan import Features, KernelPlan, make_plan


def plan(features: Mapping[str, Any] | None = None, **changes: Any) -> KernelPlan:
    sizes: dict[str, Any] = {
        "batch": 1, "tokens": 2, "slots": 32768, "heads": 8, "kv_heads": 2, "head_dim": 128,
        "value_head_dim": 128, "layout": "BKHS", "programs": 2,
    }  # fmt: skip
    features = Features(scale=1.0, has_new_keys=True, **(features or {}))
    return make_plan(features=features, **(sizes | changes))


def lines(made: KernelPlan) -> list[str]:
    first, *others = str(made).splitlines()
    assert first == made.text
    assert all(line.startswith("  ") for line in others)
    return [line[2:] for line in others]


def test_programs_that_share_a_sequence() -> None:
    assert lines(plan()) == [
        "each program has its own keys and values of every sequence",
        "program 0                             program 1",
        "rows: 16, sequence 0, KV heads 0-1    rows: 16, sequence 0, KV heads 0-1",
        "keys: slots 0-16383                   keys: slots 16384-32767, new keys",
        "tiles: 2 of up to 8192                tiles: 2 of up to 8192",
        "|= at the end: maximum, sum, output ==|",
        "|============ 3 exchanges ============|",
        "stores: 16 of 16 rows                 stores: 0 of 16 rows",
    ]


def test_exchanges_on_every_tile() -> None:
    assert lines(plan(exchange="every tile"))[5:8] == [
        "|===== every tile: maximum, sum ======|",
        "|======== at the end: output =========|",
        "|============ 5 exchanges ============|",
    ]


def test_a_loop_over_live_tiles() -> None:
    found = lines(plan({"is_ragged": True}, exchange="every tile", batch=2))
    assert found[3].split("    ")[0] == "keys: live slots, in turns"
    assert found[3].endswith("keys: live slots, in turns, new keys")
    assert "tiles: of 8192, a loop for each sequence" in found[4]
    assert found[7].strip("|= ") == "3 exchanges, and 2 a round"


def test_an_idle_program_takes_part() -> None:
    found = lines(plan(exchange="every tile", max_keys=128, slots=384))
    assert found[4].split("    ")[0] == "tiles: 2 of up to 128"
    assert found[4].endswith("tiles: 1 of up to 128, 1 idle")


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"batch": 4, "slots": 200}, ("32, sequences 0-1, KV heads 0-1", "32, sequences 2-3, KV")),
        ({"slots": 200}, ("8, sequence 0, KV head 0", "8, sequence 0, KV head 1")),
    ],
)
def test_programs_with_their_own_rows(changes: dict[str, Any], rows: tuple[str, str]) -> None:
    found = lines(plan(**changes))
    assert found[0] == "each program has its own sequences, or KV heads of a single one"
    assert found[2].startswith(f"rows: {rows[0]}  ")
    assert f"rows: {rows[1]}" in found[2]
    assert found[3].count("slots 0-199, new keys") == 2
    assert found[5].split() == ["|", "|"]
    assert found[6].split("  ")[0] == "stores: its rows"


def test_both_do_all() -> None:
    found = lines(plan(slots=200, kv_heads=1))
    assert found[0] == "nothing: both programs have all"
    assert found[-1].endswith("stores: 0 of 16 rows")


def test_one_program_needs_one_column() -> None:
    assert lines(plan(programs=1)) == [
        "program 0",
        "rows: 16, sequence 0, KV heads 0-1",
        "keys: slots 0-32767, new keys",
        "tiles: 4 of up to 8192",
        "stores: its rows",
    ]


def test_stores_are_those_of_the_kernel() -> None:
    """Of the chunks of 126 and 66 rows of each block the first program stores the first."""
    made = plan(batch=1, heads=64, tokens=6, kv_heads=2)
    stored = lines(made)[-1].split("stores: ")
    assert [part.strip() for part in stored[1:]] == ["252 of 384 rows", "132 of 384 rows"]


def test_every_way_is_in_the_table() -> None:
    for made in (plan(), plan(exchange="every tile"), plan(slots=200), plan(programs=1)):
        assert sharing_of(made) is SHARINGS[sharing_of(made).name]
    table = markdown()
    assert [row.split(" | ")[0].strip("| ") for row in table.splitlines()[2:]] == [
        title for title, _ in ASPECTS
    ]
    assert "| exchanged on every tile | nothing | nothing | maximum, sum |" in table
    assert "| exchanged at the end | nothing | maximum, sum, output | output |" in table
