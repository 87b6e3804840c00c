"""The prefill kernel as two implementations of the op: on a Neuron device, and interpreted."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax.numpy as jnp

from jax_tkg._typing import Array
from jax_tkg.nki.arguments import rotation_limits
from jax_tkg.nki.cte.arguments import make_launch, plan_prefill, prefill_limits
from jax_tkg.nki.custom_call import KernelCompiler, NkiJit
from jax_tkg.nki.implementation import Interpreter, ask_known_answer, target_limits
from jax_tkg.nki.toolchain import default_programs
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem, Op

_COMPILED: KernelCompiler = NkiJit()
_INTERPRETED: KernelCompiler = Interpreter()


@dataclass(frozen=True)
class NkiPrefill:
    """The NKI prefill kernel, compiled into the program.

    Attributes:
        op: what it computes.
        programs: 2 on a logical core of two, or 1.
        compiler: what makes the launch part of the program, for the one platform that it knows.
        self_test: compare the kernel with a known answer before its first use on a device.
        name: in `implementation=` and in reports.
    """

    op: ClassVar[Op] = Op.CTE

    programs: int = field(default_factory=default_programs)
    compiler: KernelCompiler = _COMPILED
    self_test: bool = True
    name: str = "nki"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """What the platform, the kernel or the toolchain cannot do."""
        if problem.op is not self.op:
            return f"it is the prefill kernel, for {self.op} and not for {problem.op}"
        return (
            target_limits(self.compiler, target)
            or prefill_limits(problem)
            or self.compiler.why_not(self.programs)
        )

    def why_not_rotate(self, problem: AttentionProblem, target: Target) -> str | None:
        """See `jax_tkg.rotation`."""
        del target
        return rotation_limits(problem)

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """A `PrefillPlan`."""
        del target
        return plan_prefill(problem, self.programs)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, ...]:
        """Launches the kernel once."""
        del target
        if self.self_test:
            ask_known_answer(replace(self, self_test=False), self.compiler.platform)
        launch = make_launch(problem, ops, self.programs)
        out, *rest = self.compiler.call(launch, self.programs)
        return out.astype(jnp.float32), *rest


@dataclass(frozen=True)
class NkiPrefillInterpret(NkiPrefill):
    """The same kernel in the interpreter, on the CPU; never chosen unless named."""

    compiler: KernelCompiler = _INTERPRETED
    self_test: bool = False
    name: str = "nki_interpret"
