"""The two programs on one device, an implementation of the op: `jax.vmap` over an axis `lnc`."""

from dataclasses import dataclass, field
from functools import partial

import jax

from jax_tkg._typing import Array
from jax_tkg.lnc.exchange import AXIS
from jax_tkg.lnc.program import attend_slice
from jax_tkg.lnc.shares import collect, deal, local_problem, split_of
from jax_tkg.nki.arguments import kernel_limits, plan_kernel
from jax_tkg.nki.toolchain import default_programs
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem, Op


@dataclass(frozen=True)
class XlaLnc:
    """The decode kernel's algorithm in pure JAX: its plan, its two programs, its exchanges.

    For comparing with the kernel, and for looking at what two programs do; never chosen unless
    named. The programs run in lock step on one device.

    Attributes:
        programs: of the launch that it stands for: 2 or 1.
        exchange: of two programs that share a sequence: "deferred" or "every tile".
        name: in `implementation=` and in reports.
    """

    programs: int = field(default_factory=default_programs)
    exchange: str = "deferred"
    name: str = "xla_lnc"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """What the kernel's plan cannot do."""
        del target
        if problem.op is not Op.TKG:
            return f"it has the plan of the decode kernel, for {Op.TKG} and not for {problem.op}"
        if problem.exchange:
            return "its programs exchange the maximum with each other, not over mesh axes"
        return kernel_limits(problem)

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """A `KernelPlan`, the same as the kernel's."""
        del target
        return plan_kernel(problem, self.programs, self.exchange)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, Array]:
        """Runs all programs side by side."""
        plan = plan_kernel(problem, self.programs, self.exchange)
        split = split_of(plan, problem.kv.slot_multiple)
        dealt, axes = deal(problem, ops, split)
        leaves, tree = jax.tree.flatten(dealt)
        run = partial(
            attend_slice,
            local_problem(problem, split),
            plan,
            split,
            AXIS,
            constant_trips="neuron" in target.platforms,
        )

        def program(*leaves: Array) -> tuple[Array, Array]:
            return run(jax.tree.unflatten(tree, leaves))

        mapped = jax.vmap(
            program,
            in_axes=tree.flatten_up_to(axes),  # type: ignore[attr-defined]
            axis_name=AXIS,
            axis_size=plan.programs,
        )
        out, lse = mapped(*leaves)
        at = 0 if split.letter == "B" else 2
        return collect(out, split, at), collect(lse, split, at)
