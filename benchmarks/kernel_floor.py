"""How near to the HBM roofline any decode kernel comes in the time model: loads and a store.

For every row of the public kernel's counters with 8,192 slots or more, two launches in the
interpreter: our decode kernel, and one that loads the same keys and values by the same steps, in
the same tiles and order, and stores a result of the same size once the last of them is there; where
two programs share the keys of a sequence, they exchange an output of its size before. It computes
nothing, so that what it takes is the time of its DMAs: descriptors, start, the rate of their runs,
for keys that of a DMA that transposes. Where that alone misses a share of the roofline, no kernel
that loads like this reaches it.

Keys that the Tensor engine turns are only loaded here. Page numbers come first, as they must, and
in a loop the table of its live tiles. A window leaves out what it hides: such rows are not listed.

    python benchmarks/kernel_floor.py
    python benchmarks/kernel_floor.py --rows 10:44
"""

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_costs import (
    LONG,
    ROOFLINE_GOAL,
    Row,
    call_of,
    chosen_rows,
    compare,
    geomean,
    spans,
    without_lse,
)
from rich.console import Console
from rich.table import Table

from jax_tkg.nki import interpreter
from jax_tkg.nki.arguments import Launch, Named, make_launch
from jax_tkg.nki.attention_tkg import attention_tkg
from jax_tkg.nki.buffers import Inputs, Place
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.interpreter.report import timing
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowGroup
from jax_tkg.nki.steps.cached import (
    cache_source,
    load_keys,
    load_rows,
    loads_by_rows,
    operand_dtype,
)
from jax_tkg.nki.steps.exchange import swap
from jax_tkg.nki.steps.finalize import store
from jax_tkg.nki.steps.live import STARTS
from jax_tkg.nki.steps.load import load_live_tiles
from jax_tkg.nki.steps.pages import find_pages
from jax_tkg.nki.tiles import KeyTile

Tiles = Callable[[int, RowGroup], list[tuple[KeyTile, int]]]
"""The tiles of a program and a row group, and where each starts, in the plan's unit."""


@dataclass(frozen=True)
class OnlyLoads:
    """A kernel with the decode kernel's arguments that computes nothing.

    Attributes:
        tiles: which keys.
    """

    tiles: Tiles

    @property
    def __name__(self) -> str:
        """For messages."""
        return "only_loads"

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the decode kernel."""
        return inspect.signature(attention_tkg)

    def __call__(self, *, plan: KernelPlan, **arrays: Any) -> Any:
        """Loads what this program's rows see, and stores zeros."""
        inputs, program = Inputs(**arrays), int(nl.program_id(0))
        width, merges = plan.value_head_dim, plan.sharding == "sequence"
        shape = (plan.batch, plan.tokens, plan.heads, width)
        out = nl.ndarray(shape, inputs.query.dtype, buffer=nl.shared_hbm)
        load_live_tiles(inputs, plan)
        for block in plan.shares[program].blocks:
            last = None
            for group in block.sequences if plan.live else block.groups:
                for tile, start in self.tiles(program, group):
                    last = load_tile(inputs, tile, Place(start, tile.start, None), group, plan)
            if merges:
                last = swap(waiting_for(last, min(PARTITIONS, width), block.rows, nl.float32))
            for group in block.groups:
                for number, chunk in enumerate(group.chunks):
                    if not merges or number % plan.programs == program:
                        rows = waiting_for(last, chunk.rows, width, out.dtype)
                        store(out, rows, group, chunk, plan)
        return out


def waiting_for(last: Any, partitions: int, columns: int, dtype: Any) -> Any:
    """Zeros that are there when what was loaded last is."""
    tile = nl.ndarray((partitions, columns), dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=0.0)
    if last is not None:
        nisa.tensor_copy(dst=tile[0:1, 0:1], src=last[0:1, 0:1])
    return tile


def load_tile(
    inputs: Inputs, tile: KeyTile, place: Place, group: RowGroup, plan: KernelPlan
) -> Any:
    """Keys and values of a tile; returns some of the values that came last."""
    pages, dtype, values = find_pages(inputs, tile, place, group, plan), inputs.query.dtype, None
    for i in range(group.pairs):
        source = cache_source(inputs, pages, group, i, plan)
        if not loads_by_rows(source, dtype):
            load_keys(source, dtype, tile, place, plan)
        else:
            for k in range(len(tile.cached)):
                load_rows(source.keys, source, plan.head_dim, dtype, k, 0, place, tile)
        stored = operand_dtype(source.values, dtype)
        for k in range(len(tile.cached)):
            apart = tile.apart if i == group.pairs - 1 and k == 0 else 0
            width = plan.value_head_dim
            values = load_rows(source.values, source, width, stored, k, apart, place, tile)
    return values[:, 0]


def tiles_of(launch: Launch) -> Tiles:
    """What the launch of the decode kernel loads."""
    plan: KernelPlan = launch.plan
    assert isinstance(launch.kernel, Named)
    given = dict(zip(launch.kernel.names, launch.arrays, strict=True))
    live = None if plan.live is None else np.asarray(given["live_tiles"])

    def tiles(program: int, group: RowGroup) -> list[tuple[KeyTile, int]]:
        if live is None or plan.live is None:
            known = plan.shares[program].tiles
            return [(tile, tile.start // max(1, plan.runs.long)) for tile in known if tile.cached]
        mine = live[program, group.first_batch]
        rounds = int(mine[STARTS - 1])
        return [(plan.live.full, int(start)) for start in mine[STARTS : STARTS + rounds]]

    return tiles


def floor_of(row: Row) -> float:
    """The share of the roofline that loads and a store reach."""
    call, programs = call_of(row), row.n["cores"]
    launch = without_lse(make_launch(call.problem, call.operands, programs, "deferred", "finite"))
    assert isinstance(launch.kernel, Named)
    kernel = Named(OnlyLoads(tiles_of(launch)), launch.kernel.names)
    run = interpreter.run(
        kernel, *map(np.asarray, launch.arrays), programs=programs, plan=launch.plan
    )
    times = timing(run)
    return row.cache_bytes() / run.options.target.hbm_gbps / times.total


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("--rows", default=":", help="first:end, or one row")
    console = Console(width=120)
    table = Table(title="share of the HBM roofline in the time model", pad_edge=False)
    for name in ("row", "problem", "the kernel", "loads alone", "of it"):
        table.add_column(name, justify="left" if name == "problem" else "right")
    done: dict[int, tuple[float, float]] = {}
    for row in chosen_rows(parser.parse_args().rows):
        if row.n["s_prior"] < LONG or row.n["sliding_window"]:
            continue
        found = compare(row, "deferred", "finite", rotates_inside=False, returns_lse=False)
        if isinstance(found, str) or found.roofline is None:
            continue
        floor = floor_of(row)
        done[row.number] = found.roofline, floor
        cells = (f"{share:.3f}" for share in (found.roofline, floor, found.roofline / floor))
        table.add_row(str(row.number), str(row), *cells)
    console.print(table)
    reached = [n for n, (share, _) in done.items() if share >= ROOFLINE_GOAL]
    beyond = [n for n, (_, floor) in done.items() if floor < ROOFLINE_GOAL]
    others = [n for n in done if n not in reached and n not in beyond]
    console.print(f"{len(reached)} rows reach {ROOFLINE_GOAL}: {spans(reached)}")
    console.print(f"{len(beyond)} cannot, loading like this: {spans(beyond)}")
    console.print(f"{len(others)} others miss it: {spans(others)}")
    console.print(f"kernel / loads: geometric mean {geomean(a / b for a, b in done.values()):.3f}")


if __name__ == "__main__":
    main()
