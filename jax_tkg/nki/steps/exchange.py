"""What two programs that each saw half of the keys tell each other."""

from typing import Any

from jax_tkg.nki.buffers import RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS
from jax_tkg.nki.steps.pv import fa_add_products

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


def merge_sums(bufs: RowBuffers, left: Any, plan: KernelPlan) -> Any:
    """Both programs get maximum and sum over all keys, the same to the bit.

    With m the larger maximum, each side has weight exp(its maximum - m); sums of two commute, so
    both programs round alike. The last values arrive while sums travel: then their products, `left`
    to add, come before what waits for these.

    Returns:
        The weights of this program's output and of the other's; None where programs agreed on
        maximum and sum on every tile.
    """
    if plan.every_tile:
        fa_add_products(left)
        return None
    theirs_max, theirs_sum = swap(bufs.max), swap(bufs.sum)
    top = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=top, data1=bufs.max, data2=theirs_max, op=nl.maximum)
    unit = plan.logit_unit
    my_weight, their_weight = weight_of(bufs.max, top, unit), weight_of(theirs_max, top, unit)
    kept = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)  # while sums travel
    nisa.tensor_tensor(dst=kept, data1=bufs.sum, data2=my_weight, op=nl.multiply)
    fa_add_products(left)
    nisa.tensor_tensor(dst=theirs_sum, data1=theirs_sum, data2=their_weight, op=nl.multiply)
    nisa.tensor_tensor(dst=bufs.sum, data1=kept, data2=theirs_sum, op=nl.add)
    nisa.tensor_copy(dst=bufs.max, src=top)
    return my_weight, their_weight


def send_outputs(bufs: RowBuffers, weights: Any) -> tuple[Any, Any]:
    """The other program's output, see `swap_outputs`; this one's in the merged one.

    That is multiplied by its weight, see `merge_sums`, while both travel.
    """
    theirs = swap_outputs(bufs)
    if weights == None:  # noqa: E711  (the kernel language has no `is`)
        return theirs, bufs.output
    kept = []
    for mine in bufs.output:
        part = nl.ndarray(mine.shape, nl.float32, buffer=nl.sbuf)
        my_weight = weights[0][0 : mine.shape[0]]
        nisa.tensor_tensor(dst=part, data1=mine, data2=my_weight, op=nl.multiply)
        kept.append(part)
    return theirs, kept


def merge_outputs(bufs: RowBuffers, sent: tuple[Any, Any], weights: Any) -> None:
    """Both programs get the output over all keys, the same to the bit; `sent` by `send_outputs`."""
    theirs, kept = sent
    for c in range(len(bufs.output)):
        mine = bufs.output[c]
        size = mine.shape[0]
        other = theirs[0:size, c, :]
        if weights != None:  # noqa: E711
            their_weight = weights[1][0:size]
            nisa.tensor_tensor(dst=other, data1=other, data2=their_weight, op=nl.multiply)
        nisa.tensor_tensor(dst=mine, data1=kept[c], data2=other, op=nl.add)


def weight_of(side_max: Any, top: Any, unit: float) -> Any:
    """exp(unit * (side_max - top))."""
    weight = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=weight, data1=side_max, data2=top, op=nl.subtract)
    nisa.activation(dst=weight, op=nl.exp, data=weight, scale=unit)
    return weight


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
