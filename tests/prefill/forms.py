"""The pure-JAX prefill with small tiles, in the form that it has on some platform."""

from dataclasses import dataclass

import jax
import numpy as np

from jax_tkg.online.plan import Form, Target
from jax_tkg.operands import Operands
from jax_tkg.prefill.blocks import prefill_blocks
from jax_tkg.prefill.plan import PrefillPlan, divided
from jax_tkg.prefill.rows import prefill_rows
from jax_tkg.problem import AttentionProblem


@dataclass(frozen=True)
class SmallTiles:
    """A form with tiles of `queries` by `keys`, or whole pages."""

    form: Form
    queries: int
    keys: int

    def __str__(self) -> str:
        """The name."""
        return self.name

    @property
    def name(self) -> str:
        """Says all."""
        return f"{self.form.value}-{self.queries}x{self.keys}"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """It can do every case."""
        del problem, target
        return None

    def plan(self, problem: AttentionProblem, target: Target) -> PrefillPlan:
        """The tiles asked for."""
        del target
        dtype = problem.compute_dtype if self.form is Form.BLOCKS else np.dtype(np.float32)
        return divided(
            problem, self.form, query_tile=self.queries, key_tile=self.keys, dtype=dtype, reason=""
        )

    def run(
        self, problem: AttentionProblem, ops: Operands, target: Target
    ) -> tuple[jax.Array, ...]:
        """Runs that plan."""
        prefill = prefill_rows if self.form is Form.ROWS else prefill_blocks
        return prefill(problem, ops, self.plan(problem, target))
