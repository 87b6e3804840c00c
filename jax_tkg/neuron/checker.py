"""Checks of whole programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxlib.mlir import ir

from jax_tkg.neuron.operations import broken_rules
from jax_tkg.neuron.program import Program
from jax_tkg.neuron.rules import Finding

# A line of this file is never where the user's code is.
source_info_util.register_exclusion(__file__)

_CALLBACKS = frozenset({"debug_callback", "debug_print", "io_callback", "pure_callback"})
_NOT_FOUND = re.compile(r"rule for primitive '([^']+)' not found for platform")
_SUMMARY = re.compile(r"(.+?:\d+)(?::\d+)* \(")  # file:line:column (function)


def check(
    fun: Callable[..., Any], *args: Any, platform: str = "neuron", **kwargs: Any
) -> tuple[Finding, ...]:
    """What Neuron cannot run of a function, errors and warnings, in the order of the program.

    Nothing is computed and no device or plugin is needed. What one operation does more than once
    on one source line is reported once.

    Args:
        fun: A function, jitted or not. Arguments that are static must be so by `jax.jit`, or fixed
            by `functools.partial`.
        *args: Arguments: arrays, or `jax.ShapeDtypeStruct` in their place.
        platform: What to lower for.
        **kwargs: More arguments of the function.

    Returns:
        Nothing for a program without known trouble. If lowering itself stops, at a callback or at
        an operation that JAX has for other platforms only, these alone are reported, and the rest
        of the program has not been looked at.
    """
    jitted: Any = fun if hasattr(fun, "trace") else jax.jit(fun)
    traced = jitted.trace(*args, **kwargs)
    try:
        lowered = traced.lower(lowering_platforms=(platform,))
    except (NotImplementedError, ValueError) as error:
        if findings := tuple(dict.fromkeys(_what_stops(traced.jaxpr.jaxpr, error))):
            return findings
        raise
    return check_module(lowered)


def check_module(lowered: jax.stages.Lowered | ir.Module) -> tuple[Finding, ...]:
    """What Neuron cannot run of a lowered program.

    Args:
        lowered: What `jax.jit(f).lower` returns, or a module of StableHLO. Lower it for Neuron: JAX
            writes other operations for other platforms.

    Returns:
        As `check` does.
    """
    module: Any = lowered if isinstance(lowered, ir.Module) else lowered.compiler_ir("stablehlo")
    with module.context:
        program = Program(module)
        found = (
            Finding(rule, op.name, message, line)
            for op, line in program
            for rule, message in broken_rules(op, program)
        )
        return tuple(dict.fromkeys(found))


def _what_stops(jaxpr: Jaxpr, error: Exception) -> Iterator[Finding]:
    """The callbacks of a program that could not be lowered, and the operation without a rule."""
    missing = _NOT_FOUND.search(str(error))
    if missing is None and "callback" not in str(error).lower():
        return
    name = missing[1] if missing else None
    alone = "the rest of the program was not looked at"
    no_lowering = f"JAX cannot lower it for Neuron; leave it to the host ({alone})"
    is_found = False
    for primitive, line in _primitives(jaxpr, ""):
        if primitive in _CALLBACKS:
            message = f"calls Python on the host; return the data instead ({alone})"
            yield Finding("host-callback", primitive, message, line)
        elif primitive == name:
            yield Finding("no-lowering", name, no_lowering, line)
        is_found |= primitive == name
    if name is not None and not is_found:  # it is part of how another operation is lowered
        yield Finding("no-lowering", name, no_lowering, "")


def _primitives(jaxpr: Jaxpr, outer: str) -> Iterator[tuple[str, str]]:
    """Every primitive with its "file:line", or that of the call it is in."""
    for eqn in jaxpr.eqns:
        found = _SUMMARY.match(source_info_util.summarize(eqn.source_info))
        here = found[1] if found else outer
        yield eqn.primitive.name, here
        leaves = jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr))
        for leaf in leaves:
            if isinstance(leaf, ClosedJaxpr):
                yield from _primitives(leaf.jaxpr, here)
            elif isinstance(leaf, Jaxpr):
                yield from _primitives(leaf, here)
