"""Where a row group finds its cached keys in a pool of pages."""

from typing import Any

from jax_tkg.nki.buffers import NOWHERE, Constants, Inputs, Pages, Place
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowGroup
from jax_tkg.nki.tiles import KeyTile, Piece


def find_first_pages(inputs: Inputs, plan: KernelPlan) -> Any:
    """The pages of the first known tile; None where there is none, or the tile has none."""
    share = plan.shares[nl.program_id(0)]
    if not share.tiles:
        return None
    return find_pages(
        inputs,
        share.tiles[0],
        place_of_known(share.tiles[0], plan),
        share.blocks[0].groups[0],
        plan,
    )


def place_of_known(tile: KeyTile, plan: KernelPlan) -> Place:
    """Where a tile is that is known before the launch."""
    return Place(tile.start // max(1, plan.runs.long), tile.start, None)


def pages_of(
    inputs: Inputs,
    consts: Constants,
    tile: KeyTile,
    place: Place,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """`find_pages`, once for the first tile: its rows have asked for it before all else."""
    share = plan.shares[nl.program_id(0)]
    if share.tiles and plan.live == None:  # noqa: E711
        first = share.blocks[0].groups[0]
        is_same = (group.first_batch, group.first_kv) == (first.first_batch, first.first_kv)
        if is_same and tile.start == share.tiles[0].start:
            return consts.first_pages
    return find_pages(inputs, tile, place, group, plan)


def find_pages(
    inputs: Inputs, tile: KeyTile, place: Place, group: RowGroup, plan: KernelPlan
) -> Any:
    """Where the pages of a tile are, `Pages`: once for the keys and values of a row group."""
    if plan.layout != "paged" or not tile.cached:
        return None
    batches, last = group.batches, tile.cached[-1]
    gathers = last.gather + last.gathers
    rows = nl.ndarray((PARTITIONS, gathers, batches, group.kv_heads), nl.int32, buffer=nl.sbuf)
    finds_holes = plan.features.has_holes and tile.is_masked
    at_once = nisa.engine.gpsimd  # which gathers by them: behind Vector they would wait for a tile
    for piece in tile.cached:
        mine = rows[:, nl.ds(piece.gather, piece.gathers)]
        if piece.partitions < (PARTITIONS if finds_holes else piece.stride):
            nisa.memset(dst=mine, value=-1 if finds_holes else 0, engine=at_once)
        load_page_rows(mine[0 : piece.partitions], inputs, piece, tile, place, group, plan)
    if not finds_holes:
        return Pages(rows, None)
    holes = nl.ndarray((PARTITIONS, gathers, batches), nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=holes,
        data=rows[:, :, :, 0],
        op0=nl.less,
        operand0=0.0,
        op1=nl.multiply,
        operand1=NOWHERE,
    )
    there = nl.ndarray(rows.shape, nl.int32, buffer=nl.sbuf)
    least = nl.ndarray(rows.shape, nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=least, value=0, engine=at_once)
    nisa.tensor_tensor(dst=there, data1=rows, data2=least, op=nl.maximum, engine=at_once)
    return Pages(there, holes)


def load_page_rows(
    loaded: Any,
    inputs: Inputs,
    piece: Piece,
    tile: KeyTile,
    place: Place,
    group: RowGroup,
    plan: KernelPlan,
) -> None:
    """The numbers of the runs of a piece, `[partitions, gathers, b, k]`."""
    runs, table = plan.runs, inputs.page_rows
    if piece.run < runs.long:
        table = inputs.short_rows
    together, heads = table.shape[2], nl.ds(group.first_kv, group.kv_heads)
    every = (plan.slots // runs.long, runs.long // piece.run)
    for first in range(0, group.batches, together):
        number = (group.first_batch + first) // together
        mine = table[number, :, :, heads].reshape_dim(0, every)  # a tile starts at a long run
        mine = mine[nl.ds(place.start, tile.keys // runs.long)].flatten_dims(0, 1)
        mine = mine[nl.ds(piece.start // piece.run, piece.partitions * piece.gathers)]
        by_partition = mine.reshape_dim(0, (piece.partitions, piece.gathers))
        nisa.dma_copy(dst=loaded[:, :, nl.ds(first, together)], src=by_partition)
