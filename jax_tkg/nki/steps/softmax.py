"""The online softmax of one tile: maximum, weights, sum."""

from typing import Any

from jax_tkg.nki.buffers import LOWEST_MAX, Logits, RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowGroup
from jax_tkg.nki.steps.exchange import swap
from jax_tkg.nki.steps.qk import partitions_of
from jax_tkg.nki.tiles import KeyTile


def cascaded_max_reduce(logits: Logits, tile: KeyTile, group: RowGroup, plan: KernelPlan) -> Any:
    """The largest logit of each row in a tile, `[128, R]` in PSUM: over columns, then partitions.

    Across partitions by a transpose, a reduction of the free axis, and the transpose of the result
    repeated.
    """
    live = 0
    for piece in tile.cached + tile.new:
        live = max(live, partitions_of(piece, group, plan))
    by_partition = nl.ndarray((PARTITIONS, group.rows), nl.float32, buffer=nl.sbuf)
    reduce_columns(by_partition, nl.maximum, logits.banks)
    by_partition = by_partition[0:live]
    everywhere = nl.ndarray((PARTITIONS, group.rows), nl.float32, buffer=nl.psum)
    for start in range(0, group.rows, PARTITIONS):
        count = min(PARTITIONS, group.rows - start)
        rows = nl.ds(start, count)
        turned = nl.ndarray((count, live), nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=by_partition[:, rows], engine=nisa.engine.tensor)
        largest = nl.ndarray((count, 1), nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=turned, axis=1)
        repeated = largest.broadcast(1, PARTITIONS)
        nisa.nc_transpose(dst=everywhere[:, rows], data=repeated, engine=nisa.engine.tensor)
    return everywhere


def reduce_columns(dst: Any, op: Any, parts: Any) -> None:
    """Maximum or sum of each row in each partition, `[128, R]`, of `[128, columns, R]` in parts.

    Each part is reduced as soon as it is there, while another engine makes the next.
    """
    if len(parts) == 1:
        nisa.tensor_reduce(dst=dst, op=op, data=parts[0].permute((0, 2, 1)), axis=2)
        return
    by_part = nl.ndarray((PARTITIONS, len(parts), dst.shape[1]), nl.float32, buffer=nl.sbuf)
    for i in range(len(parts)):
        nisa.tensor_reduce(dst=by_part[:, i, :], op=op, data=parts[i].permute((0, 2, 1)), axis=2)
    nisa.tensor_reduce(dst=dst, op=op, data=by_part.permute((0, 2, 1)), axis=2)


def fa_update_running_max(tile_max: Any, bufs: RowBuffers, is_first: bool, plan: KernelPlan) -> Any:
    """The new running maximum, `[128, R]`; it becomes the rows' in `fa_update_decay`."""
    if plan.every_tile:
        mine = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=mine, src=tile_max)
        theirs = swap(mine)
        nisa.tensor_tensor(dst=mine, data1=mine, data2=theirs, op=nl.maximum)
        tile_max = mine
    if is_first:
        nisa.tensor_scalar(dst=bufs.max, data=tile_max, op0=nl.maximum, operand0=LOWEST_MAX)
        return bufs.max
    largest = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=largest, data1=tile_max, data2=bufs.max, op=nl.maximum)
    return largest


def fa_update_decay(largest: Any, bufs: RowBuffers, plan: KernelPlan) -> None:
    """By what factor all that was summed before shrinks; the weights do not wait for it."""
    nisa.tensor_tensor(dst=bufs.decay, data1=bufs.max, data2=largest, op=nl.subtract)
    nisa.activation(dst=bufs.decay, op=nl.exp, data=bufs.decay, scale=plan.logit_unit)
    nisa.tensor_copy(dst=bufs.max, src=largest)


def compute_exp_qk(
    logits: Logits, dtype: Any, largest: Any, tile: KeyTile, group: RowGroup, plan: KernelPlan
) -> Any:
    """exp(logit - running maximum), `[128, columns, R]`, in the type of the values."""
    weights = nl.ndarray((PARTITIONS, tile.columns, group.rows), dtype, buffer=nl.sbuf)
    for i in range(len(logits.banks)):
        bank = logits.banks[i]
        top = largest.expand_dim(1).broadcast(1, bank.shape[1])
        nisa.tensor_tensor(dst=bank, data1=bank, data2=top, op=nl.subtract)
        exp_of_bank(weights, i, logits, plan)
    return weights


def compute_exact_exp(weights: Any, logits: Logits, plan: KernelPlan) -> Any:
    """The same in float32, of which sums are taken, for an exact LSE: by bank, a list.

    Last of all that the Scalar engine does for a tile: the products wait for the others.
    """
    exact, is_exact = weights, weights.dtype == nl.float32
    if not is_exact:
        exact = nl.ndarray(weights.shape, nl.float32, buffer=nl.sbuf)
    parts = []
    for i in range(len(logits.banks)):
        if not is_exact:
            exp_of_bank(exact, i, logits, plan)
        parts.append(columns_of_bank(exact, i, logits))
    return parts


def exp_of_bank(weights: Any, i: int, logits: Logits, plan: KernelPlan) -> None:
    """The weights of bank i of the logits."""
    part = columns_of_bank(weights, i, logits)
    nisa.activation(dst=part, op=nl.exp, data=logits.banks[i], scale=plan.logit_unit)


def columns_of_bank(weights: Any, i: int, logits: Logits) -> Any:
    """What `[128, columns, R]` has for bank i of the logits."""
    return weights[:, nl.ds(i * logits.per_bank, logits.banks[i].shape[1]), :]


def cascaded_sum_reduction(exact: Any, bufs: RowBuffers, is_first: bool, plan: KernelPlan) -> None:
    """Adds the weights of a tile, a list of parts, to the running sum of each partition.

    The second step of the cascade, over partitions, is linear and waits for the end.
    """
    if is_first and not plan.every_tile:
        reduce_columns(bufs.sum, nl.add, exact)
        return
    if not is_first:
        nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=bufs.decay, op=nl.multiply)
    total = nl.ndarray(bufs.sum.shape, nl.float32, buffer=nl.sbuf)
    reduce_columns(total, nl.add, exact)
    fa_update_running_sum(total, bufs, is_first, plan)


def fa_update_running_sum(total: Any, bufs: RowBuffers, is_first: bool, plan: KernelPlan) -> None:
    """Running sum, which has decayed, = running sum + the tile's sum."""
    if plan.every_tile:
        theirs = swap(total)
        nisa.tensor_tensor(dst=total, data1=total, data2=theirs, op=nl.add)
    if is_first:
        nisa.tensor_copy(dst=bufs.sum, src=total)
        return
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=total, op=nl.add)


def fa_rescale_output(bufs: RowBuffers) -> None:
    """Running output = running output * decay."""
    for running in bufs.output:
        decay = bufs.decay[0 : running.shape[0]]
        nisa.tensor_tensor(dst=running, data1=running, data2=decay, op=nl.multiply)


def take_part_in_exchanges(bufs: RowBuffers, plan: KernelPlan) -> None:
    """The exchanges of a tile that only the other program has, and what follows from them here."""
    nothing = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=nothing, value=LOWEST_MAX)
    fa_update_decay(fa_update_running_max(nothing, bufs, False, plan), bufs, plan)
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=bufs.decay, op=nl.multiply)
    nisa.memset(dst=nothing, value=0.0)
    fa_update_running_sum(nothing, bufs, False, plan)
    fa_rescale_output(bufs)
