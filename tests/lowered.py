"""What tests ask about lowered programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_tkg.neuron.program import nested


def lower_for_neuron(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Lowers a function, jitted or not, as for a Neuron device; none is needed."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return jitted.trace(*args, **kwargs).lower(lowering_platforms=("neuron",))


def walk(lowered: Any) -> Iterator[Any]:
    """Every operation of a lowered program, also those inside loops and functions."""
    return nested(lowered.compiler_ir("stablehlo").operation)


def operations(lowered: Any) -> Counter[str]:
    """How often each operation occurs."""
    return Counter(op.name for op in walk(lowered))
