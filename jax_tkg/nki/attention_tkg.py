"""The decode kernel: a few new tokens of each sequence attend to its cache and to themselves.

Keys lie on the partitions while logits, weights and sums are made: the few queries move through the
Tensor engine, all 128 lanes of the Vector engine work. Maximum and decay of a row are kept in every
partition, so that no step has to move them.
"""

from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, LiveTables, Place, RowBuffers
from jax_tkg.nki.dialect import nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import RowBlock, RowGroup
from jax_tkg.nki.steps.exchange import merge_outputs, merge_sums, share_rows
from jax_tkg.nki.steps.finalize import fa_finalize_rows, fa_finalize_sums, store
from jax_tkg.nki.steps.live import for_each_live_tile, load_live_tables
from jax_tkg.nki.steps.load import (
    cache_source,
    find_pages,
    load_constants,
    load_keys,
    load_rows,
    loads_by_rows,
    operand_dtype,
)
from jax_tkg.nki.steps.mask import add_bias, mask_cached, mask_new
from jax_tkg.nki.steps.new_keys import load_new_keys
from jax_tkg.nki.steps.pv import (
    add_new_values,
    allocate_products,
    clear_unseen_values,
    compute_new_pv_matmul,
    compute_pv_matmul,
    fa_accumulate_output,
    scale_values,
)
from jax_tkg.nki.steps.qk import (
    allocate_qk_buffers,
    compute_new_qk_matmul,
    compute_qk_matmul,
    shape_logits,
)
from jax_tkg.nki.steps.queries import allocate_fa_buffers, rows_of, start_rows
from jax_tkg.nki.steps.softmax import (
    cascaded_max_reduce,
    cascaded_sum_reduction,
    compute_exp_qk,
    fa_rescale_output,
    fa_update_decay,
    fa_update_running_max,
    take_part_in_exchanges,
)
from jax_tkg.nki.tiles import KeyTile


def attention_tkg(
    query: Any,
    key: Any,
    value: Any,
    constants: Any,
    positions: Any,
    page_rows: Any,
    new_key: Any,
    new_value: Any,
    new_hidden: Any,
    new_bias: Any,
    rotary_table: Any,
    query_positions: Any,
    sinks: Any,
    hidden: Any,
    bias: Any,
    live_tiles: Any,
    plan: KernelPlan,
) -> Any:
    """Attention of new tokens, and its log-sum-exp. For the arrays see `Inputs`.

    Returns:
        `[B, T, N, Hv]` in the query's dtype, and float32 `[B, T, N]`, natural log; and the rotated
        new keys `[B, T, K, H]`, if the kernel rotates. Without `returns_lse` the first one alone.
    """
    inputs = Inputs(
        query, key, value, constants, positions, page_rows, new_key, new_value, new_hidden,
        new_bias, rotary_table, query_positions, sinks, hidden, bias, live_tiles,
    )  # fmt: skip
    batch, tokens, heads = plan.batch, plan.tokens, plan.heads
    out = nl.ndarray((batch, tokens, heads, plan.value_head_dim), query.dtype, buffer=nl.shared_hbm)
    if not plan.features.returns_lse:
        attend(inputs, out, None, None, plan)
        return out
    lse_out = nl.ndarray((batch, tokens, heads), nl.float32, buffer=nl.shared_hbm)
    if plan.features.rotary == None:  # noqa: E711  (the kernel language has no `is`)
        attend(inputs, out, lse_out, None, plan)
        return out, lse_out
    rotated = nl.ndarray(new_key.shape, new_key.dtype, buffer=nl.shared_hbm)
    attend(inputs, out, lse_out, rotated, plan)
    return out, lse_out, rotated


def attend(inputs: Inputs, out: Any, lse_out: Any, rotated: Any, plan: KernelPlan) -> None:
    """The same, for a larger kernel: queries and results may be in SBUF.

    Args:
        inputs: arrays.
        out: `[B, T, N, Hv]` in HBM, or `[Hv, B * N * T]` in SBUF with Hv up to 128.
        lse_out: `[B, T, N]` in HBM, or `[1, B * N * T]` in SBUF; None without `returns_lse`.
        rotated: `[B, T, K, H]` in HBM for the rotated new keys, or None.
        plan: sizes.
    """
    consts = load_constants(inputs, plan)
    for block in plan.shares[nl.program_id(0)].blocks:
        bufs = allocate_fa_buffers(inputs, consts, block, plan)
        for group in block.groups:
            attend_known_tiles(inputs, rotated, rows_of(bufs, group), consts, group, plan)
        if plan.live != None:  # noqa: E711
            tables = load_live_tables(inputs, consts, block, plan)
            for sequence in block.sequences:
                attend_live_tiles(inputs, tables, rows_of(bufs, sequence), consts, sequence, plan)
        fa_finalize_and_store(out, lse_out, bufs, inputs, block, plan)
    if out.buffer == nl.sbuf and plan.sharding == "batch":
        share_rows(out, plan)
        if plan.features.returns_lse:
            share_rows(lse_out, plan)


def fa_finalize_and_store(
    out: Any,
    lse_out: Any,
    bufs: RowBuffers,
    inputs: Inputs,
    block: RowBlock,
    plan: KernelPlan,
) -> None:
    """Merges what two programs found, divides by the sum, and stores the rows of a block.

    Programs that hold the same take turns, the first one first, as the last one has the new keys;
    not in SBUF, where each core has its own. Sums come first: they do not wait for the last values.
    """
    merges = plan.sharding == "sequence"
    weights: Any = None
    if merges:
        weights = merge_sums(bufs, plan)
    shares = (merges or plan.sharding == "same") and out.buffer != nl.sbuf
    number, finished = 0, []
    for group in block.groups:
        for chunk in group.chunks:
            turn = number % plan.programs
            number += 1
            if shares and turn != nl.program_id(0):
                continue
            factor, lse = fa_finalize_sums(bufs, inputs, group, chunk, plan)
            if plan.features.returns_lse:
                store(lse_out, lse, group, chunk, plan)
            finished.append((group, chunk, factor))
    if merges:
        merge_outputs(bufs, weights)
    for group, chunk, factor in finished:
        rows = fa_finalize_rows(out.dtype, factor, bufs, group, chunk, plan)
        store(out, rows, group, chunk, plan)


def attend_known_tiles(
    inputs: Inputs,
    rotated: Any,
    bufs: RowBuffers,
    consts: Constants,
    group: RowGroup,
    plan: KernelPlan,
) -> None:
    """Folds known tiles of this program into the rows of a group, those of new keys too."""
    share = plan.shares[nl.program_id(0)]
    if not share.tiles:
        start_rows(bufs)
    for n in range(len(share.tiles)):
        tile = share.tiles[n]
        place = Place(tile.start // max(1, plan.run), tile.start, None)
        attend_tile(tile, place, n == 0, inputs, rotated, bufs, consts, group, plan)
    for _ in range(share.idle_tiles):
        take_part_in_exchanges(bufs, plan)


def attend_live_tiles(
    inputs: Inputs,
    tables: LiveTables,
    bufs: RowBuffers,
    consts: Constants,
    sequence: RowGroup,
    plan: KernelPlan,
) -> None:
    """Folds the live keys of one sequence into its rows."""

    def attend_here(tile: KeyTile, place: Place) -> None:
        attend_tile(tile, place, False, inputs, None, bufs, consts, sequence, plan)

    for_each_live_tile(attend_here, tables, sequence, plan)


def attend_tile(
    tile: KeyTile,
    place: Place,
    is_first: bool,
    inputs: Inputs,
    rotated: Any,
    bufs: RowBuffers,
    consts: Constants,
    group: RowGroup,
    plan: KernelPlan,
) -> None:
    """Logits, running maximum, weights, running sum, running output: of one tile.

    Args:
        tile: which keys.
        place: where they start.
        is_first: the rows have no state yet.
        inputs: arrays.
        rotated: where rotated new keys go, or None.
        bufs: the rows, changed.
        consts: tiles that no step changes.
        group: the rows.
        plan: sizes.
    """
    dtype = bufs.query[0].dtype
    logits = allocate_qk_buffers(tile, group, plan)
    pages = find_pages(inputs, tile, place, group, plan)
    sources = []
    if tile.cached:
        for i in range(group.pairs):
            source = cache_source(inputs, pages, group, i, plan)
            keys = load_keys(source, dtype, tile, place, plan)
            compute_qk_matmul(logits, keys, loads_by_rows(source, dtype), bufs, i, tile, group)
            sources.append(source)
    new = None
    if tile.new:
        new = load_new_keys(inputs, rotated, bufs, consts, tile, group, plan)
        compute_new_qk_matmul(logits, new, bufs, tile, group, plan)
    shape_logits(logits, consts, tile, group, plan)
    add_bias(logits, inputs, place, tile, group, plan)
    unseen = mask_cached(logits, pages, inputs, consts, place, tile, group, plan)
    mask_new(logits, inputs, consts, tile, group, plan)
    tile_max = cascaded_max_reduce(logits, tile, group, plan)
    largest = fa_update_running_max(tile_max, bufs, is_first, plan)
    weights, exact = compute_exp_qk(logits, dtype, largest, tile, group, plan)
    if not is_first:
        fa_update_decay(largest, bufs, plan)
        fa_rescale_output(bufs)
    cascaded_sum_reduction(exact, bufs, is_first, plan)
    add_values(tile, place, is_first, sources, new, weights, unseen, bufs, consts, group, plan)


def add_values(
    tile: KeyTile,
    place: Place,
    is_first: bool,
    sources: Any,
    new: Any,
    weights: Any,
    unseen: Any,
    bufs: RowBuffers,
    consts: Constants,
    group: RowGroup,
    plan: KernelPlan,
) -> None:
    """Running output = running output + weights times values; scales are of cached ones only."""
    if tile.new and plan.new_pairs > 0:
        add_new_values(weights, new, bufs, consts, is_first, tile, group)
        is_first = False
        if not tile.cached:
            return
    products = allocate_products(group, plan)
    for i in range(group.pairs):
        for k in range(len(tile.cached)):
            piece = tile.cached[k]
            dtype = operand_dtype(sources[i].values, weights.dtype)
            values = load_rows(
                sources[i].values, sources[i], plan.value_head_dim, dtype, k, place, tile
            )
            if unseen != None:  # noqa: E711
                columns = nl.ds(piece.column, piece.subtiles)
                clear_unseen_values(values, unseen[0 : piece.partitions, columns, i])
            compute_pv_matmul(products, weights, values, piece, k == 0, i, group)
    by_pair = len(tile.new) > 0 and plan.new_pairs == 0
    if plan.features.has_scales and tile.cached:
        scale_values(products, consts, group, plan)
        fa_accumulate_output(products, bufs, is_first)
        is_first = False
        if not by_pair:
            return
        products = allocate_products(group, plan)
    starts = plan.features.has_scales or not tile.cached
    if by_pair:
        compute_new_pv_matmul(products, weights, new, starts, tile, group)
    fa_accumulate_output(products, bufs, is_first)
