"""The decode kernel as two implementations of the op: on a Neuron device, and interpreted."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from jax_tkg._typing import Array
from jax_tkg.nki.arguments import (
    Launch,
    Named,
    kernel_limits,
    make_launch,
    plan_kernel,
    rotation_limits,
)
from jax_tkg.nki.custom_call import KernelCompiler, NkiJit
from jax_tkg.nki.host import Host
from jax_tkg.nki.toolchain import default_programs
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem, Op


@dataclass(frozen=True)
class Interpreter:
    """Runs kernels in the interpreter instead of compiling them.

    Attributes:
        platform: the only one.
        host: by which kernels of a part of the program are launched; see `jax_tkg.nki.host`.
    """

    platform: str = "cpu"
    host: Host | None = None

    def why_not(self, programs: int) -> str | None:
        """It can always do it."""
        del programs
        return None

    def call(self, launch: Launch, programs: int) -> Sequence[Array]:
        """Makes the launch a call of the host."""
        from jax_tkg.nki.dialect import interpreted
        from jax_tkg.nki.interpret import interpret

        kernel = launch.kernel
        if isinstance(kernel, Named):
            kernel = replace(kernel, kernel=interpreted(kernel.kernel))
        return interpret(
            kernel,
            *launch.arrays,
            result=launch.result,
            programs=programs,
            static={"plan": launch.plan},
            host=self.host,
        )


def target_limits(compiler: KernelCompiler, target: Target) -> str | None:
    """Why a compiler makes no kernel for a target, in words; None if it does."""
    platform = compiler.platform
    if target.platforms and target.platforms != (platform,):
        return f"the kernel is compiled for {platform}, not for {'+'.join(target.platforms)}"
    if target.auto_partitioned:
        return (
            "the compiler may split the arrays between devices, and can only gather them for "
            "a kernel: say how they lie with sharding=jax_tkg.sharding.AttentionSharding(mesh, "
            "...), or call it inside jax.shard_map; then each device launches it on its shard"
        )
    return None


def default_device(platform: str) -> jax.Device | None:
    """The device that programs of a platform run on by default; None if it is not here."""
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None


def ask_known_answer(implementation: object, platform: str) -> None:
    """Tests an implementation on the device that programs of a platform run on by default, if any.

    Raises:
        SelfTestError: if its answer is wrong.
    """
    from jax_tkg.nki.self_test import check_device

    if (device := default_device(platform)) is not None:
        check_device(implementation, device)


_COMPILED: KernelCompiler = NkiJit()
_INTERPRETED: KernelCompiler = Interpreter()


@dataclass(frozen=True)
class Nki:
    """The NKI decode kernel, compiled into the program.

    Attributes:
        op: what it computes.
        programs: 2 on a logical core of two, as `NEURON_LOGICAL_NC_CONFIG` says, or 1.
        exchange: of two programs that share a sequence: "deferred" or "every tile".
        unseen_values: what the cache may hold where no query sees it: "any", NaN too, or "finite",
            which saves the work of clearing it.
        compiler: what makes the launch part of the program, for the one platform that it knows.
        self_test: compare the kernel with a known answer before its first use on a device.
        name: in `implementation=` and in reports.
    """

    op: ClassVar[Op] = Op.TKG

    programs: int = field(default_factory=default_programs)
    exchange: str = "deferred"
    unseen_values: str = "any"
    compiler: KernelCompiler = _COMPILED
    self_test: bool = True
    name: str = "nki"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """What the platform, the kernel or the toolchain cannot do."""
        if problem.op is not self.op:
            return f"it is the decode kernel, for {self.op} and not for {problem.op}"
        return (
            target_limits(self.compiler, target)
            or kernel_limits(problem)
            or self.compiler.why_not(self.programs)
        )

    def why_not_rotate(self, problem: AttentionProblem, target: Target) -> str | None:
        """What the kernel cannot rotate itself; see `jax_tkg.rotation`."""
        del target
        return rotation_limits(problem)

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """A `KernelPlan`."""
        del target
        return plan_kernel(problem, self.programs, self.exchange, unseen_values=self.unseen_values)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, ...]:
        """Launches the kernel once."""
        if self.self_test:
            ask_known_answer(replace(self, self_test=False), self.compiler.platform)
        launch = make_launch(problem, ops, self.programs, self.exchange, self.unseen_values)
        out, *rest = self.compiler.call(launch, self.programs)
        return out.astype(jnp.float32), *rest


@dataclass(frozen=True)
class NkiInterpret(Nki):
    """The same kernel in the interpreter, on the CPU; never chosen unless named."""

    compiler: KernelCompiler = _INTERPRETED
    self_test: bool = False
    name: str = "nki_interpret"
