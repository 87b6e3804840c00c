"""Sinks, division by the sum, log-sum-exp, and back to HBM."""

from typing import Any

from jax_tkg.nki.buffers import Constants, RowBuffers, RowGroup, chunks
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.steps.load import row_view

NEGATIVE_INFINITY = float("-inf")


def add_sinks(bufs: RowBuffers, consts: Constants, group: RowGroup) -> None:
    """A sink is a logit without a value: it joins maximum and sum."""
    first = group.pairs[0] * group.rows_per_pair
    sinks = consts.sinks[:, first : first + group.rows]
    top = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=top, data1=bufs.max, data2=sinks, op=nl.maximum)
    nisa.tensor_tensor(dst=bufs.decay, data1=bufs.max, data2=top, op=nl.subtract)
    nisa.activation(dst=bufs.decay, op=nl.exp, data=bufs.decay)
    weight = nl.ndarray(bufs.max.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=weight, data1=sinks, data2=top, op=nl.subtract)
    nisa.activation(dst=weight, op=nl.exp, data=weight)
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=bufs.decay, op=nl.multiply)
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=weight, op=nl.add)
    for c in range(len(bufs.output)):
        running = bufs.output[c]
        decay = bufs.decay[0 : running.shape[0]]
        nisa.tensor_tensor(dst=running, data1=running, data2=decay, op=nl.multiply)
    nisa.tensor_copy(dst=bufs.max, src=top)


def finalize_rows(bufs: RowBuffers) -> Any:
    """Divides the output by the sum; returns the log-sum-exp `[1, R]`.

    A row that saw no key has sum 0: its output stays 0 and its log-sum-exp is -inf.
    """
    shape = bufs.sum.shape
    empty = nl.ndarray(shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=empty, data=bufs.sum, op0=nl.equal, operand0=0.0)
    nisa.tensor_tensor(dst=bufs.sum, data1=bufs.sum, data2=empty, op=nl.add)
    inverse = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=bufs.sum)
    for c in range(len(bufs.output)):
        running = bufs.output[c]
        part = inverse[0 : running.shape[0]]
        nisa.tensor_tensor(dst=running, data1=running, data2=part, op=nl.multiply)
    lse = nl.ndarray((1, shape[1]), nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=lse, op=nl.log, data=bufs.sum[0:1])
    nisa.tensor_tensor(dst=lse, data1=lse, data2=bufs.max[0:1], op=nl.add)
    nisa.tensor_copy_predicated(dst=lse, src=NEGATIVE_INFINITY, predicate=empty[0:1])
    return lse


def store_rows(
    out: Any, lse_out: Any, lse: Any, bufs: RowBuffers, group: RowGroup, plan: KernelPlan
) -> None:
    """Writes the pairs of a group; two programs that hold the same share the writing."""
    rows = nl.ndarray((group.rows, plan.value_head_dim), out.dtype, buffer=nl.sbuf)
    pieces = chunks(plan.value_head_dim)
    for c in range(len(pieces)):
        start, size = pieces[c]
        narrow = nl.ndarray((size, group.rows), out.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=narrow, src=bufs.output[c])
        turned = nl.ndarray((group.rows, size), out.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=narrow, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=rows[:, start : start + size], src=turned)
    shared = plan.sharding == "sequence" or plan.sharding == "same"
    for i in range(len(group.pairs)):
        if shared and i % plan.programs != nl.program_id(0):
            continue
        mine = nl.ds(i * group.rows_per_pair, group.rows_per_pair)
        nisa.dma_copy(dst=row_view(out, group.pairs[i], plan), src=rows[mine, :])
        nisa.dma_copy(dst=row_view(lse_out, group.pairs[i], plan), src=lse[:, mine])
