"""From HBM: constants, queries, cached keys and values."""

from typing import Any

from jax_tkg.nki.buffers import (
    LOWEST_MAX,
    Constants,
    Inputs,
    KeySource,
    Place,
    RowBuffers,
    chunks,
)
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rope import cos_sin_rows, load_turns, rotate_rows
from jax_tkg.nki.rows import PARTITIONS, RowBlock, RowChunk, RowGroup, batch_of, kv_head_of
from jax_tkg.nki.tiles import KeyTile, Piece

TRANSPOSES = 4
"""Of keys, before they are copied out of PSUM: in float32 they fill a bank."""


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
    consts = Constants(ones, None, None, None, None, None)
    features, shape = plan.features, (PARTITIONS, plan.batch, plan.tokens)
    if features.needs_mask:
        consts.high = load_broadcast(inputs.bounds[1]).reshape(shape)
        if features.has_low:
            consts.low = load_broadcast(inputs.bounds[0]).reshape(shape)
    if features.has_scales:
        consts.logit_scales = load_broadcast(inputs.logit_scales)
        consts.value_scales = load_broadcast(inputs.value_scales)
    if features.rotary != None:  # noqa: E711  (the kernel language has no `is`)
        consts.turns = load_turns(inputs.rotary_table, PARTITIONS)
    return consts


def chunk_view(tensor: Any, chunk: RowChunk) -> Any:
    """The rows of a chunk in `[B, T, N, ...]`, in their order: `[b, n, t, ...]`."""
    some = tensor[
        nl.ds(chunk.first_batch, chunk.batches),
        nl.ds(chunk.first_token, chunk.tokens),
        nl.ds(chunk.first_head, chunk.heads),
    ]
    return some.permute((0, 2, 1, 3)) if len(some.shape) == 4 else some.permute((0, 2, 1))


def transpose(rows: Any) -> Any:
    """Up to 128 rows, transposed: a tile `[h, rows]` in PSUM for each chunk of 128 of H."""
    tiles = []
    for start, size in chunks(rows.shape[1]):
        turned = nl.ndarray((size, rows.shape[0]), rows.dtype, buffer=nl.psum)
        mine = rows[:, nl.ds(start, size)]
        nisa.nc_transpose(dst=turned, data=mine, engine=nisa.engine.tensor)
        tiles.append(turned)
    return tiles


def rotate(rows: Any, positions: Any, consts: Constants, plan: KernelPlan) -> None:
    """Rotates rows `[rows, H]`, if the kernel does; `positions` are their tokens' in HBM."""
    if plan.features.rotary == None:  # noqa: E711
        return
    column = nl.ndarray((rows.shape[0], 1), nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=positions)
    cos_sin = cos_sin_rows(column, consts.turns)
    rotate_rows(rows, rows, cos_sin, plan.features.rotary == "interleaved")


def positions_of(inputs: Inputs, batches: Any, tokens: Any, heads: int) -> Any:
    """Positions of rows in the order sequence, head, token: `[b, heads, t]` in HBM."""
    if inputs.query_positions == None:  # noqa: E711
        return None
    return inputs.query_positions[batches, tokens].expand_dim(1).broadcast(1, heads)


def allocate_fa_buffers(
    inputs: Inputs, consts: Constants, block: RowBlock, plan: KernelPlan
) -> RowBuffers:
    """Queries, transposed, and the state of the rows of a block."""
    shape, query = (PARTITIONS, block.rows), inputs.query
    queries, outputs = [], []
    for _, size in chunks(plan.head_dim):
        queries.append(nl.ndarray((size, block.rows), query.dtype, buffer=nl.sbuf))
    for _, size in chunks(plan.value_head_dim):
        outputs.append(nl.ndarray((size, block.rows), nl.float32, buffer=nl.sbuf))
    for group in block.groups:
        if query.buffer == nl.sbuf:
            rows = nl.ds(group.first_row, group.rows)
            nisa.tensor_copy(dst=queries[0][:, rows], src=query[:, global_rows(group, plan)])
            continue
        for chunk in group.chunks:
            loaded = nl.ndarray((chunk.rows, plan.head_dim), query.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=loaded, src=chunk_view(query, chunk))
            batches = nl.ds(chunk.first_batch, chunk.batches)
            tokens = nl.ds(chunk.first_token, chunk.tokens)
            positions = positions_of(inputs, batches, tokens, chunk.heads)
            rotate(loaded, positions, consts, plan)
            rows = nl.ds(group.first_row + chunk.first_row, chunk.rows)
            turned = transpose(loaded)
            for c in range(len(turned)):
                nisa.tensor_copy(dst=queries[c][:, rows], src=turned[c])
    running_max = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    running_sum = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    decay = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    return RowBuffers(queries, running_max, running_sum, outputs, decay)


def global_rows(group: RowGroup, plan: KernelPlan) -> Any:
    """The rows of a group among all B * N * T."""
    head = group.first_kv * plan.group + group.first_query
    return nl.ds((group.first_batch * plan.heads + head) * plan.tokens, group.rows)


def rows_of(bufs: RowBuffers, group: RowGroup) -> RowBuffers:
    """The buffers of one group of a block."""
    rows = nl.ds(group.first_row, group.rows)
    queries, outputs = [], []
    for query in bufs.query:
        queries.append(query[:, rows])
    for output in bufs.output:
        outputs.append(output[:, rows])
    return RowBuffers(queries, bufs.max[:, rows], bufs.sum[:, rows], outputs, bufs.decay[:, rows])


def start_rows(bufs: RowBuffers) -> None:
    """The state of rows that have seen no key."""
    nisa.memset(dst=bufs.max, value=LOWEST_MAX)
    nisa.memset(dst=bufs.sum, value=0.0)
    for running in bufs.output:
        nisa.memset(dst=running, value=0.0)


def cache_source(inputs: Inputs, group: RowGroup, i: int, plan: KernelPlan) -> KeySource:
    """The cached keys of pair i of a group."""
    batch, head = batch_of(group, i), kv_head_of(group, i)
    if plan.layout == "paged":
        rows = inputs.page_rows[batch, head]
        keys, values = pool_rows(inputs.key, plan), pool_rows(inputs.value, plan)
        return KeySource(keys, values, False, rows, [], [])
    if plan.layout == "BSKH":
        keys, values = inputs.key[batch, :, head], inputs.value[batch, :, head]
        return KeySource(keys, values, False, None, [], [])
    is_transposed = plan.layout == "BKHS"
    keys, values = inputs.key[batch, head], inputs.value[batch, head]
    return KeySource(keys, values, is_transposed, None, [], [])


def pool_rows(pool: Any, plan: KernelPlan) -> Any:
    """A pool of pages `[P, K, L, H]` as `[rows, n * H]`."""
    pages, heads, page_len, width = pool.shape
    return pool.reshape((pages * heads * page_len // plan.run, plan.run * width))


def find_pages(source: KeySource, tile: KeyTile, place: Place, plan: KernelPlan) -> None:
    """Where the pages of a tile are: once for its keys and values."""
    if source.page_rows == None:  # noqa: E711
        return
    every = source.page_rows[nl.ds(place.start, tile.keys // plan.run)]
    for piece in tile.cached:
        p = piece.partitions
        rows = nl.ndarray((p, 1), nl.int32, buffer=nl.sbuf)
        wanted = every[nl.ds(piece.start // plan.run, p)]
        nisa.dma_copy(dst=rows, src=wanted.reshape_dim(0, (p, 1)))
        if plan.features.has_holes and tile.is_masked:
            hole = nl.ndarray((p, 1), nl.uint8, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=hole, data=rows, op0=nl.less, operand0=0.0)
            nisa.tensor_scalar(dst=rows, data=rows, op0=nl.maximum, operand0=0.0)
            source.holes.append(hole)
        source.rows.append(rows)


def load_keys(source: KeySource, dtype: Any, tile: KeyTile, place: Place, plan: KernelPlan) -> Any:
    """Cached keys of a tile, transposed: a tile `[h, keys]` for each chunk of H.

    Two bytes an element are transposed by DMA, others by the Tensor engine.
    """
    if loads_by_rows(source, dtype):
        return turn_keys(source, dtype, tile, place, plan)
    slots = nl.ds(place.start, tile.keys)
    loaded = []
    for start, size in chunks(plan.head_dim):
        turned = nl.ndarray((size, tile.keys), dtype, buffer=nl.sbuf)
        if source.is_transposed:
            nisa.dma_copy(dst=turned, src=source.keys[nl.ds(start, size), slots])
        else:
            nisa.dma_transpose(dst=turned, src=source.keys[slots, nl.ds(start, size)])
        loaded.append(turned)
    return loaded


def loads_by_rows(source: KeySource, dtype: Any) -> bool:
    """Whether keys arrive as they lie in memory and are transposed on chip."""
    if source.is_transposed:
        return False
    if source.page_rows != None:  # noqa: E711  (the kernel language has no `is`)
        return True
    return dtype == nl.float32 or source.keys.dtype != dtype


def key_column(keys: Any, piece: Piece, j: int, by_rows: bool) -> Any:
    """The keys of column j of a piece, `[h, partitions]`; see `load_keys` and `turn_keys`."""
    if by_rows:
        return keys[:, nl.ds(piece.start + j * piece.partitions, piece.partitions)]
    return keys[:, piece.start + j : piece.start + piece.keys : piece.subtiles]


def turn_keys(source: KeySource, dtype: Any, tile: KeyTile, place: Place, plan: KernelPlan) -> Any:
    """Keys by way of rows, `[h, keys]` for each chunk of H: column after column of a piece."""
    loaded = []
    for _, size in chunks(plan.head_dim):
        loaded.append(nl.ndarray((size, tile.keys), dtype, buffer=nl.sbuf))
    for k in range(len(tile.cached)):
        piece = tile.cached[k]
        rows = load_rows(source.keys, source, plan.head_dim, dtype, k, place, tile)
        p = piece.partitions
        for c in range(len(loaded)):
            part = nl.ds(c * PARTITIONS, loaded[c].shape[0])
            for first in range(0, piece.subtiles, TRANSPOSES):
                count = min(TRANSPOSES, piece.subtiles - first)
                turned = nl.ndarray((loaded[c].shape[0], count * p), dtype, buffer=nl.psum)
                for j in range(count):
                    mine = rows[:, first + j, part]
                    column = turned[:, nl.ds(j * p, p)]
                    nisa.nc_transpose(dst=column, data=mine, engine=nisa.engine.tensor)
                columns = nl.ds(piece.start + first * p, count * p)
                nisa.tensor_copy(dst=loaded[c][:, columns], src=turned)
    return loaded


def load_rows(
    memory: Any,
    source: KeySource,
    width: int,
    dtype: Any,
    k: int,
    place: Place,
    tile: KeyTile,
) -> Any:
    """Keys or values of piece k of a tile, `[partitions, subtiles, width]`, as `dtype`.

    Every partition reads slots that follow each other; from a pool of pages by a gather.
    """
    piece = tile.cached[k]
    p, n = piece.partitions, piece.subtiles
    loaded = nl.ndarray((p, n, width), dtype, buffer=nl.sbuf)
    if source.page_rows == None:  # noqa: E711
        mine = memory[nl.ds(place.start, tile.keys), :][nl.ds(piece.start, piece.keys), :]
        nisa.dma_copy(dst=loaded, src=mine.reshape_dim(0, (p, n)))
    else:
        nisa.dma_copy(dst=loaded, src=memory.vector_select(0, source.rows[k]))
    return loaded
