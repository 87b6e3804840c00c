"""From HBM: keys with H on the partitions, values with keys there, and what belongs to them."""

from typing import Any

from jax_tkg.nki.buffers import chunks
from jax_tkg.nki.cte.load import load_everywhere
from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Constants, Inputs, Keys, Pair, SourceArrays
from jax_tkg.nki.cte.tiles import (
    BANK_KEYS,
    KeySource,
    KeyTile,
    columns_of,
    has_bounds,
    in_runs,
    whole_tile,
)
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS
from jax_tkg.nki.steps.cached import operand_dtype
from jax_tkg.nki.tiles import GATHER_ROWS, LEAST_RUN


def load_keys(inputs: Inputs, tile: KeyTile, pair: Pair, plan: PrefillPlan) -> Keys:
    """The keys and values of a tile, and what belongs to them: see `Keys`."""
    source, arrays = plan.sources[tile.source], inputs.sources[tile.source]
    dtype, consts = inputs.query.dtype, inputs.consts
    position, holes, first_slot, rows = None, None, None, None
    if plan.has_alibi or source.has_positions:
        position = load_positions(source, arrays, tile, pair, consts)
    if source.has_holes:
        holes = load_key_row(arrays.holes, tile, pair, consts.short_ones)
    # Around a diagonal, bounds and tiles both count from the round.
    has_absolute_bounds = has_bounds(source) and not source.is_diagonal
    if tile.index != None and (has_absolute_bounds or position != None):  # noqa: E711
        first_slot = load_everywhere(first_of_stride(arrays, tile, plan), consts.ones)
        if position != None:  # noqa: E711  (the kernel language has no `is`)
            nisa.tensor_scalar(dst=position, data=position, op0=nl.add, operand0=first_slot)
        if not has_absolute_bounds:
            first_slot = None
    logit_scale, value_scale = None, None
    if source.has_scales:
        logit_scale = consts.logit_scales[:, pair.index : pair.index + 1]
        value_scale = consts.value_scales[:, pair.index : pair.index + 1]
    if source.layout == "paged":
        rows = load_page_rows(arrays, tile, pair)
    key = load_turned_keys(source, arrays, dtype, tile, pair, rows, holes, plan)
    layout = "BKSH" if source.layout == "BKHS" else source.layout
    value_dtype = operand_dtype(arrays.value, dtype)
    value = load_natural(arrays.value, layout, value_dtype, tile, pair, rows)
    if source.is_padded:
        clear_unseen(value, arrays.unseen, tile, pair)
    return Keys(
        tile, source, arrays, key, value, position, holes, first_slot, logit_scale, value_scale
    )


def tile_of(memory: Any, axis: int, tile: KeyTile, run: int = 1) -> Any:
    """What belongs to a tile along an axis of runs of so many slots.

    A tile with a stride lies within one of the pieces that long into which the axis is cut.
    """
    keys, start, stride = tile.keys // run, tile.start // run, tile.stride // run
    if stride == 0:
        return memory.slice(axis, start, start + keys)
    skipped, first = start // stride * stride, start % stride
    count = (memory.shape[axis] - skipped) // stride
    pieces = memory.slice(axis, skipped, skipped + count * stride)
    mine = pieces.reshape_dim(axis, (count, stride)).select(axis, tile.index)
    return mine.slice(axis, first, first + keys)


def first_of_stride(arrays: SourceArrays, tile: KeyTile, plan: PrefillPlan) -> Any:
    """Index times stride of a tile: float32 `[1]`."""
    every = tile.stride // whole_tile(plan.sources[tile.source], plan.tile_keys).keys
    count = arrays.tile_starts.shape[0] // every
    by_stride = arrays.tile_starts[nl.ds(0, count * every)].reshape_dim(0, (count, every))
    return by_stride[nl.ds(tile.index, 1), 0]


def load_positions(
    source: KeySource, arrays: SourceArrays, tile: KeyTile, pair: Pair, consts: Constants
) -> Any:
    """Positions of the keys of a tile, float32 `[128, keys]`, the same in every partition."""
    if source.has_positions:
        return load_key_row(arrays.positions, tile, pair, consts.ones)
    positions = nl.ndarray((PARTITIONS, tile.keys), nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=positions, pattern=[[1, tile.keys]], offset=tile.start)
    return positions


def load_key_row(source: Any, tile: KeyTile, pair: Pair, ones: Any) -> Any:
    """A number of each key of a tile, `[B, S]`, in every partition: `[128, keys]`."""
    return load_everywhere(tile_of(source[pair.batch], 0, tile), ones)


def pair_slots(tensor: Any, layout: str, pair: Pair) -> Any:
    """Keys or values of a pair: `[S, H]`, or `[H, S]` where keys are transposed."""
    if layout == "BSKH":
        return tensor[pair.batch, :, pair.kv_head, :]
    return tensor[pair.batch, pair.kv_head]


def load_natural(memory: Any, layout: str, dtype: Any, tile: KeyTile, pair: Pair, rows: Any) -> Any:
    """Keys or values of a tile, `[partitions, subtiles, width]`, converted to `dtype`."""
    width = memory.shape[-1]
    loaded = nl.ndarray((tile.partitions, tile.subtiles, width), dtype, buffer=nl.sbuf)
    if layout == "paged":
        nisa.dma_copy(dst=loaded, src=pool_rows(memory, tile).vector_select(0, rows))
        return loaded
    mine = pair_slots(memory, layout, pair)
    load_slots(loaded, tile_of(mine, 0, tile), tile)
    return loaded


def load_slots(loaded: Any, memory: Any, tile: KeyTile) -> None:
    """What belongs to the slots of a tile, `[keys, width]`, as `[partitions, subtiles, width]`."""
    if tile.in_runs:
        nisa.dma_copy(dst=loaded, src=memory.reshape_dim(0, (tile.partitions, tile.subtiles)))
        return
    whole = tile.keys // PARTITIONS
    if whole > 0:
        part = memory[nl.ds(0, whole * PARTITIONS), :].reshape_dim(0, (whole, PARTITIONS))
        nisa.dma_copy(dst=loaded[:, 0:whole, :], src=part.permute((1, 0, 2)))
    rest = tile.keys - whole * PARTITIONS
    if rest > 0:
        nisa.dma_copy(dst=loaded[0:rest, whole, :], src=memory[nl.ds(whole * PARTITIONS, rest), :])


def pool_rows(pool: Any, tile: KeyTile) -> Any:
    """A pool of pages `[P, K, L, width]` as `[rows, n * width]`, a run of a tile in each row."""
    pages, heads, page_len, width = pool.shape
    run = tile.subtiles
    return pool.reshape((pages * heads * page_len // run, run * width))


def load_page_rows(arrays: SourceArrays, tile: KeyTile, pair: Pair) -> Any:
    """Where the runs of a tile are in the pool, for keys and values: int32 `[partitions, 1]`."""
    rows = nl.ndarray((tile.partitions, 1), nl.int32, buffer=nl.sbuf)
    runs = arrays.page_rows[pair.batch, pair.kv_head]
    wanted = tile_of(runs, 0, tile, tile.subtiles)
    nisa.dma_copy(dst=rows, src=wanted.reshape((tile.partitions, 1)))
    return rows


def load_turned_keys(
    source: KeySource,
    arrays: SourceArrays,
    dtype: Any,
    tile: KeyTile,
    pair: Pair,
    rows: Any,
    holes: Any,
    plan: PrefillPlan,
) -> Any:
    """Keys of a tile in the order of slots, for each chunk of H: see `Keys.key`.

    Unless they are stored so, DMA turns what has the 16 bits that are computed in, as it loads or
    gathers it. Others come in runs, as the values do, and the Tensor engine turns them.
    """
    if gathers_turned(source, arrays, dtype, tile):
        return gather_turned(arrays.key, tile, rows, holes, plan)
    natural: Any = None
    is_direct = source.layout == "BKHS" or turns_by_dma(source, arrays, dtype)
    if not is_direct:
        tile = in_runs(tile)
        natural = load_natural(arrays.key, source.layout, dtype, tile, pair, rows)
        if source.has_holes:
            clear_unseen(natural, arrays.unseen, tile, pair)
    loaded = []
    stored = operand_dtype(arrays.key, dtype) if source.layout == "BKHS" else dtype
    for start, size in chunks(plan.head_dim):
        turned = nl.ndarray((size, tile.keys), stored, buffer=nl.sbuf)
        part = nl.ds(start, size)
        if not is_direct:
            turn_keys(turned, natural[:, :, part], tile)
        elif source.layout == "BKHS":
            slots = pair_slots(arrays.key, "BKHS", pair)[part, :]
            mine = tile_of(slots, 1, tile)
            nisa.dma_copy(dst=turned, src=mine)
        else:
            slots = pair_slots(arrays.key, source.layout, pair)
            mine = tile_of(slots, 0, tile)
            nisa.dma_transpose(dst=turned, src=mine[:, part])
        loaded.append(turned)
    return loaded


def turns_by_dma(source: KeySource, arrays: SourceArrays, dtype: Any) -> bool:
    """Whether DMA can transpose keys as it loads them: two bytes each, the type computed in."""
    is_flat = source.layout != "paged" and not source.has_holes
    return is_flat and arrays.key.dtype == dtype and dtype != nl.float32


def gathers_turned(source: KeySource, arrays: SourceArrays, dtype: Any, tile: KeyTile) -> bool:
    """Whether DMA transposes what it gathers from pages: likewise, in runs that are worth it."""
    if source.layout != "paged" or arrays.key.dtype != dtype or dtype == nl.float32:
        return False
    fits = tile.partitions % GATHER_ROWS == 0 and BANK_KEYS % tile.subtiles == 0
    return fits and tile.subtiles >= LEAST_RUN


def gather_turned(pool: Any, tile: KeyTile, rows: Any, holes: Any, plan: PrefillPlan) -> Any:
    """Keys from a pool of pages: `[h, partitions, subtiles]` for each chunk of H.

    They arrive subtile after subtile, and are seen in the order of slots.
    """
    p, n = tile.partitions, tile.subtiles
    by_run = pool_rows(pool, tile)
    runs = by_run.reshape((by_run.shape[0], 1, n, plan.head_dim))
    loaded = []
    for start, size in chunks(plan.head_dim):
        turned = nl.ndarray((size, 1, n, p), pool.dtype, buffer=nl.sbuf)
        mine = runs[:, :, :, nl.ds(start, size)]
        nisa.dma_transpose(dst=turned, src=mine.vector_select(0, rows.view(nl.uint32)))
        in_order = turned.select(1, 0).permute((0, 2, 1))
        if holes != None:  # noqa: E711
            clear = holes[0:size].view(nl.uint16).reshape_dim(1, (p, n))
            nisa.tensor_copy_predicated(dst=in_order, src=0.0, predicate=clear)
        loaded.append(in_order)
    return loaded


def turn_keys(turned: Any, natural: Any, tile: KeyTile) -> None:
    """`[partitions, subtiles, h]` to `[h, keys]` in the order of slots."""
    h, n, p = turned.shape[0], tile.subtiles, tile.partitions
    columns = nl.ndarray((h, n, p), turned.dtype, buffer=nl.psum)
    for j in range(n):
        _, _, _, count = columns_of(tile, j, 0, tile.keys)
        mine = columns[:, j, 0:count]
        nisa.nc_transpose(dst=mine, data=natural[0:count, j, :], engine=nisa.engine.tensor)
    if tile.in_runs:
        by_run = turned.reshape_dim(1, (p, n)).permute((0, 2, 1))
        nisa.tensor_copy(dst=by_run, src=columns)
    else:
        in_order = columns.reshape((h, n * p))
        nisa.tensor_copy(dst=turned, src=in_order[:, 0 : tile.keys])


def clear_unseen(slots: Any, unseen: Any, tile: KeyTile, pair: Pair) -> None:
    """Zeroes slots that no query sees: padding may hold NaN, and 0 * NaN is NaN."""
    head = pair.kv_head if unseen.shape[1] > 1 else 0
    p, n, width = slots.shape
    flags = nl.ndarray((p, n, 1), nl.uint8, buffer=nl.sbuf)
    mine = tile_of(unseen[pair.batch, head], 0, tile)
    load_slots(flags, mine.expand_dim(1), tile)
    clear = flags.broadcast(2, width)
    whole = n if tile.in_runs else tile.keys // PARTITIONS
    if whole > 0:
        nisa.tensor_copy_predicated(
            dst=slots[:, 0:whole, :], src=0.0, predicate=clear[:, 0:whole, :]
        )
    if whole < n:
        rest = tile.keys - whole * PARTITIONS
        nisa.tensor_copy_predicated(
            dst=slots[0:rest, whole, :], src=0.0, predicate=clear[0:rest, whole, :]
        )
