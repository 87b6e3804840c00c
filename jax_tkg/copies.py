"""The copies of a call that `jax.vmap` makes: axes in front of its operands, one for each level.

They stay apart until it is known what is compiled for. Where arrays are a device's own, copies are
rows of one problem. Where the compiler may split rows or copies between devices, joining the two
would move them: there the copies stay an axis of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding, PartitionSpec

from jax_tkg._typing import Array
from jax_tkg.operands import Operands, fold_into_batch, fold_into_heads, unfold_heads
from jax_tkg.problem import AttentionProblem


class Level(NamedTuple):
    """One `jax.vmap` around a call.

    Attributes:
        size: how many copies it makes.
        mapped: for each array of the call whether it has an axis for them; the outermost is first.
    """

    size: int
    mapped: tuple[bool, ...]

    @property
    def axes(self) -> tuple[int | None, ...]:
        """Of each array; once those of the levels around it are gone."""
        return tuple(0 if mapped else None for mapped in self.mapped)


Levels = tuple[Level, ...]
"""Outermost first."""


def over(levels: Levels, function: Callable[..., Any], out_axes: Any = None) -> Callable[..., Any]:
    """A function of a call's arrays, of all its copies.

    Args:
        levels: around it.
        function: takes the arrays one by one.
        out_axes: "as given" if it returns arrays that are mapped as those given; otherwise all of
            them are.
    """
    for level in reversed(levels):
        axes = list(level.axes) if out_axes == "as given" else 0
        function = jax.vmap(function, level.axes, axes, axis_size=level.size)
    return function


def levels_of(levels: Levels, array: int) -> int:
    """How many axes for copies an array has."""
    return sum(level.mapped[array] for level in levels)


def type_of_one(levels: Levels, array: int, type_: Any) -> Any:
    """The type of an array of one copy."""
    axes = levels_of(levels, array)
    spec = PartitionSpec(*type_.sharding.spec[axes:])
    sharding = NamedSharding(type_.sharding.mesh, spec)
    return type_.update(shape=type_.shape[axes:], sharding=sharding)


def type_of_all(levels: Levels, type_: Any) -> Any:
    """The type of a result of all copies, of which no type says how they are split."""
    spec = PartitionSpec(*(None for _ in levels), *type_.sharding.spec)
    sharding = NamedSharding(type_.sharding.mesh, spec)
    shape = (*(level.size for level in levels), *type_.shape)
    return type_.update(shape=shape, sharding=sharding)


# --- copies as rows or query heads of one problem


def as_rows(
    problem: AttentionProblem, levels: Levels, leaves: Sequence[Array], tree: Any
) -> tuple[AttentionProblem, Operands]:
    """All copies as rows of one problem; those of the outermost level differ last."""
    while levels:
        *around, level = levels
        axes = jax.tree.unflatten(tree, level.axes)

        def fold(*leaves: Array, axes: Any = axes, size: int = level.size) -> list[Array]:
            ops = fold_into_batch(jax.tree.unflatten(tree, leaves), axes, size)
            return jax.tree.leaves(ops)

        levels = tuple(around)
        leaves = over(levels, fold, "as given")(*leaves)
        problem = replace(problem, batch=problem.batch * level.size)
    ops: Operands = jax.tree.unflatten(tree, leaves)
    return with_dense_of(ops, problem), ops


def in_heads(
    problem: AttentionProblem,
    level: Level,
    levels: Levels,
    leaves: Sequence[Array],
    tree: Any,
    attend: Callable[..., Sequence[Array]],
) -> list[Array]:
    """The results where a level maps only what query heads have: the cache is read once for all.

    Args:
        problem: of a copy.
        level: whose copies become query heads; its axes are behind those of the others.
        levels: the others, inside it.
        leaves: the arrays.
        tree: of one copy's operands.
        attend: the call `attend(problem, *leaves)` of those that are left.
    """
    kv_heads = problem.num_kv_heads
    axes = jax.tree.unflatten(tree, level.axes)

    def fold(*leaves: Array) -> list[Array]:
        ops = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(fold_into_heads(ops, axes, kv_heads, level.size))

    leaves = over(levels, fold, "as given")(*leaves)
    one = [type_of_one(levels, i, jax.typeof(x)) for i, x in enumerate(leaves)]
    folded = replace(problem, num_heads=problem.num_heads * level.size)
    results = list(attend(with_dense_of(jax.tree.unflatten(tree, one), folded), *leaves))
    keys = [] if problem.rope is None else [results.pop()]  # of all copies, the same

    def unfold(result: Array) -> Array:
        return unfold_heads(result, kv_heads, level.size)

    for around in levels:
        unfold = jax.vmap(unfold, axis_size=around.size)
    split = [jnp.moveaxis(unfold(x), len(levels), 0) for x in results]
    return split + [jnp.broadcast_to(x, (level.size, *x.shape)) for x in keys]


def with_dense_of(ops: Any, problem: AttentionProblem) -> AttentionProblem:
    """The problem with the shapes of these operands' mask and bias."""
    mask, bias = (None if x is None else tuple(x.shape) for x in (ops.mask, ops.bias))
    return replace(problem, mask=mask, bias=bias)


# --- numbers that copies have in common


@custom_vmap
def least(numbers: Array) -> Array:
    """The least of some numbers, and of those of all copies: a loop that they share begins there.

    Of loops with bounds of their own JAX would make one that picks, at each step, from other
    slots for each copy.
    """
    return jnp.min(numbers)


@least.def_vmap
def _least_of_copies(size: int, mapped: Any, numbers: Array) -> tuple[Array, bool]:
    del size, mapped
    return least(numbers), False


def largest(numbers: Array) -> Array:
    """Likewise."""
    return -least(-numbers)
