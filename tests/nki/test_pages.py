"""Pages in runs of two lengths, and 8-bit keys that DMA transposes in pairs of channels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jax_tkg.attention import prepare
from jax_tkg.nki import interpreter
from jax_tkg.nki.implementation import NkiInterpret
from jax_tkg.nki.interpreter.record import Instruction
from jax_tkg.nki.plan import Features, KernelPlan, make_plan
from jax_tkg.nki.tiles import NO_RUNS, Runs, cache_pieces, column_of, live_runs, paged_runs
from jax_tkg.problem import Op
from tests.cases import Case, inputs
from tests.conformance import jax_arguments
from tests.grid.checking import compare, expected, prepared, run

BF16: dict[str, Any] = {"query_dtype": "bfloat16", "cache_dtype": "bfloat16"}
FP8: dict[str, Any] = {"query_dtype": "bfloat16", "cache_dtype": "float8_e4m3", "scales": "head"}
PAGES: dict[str, Any] = {"layout": "paged", "page_len": 16, "tokens": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("page_len", "most", "slots", "runs", "gathers"),
    [
        (16, 100, 5120, (16, 8), [2, 1]),  # 40 columns; with runs of 16 alone they would be 48
        (16, 100, 8192, (16, 16), [4]),
        (32, 200, 13_312, (32, 8), [3, 1]),
        (64, 100, 8192, (32, 32), [2]),
        (64, 16, 8192, (16, 16), [4]),  # no longer than a tile has columns
        (24, 100, 3072, (24, 24), [1]),
        (24, 100, 4096, (8, 8), [4]),  # 24 columns and 8; runs of 24 do not end where 8 begin
        (4, 100, 600, (4, 4), [1, 1]),
    ],
)
def test_long_runs_and_short_ones_for_what_is_left(
    page_len: int, most: int, slots: int, runs: tuple[int, int], gathers: list[int]
) -> None:
    chosen = paged_runs(page_len, most, slots)
    assert (chosen.long, chosen.short) == runs
    assert [p.gathers for p in cache_pieces(slots, chosen)] == gathers


@pytest.mark.parametrize(("live", "run"), [(100, 1), (132, 2), (600, 8), (1100, 16), (5000, 16)])
def test_a_window_is_read_in_runs_that_one_gather_has(live: int, run: int) -> None:
    assert live_runs(16, 64, 8192, live).long == run


def planned(**changes: Any) -> KernelPlan:
    sizes: dict[str, Any] = {
        "batch": 4, "tokens": 1, "slots": 8192, "heads": 1, "kv_heads": 1, "head_dim": 128,
        "value_head_dim": 128, "layout": "paged", "page_len": 16,
    }  # fmt: skip
    return make_plan(features=Features(scale=1.0, is_ragged=True), **(sizes | changes))


def test_a_window_reads_few_slots_beside_its_own() -> None:
    live = planned(most_live=132).live
    assert live is not None
    assert (live.full.keys, live.width, live.unit) == (256, 1, 2)


@pytest.mark.parametrize(
    ("key_bytes", "page_len", "together"), [(2, 16, 1), (1, 16, 2), (2, 8, 2), (1, 32, 1)]
)
def test_two_gathers_of_keys_at_once_where_runs_are_few_bytes(
    key_bytes: int, page_len: int, together: int
) -> None:
    made = planned(key_bytes=key_bytes, page_len=page_len)
    assert made.runs.together == together


def test_a_plan_says_how_it_reads_pages() -> None:
    made = planned(slots=5120, page_len=16, key_bytes=1)
    assert "pages: in runs of 16, of 8 for what is left, two gathers of keys at once" in str(made)
    assert "pages" not in str(planned(layout="BKSH", page_len=0))


def test_tiles_of_8_bits_hold_twice_as_many_keys() -> None:
    for layout, page_len in (("BKSH", 0), ("paged", 32)):
        wide, narrow = (
            planned(slots=49_152, layout=layout, page_len=page_len, key_bytes=n).live
            for n in (2, 1)
        )
        assert wide is not None
        assert narrow is not None
        assert narrow.full.keys == 2 * wide.full.keys


def test_every_column_has_its_place_among_gathered_keys() -> None:
    for keys, runs in ((5168, Runs(16, 8, 2)), (6144, Runs(16, 16, 2)), (640, NO_RUNS)):
        for piece in cache_pieces(keys, runs):
            places = [column_of(piece, j) for j in range(piece.subtiles)]
            assert sorted(places) == list(range(piece.subtiles))
    first = cache_pieces(6144, Runs(16, 16, 2))[0]
    assert [column_of(first, j) for j in (0, 1, 16, 32, 47)] == [0, 2, 1, 32, 47]


@pytest.mark.parametrize(
    ("case", "programs"),
    [
        (Case("window", **PAGES, **BF16, slots=6144, batch=2, window=(90, 0)), 1),
        (Case("window-fp8", **PAGES, **FP8, slots=6144, batch=2, window=(90, 0)), 2),
        (Case("pages-of-3", **FP8 | PAGES | {"page_len": 3}, slots=480, batch=2), 2),
        (Case("wide-pages", **BF16 | PAGES | {"head_dim": 192}, slots=480, batch=2), 1),
        (Case("wide", **FP8, layout="BSKH", slots=600, head_dim=192, beside=True), 2),
        (Case("odd-width", **FP8, layout="BKSH", slots=500, head_dim=17, beside=True), 2),
        (Case("widened", **FP8 | PAGES | {"cache_dtype": "int8"}, slots=3200, batch=1), 1),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_output_and_log_sum_exp(case: Case, programs: int) -> None:
    form, given = NkiInterpret(programs=programs), inputs(case)
    launch = prepared(prepare(op=Op.TKG, **jax_arguments(case, given)), form)
    out, lse, _ = run(launch, form)
    compare(given, expected(given), out, lse)


def loads(case: Case) -> Iterator[tuple[str, Instruction]]:
    """(array, DMA) of a launch that reads arrays, in the order of the program."""
    form = NkiInterpret(programs=1)
    launch = prepared(prepare(op=Op.TKG, **jax_arguments(case, inputs(case))), form)
    arrays = tuple(map(np.asarray, launch.arrays))
    done = interpreter.run(launch.kernel, *arrays, programs=1, plan=launch.plan)
    names = dict(zip(done.arguments, launch.kernel.names, strict=False))
    for step in done.programs[0]:
        assert step.source.function != "turn_keys"
        for access in step.reads if step.transfer is not None else ():
            if access.storage.name in names:
                yield names[access.storage.name], step


@pytest.mark.parametrize("layout", ["BKSH", "paged"])
def test_8_bit_keys_arrive_as_narrow_as_they_are_stored(layout: str) -> None:
    paged = {"page_len": 16} if layout == "paged" else {}
    case = Case("narrow", **FP8, layout=layout, slots=512, batch=2, head_dim=64, **paged)
    sizes = [s.transfer.bytes for name, s in loads(case) if name == "key" and s.transfer]
    assert sum(sizes) == 2 * case.kv_heads * 512 * 64


def test_page_numbers_come_first_and_at_once() -> None:
    """So that nothing is before the first keys; a partition reads those of all sequences."""
    case = Case("first", **PAGES, **BF16, slots=2048, batch=2, kv_heads=1, mask="full")
    (name, first), *others = loads(case)
    assert name == "page_rows"
    assert first.transfer is not None
    assert first.transfer.descriptors == first.transfer.partitions == 128
    assert "page_rows" not in [name for name, _ in others]


def test_in_a_loop_page_numbers_wait_for_what_finds_them_alone() -> None:
    """Descriptors of the other small loads are made by GpSimd, which cannot gather yet."""
    case = Case("loop", **PAGES, **BF16, slots=2560, batch=1, kv_heads=1, beside=True)
    before = []
    for name, step in loads(case):
        if name == "page_rows":
            break
        if step.transfer is not None and not step.transfer.software_dge:
            before.append(name)
    assert before == ["live_tiles", "constants"]
