"""From HBM: constants, queries, keys and values."""

from typing import Any

from jax_tkg.nki.buffers import (
    LOWEST_MAX,
    Constants,
    Inputs,
    KeySource,
    RowBuffers,
    RowGroup,
    batch_of,
    chunks,
    kv_head_of,
)
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import PARTITIONS, KernelPlan, KeyTile


def load_broadcast(source: Any) -> Any:
    """A small HBM tensor in every partition, flat: `[128, size]`."""
    size = source.size
    tile = nl.ndarray((PARTITIONS, size), source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source.reshape((1, size)).broadcast(0, PARTITIONS))
    return tile


def load_constants(inputs: Inputs, plan: KernelPlan) -> Constants:
    """What every step reads."""
    ones = nl.ndarray((PARTITIONS, PARTITIONS), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    shape = (PARTITIONS, plan.batch, plan.tokens)
    consts = Constants(
        ones,
        load_broadcast(inputs.bounds[0]).reshape(shape),
        load_broadcast(inputs.bounds[1]).reshape(shape),
        None,
        None,
        None,
        None,
        None,
    )
    if plan.has_new_keys:
        consts.new_low = load_broadcast(inputs.new_bounds[0]).reshape(shape)
        consts.new_high = load_broadcast(inputs.new_bounds[1]).reshape(shape)
    if plan.has_sinks:
        consts.sinks = load_broadcast(inputs.sinks)
    if plan.has_scales:
        consts.logit_scales = load_broadcast(inputs.logit_scales)
        consts.value_scales = load_broadcast(inputs.value_scales)
    return consts


def cache_source(inputs: Inputs, pair: int, consts: Constants, plan: KernelPlan) -> KeySource:
    """The keys of a pair in the cache."""
    batch = batch_of(plan, pair)
    is_transposed = plan.layout == "BKHS"
    source = KeySource(
        pair,
        None,
        None,
        is_transposed,
        None,
        consts.low[:, batch, :],
        consts.high[:, batch, :],
        inputs.positions[batch] if plan.has_positions else None,
        0,
        plan.scale,
        None,
    )
    if plan.layout == "paged":
        source.page_rows = inputs.page_rows[batch, kv_head_of(plan, pair)]
        source.keys = pool_rows(inputs.key, source.page_rows, plan)
        source.values = pool_rows(inputs.value, source.page_rows, plan)
    else:
        source.keys = pair_of_cache(inputs.key, pair, plan.layout, plan)
        value_layout = "BKSH" if is_transposed else plan.layout
        source.values = pair_of_cache(inputs.value, pair, value_layout, plan)
    if plan.has_scales:
        source.logit_scale = consts.logit_scales[:, pair : pair + 1]
        source.value_scale = consts.value_scales[:, pair : pair + 1]
    return source


def pool_rows(pool: Any, page_rows: Any, plan: KernelPlan) -> Any:
    """A pool of pages `[P, K, L, H]` as `[rows, n * H]`."""
    pages, heads, page_len, width = pool.shape
    run = plan.slots // page_rows.shape[0]
    return pool.reshape((pages * heads * page_len // run, run * width))


def new_source(inputs: Inputs, pair: int, consts: Constants, plan: KernelPlan) -> KeySource:
    """The new keys of a pair, beside the cache."""
    batch = batch_of(plan, pair)
    return KeySource(
        pair,
        pair_of_cache(inputs.new_key, pair, "BSKH", plan),
        pair_of_cache(inputs.new_value, pair, "BSKH", plan),
        False,
        None,
        consts.new_low[:, batch, :],
        consts.new_high[:, batch, :],
        inputs.new_positions[batch],
        plan.slots,
        plan.scale,
        None,
    )


def row_view(tensor: Any, pair: int, plan: KernelPlan) -> Any:
    """The rows of a pair in `[B, T, N, ...]`: `[G, T, ...]`."""
    first = kv_head_of(plan, pair) * plan.group
    mine = tensor[batch_of(plan, pair), :, first : first + plan.group]
    return mine.permute((1, 0, 2)) if len(mine.shape) == 3 else mine.permute((1, 0))


def load_queries(query: Any, group: RowGroup, plan: KernelPlan) -> Any:
    """The queries of a group, transposed: a tile `[h, R]` for each chunk of H."""
    rows = nl.ndarray((group.rows, plan.head_dim), query.dtype, buffer=nl.sbuf)
    for i in range(len(group.pairs)):
        mine = nl.ds(i * group.rows_per_pair, group.rows_per_pair)
        nisa.dma_copy(dst=rows[mine, :], src=row_view(query, group.pairs[i], plan))
    transposed = []
    for start, size in chunks(plan.head_dim):
        turned = nl.ndarray((size, group.rows), query.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=rows[:, start : start + size], engine=nisa.engine.tensor)
        tile = nl.ndarray((size, group.rows), query.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=tile, src=turned)
        transposed.append(tile)
    return transposed


def allocate_row_buffers(query: Any, group: RowGroup, plan: KernelPlan) -> RowBuffers:
    """Queries and the state of rows that have seen no key."""
    shape = (PARTITIONS, group.rows)
    running_max = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=running_max, value=LOWEST_MAX)
    running_sum = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=running_sum, value=0.0)
    output = []
    for _, size in chunks(plan.value_head_dim):
        tile = nl.ndarray((size, group.rows), nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=tile, value=0.0)
        output.append(tile)
    decay = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    return RowBuffers(load_queries(query, group, plan), running_max, running_sum, output, decay)


def pair_of_cache(tensor: Any, pair: int, layout: str, plan: KernelPlan) -> Any:
    """Keys or values of a pair: `[S, H]`, or `[H, S]` where keys are transposed."""
    batch, head = batch_of(plan, pair), kv_head_of(plan, pair)
    return tensor[batch, :, head, :] if layout == "BSKH" else tensor[batch, head]


def load_keys(source: KeySource, dtype: Any, tile: KeyTile, plan: KernelPlan) -> Any:
    """Keys of a tile with H on the partitions: `[h, keys]` for each chunk of H, as `dtype`.

    16-bit keys are transposed on their way by the DMA engines; those that are gathered, converted
    or of 32 bits by the Tensor engine.
    """
    slots = nl.ds(tile.start, tile.keys)
    is_gathered = source.page_rows != None  # noqa: E711  (the kernel language has no `is`)
    by_dma = not is_gathered and dtype != nl.float32 and source.keys.dtype == dtype
    rows: Any = None
    if not source.is_transposed and not by_dma:
        rows = load_rows(source.keys, source, plan.head_dim, dtype, tile)
    loaded = []
    for start, size in chunks(plan.head_dim):
        part = nl.ds(start, size)
        turned = nl.ndarray((size, tile.keys), dtype, buffer=nl.sbuf)
        if source.is_transposed:
            nisa.dma_copy(dst=turned, src=source.keys[part, slots])
        elif by_dma:
            nisa.dma_transpose(dst=turned, src=source.keys[slots, part])
        else:
            transpose_rows(turned, rows[:, :, part], tile)
        loaded.append(turned)
    return loaded


def load_rows(memory: Any, source: KeySource, width: int, dtype: Any, tile: KeyTile) -> Any:
    """Keys or values of a tile, `[partitions, subtiles, width]`, as `dtype`.

    Every partition reads slots that follow each other; from a pool of pages by a gather.
    """
    p, n = tile.partitions, tile.subtiles
    loaded = nl.ndarray((p, n, width), dtype, buffer=nl.sbuf)
    if source.page_rows == None:  # noqa: E711  (the kernel language has no `is`)
        mine = memory[nl.ds(tile.start, tile.keys), :]
        nisa.dma_copy(dst=loaded, src=mine.reshape_dim(0, (p, n)))
        return loaded
    rows = nl.ndarray((p, 1), nl.int32, buffer=nl.sbuf)
    wanted = source.page_rows[nl.ds(tile.start // n, p)]
    nisa.dma_copy(dst=rows, src=wanted.reshape((p, 1)))
    nisa.dma_copy(dst=loaded, src=memory.vector_select(0, rows))
    return loaded


def transpose_rows(turned: Any, rows: Any, tile: KeyTile) -> None:
    """On the Tensor engine: `[partitions, subtiles, h]` to `[h, keys]` in the order of slots."""
    for j in range(tile.subtiles):
        columns = nl.ndarray((turned.shape[0], tile.partitions), turned.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=columns, data=rows[:, j, :], engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=turned[:, j : tile.keys : tile.subtiles], src=columns)


def load_dense(
    dense: Any, dtype: Any, source: KeySource, g: int, tile: KeyTile, plan: KernelPlan
) -> Any:
    """A dense mask or bias for query head g of a pair: `[partitions, subtiles, T]`."""
    batch = batch_of(plan, source.pair) if dense.shape[0] > 1 else 0
    head = kv_head_of(plan, source.pair) * plan.group + g if dense.shape[1] > 1 else 0
    mine = dense[batch, head, :, nl.ds(source.first_column + tile.start, tile.keys)]
    if dense.shape[2] == 1:
        mine = mine.broadcast(0, plan.tokens)
    by_token = mine.reshape_dim(1, (tile.partitions, tile.subtiles)).permute((1, 2, 0))
    loaded = nl.ndarray((tile.partitions, tile.subtiles, plan.tokens), dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=loaded, src=by_token)
    return loaded
