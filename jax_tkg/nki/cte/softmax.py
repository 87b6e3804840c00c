"""The online softmax of a step: running maximum, weights, their sum. Rows lie on the partitions."""

from typing import Any

from jax_tkg.nki.cte.state import Work
from jax_tkg.nki.dialect import nisa, nl


def compute_weights(work: Work, top: Any) -> None:
    """Moves the running maximum; weights are exp(logit - running maximum).

    The Scalar engine scales, subtracts, exponentiates, rounds and sums in one instruction; the sum
    is that of the numbers before they are rounded.

    Args:
        work: gets weights, decay, and products that begin with their sum.
        top: the largest logit of each row, before the factor, `[R, 1]`.
    """
    rows = work.rows
    update_running_max(work, top)
    width = rows.total.shape[1]
    work.weights = nl.ndarray(work.logits.shape, rows.query[0].dtype, buffer=nl.sbuf)
    work.products = nl.ndarray((rows.block.rows, width), nl.float32, buffer=nl.psum)
    nisa.activation_reduce(
        dst=work.weights, op=nl.exp, data=work.logits, scale=work.factor, bias=rows.neg_max,
        reduce_op=nl.add, reduce_res=work.products[:, width - 1 : width],
    )  # fmt: skip


def update_running_max(work: Work, top: Any) -> None:
    """The new running maximum, and by what factor all that was summed before shrinks."""
    rows = work.rows
    neg_max = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=neg_max, data=top, op0=nl.multiply, operand0=-work.factor, op1=nl.minimum,
        operand1=rows.neg_max,
    )  # fmt: skip
    work.decay = nl.ndarray(top.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=work.decay, op=nl.exp, data=rows.neg_max, scale=-1.0, bias=neg_max)
    rows.neg_max = neg_max
