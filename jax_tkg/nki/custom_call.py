"""How a launch of a kernel becomes part of a JAX program for a Neuron device: a custom call.

This is the last step of the op's lowering. `jax_tkg.primitive` has the rest of the recipe (abstract
evaluation, the choice of an implementation for the platform, batching, differentiation), so that
nothing here is ever mapped, differentiated or typed: it sees one launch on one device's arrays.
"""

import base64
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jax_tkg._typing import Array
from jax_tkg.nki import toolchain
from jax_tkg.nki.arguments import Launch, Named

TARGET = "AwsNeuronCustomNativeKernel"
"""The target that Neuron's compiler replaces by the kernel."""

_STATUS_RETURNING = 2
"""API version of the call, in AWS's printed example."""


@runtime_checkable
class KernelCompiler(Protocol):
    """What makes a launch part of a traced program; hashable, without state."""

    @property
    def platform(self) -> str:
        """The only platform, as JAX names it, that can run what it makes."""

    def why_not(self, programs: int) -> str | None:
        """Why it cannot compile kernels for so many programs here, in words; None if it can."""

    def call(self, launch: Launch, programs: int) -> Sequence[Array]:
        """Launches a kernel: what it returns, as `launch.result` says."""


@dataclass(frozen=True)
class NkiJit:
    """The real one: `nki.jit` of whichever package is installed, which emits the custom call.

    The kernel is called with all its parameters by position: arrays, None for those that the
    problem does not have, and the plan, an `NKIObject` that the compiler reads as a constant.
    """

    platform: str = "neuron"

    def why_not(self, programs: int) -> str | None:
        """The toolchain, or a runtime set up for another number of programs."""
        return toolchain.wrong_programs(programs) or toolchain.why_not()

    def call(self, launch: Launch, programs: int) -> Sequence[Array]:
        """Calls the kernel as a function of traced arrays.

        Raises:
            RuntimeError: if the runtime is set up for another number of programs.
        """
        if (reason := toolchain.wrong_programs(programs)) is not None:
            raise RuntimeError(f"{reason}.")
        function, arguments = written_out(launch)
        kernel = _jitted(function)
        results = (kernel[programs] if programs > 1 else kernel)(*arguments)
        results = tuple(results) if isinstance(results, tuple | list) else (results,)
        _check_results(launch, results)
        return results


@dataclass(frozen=True)
class Outline:
    """A stand-in without a compiler: the documented custom call with no kernel in it.

    For looking, on any machine, at the program that a Neuron device would be given. It lowers, and
    cannot run anywhere.
    """

    platform: str = "neuron"

    def why_not(self, programs: int) -> str | None:
        """It can always do it."""
        del programs
        return None

    def call(self, launch: Launch, programs: int) -> Sequence[Array]:
        """Emits the custom call."""
        function, arguments = written_out(launch)
        named = zip(inspect.signature(function).parameters, arguments, strict=True)
        config = NativeKernel(
            func_name=function.__name__,
            grid=(programs,) if programs > 1 else (),
            binary="",
            input_names=tuple(name for name, x in named if any(x is a for a in launch.arrays)),
            output_names=tuple(f"output_{i}" for i in range(len(launch.result))),
        )
        return call_native_kernel(config, launch.arrays, launch.result, dict(launch.aliases))


@dataclass(frozen=True)
class NativeKernel:
    """What the custom call says of its kernel, under AWS's names.

    Attributes:
        func_name: of the kernel.
        grid: `(programs,)`; empty for one.
        binary: file of the compiled kernel.
        input_names: of the operands, in order.
        output_names: of the results, in order.
        has_collectives: it communicates with other devices.
        kernel_version: of this format.
    """

    func_name: str
    grid: tuple[int, ...]
    binary: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    has_collectives: bool = False
    kernel_version: int = 1

    def backend_config(self) -> str:
        """Base64 of JSON."""
        fields = asdict(self)
        binary = {name: fields.pop(name) for name in ("binary", "input_names", "output_names")}
        text = json.dumps({"klir_binary": binary, **fields}, sort_keys=True)
        return base64.b64encode(text.encode()).decode()

    @classmethod
    def from_backend_config(cls, config: str) -> "NativeKernel":
        """Reads what `backend_config` wrote, or a compiler did."""
        fields = json.loads(base64.b64decode(config))
        fields |= fields.pop("klir_binary")
        return cls(**{name: _as_tuple(value) for name, value in fields.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def call_native_kernel(
    kernel: NativeKernel,
    arrays: Sequence[Array],
    result: Sequence[jax.ShapeDtypeStruct],
    aliases: Mapping[int, int] | None = None,
) -> tuple[Array, ...]:
    """Emits a custom call of a compiled kernel, operands and results in row-major layouts.

    Args:
        kernel: what is called.
        arrays: its operands.
        result: shapes and dtypes of its results.
        aliases: for operands that the kernel updates in place, the result that each becomes.
    """
    call = jax.ffi.ffi_call(
        TARGET,
        tuple(result),
        custom_call_api_version=_STATUS_RETURNING,
        legacy_backend_config=kernel.backend_config(),
        input_output_aliases=dict(aliases or {}),
    )
    return tuple(call(*arrays))


def written_out(launch: Launch) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The kernel of a launch as it is written, and all its arguments by position."""
    function, names = launch.kernel, None
    if isinstance(function, Named):
        function, names = function.kernel, function.names
    given: dict[str, Any] = dict.fromkeys(inspect.signature(function).parameters)
    given.update(zip(names or tuple(given), launch.arrays, strict=False), plan=launch.plan)
    return function, tuple(given.values())


@cache
def _jitted(function: Callable[..., Any]) -> Any:
    """One compiler object for each kernel: it keeps what it has compiled."""
    from jax_tkg.nki.dialect import nki

    return nki.jit(function)


def _check_results(launch: Launch, results: Sequence[Any]) -> None:
    found = [(tuple(x.shape), np.dtype(x.dtype)) for x in results]
    wanted = [(tuple(x.shape), np.dtype(x.dtype)) for x in launch.result]
    if found != wanted:
        raise RuntimeError(
            f"the compiled kernel returns {_described(found)}, not {_described(wanted)}; the "
            f"compiler may not be what the kernel was written for ({toolchain.describe()})."
        )


def _described(arrays: Sequence[tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in arrays) or "nothing"
