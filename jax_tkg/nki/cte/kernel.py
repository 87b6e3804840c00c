"""The prefill kernel: many queries attend to a cache and to the new keys beside it.

Rows lie on the partitions: a row's maximum, sum and decay are one number a partition, which the
Vector and Scalar engines apply for free. Row blocks take turns, so that the Tensor engine
multiplies for one while the softmax of another is made.
"""

from typing import Any

from jax_tkg.nki.cte.finalize import finish_rows
from jax_tkg.nki.cte.load import load_constants, load_rows
from jax_tkg.nki.cte.load_keys import load_keys
from jax_tkg.nki.cte.logits import finish_logits, multiply_queries
from jax_tkg.nki.cte.mask import mask_and_max
from jax_tkg.nki.cte.plan import PrefillPlan, visits_of
from jax_tkg.nki.cte.pv import accumulate, multiply_values, transpose_weights
from jax_tkg.nki.cte.softmax import compute_weights
from jax_tkg.nki.cte.state import (
    Inputs,
    Outputs,
    Pair,
    Pipeline,
    Place,
    Rows,
    SourceArrays,
    Work,
    pair_of,
)
from jax_tkg.nki.cte.tiles import KeyTile, RowBlock, Step, has_bounds, takes_part, whole_tile
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rope import rotate_tokens

STAGES = 4
"""Of a step after its logits were multiplied: softmax, turning of the weights, values."""


def attention_cte(
    query: Any,
    key: Any,
    value: Any,
    bounds: Any,
    query_at: Any,
    positions: Any,
    holes: Any,
    page_rows: Any,
    unseen: Any,
    logit_scales: Any,
    value_scales: Any,
    new_key: Any,
    new_value: Any,
    new_bounds: Any,
    new_query_at: Any,
    new_positions: Any,
    new_unseen: Any,
    sinks: Any,
    slopes: Any,
    hidden: Any,
    bias: Any,
    live: Any,
    tile_starts: Any,
    new_live: Any,
    new_tile_starts: Any,
    rotary_table: Any,
    query_positions: Any,
    plan: PrefillPlan,
) -> Any:
    """Attention of many queries. For the arrays see `Inputs` and `SourceArrays`.

    With a plan that rotates, `rotary_table` is that of `jax_tkg.nki.rope_call.rotary_table`, and
    `query_positions` int32 `[B, T]` those of the new tokens.

    Returns:
        `[B, T, N, Hv]` in the query's dtype, and the log-sum-exp float32 `[B, T, N]`, natural log;
        or, not normalised, float32 output, maximum and sum. Behind them the rotated new keys
        `[B, T, K, H]`, if the kernel rotates.
    """
    if plan.rotary != None:  # noqa: E711  (the kernel language has no `is`)
        query, new_key = rotate(query, new_key, query_positions, rotary_table, plan)
    cache = SourceArrays(
        key, value, bounds, query_at, positions, holes, page_rows, unseen, logit_scales,
        value_scales, tile_starts, live, 0,
    )  # fmt: skip
    sources = [cache]
    if len(plan.sources) > 1:
        first_column = plan.sources[0].slots
        new = SourceArrays(
            new_key, new_value, new_bounds, new_query_at, new_positions, None, None, new_unseen,
            None, None, new_tile_starts, new_live, first_column,
        )  # fmt: skip
        sources.append(new)
    consts = load_constants(cache, plan)
    inputs = Inputs(query, sources, sinks, slopes, hidden, bias, consts)
    outputs = allocate_outputs(query, plan)
    share, pipeline = plan.shares[nl.program_id(0)], Pipeline()
    for p in range(len(share.pairs)):
        pair = pair_of(plan, share.pairs[p])
        if plan.rounds > 0:
            attend_rounds(p, pair, inputs, outputs, plan, pipeline)
        for g in range(len(share.groups)):
            place = Place(p, g, None, pipeline)
            attend_group(share.groups[g], inputs, outputs, pair, plan, place)
    drain(pipeline, inputs, outputs, plan)
    return results(outputs, new_key, plan)


def results(outputs: Outputs, rotated: Any, plan: PrefillPlan) -> Any:
    """What the kernel returns, in order."""
    found = [outputs.out]
    if plan.normalize:
        found.append(outputs.lse)
    else:
        found.append(outputs.max)
        found.append(outputs.sum)
    if plan.rotary != None:  # noqa: E711
        found.append(rotated)
    return tuple(found)


def rotate(query: Any, new_key: Any, positions: Any, table: Any, plan: PrefillPlan) -> Any:
    """The queries and new keys turned, in HBM: every row block loads what all programs rotated."""
    queries = nl.ndarray(query.shape, query.dtype, buffer=nl.shared_hbm)
    keys = nl.ndarray(new_key.shape, new_key.dtype, buffer=nl.shared_hbm)
    is_interleaved = plan.rotary == "interleaved"
    rotate_tokens([queries, keys], [query, new_key], positions, table, is_interleaved)
    if plan.programs > 1:
        nisa.core_barrier(data=queries, cores=(0, 1))
        nisa.core_barrier(data=keys, cores=(0, 1))
    return queries, keys


def allocate_outputs(query: Any, plan: PrefillPlan) -> Outputs:
    """The results in HBM."""
    rows = (plan.batch, plan.tokens, plan.heads)
    wide = (plan.batch, plan.tokens, plan.heads, plan.value_head_dim)
    if plan.normalize:
        out = nl.ndarray(wide, query.dtype, buffer=nl.shared_hbm)
        return Outputs(out, nl.ndarray(rows, nl.float32, buffer=nl.shared_hbm), None, None)
    out = nl.ndarray(wide, nl.float32, buffer=nl.shared_hbm)
    largest = nl.ndarray(rows, nl.float32, buffer=nl.shared_hbm)
    return Outputs(out, None, largest, nl.ndarray(rows, nl.float32, buffer=nl.shared_hbm))


def attend_rounds(
    p: int, pair: Pair, inputs: Inputs, outputs: Outputs, plan: PrefillPlan, pipeline: Pipeline
) -> None:
    """A loop at run time over row blocks of the p-th pair that lie the same distance apart."""
    drain(pipeline, inputs, outputs, plan)
    groups = plan.shares[nl.program_id(0)].looped

    def attend(i: Any) -> None:
        for g in range(len(groups)):
            blocks = []
            for block in groups[g]:
                mine = RowBlock(
                    block.first_token, block.tokens, block.first_head, block.heads, block.rows,
                    block.stride, i,
                )  # fmt: skip
                blocks.append(mine)
            attend_group(blocks, inputs, outputs, pair, plan, Place(p, g, i, pipeline))
            drain(pipeline, inputs, outputs, plan)

    nl.fori_loop(0, plan.rounds, attend)


def attend_group(
    blocks: Any, inputs: Inputs, outputs: Outputs, pair: Pair, plan: PrefillPlan, place: Place
) -> None:
    """Row blocks of a pair against all keys that some of them see, each tile loaded once."""
    visits, rows, has_live = visits_of(plan, blocks), [], False
    for source in plan.sources:
        has_live = has_live or source.live_tiles > 0
    for b in range(len(blocks)):
        rows.append(Rows(blocks[b], pair))
        if has_live or not takes_part(visits, b):
            load_rows(rows[b], inputs, plan)
    for s in range(len(plan.sources)):
        if plan.sources[s].live_tiles > 0:
            attend_live_tiles(s, rows, inputs, outputs, plan, place)
    for b in range(len(blocks)):
        if not takes_part(visits, b):
            finish_rows(rows[b], outputs, plan)
    for visit in visits:
        keys = load_keys(inputs, visit.tile, pair, plan)
        for step in visit.steps:
            mine = rows[step.block]
            if mine.query == None:  # noqa: E711  (the kernel language has no `is`)
                load_rows(mine, inputs, plan)
            take_up(Work(mine, keys, step), place.pipeline, inputs, outputs, plan)


def live_range(s: int, inputs: Inputs, plan: PrefillPlan, place: Place) -> Any:
    """Registers of the first live tile of source s that the rows visit, and of the one behind."""
    limits = nl.ndarray((1, 2), nl.int32, buffer=nl.sbuf)
    of_groups = inputs.sources[s].live[nl.program_id(0), place.pair]
    looped = len(plan.shares[nl.program_id(0)].looped)
    if place.round == None:  # noqa: E711
        found = of_groups[plan.rounds * looped + place.group]
    else:
        by_round = of_groups[nl.ds(0, plan.rounds * looped)].reshape_dim(0, (plan.rounds, looped))
        found = by_round.select(0, place.round)[place.group]
    nisa.dma_copy(dst=limits, src=found.reshape((1, 2)))
    first, end = nisa.register_alloc(), nisa.register_alloc()
    nisa.register_load(first, limits[:, 0:1])
    nisa.register_load(end, limits[:, 1:2])
    return first, end


def attend_live_tiles(
    s: int, rows: Any, inputs: Inputs, outputs: Outputs, plan: PrefillPlan, place: Place
) -> None:
    """A loop at run time over the tiles of a source in which some of the rows see something."""
    drain(place.pipeline, inputs, outputs, plan)
    first, end = live_range(s, inputs, plan, place)
    source = plan.sources[s]
    like, kept = whole_tile(source, plan.tile_keys), []
    is_masked = has_bounds(source) and not source.is_diagonal
    for mine in rows:
        kept.append(mine.neg_max)

    def attend(i: Any) -> None:
        tile = KeyTile(s, 0, like.keys, like.subtiles, like.partitions, True, like.keys, i)
        keys = load_keys(inputs, tile, rows[0].pair, plan)
        for b in range(len(rows)):
            work = Work(rows[b], keys, Step(b, 0, tile.keys, is_masked))
            take_up(work, place.pipeline, inputs, outputs, plan)
        drain(place.pipeline, inputs, outputs, plan)
        for b in range(len(rows)):
            nisa.tensor_copy(dst=kept[b], src=rows[b].neg_max)
            rows[b].neg_max = kept[b]

    nl.fori_loop(first, end, attend)


def take_up(
    work: Work, pipeline: Pipeline, inputs: Inputs, outputs: Outputs, plan: PrefillPlan
) -> None:
    """Begins a step."""
    multiply_queries(work)
    advance(pipeline, work, inputs, outputs, plan)


def drain(pipeline: Pipeline, inputs: Inputs, outputs: Outputs, plan: PrefillPlan) -> None:
    """Completes the steps under way."""
    for _ in range(STAGES):
        advance(pipeline, None, inputs, outputs, plan)


def advance(
    pipeline: Pipeline, work: Any, inputs: Inputs, outputs: Outputs, plan: PrefillPlan
) -> None:
    """Takes the next step, and moves those under way on by one stage each.

    While the logits of one step are multiplied, the softmax of the step before is made, the weights
    of the one before that are turned, and those of yet another are multiplied with values: every
    engine has work that waits for none of the others. A row block is stored after its last step.
    """
    first, second, third = pipeline.multiplied, pipeline.weighted, pipeline.resting
    last = pipeline.turned
    pipeline.multiplied, pipeline.weighted, pipeline.resting = work, first, second
    pipeline.turned = third
    if third != None:  # noqa: E711  (the kernel language has no `is`)
        transpose_weights(third)
    if first != None:  # noqa: E711
        finish_logits(first, inputs, plan)
        compute_weights(first, mask_and_max(first, inputs, plan))
    if last != None:  # noqa: E711
        multiply_values(last, plan)
        accumulate(last)
        if last.step.is_last:
            finish_rows(last.rows, outputs, plan)
