"""A loop at run time over the tiles of a sequence that hold live keys."""

from collections.abc import Callable
from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, LiveTables, Place
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import RowBlock, RowGroup
from jax_tkg.nki.steps.load import count_slots, load_live_tiles, sequences_of_program
from jax_tkg.nki.tiles import KeyTile

FULL, EDGE, DIRTY, STARTS = 0, 1, 2, 3


def load_live_tables(
    inputs: Inputs, consts: Constants, block: RowBlock, plan: KernelPlan
) -> LiveTables:
    """Where the live tiles of the sequences of a block are, for this program.

    And which slots are in a tile: GpSimd, which counts them, has small DMAs to start before.
    """
    live: Any = plan.live
    if consts.live_tiles == None:  # noqa: E711
        consts.live_tiles = load_live_tiles(inputs, plan)
    if consts.slots == None and plan.features.needs_mask:  # noqa: E711
        consts.slots = count_slots(live.edge, 0)
    first = block.sequences[0].first_batch
    count = block.sequences[-1].first_batch + 1 - first
    mine = consts.live_tiles[:, nl.ds(first - sequences_of_program(plan)[0], count)]
    return LiveTables(first, mine, consts.live_edges[:, nl.ds(first, count)])


def for_each_live_tile(
    attend: Callable[[KeyTile, Place], None],
    tables: LiveTables,
    sequence: RowGroup,
    is_last: bool,
    plan: KernelPlan,
) -> None:
    """Calls `attend(tile, place)` in loops: over full tiles, then over edge or dirty ones.

    Those of the last sequence of a block are its `last` ones.
    """
    live: Any = plan.live
    full, edge, dirty = live.last if is_last else (live.full, live.edge, live.dirty)
    number = sequence.first_batch - tables.first_batch
    mine, edges = tables.tiles[:, number], tables.edges[:, number]
    starts = mine[:, nl.ds(STARTS, live.width)]

    def attend_full(i: Any) -> None:
        start = nisa.register_alloc()
        nisa.register_load(start, starts[:, nl.ds(i, 1)])
        attend(full, Place(start, None, None))

    def attend_edge(i: Any) -> None:
        attend(edge, place_of(i, starts, edges))

    def attend_dirty(i: Any) -> None:
        attend(dirty, place_of(i, starts, edges))

    full_end, edge_end = end_of(mine, FULL), end_of(mine, EDGE)
    nl.fori_loop(0, full_end, attend_full)
    nl.fori_loop(full_end, edge_end, attend_edge)
    if plan.features.clears_values:
        nl.fori_loop(edge_end, end_of(mine, DIRTY), attend_dirty)
    else:
        nl.fori_loop(edge_end, end_of(mine, DIRTY), attend_edge)


def end_of(tiles: Any, kind: int) -> Any:
    """The round in which the tiles of a kind end: a register."""
    end = nisa.register_alloc()
    nisa.register_load(end, tiles[:, kind : kind + 1])
    return end


def place_of(i: Any, starts: Any, edges: Any) -> Place:
    """Where edge or dirty tile i is."""
    start = nisa.register_alloc()
    nisa.register_load(start, starts[:, nl.ds(i, 1)])
    return Place(start, edges[:, 0, nl.ds(i, 1)], edges[:, 1, nl.ds(i, 1)])
