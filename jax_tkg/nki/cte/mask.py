"""Which keys a row sees, and the largest logit among them."""

from typing import Any

from jax_tkg.nki.buffers import MASKED
from jax_tkg.nki.cte.logits import load_dense
from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Inputs, Work
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.mask import hidden_by_row, select_slots


def mask_and_max(work: Work, inputs: Inputs, plan: PrefillPlan) -> Any:
    """Sets invisible logits far below all others; returns the largest of each row `[R, 1]`.

    Inside the visible range nothing is masked. At its edges one instruction compares slots with the
    bounds of the row, selects, and finds the maximum.
    """
    step, source = work.step, work.keys.source
    if plan.has_mask:
        overwrite(work, load_dense(inputs.hidden, nl.uint8, work, plan))
    if source.has_holes:
        add_holes(work)
    if step.is_masked and not source.has_positions:
        return select_range(work)
    if step.is_masked:
        n, bounds = work.rows.block.rows, work.rows.bounds[work.keys.tile.source]
        position = work.keys.position[0:n, step.first : step.first + step.keys]
        overwrite(work, hidden_by_row(position, bounds[:, 0:1], bounds[:, 1:2]))
    top = nl.ndarray((work.rows.block.rows, 1), nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=top, op=nl.maximum, data=work.logits, axis=1)
    return top


def add_holes(work: Work) -> None:
    """Lowers the logits of slots that hold nothing; their keys are zeroed, whatever was there."""
    n, step = work.rows.block.rows, work.step
    lowered = nl.ndarray(work.logits.shape, nl.float32, buffer=nl.sbuf)
    holes = work.keys.holes[0:n, step.first : step.first + step.keys]
    nisa.tensor_tensor(dst=lowered, data1=work.logits, data2=holes, op=nl.add)
    work.logits = lowered


def select_range(work: Work) -> Any:
    """Masks the slots outside the bounds of a row; returns the maximum of the others."""
    bounds, first = work.rows.bounds[work.keys.tile.source], work.keys.tile.start + work.step.first
    if work.keys.first_slot != None:  # noqa: E711  (the kernel language has no `is`)
        shifted = nl.ndarray(bounds.shape, nl.float32, buffer=nl.sbuf)
        start = work.keys.first_slot[0 : bounds.shape[0]].broadcast(1, 2)
        nisa.tensor_tensor(
            dst=shifted, data1=bounds, data2=start, op=nl.subtract, engine=nisa.engine.gpsimd
        )
        bounds = shifted
    work.logits, top = select_slots(work.logits, bounds[:, 0:1], bounds[:, 1:2], first)
    return top


def overwrite(work: Work, hidden: Any) -> None:
    """Logits that may be NaN become the masked logit."""
    shown = nl.ndarray(work.logits.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=shown, src=work.logits)
    nisa.tensor_copy_predicated(dst=shown, src=MASKED, predicate=hidden)
    work.logits = shown
