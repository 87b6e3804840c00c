"""From state to results: rows on the partitions, sinks, division by the sum, log-sum-exp, store."""

from typing import Any

from jax_tkg.nki.buffers import Inputs, RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowChunk, RowGroup
from jax_tkg.nki.steps.load import TURNED, chunk_view, global_rows

NEGATIVE_INFINITY = float("-inf")

LEAST_SUM = 1e-15
"""Added to each part of a sum, of 128: so that of no key has an inverse and a logarithm. The
largest weight of a row is 1, so that no other sum changes."""

NO_SUM = 1e-10
"""Above the sum of no key, below any other."""


def turn_column(row: Any, columns: Any) -> Any:
    """Some columns of `[1, R]`, as a column in PSUM."""
    mine = row[:, columns]
    column = nl.ndarray((mine.shape[1], 1), nl.float32, buffer=nl.psum)
    nisa.nc_transpose(dst=column, data=mine, engine=nisa.engine.tensor)
    return column


def sum_over_partitions(bufs: RowBuffers, columns: Any) -> Any:
    """The sums of some rows, as a column: the second step of the cascade.

    By a transpose: that is cheaper than a float32 matmul with ones.
    """
    mine = bufs.sum[:, columns]
    turned = nl.ndarray((mine.shape[1], PARTITIONS), nl.float32, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=mine, engine=nisa.engine.tensor)
    total = nl.ndarray((mine.shape[1], 1), nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar_reduce(
        dst=turned, data=turned, op0=nl.add, operand0=LEAST_SUM, reduce_op=nl.add, reduce_res=total
    )
    return total


def max_in_logits(bufs: RowBuffers, columns: Any, plan: KernelPlan) -> Any:
    """The maxima of some rows in logits, as a column."""
    turned = turn_column(bufs.max[0:1], columns)
    top = nl.ndarray(turned.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=top, data=turned, op0=nl.multiply, operand0=plan.logit_unit)
    return top


def load_sinks(inputs: Inputs, chunk: RowChunk) -> Any:
    """The sinks of a chunk of rows, as a column: read once a head, spread over rows, transposed.

    By the Vector engine if it can, which transposes up to 32 numbers.
    """
    batches = inputs.sinks.shape[0]
    mine = nl.ds(chunk.first_batch, chunk.batches) if batches > 1 else nl.ds(0, 1)
    some = inputs.sinks[mine, nl.ds(chunk.first_head, chunk.heads)]
    by_head = nl.ndarray((1, some.shape[0], some.shape[1]), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=by_head, src=some.expand_dim(0))
    if batches == 1:
        by_head = by_head.broadcast(1, chunk.batches)
    every = by_head.expand_dim(3).broadcast(3, chunk.tokens)
    if chunk.rows <= TURNED:
        column = nl.ndarray((chunk.rows, 1), nl.float32, buffer=nl.sbuf)
        nisa.nc_transpose(dst=column, data=every, engine=nisa.engine.vector)
        return column
    column = nl.ndarray((chunk.rows, 1), nl.float32, buffer=nl.psum)
    nisa.nc_transpose(dst=column, data=every, engine=nisa.engine.tensor)
    return column


def add_sinks(top: Any, total: Any, sinks: Any) -> Any:
    """A sink is a logit without a value: it joins maximum and sum, in place.

    Returns:
        What the output shrinks by, as a column.
    """
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


def find_factor(total: Any, shrinks: Any) -> Any:
    """What the output is multiplied by, as a column; 0 stays 0 in a row that saw no key."""
    factor = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=factor, data=total)
    if shrinks != None:  # noqa: E711  (the kernel language has no `is`)
        nisa.tensor_tensor(dst=factor, data1=factor, data2=shrinks, op=nl.multiply)
    return factor


def find_lse(top: Any, total: Any) -> Any:
    """The log-sum-exp, as a column; -inf in a row that saw no key."""
    empty = nl.ndarray(total.shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=empty, data=total, op0=nl.less, operand0=NO_SUM)
    lse = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=lse, op=nl.log, data=total)
    nisa.tensor_tensor(dst=lse, data1=lse, data2=top, op=nl.add)
    nisa.tensor_copy_predicated(dst=lse, src=NEGATIVE_INFINITY, predicate=empty)
    return lse


def fa_finalize_sums(
    bufs: RowBuffers, inputs: Inputs, group: RowGroup, chunk: RowChunk, plan: KernelPlan
) -> tuple[Any, Any, Any]:
    """Of a chunk of rows the sum, what `add_sinks` returns or None, and the log-sum-exp or None."""
    columns = nl.ds(group.first_row + chunk.first_row, chunk.rows)
    total, features = sum_over_partitions(bufs, columns), plan.features
    top: Any = None
    if features.has_sinks or features.returns_lse:
        top = max_in_logits(bufs, columns, plan)
    shrinks: Any = None
    if features.has_sinks:
        shrinks = add_sinks(top, total, load_sinks(inputs, chunk))
    lse: Any = find_lse(top, total) if features.returns_lse else None
    return total, shrinks, lse


def fa_finalize_rows(
    dtype: Any,
    total: Any,
    shrinks: Any,
    bufs: RowBuffers,
    group: RowGroup,
    chunk: RowChunk,
    plan: KernelPlan,
) -> Any:
    """The output of a chunk of rows, `[rows, Hv]` in `dtype`; for the sums see above."""
    factor = find_factor(total, shrinks)
    columns = nl.ds(group.first_row + chunk.first_row, chunk.rows)
    out = nl.ndarray((chunk.rows, plan.value_head_dim), dtype, buffer=nl.sbuf)
    for c in range(len(bufs.output)):
        mine = bufs.output[c][:, columns]
        turned = nl.ndarray((chunk.rows, mine.shape[0]), nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=mine, engine=nisa.engine.tensor)
        part = out[:, nl.ds(c * PARTITIONS, mine.shape[0])]
        nisa.tensor_scalar(dst=part, data=turned, op0=nl.multiply, operand0=factor)
    return out


def store(target: Any, result: Any, group: RowGroup, chunk: RowChunk, plan: KernelPlan) -> None:
    """Writes a result of a chunk to HBM, or to SBUF, transposed, where `target` is there."""
    if target.buffer != nl.sbuf:
        nisa.dma_copy(dst=chunk_view(target, chunk), src=result)
        return
    columns = nl.ds(global_rows(group, plan).start + chunk.first_row, chunk.rows)
    turned = nl.ndarray((result.shape[1], chunk.rows), result.dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=result, engine=nisa.engine.tensor)
    nisa.tensor_copy(dst=target[:, columns], src=turned)
