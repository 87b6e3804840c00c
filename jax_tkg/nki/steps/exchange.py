"""What two programs that each saw half of the keys tell each other."""

from typing import Any

from jax_tkg.nki.buffers import RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan

FAST_BYTES = {4: 1024, 2: 512}
"""Most bytes a partition that the fast path between two cores takes, by element size."""


def swap(tile: Any) -> Any:
    """The other program's tile; it gets this one."""
    theirs = nl.ndarray(tile.shape, tile.dtype, buffer=nl.sbuf)
    other = 1 - nl.program_id(0)
    nisa.sendrecv(
        src=tile,
        dst=theirs,
        send_to_rank=other,
        recv_from_rank=other,
        pipe_id=0,
        dma_engine=nisa.dma_engine.gpsimd_dma,
    )
    return theirs


def swap_outputs(bufs: RowBuffers) -> Any:
    """The other program's output, in one exchange whatever the number of chunks."""
    rows = bufs.max.shape[1]
    packed = nl.ndarray((128, len(bufs.output), rows), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=packed, value=0.0)
    for c in range(len(bufs.output)):
        nisa.tensor_copy(dst=packed[0 : bufs.output[c].shape[0], c, :], src=bufs.output[c])
    return swap(packed)


def merge_programs(bufs: RowBuffers, plan: KernelPlan) -> None:
    """Both programs get the state over all keys, the same to the bit.

    With m the larger maximum, each side has weight exp(its maximum - m); sums of two commute, so
    both programs round alike. After exchanges on every tile the maxima and sums agree already.
    """
    theirs_output = swap_outputs(bufs)
    if plan.exchange == "every tile":
        for c in range(len(bufs.output)):
            mine = bufs.output[c]
            other = theirs_output[0 : mine.shape[0], c, :]
            nisa.tensor_tensor(dst=mine, data1=mine, data2=other, op=nl.add)
        return
    theirs_max, theirs_sum = swap(bufs.max), swap(bufs.sum)
    top = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=top, data1=bufs.max, data2=theirs_max, op=nl.maximum)
    my_weight, their_weight = weight_of(bufs.max, top), weight_of(theirs_max, top)
    add_weighted(bufs.sum, my_weight, theirs_sum, their_weight)
    for c in range(len(bufs.output)):
        mine = bufs.output[c]
        size = mine.shape[0]
        other = theirs_output[0:size, c, :]
        add_weighted(mine, my_weight[0:size], other, their_weight[0:size])
    nisa.tensor_copy(dst=bufs.max, src=top)


def weight_of(side_max: Any, top: Any) -> Any:
    """exp(side_max - top)."""
    weight = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=weight, data1=side_max, data2=top, op=nl.subtract)
    nisa.activation(dst=weight, op=nl.exp, data=weight)
    return weight


def add_weighted(mine: Any, my_weight: Any, theirs: Any, their_weight: Any) -> None:
    """Mine = mine * my_weight + theirs * their_weight."""
    nisa.tensor_tensor(dst=mine, data1=mine, data2=my_weight, op=nl.multiply)
    scaled = nl.ndarray(mine.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=scaled, data1=theirs, data2=their_weight, op=nl.multiply)
    nisa.tensor_tensor(dst=mine, data1=mine, data2=scaled, op=nl.add)
