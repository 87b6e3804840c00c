"""The implementations of the op, the order they are tried in, and why one was chosen.

An implementation is an object with a name. Given a problem and a target it says whether it can do
the case (`why_not` returns None or the reason), describes how it would (`plan`), and does it
(`run`). The choice is made for the platform that is compiled for, not for the default one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jax_tkg import choice
from jax_tkg._typing import Array
from jax_tkg.lnc.implementation import XlaLnc
from jax_tkg.nki.cte.implementation import NkiPrefill, NkiPrefillInterpret
from jax_tkg.nki.implementation import Nki, NkiInterpret
from jax_tkg.online.blocks import attend_blocks
from jax_tkg.online.parts import attend_parts
from jax_tkg.online.plan import Form, Target, make_plan
from jax_tkg.online.rows import attend_rows
from jax_tkg.operands import Operands
from jax_tkg.prefill.implementation import TiledPrefill
from jax_tkg.problem import AttentionProblem, Op
from jax_tkg.reference import attend_reference


@runtime_checkable
class Implementation(Protocol):
    """One way to compute the op; hashable, without state."""

    @property
    def name(self) -> str:
        """Its name in `implementation=` and in reports."""

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """None if it can do this problem on this target, else the reason in words.

        Asked twice: when the op is called, of a target without platforms, whether anything rules
        the problem out everywhere; when it is lowered, of the platforms compiled for.
        """

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """How it would do it; printable."""

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, ...]:
        """Output `[B, T, N, Hv]` and log-sum-exp `[B, T, N]`, both float32; traced by JAX.

        If the problem is not normalised: output before the division, maximum and sum, as in
        `SoftmaxState`. A problem has `rope` only if the implementation rotates itself
        (`jax_tkg.rotation.Rotates`); then the rotated new keys come last.
        """


_FORMS = {Form.ROWS: attend_rows, Form.BLOCKS: attend_blocks, Form.PARTS: attend_parts}


@dataclass(frozen=True)
class OnlineSoftmax:
    """The pure-JAX online softmax over tiles of keys: every decode problem, every platform."""

    name: str = "xla"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """It can always do it, for its own op."""
        del target
        if problem.op is not Op.TKG:
            return f"it walks the keys of a few queries, for {Op.TKG} and not for {problem.op}"
        return None

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """An `OnlinePlan`."""
        return make_plan(problem, target)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, Array]:
        """Runs the form that the plan chose."""
        plan = make_plan(problem, target)
        return _FORMS[plan.form](problem, ops, plan)


@dataclass(frozen=True)
class Reference:
    """The oracle; never chosen unless named."""

    name: str = "reference"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """Only that it has no tiles."""
        del target
        return "it has no tiles on which to exchange anything" if problem.exchange else None

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """One sentence."""
        del problem, target
        return "all scores at once in float32; for tests"

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, ...]:
        """Runs the oracle."""
        del target
        return attend_reference(problem, ops)


XLA = OnlineSoftmax()
REFERENCE = Reference()
NKI = Nki()
NKI_INTERPRET = NkiInterpret()
XLA_LNC = XlaLnc()

PREFILL_XLA = TiledPrefill()
PREFILL_NKI = NkiPrefill()
PREFILL_NKI_INTERPRET = NkiPrefillInterpret()

IMPLEMENTATIONS: dict[str, Implementation] = {
    i.name: i for i in (NKI, XLA, REFERENCE, NKI_INTERPRET, XLA_LNC)
}
"""Every implementation of `attention_tkg` that can be named."""

PREFILL_IMPLEMENTATIONS: dict[str, Implementation] = {
    i.name: i for i in (PREFILL_NKI, PREFILL_XLA, REFERENCE, PREFILL_NKI_INTERPRET)
}
"""Every implementation of `attention_cte` that can be named."""

_NAMED = {Op.TKG: IMPLEMENTATIONS, Op.CTE: PREFILL_IMPLEMENTATIONS}

TRIED_BY_DEFAULT: dict[Op, tuple[Implementation, ...]] = {
    Op.TKG: (NKI, XLA),
    Op.CTE: (PREFILL_NKI, PREFILL_XLA),
}
"""What `implementation=None` tries, in order."""


def candidates(
    implementation: "str | Implementation | Sequence[str | Implementation] | None",
    op: Op,
) -> tuple[Implementation, ...]:
    """Reads `implementation=` of an op; see `jax_tkg.choice.candidates`."""
    return choice.candidates(implementation, _NAMED[op], TRIED_BY_DEFAULT[op], Implementation)
