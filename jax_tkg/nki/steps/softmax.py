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
    by_partition = max_over_columns(logits, group)[0:live]
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


def max_over_columns(logits: Logits, group: RowGroup) -> Any:
    """The largest logit of each row in each partition, `[128, R]`."""
    banks = len(logits.banks)
    by_bank = nl.ndarray((PARTITIONS, banks, group.rows), nl.float32, buffer=nl.sbuf)
    for i in range(banks):
        by_row = logits.banks[i].permute((0, 2, 1))
        nisa.tensor_reduce(dst=by_bank[:, i, :], op=nl.maximum, data=by_row, axis=2)
    if banks == 1:
        return by_bank[:, 0, :]
    largest = nl.ndarray((PARTITIONS, group.rows), nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=by_bank.permute((0, 2, 1)), axis=2)
    return largest


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
) -> tuple[Any, Any]:
    """exp(logit - running maximum), `[128, columns, R]`, in the type of the values and in float32.

    Sums are taken of the float32 ones, for an exact LSE; the products wait for the others, which
    come first.
    """
    shape = (PARTITIONS, tile.columns, group.rows)
    exact = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    weights = exact if dtype == nl.float32 else nl.ndarray(shape, dtype, buffer=nl.sbuf)
    for i in range(len(logits.banks)):
        bank = logits.banks[i]
        top = largest.expand_dim(1).broadcast(1, bank.shape[1])
        nisa.tensor_tensor(dst=bank, data1=bank, data2=top, op=nl.subtract)
        exp_of_bank(weights, i, logits, plan)
    if dtype != nl.float32:
        for i in range(len(logits.banks)):
            exp_of_bank(exact, i, logits, plan)
    return weights, exact


def exp_of_bank(weights: Any, i: int, logits: Logits, plan: KernelPlan) -> None:
    """The weights of bank i of the logits."""
    bank = logits.banks[i]
    part = weights[:, nl.ds(i * logits.per_bank, bank.shape[1]), :]
    nisa.activation(dst=part, op=nl.exp, data=bank, scale=plan.logit_unit)


def cascaded_sum_reduction(
    weights: Any, bufs: RowBuffers, is_first: bool, plan: KernelPlan
) -> None:
    """Adds the weights of a tile to the running sum of each partition.

    The second step of the cascade, over partitions, is linear and waits for the end.
    """
    by_row = weights.permute((0, 2, 1))
    if is_first and not plan.every_tile:
        nisa.tensor_reduce(dst=bufs.sum, op=nl.add, data=by_row, axis=2)
        return
    total = nl.ndarray(bufs.sum.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=total, op=nl.add, data=by_row, axis=2)
    fa_update_running_sum(total, bufs, is_first, plan)


def fa_update_running_sum(total: Any, bufs: RowBuffers, is_first: bool, plan: KernelPlan) -> None:
    """Running sum = running sum * decay + the tile's sum."""
    if plan.every_tile:
        theirs = swap(total)
        nisa.tensor_tensor(dst=total, data1=total, data2=theirs, op=nl.add)
    if is_first:
        nisa.tensor_copy(dst=bufs.sum, src=total)
        return
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=bufs.decay, op=nl.multiply)
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
    nisa.memset(dst=nothing, value=0.0)
    fa_update_running_sum(nothing, bufs, False, plan)
    fa_rescale_output(bufs)
