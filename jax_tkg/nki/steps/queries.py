"""Queries, and new keys beside them: loaded, rotated, transposed; the state of their rows."""

from typing import Any

from jax_tkg.nki.buffers import LOWEST_MAX, Constants, Inputs, RowBuffers, chunks
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rope import cos_sin_rows, rotate_rows
from jax_tkg.nki.rows import PARTITIONS, RowBlock, RowChunk, RowGroup
from jax_tkg.nki.steps.cached import channel_parts, turns_pairs
from jax_tkg.nki.steps.load import chunk_view, global_rows, load_small, piece_view

BEHIND_KEYS = 3
"""Cached keys of so many pairs are loaded one after the other: queries that arrive behind the first
ones hold nothing up."""


def allocate_fa_buffers(
    inputs: Inputs, consts: Constants, block: RowBlock, plan: KernelPlan
) -> RowBuffers:
    """Queries, transposed, and the state of the rows of a block."""
    shape, query = (PARTITIONS, block.rows), inputs.query
    beside = new_rows_beside(inputs, block, plan)
    queries, outputs, parts = [], [], channel_parts(inputs, plan)
    for _, _, size in parts:
        queries.append(nl.ndarray((size, block.rows + beside), query.dtype, buffer=nl.sbuf))
    for _, size in chunks(plan.value_head_dim):
        outputs.append(nl.ndarray((size, block.rows), nl.float32, buffer=nl.sbuf))
    for group in block.groups:
        if query.buffer == nl.sbuf:
            rows = nl.ds(group.first_row, group.rows)
            nisa.tensor_copy(dst=queries[0][:, rows], src=query[:, global_rows(group, plan)])
            continue
        for chunk in group.chunks:
            rows = load_queries(inputs, consts, beside, group, chunk, plan)
            columns = nl.ds(group.first_row + chunk.first_row, chunk.rows + beside)
            turned = transpose(rows, parts)
            for c in range(len(turned)):
                nisa.tensor_copy(dst=queries[c][:, columns], src=turned[c])
    new_key: Any = None
    if beside > 0:
        new_key = []
        for c in range(len(queries)):
            new_key.append(queries[c][:, nl.ds(block.rows, beside)])
            queries[c] = queries[c][:, nl.ds(0, block.rows)]
    running_max = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    running_sum = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    decay = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    pairs = pair_queries(queries[0]) if plan.has_query_pairs else None
    return RowBuffers(queries, pairs, running_max, running_sum, outputs, decay, new_key)


def pair_queries(query: Any) -> Any:
    """Queries `[h, R]` for two keys that lie one below the other: see `RowBuffers.query_pairs`."""
    size, rows = query.shape
    pairs = nl.ndarray((2 * size, 2, rows), query.dtype, buffer=nl.sbuf)
    nisa.memset(dst=pairs, value=0.0)
    for i in range(2):
        nisa.tensor_copy(dst=pairs[nl.ds(i * size, size), i, :], src=query)
    return pairs


def new_rows_beside(inputs: Inputs, block: RowBlock, plan: KernelPlan) -> int:
    """How many new keys are transposed together with the queries of a block; 0: none.

    Where both fit into the partitions that saves a transpose and a copy.
    """
    share, group = plan.shares[nl.program_id(0)], block.groups[0]
    if inputs.query.buffer == nl.sbuf or plan.features.rotary != None:  # noqa: E711
        return 0
    if len(block.groups) > 1 or not share.tiles or not share.tiles[-1].new:
        return 0
    count = group.pairs * plan.tokens
    return count if group.rows + count <= PARTITIONS else 0


def load_queries(
    inputs: Inputs,
    consts: Constants,
    beside: int,
    group: RowGroup,
    chunk: RowChunk,
    plan: KernelPlan,
) -> Any:
    """The queries of a chunk of rows, `[rows, H]`, and below them so many new keys of a group."""
    query = inputs.query
    loaded = nl.ndarray((chunk.rows + beside, plan.head_dim), query.dtype, buffer=nl.sbuf)
    mine = loaded[0 : chunk.rows]
    behind = group.pairs >= BEHIND_KEYS and not turns_keys(inputs, plan)
    in_loop = plan.live != None  # noqa: E711  (whose keys come after all)
    load_small(mine, chunk_view(query, chunk), in_loop or behind, plan)
    if beside > 0:
        piece = plan.shares[nl.program_id(0)].tiles[-1].new[0]
        keys = piece_view(inputs.new_key, piece, group).permute((0, 2, 1, 3))
        load_small(loaded[nl.ds(chunk.rows, beside)], keys, True, plan)
    batches = nl.ds(chunk.first_batch, chunk.batches)
    tokens = nl.ds(chunk.first_token, chunk.tokens)
    rotate(mine, positions_of(inputs, batches, tokens, chunk.heads), consts, plan)
    return loaded


def turns_keys(inputs: Inputs, plan: KernelPlan) -> bool:
    """Whether the Tensor engine turns cached keys: it does so behind the queries."""
    if plan.layout == "BKHS" or turns_pairs(inputs, plan):
        return False
    dtype = inputs.query.dtype
    return dtype == nl.float32 or inputs.key.dtype != dtype


def transpose(rows: Any, parts: list[tuple[int, int, int]]) -> Any:
    """Up to 128 rows, transposed: a tile `[h, rows]` in PSUM for each of `channel_parts`."""
    tiles = []
    for start, step, size in parts:
        turned = nl.ndarray((size, rows.shape[0]), rows.dtype, buffer=nl.psum)
        mine = rows[:, start : start + step * (size - 1) + 1 : step]
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


def rows_of(bufs: RowBuffers, group: RowGroup) -> RowBuffers:
    """The buffers of one group of a block."""
    rows = nl.ds(group.first_row, group.rows)
    queries, outputs = [], []
    for query in bufs.query:
        queries.append(query[:, rows])
    for output in bufs.output:
        outputs.append(output[:, rows])
    pairs: Any = None
    if bufs.query_pairs != None:  # noqa: E711  (the kernel language has no `is`)
        pairs = bufs.query_pairs[:, :, rows]
    running = (bufs.max[:, rows], bufs.sum[:, rows], outputs, bufs.decay[:, rows])
    return RowBuffers(queries, pairs, running[0], running[1], running[2], running[3], bufs.new_key)


def start_rows(bufs: RowBuffers) -> None:
    """The state of rows that have seen no key."""
    nisa.memset(dst=bufs.max, value=LOWEST_MAX)
    nisa.memset(dst=bufs.sum, value=0.0)
    for running in bufs.output:
        nisa.memset(dst=running, value=0.0)
