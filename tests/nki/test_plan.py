"""The kernel's plan: every slot once, every row once, balanced programs, reasons."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_tkg.nki.plan import Features, KernelPlan, make_plan
from jax_tkg.nki.rows import BANK_ELEMENTS
from jax_tkg.nki.tiles import LOGIT_BANKS, KeyTile, Piece


def plan(features: dict[str, Any] | None = None, **changes: Any) -> KernelPlan:
    sizes: dict[str, Any] = {
        "batch": 2, "tokens": 2, "slots": 1000, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "value_head_dim": 64, "layout": "BKSH",
    }  # fmt: skip
    return make_plan(features=Features(scale=0.125, **(features or {})), **(sizes | changes))


def keys_of(pieces: tuple[Piece, ...], start: int) -> list[int]:
    """Keys of pieces in the order of partition and column, which must be that of memory."""
    keys = []
    for piece in pieces:
        assert 1 <= piece.partitions <= 128
        assert piece.keys == piece.partitions * piece.subtiles
        for p in range(piece.partitions):
            first = start + piece.start + p * piece.subtiles
            keys += range(first, first + piece.subtiles)
    return keys


def slots_of(tile: KeyTile) -> list[int]:
    columns = [c for p in tile.cached + tile.new for c in range(p.column, p.column + p.subtiles)]
    assert columns == list(range(tile.columns))
    assert tile.cached_columns == tile.columns - len(tile.new)
    slots = keys_of(tile.cached, tile.start)
    assert len(slots) == tile.keys
    return slots


def rows_of(made: KernelPlan, program: int) -> list[tuple[int, int, int]]:
    """Rows (sequence, head, token) of a program, in the order of its blocks."""
    rows = []
    for block in made.shares[program].blocks:
        mine = []
        for group in block.groups:
            assert group.first_row == len(mine)
            for chunk in group.chunks:
                assert chunk.rows <= 128
                assert group.first_row + chunk.first_row == len(mine)
                mine += [
                    (b, h, t)
                    for b in range(chunk.first_batch, chunk.first_batch + chunk.batches)
                    for h in range(chunk.first_head, chunk.first_head + chunk.heads)
                    for t in range(chunk.first_token, chunk.first_token + chunk.tokens)
                ]
            assert group.rows == len(mine) - group.first_row <= 512
        assert block.rows == len(mine)
        assert [s.first_row for s in block.sequences] == sorted(
            s.first_row for s in block.sequences
        )
        assert sum(s.rows for s in block.sequences) == len(mine)
        for sequence in block.sequences:
            some = mine[sequence.first_row : sequence.first_row + sequence.rows]
            assert {b for b, _, _ in some} == {sequence.first_batch}
        rows += mine
    return rows


@given(
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 70),
    tokens=st.one_of(st.integers(1, 9), st.integers(100, 300)),
    slots=st.integers(1, 3000),
    programs=st.sampled_from([1, 2]),
    max_keys=st.sampled_from([128, 640, 8192]),
)
def test_every_row_sees_every_key_once(
    batch: int, kv_heads: int, group: int, tokens: int, slots: int, programs: int, max_keys: int
) -> None:
    made = plan(
        {"has_new_keys": True}, batch=batch, kv_heads=kv_heads, heads=kv_heads * group,
        tokens=tokens, slots=slots, programs=programs, max_keys=max_keys, loop="static",
    )  # fmt: skip
    every = sorted(r for p in range(programs) for r in rows_of(made, p))
    wanted = [
        (b, h, t) for b in range(batch) for h in range(kv_heads * group) for t in range(tokens)
    ]
    copies = 2 if made.sharding in ("same", "sequence") else 1
    assert every == sorted(wanted * copies)
    found = []
    for share in made.shares:
        slots_here = [s for tile in share.tiles for s in slots_of(tile)]
        new_here = [k for tile in share.tiles for k in keys_of(tile.new, 0)]
        found.append((slots_here, new_here))
        widest = max(g.rows for block in share.blocks for g in block.groups)
        for tile in share.tiles:
            beside = len(tile.new) + 1  # the new keys and the rest of the cache
            assert tile.columns - beside <= LOGIT_BANKS * (BANK_ELEMENTS // widest)
    if made.sharding == "sequence":
        assert sorted(s for slots_here, _ in found for s in slots_here) == list(range(slots))
        assert sorted(k for _, new_here in found for k in new_here) == list(range(tokens))
    else:
        assert all(
            (sorted(a), sorted(b)) == (list(range(slots)), list(range(tokens))) for a, b in found
        )


@given(
    page_len=st.integers(1, 300),
    pages=st.integers(1, 40),
    group=st.sampled_from([1, 100]),
    programs=st.sampled_from([1, 2]),
)
def test_partitions_of_a_paged_tile_stay_inside_a_page(
    page_len: int, pages: int, group: int, programs: int
) -> None:
    made = plan(
        layout="paged", slots=page_len * pages, page_len=page_len, programs=programs,
        heads=2 * group, batch=1,
    )  # fmt: skip
    assert page_len % made.runs.long == made.runs.long % made.runs.short == 0
    for share in made.shares:
        for tile in share.tiles:
            assert tile.start % made.runs.long == 0
            for piece in tile.cached:
                assert piece.run in (made.runs.long, made.runs.short)
                assert piece.subtiles % piece.run == piece.start % piece.run == 0
    if made.sharding == "sequence":
        every = [s for share in made.shares for tile in share.tiles for s in slots_of(tile)]
        assert sorted(every) == list(range(page_len * pages))


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


RAGGED = {"is_ragged": True}
CLEAN = {"clears_values": False, "sees_alike": True}


@pytest.mark.parametrize(
    ("sizes", "sharding"),
    [
        ({"most_live": 129}, "batch"),
        ({"most_live": 2048}, "batch"),  # a tile or so for each sequence, long or short
        ({"most_live": 2049}, "sequence"),
        ({"most_live": 129, "batch": 3}, "sequence"),
        ({}, "sequence"),  # a sequence may be as long as the cache, another empty
    ],
)
def test_how_two_programs_share_a_loop(sizes: dict[str, Any], sharding: str) -> None:
    made = plan(RAGGED, **({"programs": 2, "slots": 20_000} | sizes))
    assert made.live is not None
    assert made.sharding == sharding
    assert made.live.sharers == (2 if sharding == "sequence" else 1)
    assert ("in turns" in str(made)) == (sharding == "sequence")
    assert "loop over" in made.reason


@pytest.mark.parametrize(
    ("features", "sizes", "is_loop"),
    [
        ({}, {"slots": 100_000}, False),  # all is live
        (RAGGED, {"slots": 2048}, False),
        (RAGGED, {"slots": 2049}, True),
        (RAGGED, {"slots": 4096, "programs": 2}, False),
        (RAGGED, {"slots": 4097, "programs": 2}, True),
        (RAGGED, {"slots": 1024, "most_live": 256}, False),
        (RAGGED, {"slots": 1024, "most_live": 255}, True),  # a window
        (RAGGED | {"has_mask": True}, {"slots": 100_000}, False),
        (RAGGED | {"has_bias": True}, {"slots": 100_000}, False),
        (RAGGED | {"has_positions": True}, {"slots": 100_000}, False),
    ],
)
def test_when_tiles_are_chosen_at_run_time(
    features: dict[str, Any], sizes: dict[str, Any], is_loop: bool
) -> None:
    made = plan(features, **sizes)
    assert (made.live is not None) == is_loop
    assert ("live" in str(made)) == is_loop


@given(
    slots=st.integers(256, 30_000),
    programs=st.sampled_from([1, 2]),
    run=st.sampled_from([None, 8, 16]),
)
def test_tiles_of_a_loop_fit_the_cache_and_cover_it(
    slots: int, programs: int, run: int | None
) -> None:
    paged = {} if run is None else {"layout": "paged", "page_len": run}
    slots = max(slots, 128 * programs * (run or 1)) // (run or 1) * (run or 1)
    made = plan(RAGGED, slots=slots, programs=programs, loop="runtime", **paged)
    assert made.live is not None
    full = made.live.full
    assert sorted(slots_of(full)) == list(range(full.keys))
    assert full.keys <= slots
    assert not full.is_masked
    assert made.live.edge.is_masked
    assert made.live.edge.cached == full.cached
    rounds = made.live.width
    assert (rounds - 1) * programs * full.keys < slots <= rounds * programs * full.keys
    assert made.sharding == ("none" if programs == 1 else "sequence")


@pytest.mark.parametrize(
    ("slots", "keys"),
    [(22_528, 5632), (24_576, 8192), (19_072, 6400)],  # 4 rounds, not 3; 3; 3, as none is even
)
def test_a_few_more_rounds_where_they_read_no_key_twice(slots: int, keys: int) -> None:
    made = plan(RAGGED, slots=slots, tokens=1, head_dim=128)
    assert made.live is not None
    assert made.live.full.keys == keys


def test_narrow_heads_fit_larger_tiles() -> None:
    """Of the values of 64 channels, a partition holds half as many bytes."""
    for widths, keys in (((64, 64), 12_288), ((128, 64), 8192), ((64, 128), 8192)):
        sizes = dict(zip(("head_dim", "value_head_dim"), widths, strict=True))
        made = plan(RAGGED, slots=49_152, tokens=1, **sizes)
        assert made.live is not None
        assert made.live.full.keys == keys


@pytest.mark.parametrize(
    ("changes", "keys", "values"),
    [
        ({}, 2, 2),
        ({"head_dim": 128}, 1, 2),
        ({"value_head_dim": 128}, 2, 1),
        ({"head_dim": 32, "value_head_dim": 32}, 1, 1),
        ({"heads": 2 * 20, "tokens": 2, "slots": 2048}, 2, 2),  # 40 rows of a pair
        ({"heads": 2 * 16, "tokens": 4, "slots": 2048}, 1, 1),  # 64
        ({"slots": 1024 + 128}, 1, 2),  # the last column has no other
        ({"slots": 1024 + 1}, 1, 2),
        ({"slots": 512}, 1, 2),  # queries copied twice would not pay, values just do
        ({"slots": 256}, 1, 1),
        ({"layout": "paged", "page_len": 16}, 1, 2),
        ({"key_bytes": 1}, 1, 2),  # transposed in pairs of channels
        ({"layout": "BKHS", "slots": 40 * 128, "key_bytes": 1}, 2, 2),
        ({"layout": "BKHS", "slots": 39 * 128}, 1, 2),  # long runs of values are worth more
        ({"layout": "BKHS", "slots": 40 * 128}, 2, 2),
    ],
)
def test_two_key_columns_of_narrow_heads_share_a_matmul(
    changes: dict[str, Any], keys: int, values: int
) -> None:
    """Not where a key that some row does not see may be NaN."""
    made = plan(**({"slots": 1024, "batch": 1, "heads": 4, "features": CLEAN} | changes))
    (tile,) = made.shares[0].tiles
    assert (tile.key_columns, tile.value_columns) == (keys, values)
    assert made.has_query_pairs == (keys == 2)
    for features in ({"sees_alike": True}, {"clears_values": False}, CLEAN | {"has_mask": True}):
        by_one = plan(
            **({"slots": 1024, "batch": 1, "heads": 4} | changes | {"features": features})
        )
        (tile,) = by_one.shares[0].tiles
        assert (tile.key_columns, tile.value_columns) == (1, values)
        assert not by_one.has_query_pairs


@pytest.mark.parametrize("name", ["has_mask", "has_bias", "has_positions"])
def test_keys_stored_transposed_come_in_halves_unless_tables_would_too(name: str) -> None:
    sizes = {"slots": 5120, "batch": 1, "heads": 4, "layout": "BKHS"}
    for is_table in (False, True):
        (tile,) = plan(CLEAN | {name: is_table}, **sizes).shares[0].tiles
        (piece,) = tile.cached
        assert (piece.halves, tile.key_columns) == ((1, 1) if is_table else (2, 2))
    (tile,) = plan(CLEAN, **(sizes | {"layout": "BKSH"})).shares[0].tiles
    assert (tile.cached[0].halves, tile.key_columns) == (1, 2)


def test_pairs_of_columns_do_not_straddle_banks_of_logits() -> None:
    """100 rows leave 5 columns in a bank, of which 4 can be taken in twos."""
    sizes = {"slots": 2560, "batch": 5, "kv_heads": 1, "heads": 10, "tokens": 2}
    for width, columns in ((64, [10, 10]), (128, [20])):
        made = plan(CLEAN, **sizes, head_dim=width)
        assert [tile.columns for tile in made.shares[0].tiles] == columns
    assert plan(CLEAN, **sizes).shares[0].tiles[0].key_columns == 2


def test_tiles_of_a_loop_take_two_columns_where_every_key_is_seen() -> None:
    for alike, edge in ((True, 2), (False, 1)):
        made = plan(RAGGED | {"sees_alike": alike}, slots=8192)
        assert made.live is not None
        tiles = made.live.full, made.live.edge, made.live.dirty
        assert [tile.key_columns for tile in tiles] == [2, edge, 1]
    assert [tile.value_columns for tile in tiles] == [2, 2, 2]
    assert made.has_query_pairs
    assert "2 columns" in str(made)
    assert "2 columns" not in str(plan(RAGGED, slots=8192, head_dim=128, value_head_dim=128))


@pytest.mark.parametrize(("slots", "is_loop"), [(4096, False), (8192, True)])
def test_a_window_is_no_loop_where_each_program_has_one_tile_of_pages(
    slots: int, is_loop: bool
) -> None:
    """It would read as much as is there."""
    made = plan(RAGGED, layout="paged", page_len=16, slots=slots, programs=2, most_live=128)
    assert (made.live is not None) == is_loop


def test_programs_that_exchange_on_every_tile_take_equally_many_steps() -> None:
    made = plan({"has_new_keys": True}, slots=700, max_keys=128, programs=2, exchange="every tile")
    steps = [len(s.tiles) + s.idle_tiles for s in made.shares]
    assert steps[0] == steps[1]
    assert min(s.idle_tiles for s in made.shares) == 0


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        ({}, {"tokens": 513}, "T = 513 new tokens; the kernel takes at most 512"),
        ({}, {"exchange": "never"}, "must be 'deferred' or 'every tile'"),
        ({}, {"loop": "while"}, "must be 'static', 'runtime' or None"),
        ({"has_bias": True}, {"loop": "runtime"}, "a dense mask, a bias or given positions"),
        ({}, {"loop": "runtime", "slots": 100}, "use loop='static'"),
        ({"rotary": "full"}, {}, "must be 'half', 'interleaved' or None"),
        ({"rotary": "half"}, {}, "rotary needs the new keys"),
        (
            {"rotary": "half", "has_new_keys": True, "returns_lse": False},
            {},
            "rotary needs returns_lse",
        ),
    ],
)
def test_what_cannot_be_planned(
    features: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(features, **changes)
