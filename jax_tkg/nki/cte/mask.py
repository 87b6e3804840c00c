"""Which keys a row sees, and the largest logit among them."""

from typing import Any

from jax_tkg.nki.buffers import MASKED
from jax_tkg.nki.cte.logits import load_dense
from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Inputs, Work
from jax_tkg.nki.dialect import nisa, nl


def mask_and_max(work: Work, inputs: Inputs, plan: PrefillPlan) -> Any:
    """Sets invisible logits far below all others; returns the largest of each row `[R, 1]`.

    Inside the visible range nothing is masked. At its edges one instruction compares slots with the
    bounds of the row, selects, and finds the maximum.
    """
    step, source = work.step, work.keys.source
    top = nl.ndarray((work.rows.block.rows, 1), nl.float32, buffer=nl.sbuf)
    if plan.has_mask:
        overwrite(work, load_dense(inputs.hidden, nl.uint8, work, plan))
    if source.has_holes:
        add_holes(work)
    if step.is_masked and not source.has_positions:
        select_range(work, top)
        return top
    if step.is_masked:
        overwrite(work, out_of_bounds(work))
    nisa.tensor_reduce(dst=top, op=nl.maximum, data=work.logits, axis=1)
    return top


def add_holes(work: Work) -> None:
    """Lowers the logits of slots that hold nothing; their keys are zeroed, whatever was there."""
    n, step = work.rows.block.rows, work.step
    lowered = nl.ndarray(work.logits.shape, nl.float32, buffer=nl.sbuf)
    holes = work.keys.holes[0:n, step.first : step.first + step.keys]
    nisa.tensor_tensor(dst=lowered, data1=work.logits, data2=holes, op=nl.add)
    work.logits = lowered


def select_range(work: Work, top: Any) -> None:
    """Masks the slots outside the bounds of a row, and finds the maximum of the others."""
    bounds, first = work.rows.bounds[work.keys.tile.source], work.keys.tile.start + work.step.first
    if work.keys.first_slot != None:  # noqa: E711  (the kernel language has no `is`)
        shifted = nl.ndarray(bounds.shape, nl.float32, buffer=nl.sbuf)
        start = work.keys.first_slot[0 : bounds.shape[0]].broadcast(1, 2)
        nisa.tensor_tensor(
            dst=shifted, data1=bounds, data2=start, op=nl.subtract, engine=nisa.engine.gpsimd
        )
        bounds = shifted
    selected = nl.ndarray(work.logits.shape, nl.float32, buffer=nl.sbuf)
    nisa.range_select(
        dst=selected, on_true_tile=work.logits, comp_op0=nl.greater_equal, comp_op1=nl.less,
        bound0=bounds[:, 0:1], bound1=bounds[:, 1:2],
        range_start=first, reduce_res=top, reduce_op=nl.maximum,
    )  # fmt: skip
    work.logits = selected


def out_of_bounds(work: Work) -> Any:
    """Which keys lie outside the bounds of a row by their positions: uint8 `[R, keys]`."""
    n, step, bounds = work.rows.block.rows, work.step, work.rows.bounds[work.keys.tile.source]
    position = work.keys.position[0:n, step.first : step.first + step.keys]
    before = nl.ndarray((n, step.keys), nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=before, data=position, op0=nl.less, operand0=bounds[:, 0:1])
    outside = nl.ndarray((n, step.keys), nl.uint8, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=outside, data=position, op0=nl.greater_equal, operand0=bounds[:, 1:2],
        op1=nl.logical_or, operand1=before,
    )  # fmt: skip
    return outside


def overwrite(work: Work, hidden: Any) -> None:
    """Logits that may be NaN become the masked logit."""
    shown = nl.ndarray(work.logits.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=shown, src=work.logits)
    nisa.tensor_copy_predicated(dst=shown, src=MASKED, predicate=hidden)
    work.logits = shown
