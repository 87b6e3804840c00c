"""The kernel's plan: every slot once, every pair once, balanced programs, reasons."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_tkg.nki.plan import KernelPlan, make_plan, paged_run


def plan(**changes: Any) -> KernelPlan:
    sizes: dict[str, Any] = {
        "batch": 2, "tokens": 2, "slots": 1000, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "value_head_dim": 64, "layout": "BKSH", "scale": 0.125,
    }  # fmt: skip
    return make_plan(**(sizes | changes))


def slots_of(made: KernelPlan, program: int) -> list[int]:
    tiles = made.shares[program].tiles
    assert all(t.keys == t.partitions * t.subtiles and t.partitions <= 128 for t in tiles)
    return [s for t in tiles for s in range(t.start, t.start + t.keys)]


def pairs_of(made: KernelPlan, program: int) -> list[int]:
    return [p for group in made.shares[program].groups for p in group]


@given(
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    tokens=st.integers(1, 9),
    slots=st.integers(1, 3000),
    programs=st.sampled_from([1, 2]),
    subtiles=st.integers(1, 40),
)
def test_every_slot_of_every_pair_is_seen_once(
    batch: int, kv_heads: int, group: int, tokens: int, slots: int, programs: int, subtiles: int
) -> None:
    made = plan(
        batch=batch, kv_heads=kv_heads, heads=kv_heads * group, tokens=tokens, slots=slots,
        programs=programs, subtiles=subtiles, has_new_keys=True,
    )  # fmt: skip
    every = [
        (pair, slot)
        for program in range(programs)
        for pair in pairs_of(made, program)
        for slot in (*slots_of(made, program), *["new"] * made.shares[program].sees_new_keys)
    ]
    wanted = [(pair, slot) for pair in range(batch * kv_heads) for slot in (*range(slots), "new")]
    copies = 2 if made.sharding == "same" else 1
    assert sorted(every, key=str) == sorted(wanted * copies, key=str)
    for share in made.shares:
        assert all(len(pairs) * made.rows_per_pair <= 128 for pairs in share.groups)


@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 2]))
def test_partitions_of_a_paged_tile_stay_inside_a_page(
    page_len: int, pages: int, programs: int
) -> None:
    made = plan(layout="paged", slots=page_len * pages, page_len=page_len, programs=programs)
    run = paged_run(page_len)
    assert page_len % run == 0
    for share in made.shares:
        assert all(t.subtiles == run and t.start % run == 0 for t in share.tiles)
    if made.sharding != "batch":
        every = [s for p in range(programs) for s in slots_of(made, p)]
        copies = 2 if made.sharding == "same" else 1
        assert sorted(every) == sorted(list(range(page_len * pages)) * copies)


@pytest.mark.parametrize(
    ("sizes", "sharding"),
    [
        ({"programs": 1}, "none"),
        ({"slots": 4096}, "sequence"),  # few rows
        ({"batch": 4, "heads": 16, "tokens": 4, "slots": 4096}, "batch"),  # 256 rows
        ({"batch": 3, "heads": 16, "tokens": 4, "slots": 4096}, "sequence"),  # odd batch
        ({"slots": 255}, "batch"),
        ({"batch": 3, "slots": 255}, "batch"),  # by pairs
        ({"batch": 1, "kv_heads": 1, "slots": 255}, "same"),
        ({"batch": 1, "kv_heads": 1, "slots": 256}, "sequence"),
    ],
)
def test_sharding(sizes: dict[str, Any], sharding: str) -> None:
    made = plan(**({"programs": 2} | sizes))
    assert made.sharding == sharding
    assert made.reason
    assert sharding in str(made)


def test_programs_that_exchange_on_every_tile_take_equally_many_steps() -> None:
    made = plan(slots=700, subtiles=1, programs=2, exchange="every tile", has_new_keys=True)
    steps = [len(s.tiles) + s.sees_new_keys + s.idle_tiles for s in made.shares]
    assert steps[0] == steps[1]
    assert min(s.idle_tiles for s in made.shares) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 100, "kv_heads": 1}, "G \\* T = 200 rows"),
        ({"exchange": "never"}, "must be 'deferred' or 'every tile'"),
    ],
)
def test_what_cannot_be_planned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)
