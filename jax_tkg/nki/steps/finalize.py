"""From state to results: rows on the partitions, sinks, division by the sum, log-sum-exp, store."""

from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowChunk, RowGroup
from jax_tkg.nki.steps.load import chunk_view, global_rows

NEGATIVE_INFINITY = float("-inf")


def turn_column(row: Any, columns: Any) -> Any:
    """Some columns of `[1, R]`, as a column in PSUM."""
    mine = row[:, columns]
    column = nl.ndarray((mine.shape[1], 1), nl.float32, buffer=nl.psum)
    nisa.nc_transpose(dst=column, data=mine, engine=nisa.engine.tensor)
    return column


def sum_over_partitions(bufs: RowBuffers, columns: Any, consts: Constants) -> Any:
    """The sums of some rows, as a column: the second step of the cascade."""
    mine = bufs.sum[:, columns]
    added = nl.ndarray((mine.shape[1], 1), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=added, stationary=mine, moving=consts.ones[:, 0:1], accumulate=False)
    total = nl.ndarray(added.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=total, src=added)
    return total


def max_in_logits(bufs: RowBuffers, columns: Any, plan: KernelPlan) -> Any:
    """The maxima of some rows in logits, as a column."""
    turned = turn_column(bufs.max[0:1], columns)
    top = nl.ndarray(turned.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=top, data=turned, op0=nl.multiply, operand0=plan.logit_unit)
    return top


def add_sinks(top: Any, total: Any, inputs: Inputs, rows: Any) -> Any:
    """A sink is a logit without a value: it joins maximum and sum, in place.

    Returns:
        What the output shrinks by, as a column.
    """
    sinks = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=sinks, src=inputs.sinks[rows].reshape_dim(0, top.shape))
    larger = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=larger, data1=top, data2=sinks, op=nl.maximum)
    shrinks = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=shrinks, data1=top, data2=larger, op=nl.subtract)
    nisa.activation(dst=shrinks, op=nl.exp, data=shrinks)
    nisa.tensor_tensor(dst=sinks, data1=sinks, data2=larger, op=nl.subtract)
    nisa.activation(dst=sinks, op=nl.exp, data=sinks)
    nisa.tensor_tensor(dst=total, data1=total, data2=shrinks, op=nl.multiply)
    nisa.tensor_tensor(dst=total, data1=total, data2=sinks, op=nl.add)
    nisa.tensor_copy(dst=top, src=larger)
    return shrinks


def finish_rows(top: Any, total: Any) -> tuple[Any, Any]:
    """What the output is multiplied by, and the log-sum-exp, as columns.

    A row that saw no key has sum 0: its output stays 0 and its log-sum-exp is -inf.
    """
    empty = nl.ndarray(total.shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=empty, data=total, op0=nl.equal, operand0=0.0)
    nisa.tensor_tensor(dst=total, data1=total, data2=empty, op=nl.add)
    inverse = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=total)
    lse = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=lse, op=nl.log, data=total)
    nisa.tensor_tensor(dst=lse, data1=lse, data2=top, op=nl.add)
    nisa.tensor_copy_predicated(dst=lse, src=NEGATIVE_INFINITY, predicate=empty)
    return inverse, lse


def fa_finalize(
    dtype: Any,
    bufs: RowBuffers,
    inputs: Inputs,
    consts: Constants,
    group: RowGroup,
    chunk: RowChunk,
    plan: KernelPlan,
) -> tuple[Any, Any]:
    """The results of a chunk of rows: output `[rows, Hv]` in `dtype`, log-sum-exp `[rows, 1]`."""
    columns = nl.ds(group.first_row + chunk.first_row, chunk.rows)
    total, top = sum_over_partitions(bufs, columns, consts), max_in_logits(bufs, columns, plan)
    shrinks: Any = None
    if plan.features.has_sinks:
        first = global_rows(group, plan).start + chunk.first_row
        shrinks = add_sinks(top, total, inputs, nl.ds(first, chunk.rows))
    factor, lse = finish_rows(top, total)
    if shrinks != None:  # noqa: E711  (the kernel language has no `is`)
        nisa.tensor_tensor(dst=factor, data1=factor, data2=shrinks, op=nl.multiply)
    out = nl.ndarray((chunk.rows, plan.value_head_dim), dtype, buffer=nl.sbuf)
    for c in range(len(bufs.output)):
        mine = bufs.output[c][:, columns]
        turned = nl.ndarray((chunk.rows, mine.shape[0]), nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=mine, engine=nisa.engine.tensor)
        part = out[:, nl.ds(c * PARTITIONS, mine.shape[0])]
        nisa.tensor_scalar(dst=part, data=turned, op0=nl.multiply, operand0=factor)
    return out, lse


def store_rows(
    out: Any, lse_out: Any, rows: Any, lse: Any, group: RowGroup, chunk: RowChunk, plan: KernelPlan
) -> None:
    """Writes the results of a chunk to HBM, or to SBUF, transposed, where `out` is there."""
    if out.buffer != nl.sbuf:
        nisa.dma_copy(dst=chunk_view(out, chunk), src=rows)
        nisa.dma_copy(dst=chunk_view(lse_out, chunk), src=lse)
        return
    columns = nl.ds(global_rows(group, plan).start + chunk.first_row, chunk.rows)
    for tile, result in ((out, rows), (lse_out, lse)):
        turned = nl.ndarray((result.shape[1], chunk.rows), result.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=result, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=tile[:, columns], src=turned)
