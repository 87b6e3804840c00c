"""Division by the sum, log-sum-exp, and back to HBM."""

from typing import Any

from jax_tkg.nki.cte.load import heads_of
from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Outputs, Rows
from jax_tkg.nki.dialect import nisa, nl

NEGATIVE_INFINITY = float("-inf")


def finish_rows(rows: Rows, outputs: Outputs, plan: PrefillPlan) -> None:
    """Stores a row block: normalised, or as it is, for a merge with other keys."""
    width = plan.value_head_dim
    output, total = rows.total[:, 0:width], rows.total[:, width : width + 1]
    if plan.normalize:
        ceiling = lse_ceiling(total)
        # A row that saw a key has the sum 1 at least: that of its largest logit.
        nisa.tensor_scalar(dst=total, data=total, op0=nl.maximum, operand0=0.5)
        store(outputs.out, divided(output, total, outputs.out.dtype), rows, plan)
        store(outputs.lse, log_sum_exp(total, rows.neg_max, ceiling), rows, plan)
        return
    largest = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=largest, op=nl.copy, data=rows.neg_max, scale=-1.0)
    store(outputs.out, output, rows, plan)
    store(outputs.max, largest, rows, plan)
    store(outputs.sum, total, rows, plan)


def lse_ceiling(total: Any) -> Any:
    """What the log-sum-exp cannot exceed: -inf for rows that saw no key, else nothing, `[R, 1]`."""
    empty = nl.ndarray(total.shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=empty, data=total, op0=nl.equal, operand0=0.0)
    ceiling = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ceiling, value=-NEGATIVE_INFINITY, engine=nisa.engine.gpsimd)
    nisa.tensor_copy_predicated(dst=ceiling, src=NEGATIVE_INFINITY, predicate=empty)
    return ceiling


def divided(output: Any, total: Any, dtype: Any) -> Any:
    """The output in its final dtype, `[R, Hv]`."""
    inverse = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=total)
    final = nl.ndarray(output.shape, dtype, buffer=nl.sbuf)
    nisa.activation(dst=final, op=nl.copy, data=output, scale=inverse)
    return final


def log_sum_exp(total: Any, neg_max: Any, ceiling: Any) -> Any:
    """`[R, 1]`. The Vector engine, for which all softmaxes wait, waits for nothing here."""
    lse = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=lse, op=nl.log, data=total)
    nisa.activation(dst=lse, op=nl.copy, data=neg_max, scale=-1.0, bias=lse)
    nisa.tensor_tensor(dst=lse, data1=lse, data2=ceiling, op=nl.minimum, engine=nisa.engine.gpsimd)
    return lse


def store(memory: Any, found: Any, rows: Rows, plan: PrefillPlan) -> None:
    """What was found for a row block, `[R, ...]`, to `[B, T, N, ...]`."""
    nisa.dma_copy(dst=heads_of(memory, rows.block, rows.pair, plan), src=found)
