"""The decode kernel as an implementation of the op: interpreted on the CPU."""

from dataclasses import dataclass

import jax.numpy as jnp

from jax_tkg._typing import Array
from jax_tkg.nki.arguments import kernel_limits, make_launch, plan_kernel
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem


@dataclass(frozen=True)
class NkiInterpret:
    """The NKI decode kernel in the interpreter, on the CPU; never chosen unless named.

    Attributes:
        programs: 2 as on a logical core of two, or 1.
        exchange: of two programs that share a sequence: "deferred" or "every tile".
        name: in `implementation=` and in reports.
    """

    programs: int = 2
    exchange: str = "deferred"
    name: str = "nki_interpret"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """What the kernel or the platform cannot do."""
        if target.platforms and target.platforms != ("cpu",):
            return f"the interpreter runs on the CPU, not on {'+'.join(target.platforms)}"
        if target.auto_partitioned:
            return "the compiler may split the arrays between devices; call it inside shard_map"
        from jax_tkg.nki import dialect

        if not dialect.is_interpreted:
            return "the nki package is installed, and the kernels here are written against it"
        return kernel_limits(problem)

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """A `KernelPlan`."""
        del target
        return plan_kernel(problem, self.programs, self.exchange)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, Array]:
        """Launches the kernel once."""
        from jax_tkg.nki.interpret import interpret

        del target
        launch = make_launch(problem, ops, self.programs, self.exchange)
        out, lse = interpret(
            launch.kernel,
            *launch.arrays,
            result=launch.result,
            programs=self.programs,
            static={"plan": launch.plan},
        )
        return out.astype(jnp.float32), lse
