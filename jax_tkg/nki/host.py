"""Launches on the host that are known only when a program is partitioned.

A program is compiled with a list of its callbacks, made when it is lowered. The local part of an
operation with a partitioning rule is lowered later, while XLA compiles, in a module of its own, of
which XLA takes the instructions and not the callbacks. So a program sets one callback aside, and
its later parts add their launches to that.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

_CALLBACK = "xla_ffi_python_cpu_callback"


class Host:
    """A callback set aside in the program that is being lowered; alive as long as the program."""

    def __init__(self, ctx: mlir.LoweringRuleContext) -> None:
        self._launches: dict[int, Callable[..., tuple[np.ndarray, ...]]] = {}
        self._numbers = itertools.count()
        callbacks = ctx.module_context.host_callbacks
        ctx.module_context.add_host_callback(self._call)
        self._index = len(callbacks) - 1

    def launch(
        self,
        ctx: mlir.LoweringRuleContext,
        function: Callable[..., tuple[np.ndarray, ...]],
        operands: Sequence[Any],
    ) -> Sequence[Any]:
        """Lowers a call of `function` with the operands, in a module that becomes a part."""
        number = next(self._numbers)
        self._launches[number] = function
        which = mlir.ir_constant(np.int32(number))
        numbered = ctx.replace(avals_in=[jax.core.ShapedArray((), np.int32), *ctx.avals_in])
        call = jax.ffi.ffi_lowering(_CALLBACK)
        return list(call(numbered, which, *operands, index=np.uint64(self._index)))

    def _call(self, number: Any, *arrays: Any) -> tuple[np.ndarray, ...]:
        return self._launches[int(number)](*arrays)
