"""One lowering rule for primitives whose implementation is chosen when the platform is known.

Only the code of what is chosen is traced. Partitioning has no rule here: inside `shard_map` a
device's shard arrives, elsewhere the compiler splits what it can see into; the target says which.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.online.plan import Target

Choose = Callable[..., Any]
"""`choose(target, *operands, **params)`: what runs there; hashable."""

Run = Callable[..., Sequence[Array]]
"""`run(chosen, target, *operands, **params)`: does it, traced by JAX."""


def lower_as_chosen(primitive: Primitive, choose: Choose, run: Run) -> None:
    """Gives a primitive the lowering rule: `choose` for the platforms compiled for, then `run`.

    For several platforms that differ in what is chosen, the program has a branch for each.
    """
    mlir.register_lowering(primitive, partial(_lower, choose, run))


def run_compiled(primitive: Primitive, static: Sequence[str]) -> None:
    """Gives a primitive its evaluation outside `jit`: compiled, by its static parameters."""
    compiled = jax.jit(primitive.bind, static_argnames=tuple(static))

    def evaluate(*operands: Array, **params: Any) -> Any:
        with jax.disable_jit(False):  # or it would come back here
            return compiled(*operands, **params)

    primitive.def_impl(evaluate)


def target_of(ctx: mlir.LoweringRuleContext) -> Target:
    """What is being compiled for."""
    platforms = tuple(ctx.platforms or ctx.module_context.platforms)
    devices = _compat.devices_to_partition(ctx)
    return Target(platforms, auto_partitioned=devices > 1, devices=devices)


def _lower(
    choose: Choose, run: Run, ctx: mlir.LoweringRuleContext, *values: Any, **params: Any
) -> Any:
    body = partial(_run_chosen, choose, run, target_of(ctx))
    # The body is traced without explicit shardings: the compiler propagates those of the operands.
    plain = ctx.replace(avals_in=[_compat.without_sharding(a) for a in ctx.avals_in])
    return mlir.lower_fun(body, multiple_results=True)(plain, *values, **params)


def _run_chosen(
    choose: Choose, run: Run, target: Target, *operands: Array, **params: Any
) -> Sequence[Array]:
    platforms: dict[Any, tuple[str, ...]] = {}
    for platform in target.platforms:
        chosen = choose(replace(target, platforms=(platform,)), *operands, **params)
        platforms[chosen] = (*platforms.get(chosen, ()), platform)
    branches = {
        platform: partial(run, chosen, replace(target, platforms=alike), **params)
        for chosen, alike in platforms.items()
        for platform in alike
    }
    with _compat.no_explicit_mesh():
        if len(platforms) == 1:
            return branches[target.platforms[0]](*operands)
        return tuple(lax.platform_dependent(*operands, **branches))
