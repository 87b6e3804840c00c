"""The decode kernel: a few new tokens of each sequence attend to its cache and to themselves.

Keys lie on the partitions while logits, weights and sums are made: the few queries move through the
Tensor engine, all 128 lanes of the Vector engine work. Maximum and decay of a row are kept in every
partition, so that no step has to move them.
"""

from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, LiveTables, Place, RowBuffers, Waiting
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import RowBlock, RowGroup
from jax_tkg.nki.steps.cached import (
    cache_source,
    load_keys,
    load_rows,
    loads_by_rows,
    operand_dtype,
)
from jax_tkg.nki.steps.exchange import merge_outputs, merge_sums, send_outputs, share_rows
from jax_tkg.nki.steps.finalize import fa_finalize_rows, fa_finalize_sums, store
from jax_tkg.nki.steps.live import for_each_live_tile, load_live_tables
from jax_tkg.nki.steps.load import load_constants
from jax_tkg.nki.steps.mask import add_bias, mask_cached, mask_new
from jax_tkg.nki.steps.new_keys import load_new_keys
from jax_tkg.nki.steps.pages import pages_of, place_of_known
from jax_tkg.nki.steps.pv import (
    add_new_values,
    allocate_products,
    clear_unseen_values,
    compute_new_pv_matmul,
    compute_pv_matmul,
    fa_add_products,
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
    compute_exact_exp,
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
    short_rows: Any,
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
        query, key, value, constants, positions, page_rows, short_rows, new_key, new_value,
        new_hidden, new_bias, rotary_table, query_positions, sinks, hidden, bias, live_tiles,
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
        if plan.live == None:  # noqa: E711
            left = attend_known_tiles(inputs, rotated, bufs, consts, block, True, plan)
        else:
            left = attend_live_block(inputs, rotated, bufs, consts, block, plan)
        fa_finalize_and_store(out, lse_out, bufs, left, inputs, block, plan)
    if out.buffer == nl.sbuf and plan.sharding == "batch":
        share_rows(out, plan)
        if plan.features.returns_lse:
            share_rows(lse_out, plan)


def fa_finalize_and_store(
    out: Any,
    lse_out: Any,
    bufs: RowBuffers,
    left: Any,
    inputs: Inputs,
    block: RowBlock,
    plan: KernelPlan,
) -> None:
    """Merges what two programs found, divides by the sum, and stores the rows of a block.

    Programs that hold the same take turns, the first one first, as the last one has the new keys;
    not in SBUF, where each core has its own. Sums come first: they do not wait for the last values,
    whose products are `left` to add.
    """
    merges = plan.sharding == "sequence"
    weights: Any = None
    sent: Any = None
    if merges:
        weights = merge_sums(bufs, left, plan)
        sent = send_outputs(bufs, weights)
    else:
        fa_add_products(left)
    shares = (merges or plan.sharding == "same") and out.buffer != nl.sbuf
    number, finished = 0, []
    for group in block.groups:
        for chunk in group.chunks:
            turn = number % plan.programs
            number += 1
            if shares and turn != nl.program_id(0):
                continue
            total, shrinks, lse = fa_finalize_sums(bufs, inputs, group, chunk, plan)
            if plan.features.returns_lse:
                store(lse_out, lse, group, chunk, plan)
            finished.append((group, chunk, total, shrinks))
    if merges:
        merge_outputs(bufs, sent, weights)
    for group, chunk, total, shrinks in finished:
        rows = fa_finalize_rows(out.dtype, total, shrinks, bufs, group, chunk, plan)
        store(out, rows, group, chunk, plan)


def attend_known_tiles(
    inputs: Inputs,
    rotated: Any,
    bufs: RowBuffers,
    consts: Constants,
    block: RowBlock,
    is_first: bool,
    plan: KernelPlan,
) -> Any:
    """Folds known tiles of this program into the rows of a block, those of new keys too.

    Returns:
        Products of the last tile, `Waiting`, or None.
    """
    share, left = plan.shares[nl.program_id(0)], None
    for group in block.groups:
        mine = rows_of(bufs, group)
        if is_first and not share.tiles:
            start_rows(mine)
        for n in range(len(share.tiles)):
            fa_add_products(left)
            tile, starts = share.tiles[n], is_first and n == 0
            place = place_of_known(tile, plan)
            left = attend_tile(
                tile, place, starts, inputs, rotated, mine, consts, None, group, plan
            )
        for _ in range(share.idle_tiles):
            fa_add_products(left)
            left = None
            take_part_in_exchanges(mine, plan)
    return left


def attend_live_block(
    inputs: Inputs,
    rotated: Any,
    bufs: RowBuffers,
    consts: Constants,
    block: RowBlock,
    plan: KernelPlan,
) -> Waiting:
    """Folds the live keys of each sequence of a block into its rows, and the new keys.

    These may follow the first sequence if there are others: so what is loaded for them arrives
    behind the first cached keys.

    Returns:
        Products of the last tile.
    """
    tables, every = load_live_tables(inputs, consts, block, plan), block.sequences
    ahead = 1 if plan.new_keys_follow and len(every) > 1 else 0
    if ahead > 0:
        start_rows(bufs)
        mine = rows_of(bufs, every[0])
        attend_live_tiles(inputs, tables, mine, consts, None, every[0], plan)
    known = attend_known_tiles(inputs, rotated, bufs, consts, block, ahead == 0, plan)
    fa_add_products(known)
    for sequence in every[ahead:-1]:
        mine = rows_of(bufs, sequence)
        attend_live_tiles(inputs, tables, mine, consts, None, sequence, plan)
    last = every[-1]
    live: Any = plan.live
    empty = allocate_products(live.full.value_columns, last, plan)
    left = Waiting(empty, rows_of(bufs, last), False)
    for products in left.products:
        nisa.memset(dst=products, value=0.0)
    attend_live_tiles(inputs, tables, left.bufs, consts, left, last, plan)
    return left


def attend_live_tiles(
    inputs: Inputs,
    tables: LiveTables,
    bufs: RowBuffers,
    consts: Constants,
    left: Any,
    sequence: RowGroup,
    plan: KernelPlan,
) -> None:
    """Folds the live keys of one sequence into its rows.

    Of the last one, products are `left` until the next tile, see `Waiting`; of others None are.
    """

    def attend_here(tile: KeyTile, place: Place) -> None:
        fa_add_products(left)
        products = None if left == None else left.products  # noqa: E711
        found = attend_tile(
            tile, place, False, inputs, None, bufs, consts, products, sequence, plan
        )
        if left == None:  # noqa: E711
            fa_add_products(found)

    for_each_live_tile(attend_here, tables, sequence, left != None, plan)  # noqa: E711


def attend_tile(
    tile: KeyTile,
    place: Place,
    is_first: bool,
    inputs: Inputs,
    rotated: Any,
    bufs: RowBuffers,
    consts: Constants,
    products: Any,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """Logits, running maximum, weights, running sum, running output: of one tile.

    Args:
        tile: which keys.
        place: where they start.
        is_first: the rows have no state yet.
        inputs: arrays.
        rotated: where rotated new keys go, or None.
        bufs: the rows, changed.
        consts: tiles that no step changes.
        products: where to multiply cached values by weights; None allocates.
        group: the rows.
        plan: sizes.

    Returns:
        What is not in the output yet, `Waiting`, or None.
    """
    dtype = bufs.query[0].dtype
    logits = allocate_qk_buffers(tile, group, plan)
    pages = pages_of(inputs, consts, tile, place, group, plan)
    sources = []
    if tile.cached:
        for i in range(group.pairs):
            source = cache_source(inputs, pages, group, i, plan)
            keys = load_keys(source, dtype, tile, place, plan)
            by_column = pages != None or loads_by_rows(source, dtype)  # noqa: E711
            compute_qk_matmul(logits, keys, by_column, bufs, i, tile, group)
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
    weights = compute_exp_qk(logits, dtype, largest, tile, group, plan)
    if not is_first:
        fa_update_decay(largest, bufs, plan)
        fa_rescale_output(bufs)
    exact = compute_exact_exp(weights, logits, plan)
    cascaded_sum_reduction(exact, bufs, is_first, plan)
    return add_values(
        tile, place, is_first, sources, new, weights, unseen, bufs, consts, products, group, plan
    )


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
    products: Any,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """Running output = running output + weights times values; scales are of cached ones only.

    Returns:
        What is not in the output yet, `Waiting`, or None.
    """
    if tile.new and plan.new_pairs > 0:
        add_new_values(weights, new, bufs, consts, is_first, tile, group)
        is_first = False
        if not tile.cached:
            return None
    if products == None:  # noqa: E711
        products = allocate_products(tile.value_columns, group, plan)
    for i in range(group.pairs):
        for k in range(len(tile.cached)):
            piece = tile.cached[k]
            dtype = operand_dtype(sources[i].values, weights.dtype)
            apart = tile.apart if i == group.pairs - 1 and k == 0 else 0
            values = load_rows(
                sources[i].values, sources[i], plan.value_head_dim, dtype, k, apart, place, tile
            )
            if unseen != None:  # noqa: E711
                columns = nl.ds(piece.column, piece.subtiles)
                clear_unseen_values(values, unseen[0 : piece.partitions, columns, i])
            compute_pv_matmul(products, weights, values, piece, k == 0, i, group)
    by_pair = len(tile.new) > 0 and plan.new_pairs == 0
    if plan.features.has_scales and tile.cached:
        scale_values(products, consts, group, plan)
        if not by_pair:
            return Waiting(products, bufs, is_first)
        fa_add_products(Waiting(products, bufs, is_first))
        is_first = False
        products = allocate_products(1, group, plan)
    starts = plan.features.has_scales or not tile.cached
    if by_pair:
        compute_new_pv_matmul(products, weights, new, starts, tile, group)
    return Waiting(products, bufs, is_first)
