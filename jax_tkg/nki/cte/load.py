"""From HBM: the queries and bounds of a row block, the keys and values of a tile."""

from typing import Any

from jax_tkg.nki.buffers import LOWEST_MAX, chunks
from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Inputs, Keys, Pair, Rows, SourceArrays, has_bounds
from jax_tkg.nki.cte.tiles import KeySource, KeyTile, RowBlock, columns_of, in_runs
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS


def heads_of(tensor: Any, block: RowBlock, pair: Pair, plan: PrefillPlan) -> Any:
    """The rows of a block in `[B, T, N, ...]`: `[heads, tokens, ...]`."""
    first = pair.kv_head * plan.group + block.first_head
    heads = nl.ds(first, block.heads)
    mine = tensor[pair.batch, nl.ds(block.first_token, block.tokens), heads]
    return mine.permute((1, 0, 2)) if len(mine.shape) == 3 else mine.permute((1, 0))


def load_head_column(source: Any, block: RowBlock, pair: Pair, plan: PrefillPlan) -> Any:
    """A number of each head, `[B|1, N]`, for the rows of a block: `[R, 1]`."""
    first = pair.kv_head * plan.group + block.first_head
    mine = source[pair.batch if source.shape[0] > 1 else 0, nl.ds(first, block.heads)]
    column = nl.ndarray((block.rows, 1), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=mine.expand_dim(1).broadcast(1, block.tokens))
    return column


def load_token_columns(source: Any, block: RowBlock) -> Any:
    """Numbers of each token, `[T, n]` in HBM, for the rows of a block: `[R, n]`."""
    mine = source[nl.ds(block.first_token, block.tokens)]
    columns = nl.ndarray((block.rows, source.shape[1]), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=columns, src=mine.expand_dim(0).broadcast(0, block.heads))
    return columns


def load_rows(rows: Rows, inputs: Inputs, plan: PrefillPlan) -> None:
    """Queries of a block and what masks need, and the state of rows that have seen no key."""
    block, pair = rows.block, rows.pair
    rows.query = load_queries(inputs.query, block, pair, plan)
    rows.bounds, rows.neg_query_at = [], []
    for s in range(len(plan.sources)):
        rows.bounds.append(load_bounds(plan.sources[s], inputs.sources[s], block, pair))
        at = None
        if plan.has_alibi:
            at = load_token_columns(inputs.sources[s].query_at[pair.batch].expand_dim(1), block)
            nisa.tensor_scalar(dst=at, data=at, op0=nl.multiply, operand0=-1.0)
        rows.neg_query_at.append(at)
    if plan.has_alibi:
        rows.slopes = load_head_column(inputs.slopes, block, pair, plan)
        nisa.tensor_scalar(dst=rows.slopes, data=rows.slopes, op0=nl.multiply, operand0=-1.0)
    rows.neg_max = nl.ndarray((block.rows, 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=rows.neg_max, value=-LOWEST_MAX, engine=nisa.engine.gpsimd)
    rows.total = nl.ndarray((block.rows, plan.value_head_dim + 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=rows.total, value=0.0, engine=nisa.engine.gpsimd)
    if plan.has_sinks:
        start_with_sinks(rows, load_head_column(inputs.sinks, block, pair, plan))


def load_bounds(source: KeySource, arrays: SourceArrays, block: RowBlock, pair: Pair) -> Any:
    """Bounds of what each row sees, `[R, 2]`; made here where they follow from the plan."""
    if not has_bounds(source):
        return None
    if not source.is_exact or block.heads > 1:
        return load_token_columns(arrays.bounds[:, pair.batch].permute((1, 0)), block)
    bounds = nl.ndarray((block.rows, 2), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=bounds[:, 0:1], value=0.0, engine=nisa.engine.gpsimd)
    nisa.memset(dst=bounds[:, 1:2], value=float(source.slots), engine=nisa.engine.gpsimd)
    if source.before != None:  # noqa: E711  (the kernel language has no `is`)
        low = block.first_token + source.before
        nisa.iota(dst=bounds[:, 0:1], pattern=[[1, 1]], offset=low, channel_multiplier=1)
    if source.after != None:  # noqa: E711
        high = block.first_token + source.after + 1
        nisa.iota(dst=bounds[:, 1:2], pattern=[[1, 1]], offset=high, channel_multiplier=1)
    return bounds


def start_with_sinks(rows: Rows, sinks: Any) -> None:
    """A sink is a logit without a value: the first that its rows see."""
    nisa.tensor_scalar(
        dst=rows.neg_max, data=sinks, op0=nl.multiply, operand0=-1.0, op1=nl.minimum,
        operand1=-LOWEST_MAX,
    )  # fmt: skip
    width = rows.total.shape[1]
    total = rows.total[:, width - 1 : width]
    nisa.activation(dst=total, op=nl.exp, data=sinks, bias=rows.neg_max)


def load_queries(query: Any, block: RowBlock, pair: Pair, plan: PrefillPlan) -> Any:
    """The queries of a block, transposed: a tile `[h, R]` for each chunk of H."""
    rows = nl.ndarray((block.rows, plan.head_dim), query.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=rows, src=heads_of(query, block, pair, plan))
    transposed = []
    for start, size in chunks(plan.head_dim):
        turned = nl.ndarray((size, block.rows), query.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=rows[:, start : start + size], engine=nisa.engine.tensor)
        tile = nl.ndarray((size, block.rows), query.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=tile, src=turned)
        transposed.append(tile)
    return transposed


def load_keys(inputs: Inputs, tile: KeyTile, pair: Pair, plan: PrefillPlan) -> Keys:
    """Keys with H on the partitions, values with keys on the partitions, what belongs to them."""
    source, arrays, dtype = (
        plan.sources[tile.source],
        inputs.sources[tile.source],
        inputs.query.dtype,
    )
    position = None
    if plan.has_alibi or source.has_positions:
        position = load_positions(source, arrays, tile, pair)
    holes, first_slot = None, None
    if source.has_holes:
        holes = load_key_row(arrays.holes, tile, pair)
    if tile.index != None:  # noqa: E711
        first_slot = load_everywhere(arrays.tile_starts[nl.ds(tile.index, 1)])
        if position != None:  # noqa: E711
            nisa.tensor_scalar(dst=position, data=position, op0=nl.add, operand0=first_slot)
    logit_scale, value_scale = None, None
    if source.has_scales:
        logit_scale = load_everywhere(arrays.logit_scales[nl.ds(pair.index, 1)])
        value_scale = load_everywhere(arrays.value_scales[nl.ds(pair.index, 1)])
        if plan.soft_cap != None:  # noqa: E711
            cap = 1.0 / plan.soft_cap
            nisa.tensor_scalar(dst=logit_scale, data=logit_scale, op0=nl.multiply, operand0=cap)
    key = load_turned_keys(source, arrays, dtype, tile, pair, plan)
    value_layout = "BKSH" if source.layout == "BKHS" else source.layout
    value = load_natural(arrays.value, value_layout, arrays, dtype, tile, pair)
    if source.is_padded:
        clear_unseen(value, arrays.unseen, tile, pair)
    return Keys(
        tile, source, arrays, key, value, position, holes, first_slot, logit_scale, value_scale
    )


def load_everywhere(number: Any) -> Any:
    """One number, `[1]` in HBM, in every partition: `[128, 1]`."""
    loaded = nl.ndarray((PARTITIONS, 1), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=loaded, src=number.expand_dim(0).broadcast(0, PARTITIONS))
    return loaded


def tile_of(memory: Any, axis: int, keys: int, start: int, index: Any) -> Any:
    """What belongs to a tile along an axis of slots, or of runs of slots.

    Args:
        memory: in HBM.
        axis: which.
        keys: so many entries.
        start: the first of them, if there is no index.
        index: a register that counts tiles, or None.
    """
    if index == None:  # noqa: E711  (the kernel language has no `is`)
        return memory.slice(axis, start, start + keys)
    tiles = memory.shape[axis] // keys
    by_tile = memory.slice(axis, 0, tiles * keys).reshape_dim(axis, (tiles, keys))
    return by_tile.select(axis, index)


def load_positions(source: KeySource, arrays: SourceArrays, tile: KeyTile, pair: Pair) -> Any:
    """Positions of the keys of a tile, float32 `[128, keys]`, the same in every partition."""
    if source.has_positions:
        return load_key_row(arrays.positions, tile, pair)
    positions = nl.ndarray((PARTITIONS, tile.keys), nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=positions, pattern=[[1, tile.keys]], offset=tile.start)
    return positions


def load_key_row(source: Any, tile: KeyTile, pair: Pair) -> Any:
    """A number of each key of a tile, `[B, S]`, in every partition: float32 `[128, keys]`."""
    loaded = nl.ndarray((PARTITIONS, tile.keys), nl.float32, buffer=nl.sbuf)
    mine = tile_of(source[pair.batch], 0, tile.keys, tile.start, tile.index)
    nisa.dma_copy(dst=loaded, src=mine.expand_dim(0).broadcast(0, PARTITIONS))
    return loaded


def pair_slots(tensor: Any, layout: str, pair: Pair) -> Any:
    """Keys or values of a pair: `[S, H]`, or `[H, S]` where keys are transposed."""
    if layout == "BSKH":
        return tensor[pair.batch, :, pair.kv_head, :]
    return tensor[pair.batch, pair.kv_head]


def load_natural(
    memory: Any, layout: str, arrays: SourceArrays, dtype: Any, tile: KeyTile, pair: Pair
) -> Any:
    """Keys or values of a tile, `[partitions, subtiles, width]`, converted to `dtype`."""
    width = memory.shape[-1]
    loaded = nl.ndarray((tile.partitions, tile.subtiles, width), dtype, buffer=nl.sbuf)
    if layout == "paged":
        gather_pages(loaded, memory, arrays, tile, pair)
        return loaded
    mine = pair_slots(memory, layout, pair)
    load_slots(loaded, tile_of(mine, 0, tile.keys, tile.start, tile.index), tile)
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


def gather_pages(loaded: Any, pool: Any, arrays: SourceArrays, tile: KeyTile, pair: Pair) -> None:
    """From a pool of pages `[P, K, L, width]`: each partition a run of slots of one page."""
    pages, heads, page_len, width = pool.shape
    run = tile.subtiles
    index = nl.ndarray((tile.partitions, 1), nl.int32, buffer=nl.sbuf)
    runs = arrays.page_rows[pair.batch, pair.kv_head]
    wanted = tile_of(runs, 0, tile.partitions, tile.start // run, tile.index)
    nisa.dma_copy(dst=index, src=wanted.reshape((tile.partitions, 1)))
    rows = pool.reshape((pages * heads * page_len // run, run * width))
    nisa.dma_copy(dst=loaded, src=rows.vector_select(0, index))


def load_turned_keys(
    source: KeySource,
    arrays: SourceArrays,
    dtype: Any,
    tile: KeyTile,
    pair: Pair,
    plan: PrefillPlan,
) -> Any:
    """Keys of a tile in the order of slots: `[h, keys]` for each chunk of H, as `dtype`.

    Unless they are stored so they come in runs, as the values do, and the Tensor engine turns them.
    """
    natural: Any = None
    if source.layout != "BKHS":
        tile = in_runs(tile)
        natural = load_natural(arrays.key, source.layout, arrays, dtype, tile, pair)
        if source.has_holes:
            clear_unseen(natural, arrays.unseen, tile, pair)
    loaded = []
    for start, size in chunks(plan.head_dim):
        turned = nl.ndarray((size, tile.keys), dtype, buffer=nl.sbuf)
        part = nl.ds(start, size)
        if source.layout == "BKHS":
            stored = pair_slots(arrays.key, "BKHS", pair)[part, :]
            mine = tile_of(stored, 1, tile.keys, tile.start, tile.index)
            nisa.dma_copy(dst=turned, src=mine)
        else:
            turn_keys(turned, natural[:, :, part], tile)
        loaded.append(turned)
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
    mine = tile_of(unseen[pair.batch, head], 0, tile.keys, tile.start, tile.index)
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
