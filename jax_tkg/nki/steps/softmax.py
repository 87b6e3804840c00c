"""The online softmax of one tile: maximum, weights, sum. State is the same in every partition."""

from typing import Any

from jax_tkg.nki.buffers import LOWEST_MAX, Constants, RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import PARTITIONS, KernelPlan, KeyTile
from jax_tkg.nki.steps.exchange import swap


def cascaded_max_reduce(qk: Any, tile: KeyTile, rows: int) -> Any:
    """The largest logit of each row in a tile, `[128, R]`: over subtiles, then over partitions.

    Across partitions by a transpose, a reduction of the free axis, and the transpose of the result
    repeated.
    """
    by_partition = nl.ndarray((tile.partitions, rows), nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=by_partition, op=nl.maximum, data=qk.permute((0, 2, 1)), axis=2)
    turned = nl.ndarray((rows, tile.partitions), nl.float32, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=by_partition, engine=nisa.engine.tensor)
    largest = nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=turned, axis=1)
    everywhere = nl.ndarray((PARTITIONS, rows), nl.float32, buffer=nl.psum)
    nisa.nc_transpose(
        dst=everywhere, data=largest.broadcast(1, PARTITIONS), engine=nisa.engine.tensor
    )
    found = nl.ndarray((PARTITIONS, rows), nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=found, src=everywhere)
    return found


def update_running_max(tile_max: Any, bufs: RowBuffers, plan: KernelPlan) -> None:
    """The new running maximum, and by what factor all that was summed before shrinks."""
    if plan.sharding == "sequence" and plan.exchange == "every tile":
        theirs = swap(tile_max)
        nisa.tensor_tensor(dst=tile_max, data1=tile_max, data2=theirs, op=nl.maximum)
    nisa.tensor_tensor(dst=tile_max, data1=tile_max, data2=bufs.max, op=nl.maximum)
    nisa.tensor_tensor(dst=bufs.decay, data1=bufs.max, data2=tile_max, op=nl.subtract)
    nisa.activation(dst=bufs.decay, op=nl.exp, data=bufs.decay)
    nisa.tensor_copy(dst=bufs.max, src=tile_max)


def compute_exp_qk(qk: Any, dtype: Any, bufs: RowBuffers, tile: KeyTile) -> Any:
    """Turns logits into exp(logit - running maximum); returns them in the type of the values.

    The sum is taken of the float32 ones: the log-sum-exp is as exact as they are.
    """
    top = bufs.max[0 : tile.partitions].expand_dim(1).broadcast(1, tile.subtiles)
    nisa.tensor_tensor(dst=qk, data1=qk, data2=top, op=nl.subtract)
    nisa.activation(dst=qk, op=nl.exp, data=qk)
    if dtype == nl.float32:
        return qk
    weights = nl.ndarray(qk.shape, dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=weights, src=qk)
    return weights


def cascaded_sum_reduction(
    weights: Any, bufs: RowBuffers, consts: Constants, tile: KeyTile, plan: KernelPlan
) -> None:
    """Adds the weights of a tile to the running sum: over subtiles, then over partitions."""
    rows = weights.shape[2]
    by_partition = nl.ndarray((tile.partitions, rows), nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=by_partition, op=nl.add, data=weights.permute((0, 2, 1)), axis=2)
    sums = nl.ndarray((PARTITIONS, rows), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(
        dst=sums, stationary=consts.ones[0 : tile.partitions], moving=by_partition, accumulate=False
    )
    total = nl.ndarray((PARTITIONS, rows), nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=total, src=sums)
    update_running_sum(total, bufs, plan)


def update_running_sum(total: Any, bufs: RowBuffers, plan: KernelPlan) -> None:
    """Running sum = running sum * decay + the tile's sum."""
    if plan.sharding == "sequence" and plan.exchange == "every tile":
        theirs = swap(total)
        nisa.tensor_tensor(dst=total, data1=total, data2=theirs, op=nl.add)
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=bufs.decay, op=nl.multiply)
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=total, op=nl.add)


def take_part_in_exchanges(bufs: RowBuffers, plan: KernelPlan) -> None:
    """The exchanges of a tile that only the other program has, and what follows from them here."""
    nothing = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=nothing, value=LOWEST_MAX)
    update_running_max(nothing, bufs, plan)
    nisa.memset(dst=nothing, value=0.0)
    update_running_sum(nothing, bufs, plan)
    for running in bufs.output:
        decay = bufs.decay[0 : running.shape[0]]
        nisa.tensor_tensor(dst=running, data1=running, data2=decay, op=nl.multiply)
