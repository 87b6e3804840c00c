"""The order of the decode kernel's steps: what is before the first keys, what after the last."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.choices import choose_group_rows, loads_decide
from jax_tkg.nki.interpreter.record import Engine, Instruction
from jax_tkg.nki.plan import Features, make_plan
from tests.nki.test_kernel import ALL, CLOSE, Case, planned

NEW_KEYS = replace(ALL, has_sinks=False)
WIDE: dict[str, Any] = {
    "batch": 2, "tokens": 1, "slots": 2048, "heads": 1, "kv_heads": 1, "head_dim": 128,
    "value_head_dim": 128, "max_keys": 2048, "loop": "runtime",
}  # fmt: skip


def steps_of(program: Sequence[Instruction], *functions: str) -> list[int]:
    """Where the instructions of steps are in a program."""
    return [i for i, step in enumerate(program) if step.source.function in functions]


def by_hardware(run: interpreter.Run) -> list[str]:
    """The steps whose DMAs from HBM the hardware makes descriptors for, in order, of a program."""
    return [
        step.source.function
        for step in run.programs[0]
        if step.transfer and step.transfer.route == "hbm->sbuf" and not step.transfer.software_dge
    ]


def test_where_loads_decide_only_a_table_is_before_the_first_keys() -> None:
    case = Case(planned(NEW_KEYS, **WIDE), [2048, 2000])
    assert case.plan.new_keys_follow
    assert case.error() < CLOSE
    run = case.run()
    loads = by_hardware(run)
    assert loads[0] == "load_live_tiles"
    assert loads[1] in ("load_keys", "load_rows")
    new = steps_of(run.programs[0], "compute_new_qk_matmul")
    products = steps_of(run.programs[0], "compute_pv_matmul")
    assert products[0] < new[0] < products[-1]


@pytest.mark.parametrize(
    "changes", [{"batch": 1}, {"head_dim": 32, "value_head_dim": 32}, {"max_keys": 1024}]
)
def test_elsewhere_new_keys_come_first(changes: dict[str, Any]) -> None:
    """One sequence; as much to compute as to load; small tiles."""
    sizes = WIDE | changes
    case = Case(planned(NEW_KEYS, **sizes), [2000] * sizes["batch"])
    program = case.run().programs[0]
    new = steps_of(program, "compute_new_qk_matmul")
    assert new[0] < steps_of(program, "compute_qk_matmul")[0]


@pytest.mark.parametrize(
    ("batch", "layout", "first"),
    [
        (2, "BKHS", "query"),
        (3, "BKHS", "key"),
        (3, "BKSH", "query"),  # the Tensor engine turns keys, behind the queries
    ],
)
def test_keys_of_several_sequences_are_loaded_before_the_queries(
    batch: int, layout: str, first: str
) -> None:
    case = Case(planned(tokens=1, kv_heads=1, heads=1, batch=batch, layout=layout), [900] * batch)
    if layout == "BKHS":
        case.arrays["key"] = case.arrays["key"].swapaxes(2, 3).copy()
    loads = by_hardware(case.run())
    keys = loads.index("load_keys" if layout == "BKHS" else "load_rows")
    bounds = 1
    assert loads[:keys].count("load_small") == bounds + (first == "query")


def test_the_last_values_come_in_two_loads() -> None:
    """Those of the last sequence, in a loop; of the last pair of known tiles."""
    sizes = {"head_dim": 128, "value_head_dim": 128, "max_keys": 8192, "slots": 4096, "heads": 2}
    made = planned(loop="runtime", **sizes)
    assert made.live is not None
    assert [t.apart for t in (made.live.full, made.live.edge, *made.live.last)] == [
        0,
        0,
        16,
        16,
        16,
    ]
    tiles = planned(**(sizes | {"slots": 16_384}), programs=1).shares[0].tiles
    assert [tile.apart for tile in tiles] == [0] * (len(tiles) - 1) + [16]
    assert planned(**(sizes | {"slots": 3968})).shares[0].tiles[-1].apart == 0  # too few columns
    paged = planned(loop="runtime", **(sizes | {"layout": "paged", "page_len": 16}))
    assert paged.live is not None
    assert [tile.apart for tile in paged.live.last] == [0, 0, 0]

    case = Case(planned(loop="runtime", **(sizes | {"kv_heads": 1})), [4096, 4000])
    assert case.error() < CLOSE
    values = [step.transfer.bytes for step in case.run().programs[0] if is_of(step, "load_rows")]
    a_column = 128 * 128 * 4
    assert values[-2:] == [16 * a_column, 16 * a_column]
    assert len(values) == 2 * 2 + 1  # of float32, keys come by rows too


def is_of(step: Instruction, function: str) -> bool:
    return step.source.function == function and step.transfer is not None


@pytest.mark.parametrize("loop", ["static", "runtime"])
def test_sums_do_not_wait_for_the_last_products(loop: str) -> None:
    """Programs tell each other maxima and sums before Vector waits for the last values."""
    program = Case(planned(programs=2, loop=loop), [900, 900]).run().programs[0]
    vector = [step.source.function for step in program if step.engine is Engine.vector]
    last = max(i for i, function in enumerate(vector) if function == "fa_add_products")
    assert vector.index("weight_of") < last < vector.index("merge_outputs")
    assert vector[last:].count("merge_sums") > 0


def test_known_tiles_of_a_program_that_shares_nothing_are_finished_group_by_group() -> None:
    sizes = {"batch": 4, "heads": 64, "slots": 256}
    assert [len(b.groups) for b in planned(**sizes).shares[0].blocks] == [1, 1, 1, 1]
    shared = planned(**(sizes | {"batch": 3}), programs=2)
    assert shared.sharding == "sequence"
    assert [len(b.groups) for b in shared.shares[0].blocks] == [2, 1]
    program = Case(planned(**sizes), [250] * 4).run().programs[0]
    assert steps_of(program, "store")[0] < steps_of(program, "compute_pv_matmul")[-1]


@pytest.mark.parametrize(
    ("share", "value_head_dim", "tokens", "rows"),
    [
        (8192, 64, 1, 64),  # 4 tiles of 128 rows, or 2 of each 64
        (4096, 64, 1, 64),
        (4095, 64, 1, 128),  # short
        (8192, 128, 1, 128),  # runs are long enough
        (8192, 64, 5, 128),  # 40 rows a sequence: 6 groups of 4 tiles, or 16 of 2
    ],
)
def test_rows_of_a_group_of_narrow_heads(
    share: int, value_head_dim: int, tokens: int, rows: int
) -> None:
    found = choose_group_rows(((0, 16), (0, 1)), 8, tokens, share, 12_288, 128, value_head_dim)
    assert found == rows
    if tokens == 1:
        made = make_plan(
            batch=16, tokens=1, slots=share, heads=8, kv_heads=1, head_dim=64, layout="BKHS",
            value_head_dim=value_head_dim, features=Features(scale=0.125),
        )  # fmt: skip
        assert made.shares[0].blocks[0].groups[0].rows == rows


def test_what_decides_how_long_a_tile_takes() -> None:
    assert loads_decide(5, 128, 128, is_small=False)
    assert loads_decide(14, 128, 128, is_small=False)
    assert not loads_decide(40, 128, 128, is_small=False)
    assert not loads_decide(5, 128, 128, is_small=True)
    assert not loads_decide(5, 64, 64, is_small=False)
