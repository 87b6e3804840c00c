"""The prefill kernel: many queries attend to a cache and to the new keys beside it.

Rows lie on the partitions: a row's maximum, sum and decay are one number a partition, which the
Vector and Scalar engines apply for free. Row blocks take turns, so that the Tensor engine
multiplies for one while the softmax of another is made.
"""

from typing import Any

from jax_tkg.nki.cte.finalize import finish_rows
from jax_tkg.nki.cte.load import load_keys, load_rows
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
from jax_tkg.nki.cte.tiles import KeyTile, Step, takes_part, whole_tile
from jax_tkg.nki.dialect import nisa, nl

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
    plan: PrefillPlan,
) -> Any:
    """Attention of many queries. For the arrays see `Inputs` and `SourceArrays`.

    Returns:
        `[B, T, N, Hv]` in the query's dtype, and the log-sum-exp float32 `[B, T, N]`, natural log;
        or, not normalised, float32 output, maximum and sum.
    """
    cache = SourceArrays(
        key, value, bounds, query_at, positions, holes, page_rows, unseen, logit_scales,
        value_scales, tile_starts, 0,
    )  # fmt: skip
    sources = [cache]
    if len(plan.sources) > 1:
        first_column = plan.sources[0].slots
        new = SourceArrays(
            new_key, new_value, new_bounds, new_query_at, new_positions, None, None, new_unseen,
            None, None, None, first_column,
        )  # fmt: skip
        sources.append(new)
    inputs = Inputs(query, sources, sinks, slopes, hidden, bias, live)
    outputs = allocate_outputs(query, plan)
    share, pipeline = plan.shares[nl.program_id(0)], Pipeline()
    for p in range(len(share.pairs)):
        pair = pair_of(plan, share.pairs[p])
        for g in range(len(share.groups)):
            place = Place(p, g, pipeline)
            attend_group(share.groups[g], inputs, outputs, pair, plan, place)
    drain(pipeline, inputs, outputs, plan)
    if plan.normalize:
        return outputs.out, outputs.lse
    return outputs.out, outputs.max, outputs.sum


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


def attend_group(
    blocks: Any, inputs: Inputs, outputs: Outputs, pair: Pair, plan: PrefillPlan, place: Place
) -> None:
    """Row blocks of a pair against all keys that some of them see, each tile loaded once."""
    visits, rows = visits_of(plan, blocks), []
    for b in range(len(blocks)):
        rows.append(Rows(blocks[b], pair))
        if plan.live_tiles > 0 or not takes_part(visits, b):
            load_rows(rows[b], inputs, plan)
    if plan.live_tiles > 0:
        attend_live_tiles(rows, inputs, outputs, plan, place)
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


def attend_live_tiles(
    rows: Any, inputs: Inputs, outputs: Outputs, plan: PrefillPlan, place: Place
) -> None:
    """A loop at run time over the tiles of the cache in which some of the rows see something."""
    drain(place.pipeline, inputs, outputs, plan)
    limits = nl.ndarray((1, 2), nl.int32, buffer=nl.sbuf)
    found = inputs.live[nl.program_id(0), place.pair, place.group]
    nisa.dma_copy(dst=limits, src=found.reshape((1, 2)))
    first, end = nisa.register_alloc(), nisa.register_alloc()
    nisa.register_load(first, limits[:, 0:1])
    nisa.register_load(end, limits[:, 1:2])
    like, kept = whole_tile(plan.sources[0], plan.tile_keys), []
    for mine in rows:
        kept.append(mine.neg_max)

    def attend(i: Any) -> None:
        tile = KeyTile(0, 0, like.keys, like.subtiles, like.partitions, True, i)
        keys = load_keys(inputs, tile, rows[0].pair, plan)
        for b in range(len(rows)):
            work = Work(rows[b], keys, Step(b, 0, tile.keys, True))
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
