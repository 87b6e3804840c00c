"""A loop at run time over the tiles of a sequence that hold live keys."""

from collections.abc import Callable
from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, LiveTables, Place
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import RowBlock, RowGroup
from jax_tkg.nki.tiles import KeyTile

FULL, EDGE, DIRTY, STARTS = 0, 1, 2, 3


def load_live_tables(
    inputs: Inputs, consts: Constants, block: RowBlock, plan: KernelPlan
) -> LiveTables:
    """Where the live tiles of the sequences of a block are, for this program."""
    live: Any = plan.live
    program, first = nl.program_id(0), block.sequences[0].first_batch
    count = block.sequences[-1].first_batch + 1 - first
    some = nl.ds(first, count)
    tiles = nl.ndarray((1, count, STARTS + live.width), nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tiles, src=inputs.live_tiles[program, some].expand_dim(0))
    return LiveTables(first, tiles, consts.live_edges[:, some])


def for_each_live_tile(
    attend: Callable[[KeyTile, Place], None],
    tables: LiveTables,
    sequence: RowGroup,
    plan: KernelPlan,
) -> None:
    """Calls `attend(tile, place)` in loops: over full tiles, then over edge or dirty ones."""
    live: Any = plan.live
    number = sequence.first_batch - tables.first_batch
    mine, edges = tables.tiles[:, number], tables.edges[:, number]
    starts = mine[:, nl.ds(STARTS, live.width)]

    def attend_full(i: Any) -> None:
        start = nisa.register_alloc()
        nisa.register_load(start, starts[:, nl.ds(i, 1)])
        attend(live.full, Place(start, None, None))

    def attend_edge(i: Any) -> None:
        attend(live.edge, place_of(i, starts, edges))

    def attend_dirty(i: Any) -> None:
        attend(live.dirty, place_of(i, starts, edges))

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
