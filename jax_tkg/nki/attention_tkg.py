"""The decode kernel: a few new tokens of each sequence attend to its cache and to themselves.

Keys lie on the partitions while logits, weights and sums are made: the few queries move through the
Tensor engine, all 128 lanes of the Vector engine work. Maximum, sum and decay of a row are kept in
every partition, so that no step has to move them.
"""

from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, RowBuffers, RowGroup
from jax_tkg.nki.dialect import nl
from jax_tkg.nki.plan import KernelPlan, KeyTile, key_tile
from jax_tkg.nki.steps.exchange import merge_programs
from jax_tkg.nki.steps.finalize import add_sinks, finalize_rows, store_rows
from jax_tkg.nki.steps.load import (
    allocate_row_buffers,
    cache_source,
    load_constants,
    new_source,
)
from jax_tkg.nki.steps.pv import accumulate_output, allocate_products, compute_pv_matmul
from jax_tkg.nki.steps.qk import compute_qk_matmul, mask_logits
from jax_tkg.nki.steps.softmax import (
    cascaded_max_reduce,
    cascaded_sum_reduction,
    compute_exp_qk,
    take_part_in_exchanges,
    update_running_max,
)


def attention_tkg(
    query: Any,
    key: Any,
    value: Any,
    bounds: Any,
    positions: Any,
    page_rows: Any,
    new_key: Any,
    new_value: Any,
    new_bounds: Any,
    new_positions: Any,
    sinks: Any,
    hidden: Any,
    bias: Any,
    logit_scales: Any,
    value_scales: Any,
    plan: KernelPlan,
) -> Any:
    """Attention of new tokens, and its log-sum-exp. For the arrays see `Inputs`.

    Returns:
        `[B, T, N, Hv]` in the query's dtype, and float32 `[B, T, N]`, natural log.
    """
    inputs = Inputs(
        query, key, value, bounds, positions, page_rows, new_key, new_value, new_bounds,
        new_positions, sinks, hidden, bias, logit_scales, value_scales,
    )  # fmt: skip
    batch, tokens, heads = plan.batch, plan.tokens, plan.heads
    out = nl.ndarray((batch, tokens, heads, plan.value_head_dim), query.dtype, buffer=nl.shared_hbm)
    lse_out = nl.ndarray((batch, tokens, heads), nl.float32, buffer=nl.shared_hbm)
    consts = load_constants(inputs, plan)
    share = plan.shares[nl.program_id(0)]
    for pairs in share.groups:
        group = RowGroup(pairs, plan.rows_per_pair, len(pairs) * plan.rows_per_pair)
        bufs = allocate_row_buffers(query, group, plan)
        attend_keys(inputs, bufs, consts, group, plan)
        if plan.sharding == "sequence":
            merge_programs(bufs, plan)
        if plan.has_sinks:
            add_sinks(bufs, consts, group)
        lse = finalize_rows(bufs)
        store_rows(out, lse_out, lse, bufs, group, plan)
    return out, lse_out


def attend_keys(
    inputs: Inputs, bufs: RowBuffers, consts: Constants, group: RowGroup, plan: KernelPlan
) -> None:
    """Folds this program's keys into the rows of a group, tile by tile."""
    share = plan.shares[nl.program_id(0)]
    sources = []
    for pair in group.pairs:
        sources.append(cache_source(inputs, pair, consts, plan))
    for tile in share.tiles:
        attend_tile(sources, tile, inputs, bufs, consts, group, plan)
    if share.sees_new_keys:
        beside = []
        for pair in group.pairs:
            beside.append(new_source(inputs, pair, consts, plan))
        tile = key_tile(0, plan.tokens, 1)
        attend_tile(beside, tile, inputs, bufs, consts, group, plan)
    for _ in range(share.idle_tiles):
        take_part_in_exchanges(bufs, plan)


def attend_tile(
    sources: Any,
    tile: KeyTile,
    inputs: Inputs,
    bufs: RowBuffers,
    consts: Constants,
    group: RowGroup,
    plan: KernelPlan,
) -> None:
    """Logits, running maximum, weights, running sum, running output: of one tile.

    Args:
        sources: where the keys of each pair come from.
        tile: which slots.
        inputs: dense masks and biases.
        bufs: the rows, changed.
        consts: tiles that no step changes.
        group: the rows.
        plan: sizes.
    """
    qk = nl.ndarray((tile.partitions, tile.subtiles, group.rows), nl.float32, buffer=nl.sbuf)
    unseen = []
    for i in range(len(group.pairs)):
        compute_qk_matmul(qk, sources[i], bufs, i, tile, plan)
        unseen.append(mask_logits(qk, sources[i], i, inputs, tile, plan))
    tile_max = cascaded_max_reduce(qk, tile, group.rows)
    update_running_max(tile_max, bufs, plan)
    weights = compute_exp_qk(qk, bufs.query[0].dtype, bufs, tile)
    cascaded_sum_reduction(qk, bufs, consts, tile, plan)
    products = allocate_products(group, plan)
    for i in range(len(group.pairs)):
        compute_pv_matmul(products, weights, sources[i], unseen[i], i, tile, plan)
    accumulate_output(products, bufs)
