"""Rows and pages in parts: who goes where, who has to go, and what has been promised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jax_tkg.serving import Engine, OutOfPagesError, Request, ServingConfig, State, Ticket
from jax_tkg.serving.places import Places
from jax_tkg.serving.pool import PageUsage
from tests.serving.test_sharded import on_mesh
from tests.serving.tiny import MODEL, assert_no_leak

CONFIG = ServingConfig(
    max_rows=4,
    page_len=4,
    pages_per_sequence=6,
    num_pages=12,
    steps_per_call=4,
    prefill_rows=2,
    prefill_chunk=8,
)


def ticket(number: int, prompt: list[int], new: int = 4) -> Ticket:
    return Ticket(number, Request(prompt, new), None)


def enter(places: Places, number: int, prompt: list[int], new: int = 4) -> int | None:
    """The slot that a request gets; its prompt is written at once."""
    row = places.enter(ticket(number, prompt, new))
    if row is None:
        return None
    row.pages.written(row.tokens, len(prompt))
    row.ticket.state = State.PREFILL
    return row.slot


def test_rows_use_pages_of_their_part() -> None:
    places = Places(CONFIG, 2)
    slots = [enter(places, i, [i] * 5) for i in range(4)]
    assert slots == [0, 2, 1, 3]  # where most pages are left
    for slot, row in places.rows.items():
        assert all(page // 6 == slot // 2 for page in row.pages.pages)
    assert places.usage == PageUsage(used=8, shared=0, cached=0, free=4)
    assert enter(places, 4, [1]) is None
    for row in list(places.rows.values()):
        places.leave(row)
    assert places.usage.used == 0
    places.forget_cached()
    assert places.usage == PageUsage(0, 0, 0, 12)


def test_a_prompt_goes_where_its_beginning_is() -> None:
    prefix = [7] * 8
    places = Places(CONFIG, 2)
    assert enter(places, 0, [*prefix, 1]) == 0
    assert enter(places, 1, [*prefix, 2]) == 1  # though part 1 is empty
    assert places.rows[1].pages.pages[:2] == places.rows[0].pages.pages[:2]
    assert enter(places, 2, [*prefix, 3]) == 2  # no row is left there
    assert places.rows[2].pages.shared_tokens == 0
    # Without a mesh it is the first row in any case.
    assert [enter(Places(CONFIG), 0, [*prefix, 1])] == [0]


def test_no_pages_in_one_part_but_in_another() -> None:
    places = Places(CONFIG, 2)
    assert enter(places, 0, [1] * 17) == 0
    assert enter(places, 1, [2] * 17) == 2
    assert enter(places, 2, [3] * 5) is None  # one page is left in each
    places.leave(places.rows[2])
    assert enter(places, 2, [3] * 5) == 2


def test_who_has_to_go_is_of_the_same_part() -> None:
    places = Places(CONFIG, 2)
    assert [enter(places, i, [i]) for i in (5, 3, 4, 9)] == [0, 2, 1, 3]
    assert places.youngest_beside(places.rows[1]) is places.rows[0]
    assert places.youngest_beside(places.rows[2]) is places.rows[3]
    assert [row.ticket.number for row in places.by_age(State.PREFILL)] == [3, 4, 5, 9]
    # One of each part in a call of two rows; without parts, the two oldest.
    assert {i: row.slot for i, row in places.to_prefill().items()} == {0: 1, 1: 2}
    whole = Places(CONFIG)
    assert [enter(whole, i, [i]) for i in (5, 3, 4, 9)] == [0, 1, 2, 3]
    assert {i: row.slot for i, row in whole.to_prefill().items()} == {0: 1, 1: 2}
    for slot in (0, 1):
        places.leave(places.rows[slot])
    assert {i: row.slot for i, row in places.to_prefill().items()} == {1: 2}


def test_promises_are_of_one_part() -> None:
    places = Places(CONFIG, 2)
    tickets = [ticket(i, [1]) for i in range(3)]
    for given, pages, left in zip(tickets, (4, 5, 2), (6, 2, 1), strict=True):
        places.promise(given, pages)
        assert places.unpromised == left
    row = places.enter(tickets[1])
    assert row is not None
    assert row.slot == 2  # the first has the other part's
    for given in (*tickets, *tickets):
        places.redeem(given)
    assert places.unpromised == 6


@pytest.mark.parametrize("parts", [1, 2])
def test_an_engine_refuses_what_no_part_can_promise(parts: int) -> None:
    config = replace(CONFIG, out_of_pages="refuse")
    sharding = on_mesh(2, batch="x") if parts == 2 else None
    engine = Engine(MODEL, config, sharding=sharding)
    tickets = [engine.submit(Request([1] * 9, 8)) for _ in range(2)]  # 4 pages each
    if parts == 2:
        with pytest.raises(OutOfPagesError, match="of 6 pages in each part of the mesh 2 are not"):
            engine.submit(Request([1] * 9, 8))
        engine.cancel(tickets[0])
        tickets[0] = engine.submit(Request([1] * 9, 8))
    else:
        tickets.append(engine.submit(Request([1] * 9, 8)))
        with pytest.raises(OutOfPagesError, match="of 12 pages 0 are not promised"):
            engine.submit(Request([1], 1))
    for given in tickets:
        engine.cancel(given)
    assert_no_leak(engine)
    assert engine._places.unpromised == 12 // parts
