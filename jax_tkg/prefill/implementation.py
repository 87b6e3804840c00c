"""The pure-JAX prefill as an implementation of the op."""

from dataclasses import dataclass

from jax_tkg._typing import Array
from jax_tkg.online.plan import Form, Target
from jax_tkg.operands import Operands
from jax_tkg.prefill.blocks import prefill_blocks
from jax_tkg.prefill.parts import prefill_parts
from jax_tkg.prefill.plan import make_prefill_plan
from jax_tkg.prefill.rows import prefill_rows
from jax_tkg.problem import AttentionProblem

_FORMS = {Form.ROWS: prefill_rows, Form.BLOCKS: prefill_blocks, Form.PARTS: prefill_parts}


@dataclass(frozen=True)
class TiledPrefill:
    """Online softmax over tiles of queries by tiles of keys: every problem, every platform."""

    name: str = "xla"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """It can always do it."""
        del problem, target
        return None

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """A `PrefillPlan`."""
        return make_prefill_plan(problem, target)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, ...]:
        """Runs the form that the plan chose."""
        plan = make_prefill_plan(problem, target)
        return _FORMS[plan.form](problem, ops, plan)
