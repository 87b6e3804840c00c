"""From HBM: what every step reads, and the queries and bounds of a row block."""

from typing import Any

from jax_tkg.nki.buffers import LOWEST_MAX, chunks
from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Constants, Inputs, Pair, Rows, SourceArrays
from jax_tkg.nki.cte.tiles import BANK_KEYS, KeySource, RowBlock, has_bounds, tokens_of
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS


def load_constants(cache: SourceArrays, plan: PrefillPlan) -> Constants:
    """What every step reads."""
    ones = nl.ndarray((1, PARTITIONS), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    consts = Constants(ones, None, None, None)
    source = plan.sources[0]
    if source.has_holes:
        consts.short_ones = nl.ndarray((1, PARTITIONS), nl.bfloat16, buffer=nl.sbuf)
        nisa.memset(dst=consts.short_ones, value=1.0)
    if source.has_scales:
        consts.logit_scales = load_everywhere(cache.logit_scales, ones)
        consts.value_scales = load_everywhere(cache.value_scales, ones)
        if plan.soft_cap != None:  # noqa: E711  (the kernel language has no `is`)
            scales, cap = consts.logit_scales, 1.0 / plan.soft_cap
            nisa.tensor_scalar(dst=scales, data=scales, op0=nl.multiply, operand0=cap)
    return consts


def load_everywhere(source: Any, ones: Any) -> Any:
    """Numbers `[n]` in HBM, in every partition: `[128, n]`.

    They are read once, and the Tensor engine repeats them, exactly.

    Args:
        source: of a type that DMA converts.
        ones: `[1, 128]` of 1, in the type of the result.
    """
    count = source.size
    once = nl.ndarray((1, count), ones.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=once, src=source.reshape((1, count)))
    every = nl.ndarray((PARTITIONS, count), ones.dtype, buffer=nl.sbuf)
    for first in range(0, count, BANK_KEYS):
        mine = once[:, first : min(first + BANK_KEYS, count)]
        repeated = nl.ndarray((PARTITIONS, mine.shape[1]), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=repeated, stationary=ones, moving=mine)
        part = every[:, first : first + mine.shape[1]]
        nisa.tensor_copy(dst=part, src=repeated, engine=nisa.engine.scalar)
    return every


def heads_of(tensor: Any, block: RowBlock, pair: Pair, plan: PrefillPlan) -> Any:
    """The rows of a block in `[B, T, N, ...]`: `[heads, tokens, ...]`."""
    first = pair.kv_head * plan.group + block.first_head
    heads = nl.ds(first, block.heads)
    mine = tokens_of(tensor[pair.batch], 0, block)[:, heads]
    return mine.permute((1, 0, 2)) if len(mine.shape) == 3 else mine.permute((1, 0))


def load_head_column(source: Any, block: RowBlock, pair: Pair, plan: PrefillPlan) -> Any:
    """A number of each head, `[B|1, N]`, for the rows of a block: `[R, 1]`."""
    first = pair.kv_head * plan.group + block.first_head
    mine = source[pair.batch if source.shape[0] > 1 else 0, nl.ds(first, block.heads)]
    column = nl.ndarray((block.rows, 1), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=mine.expand_dim(1).broadcast(1, block.tokens))
    return column


def load_token_columns(source: Any, block: RowBlock) -> Any:
    """Numbers of each token, `[n, T]` in HBM, for the rows of a block: `[R, n]`.

    Tokens that follow each other are one piece for DMA; the Tensor engine turns them.
    """
    n = source.shape[0]
    loaded = nl.ndarray((n, block.heads, block.tokens), nl.float32, buffer=nl.sbuf)
    mine = tokens_of(source, 1, block)
    nisa.dma_copy(dst=loaded, src=mine.expand_dim(1).broadcast(1, block.heads))
    turned = nl.ndarray((block.rows, n), nl.float32, buffer=nl.psum)
    by_row = loaded.reshape((n, block.rows))
    nisa.nc_transpose(dst=turned, data=by_row, engine=nisa.engine.tensor)
    columns = nl.ndarray((block.rows, n), nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=columns, src=turned)
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
            at = load_token_columns(inputs.sources[s].query_at[pair.batch].expand_dim(0), block)
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
    moves_on = block.stride > 0 and not source.is_diagonal
    if not source.is_exact or block.heads > 1 or moves_on:
        return load_token_columns(arrays.bounds[:, pair.batch], block)
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
