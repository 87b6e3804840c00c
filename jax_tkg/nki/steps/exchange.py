"""What two programs that each saw half of the keys tell each other."""

from typing import Any

from jax_tkg.nki.buffers import RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS

FAST_ELEMENTS = 256
"""Most float32 of a partition that the fast path between two cores takes."""


def swap(tile: Any) -> Any:
    """The other program's tile `[p, R]`; it gets this one. One exchange for every 256 columns."""
    theirs = nl.ndarray(tile.shape, tile.dtype, buffer=nl.sbuf)
    other = 1 - nl.program_id(0)
    for start in range(0, tile.shape[1], FAST_ELEMENTS):
        columns = nl.ds(start, min(FAST_ELEMENTS, tile.shape[1] - start))
        nisa.sendrecv(
            src=tile[:, columns],
            dst=theirs[:, columns],
            send_to_rank=other,
            recv_from_rank=other,
            pipe_id=0,
            dma_engine=nisa.dma_engine.gpsimd_dma,
        )
    return theirs


def swap_outputs(bufs: RowBuffers) -> Any:
    """The other program's output `[128, chunks, R]`, in one exchange for all chunks."""
    if len(bufs.output) == 1:
        return swap(bufs.output[0]).expand_dim(1)
    rows = bufs.max.shape[1]
    packed = nl.ndarray((PARTITIONS, len(bufs.output), rows), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=packed, value=0.0)
    for c in range(len(bufs.output)):
        nisa.tensor_copy(dst=packed[0 : bufs.output[c].shape[0], c, :], src=bufs.output[c])
    theirs = swap(packed.flatten_dims(1, 2))
    return theirs.reshape_dim(1, (len(bufs.output), rows))


def merge_sums(bufs: RowBuffers, plan: KernelPlan) -> Any:
    """Both programs get maximum and sum over all keys, the same to the bit.

    With m the larger maximum, each side has weight exp(its maximum - m); sums of two commute, so
    both programs round alike.

    Returns:
        The weights of this program's output and of the other's; None where programs agreed on
        maximum and sum on every tile.
    """
    if plan.every_tile:
        return None
    theirs_max, theirs_sum = swap(bufs.max), swap(bufs.sum)
    top = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=top, data1=bufs.max, data2=theirs_max, op=nl.maximum)
    unit = plan.logit_unit
    my_weight, their_weight = weight_of(bufs.max, top, unit), weight_of(theirs_max, top, unit)
    add_weighted(bufs.sum, my_weight, theirs_sum, their_weight)
    nisa.tensor_copy(dst=bufs.max, src=top)
    return my_weight, their_weight


def merge_outputs(bufs: RowBuffers, weights: Any) -> None:
    """Both programs get the output over all keys, the same to the bit; see `merge_sums`."""
    theirs = swap_outputs(bufs)
    for c in range(len(bufs.output)):
        mine = bufs.output[c]
        size = mine.shape[0]
        other = theirs[0:size, c, :]
        if weights == None:  # noqa: E711  (the kernel language has no `is`)
            nisa.tensor_tensor(dst=mine, data1=mine, data2=other, op=nl.add)
        else:
            add_weighted(mine, weights[0][0:size], other, weights[1][0:size])


def weight_of(side_max: Any, top: Any, unit: float) -> Any:
    """exp(unit * (side_max - top))."""
    weight = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=weight, data1=side_max, data2=top, op=nl.subtract)
    nisa.activation(dst=weight, op=nl.exp, data=weight, scale=unit)
    return weight


def add_weighted(mine: Any, my_weight: Any, theirs: Any, their_weight: Any) -> None:
    """Mine = mine * my_weight + theirs * their_weight."""
    nisa.tensor_tensor(dst=mine, data1=mine, data2=my_weight, op=nl.multiply)
    scaled = nl.ndarray(mine.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=scaled, data1=theirs, data2=their_weight, op=nl.multiply)
    nisa.tensor_tensor(dst=mine, data1=mine, data2=scaled, op=nl.add)


def share_rows(tile: Any, plan: KernelPlan) -> None:
    """After batch sharding, both programs get the columns of `tile` that the other one made."""
    mine, theirs = columns_of(nl.program_id(0), plan), columns_of(1 - nl.program_id(0), plan)
    width = max(mine[1], theirs[1])
    packed = nl.ndarray((tile.shape[0], width), tile.dtype, buffer=nl.sbuf)
    nisa.memset(dst=packed, value=0.0)
    nisa.tensor_copy(dst=packed[:, 0 : mine[1]], src=tile[:, nl.ds(mine[0], mine[1])])
    received = swap(packed)
    nisa.tensor_copy(dst=tile[:, nl.ds(theirs[0], theirs[1])], src=received[:, 0 : theirs[1]])


def columns_of(program: int, plan: KernelPlan) -> tuple[int, int]:
    """The first of all B * N * T rows that a program makes, and how many."""
    count = 0
    for block in plan.shares[program].blocks:
        count += block.rows
    return (0 if program == 0 else plan.batch * plan.heads * plan.tokens - count), count
