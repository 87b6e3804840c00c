"""The op as a JAX primitive: abstract evaluation, lowering, batching, differentiation, in order.

A primitive, so that the implementation is chosen when the platform is known (lowering) and only its
code is traced, and so that vmap batches the call and not a loop (`jax_tkg.copies`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import batching

from jax_tkg import _compat, rotation
from jax_tkg._typing import Array
from jax_tkg.choice import choose
from jax_tkg.copies import (
    Level,
    Levels,
    as_rows,
    in_heads,
    levels_of,
    over,
    type_of_all,
    type_of_one,
)
from jax_tkg.implementations import Implementation
from jax_tkg.lowering import lower_as_chosen, run_compiled
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands, maps_heads_only
from jax_tkg.problem import AttentionProblem, Op

_PRIMITIVES = {op: Primitive(op.value) for op in Op}


def bind(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    """The op's primitive on a problem's operands.

    Returns:
        Output in the problem's `out_dtype` and log-sum-exp; of a problem that is not normalised,
        output, maximum and sum in float32. With `rope`, behind them the rotated new keys.
    """
    leaves, tree = jax.tree.flatten(ops)
    return _bind_leaves(problem, *leaves, tree=tree, tried=tried, levels=())


def _bind_leaves(
    problem: AttentionProblem, *leaves: Array, tree: Any, tried: Any, levels: Levels
) -> tuple[Array, ...]:
    primitive = _PRIMITIVES[problem.op]
    found = primitive.bind(*leaves, tree=tree, problem=problem, tried=tried, levels=levels)
    return tuple(found)


# --- abstract evaluation


def _abstract_eval(
    *leaves: Any, tree: Any, problem: AttentionProblem, levels: Levels, **_: Any
) -> Any:
    one = [type_of_one(levels, i, x) for i, x in enumerate(leaves)]
    return [type_of_all(levels, x) for x in _types_of_one(problem, jax.tree.unflatten(tree, one))]


def _types_of_one(problem: AttentionProblem, ops: Any) -> Any:
    query = ops.query
    rows = query.shape[:3]
    float32 = np.dtype(np.float32)
    out = _compat.like_query(query, (*rows, problem.value_head_dim), problem.out_dtype)
    of_rows = _compat.like_query(query, rows, float32)
    keys = () if problem.rope is None else (ops.new_key.update(weak_type=False),)
    return (out, *(of_rows,) * (1 if problem.normalize else 2), *keys)


# --- lowering


def _choose(
    target: Target,
    *leaves: Array,
    tree: Any,
    problem: AttentionProblem,
    tried: tuple[Implementation, ...],
    levels: Levels,
) -> Implementation | None:
    """None for copies that become rows of one problem, for which another may be chosen."""
    del leaves, tree
    if levels and not target.auto_partitioned:
        return None
    return choose(problem, target, tried).require()


def _run(
    chosen: Implementation | None,
    target: Target,
    *leaves: Array,
    tree: Any,
    problem: AttentionProblem,
    tried: tuple[Implementation, ...],
    levels: Levels,
) -> tuple[Array, ...]:
    if chosen is None:
        folded, ops = as_rows(problem, levels, leaves, tree)
        sizes = [level.size for level in levels]
        results = bind(folded, tried, ops)
        return tuple(x.reshape(*sizes, problem.batch, *x.shape[1:]) for x in results)

    def run(*leaves: Array) -> tuple[Array, ...]:
        out, *rest = rotation.run(chosen, problem, jax.tree.unflatten(tree, leaves), target)
        return out.astype(problem.out_dtype), *rest

    with jax.named_scope(f"{problem.op}[{chosen.name}]"):
        return tuple(over(levels, run)(*leaves))


# --- batching


def _batch(
    leaves: Any, dims: Any, *, tree: Any, problem: AttentionProblem, tried: Any, levels: Levels
) -> tuple[Any, Any]:
    mapped, axis = next((x, d) for x, d in zip(leaves, dims, strict=True) if d is not None)
    level = Level(mapped.shape[axis], tuple(d is not None for d in dims))
    axes = jax.tree.unflatten(tree, dims)
    ops = jax.tree.unflatten(tree, leaves)
    call = partial(_bind_leaves, tree=tree, tried=tried)

    def stacked(name: str) -> Any:
        type_, own = jax.typeof(getattr(ops, name)), getattr(axes, name)
        return _compat.stacked_sharding(type_, own, jax.typeof(mapped), axis, len(levels))

    def attend_copies(*leaves: Array) -> list[Array]:
        if maps_heads_only(axes):
            given = _with_axis_at(leaves, dims, partial(levels_of, levels))
            attend = partial(call, levels=levels)
            return in_heads(problem, level, levels, given, tree, attend)
        given = _with_axis_at(leaves, dims, lambda _: 0)
        if not jax.tree.leaves(axes.kv):
            return _attend_in_turn(partial(call, problem, levels=levels), level, given)
        return list(call(problem, *given, levels=(level, *levels)))

    shardings = [stacked("query")] * (2 if problem.normalize else 3)
    shardings += [] if problem.rope is None else [stacked("new_key")]
    results = _compat.partitioned_by_compiler(attend_copies, shardings, *leaves)
    return results, [0] * len(results)


def _with_axis_at(leaves: Any, dims: Any, where: Callable[[int], int]) -> list[Array]:
    """The arrays with the mapped axis of array i at `where(i)`."""
    return [
        x if d is None else jnp.moveaxis(x, d, where(i))
        for i, (x, d) in enumerate(zip(leaves, dims, strict=True))
    ]


def _attend_in_turn(
    attend: Callable[..., Sequence[Array]], level: Level, leaves: Sequence[Array]
) -> list[Array]:
    """One copy after another: the cache they share is not repeated."""
    own = [x for x, is_own in zip(leaves, level.mapped, strict=True) if is_own]

    def attend_one(own: list[Array]) -> Sequence[Array]:
        given = iter(own)
        filled = zip(leaves, level.mapped, strict=True)
        return attend(*(next(given) if is_own else x for x, is_own in filled))

    return list(lax.map(attend_one, own))


# --- the primitives, one for each op

for _primitive in _PRIMITIVES.values():
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(_abstract_eval)
    run_compiled(_primitive, ("tree", "problem", "tried", "levels"))
    lower_as_chosen(_primitive, _choose, _run)
    batching.primitive_batchers[_primitive] = _batch


# --- differentiation: recomputation from the log-sum-exp


def attend(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    """The op on validated operands, differentiable in reverse mode.

    Operands that are replicated over a manual axis become varying here, outside the custom rule, so
    that their cotangents are summed over it.
    """
    leaves, tree = jax.tree.flatten(ops)
    return _attend(problem, tried, jax.tree.unflatten(tree, _compat.agree_on_varying_axes(leaves)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    return bind(problem, tried, ops)


def result_names(problem: AttentionProblem) -> tuple[str, ...]:
    """What the results are called for the policies of `jax.checkpoint`."""
    names = ("out", "lse") if problem.normalize else ("out", "max", "sum")
    return names if problem.rope is None else (*names, "new_key")


def _attend_forward(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[tuple[Array, ...], tuple[Operands, tuple[Array, ...]]]:
    found = _attend(problem, tried, ops)
    names = result_names(problem)
    found = tuple(
        checkpoint_name(x, f"{problem.op}_{name}") for x, name in zip(found, names, strict=True)
    )
    return found, (ops, found)


def _attend_backward(
    problem: AttentionProblem,
    tried: tuple[Implementation, ...],
    residuals: tuple[Operands, tuple[Array, ...]],
    cotangents: tuple[Array, ...],
) -> tuple[Operands]:
    del tried
    ops = residuals[0]
    arrays, tree = jax.tree.flatten((*residuals, tuple(cotangents)))
    floats = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, ops)
    wanted, wanted_tree = jax.tree.flatten(floats)

    def backward(*arrays: Array) -> list[Array]:
        d_floats = rotation.backward(problem, *jax.tree.unflatten(tree, arrays))
        return wanted_tree.flatten_up_to(d_floats)  # type: ignore[attr-defined]

    shardings = [jax.typeof(x).sharding for x in wanted]
    found = _compat.partitioned_by_compiler(backward, shardings, *arrays)
    return (jax.tree.unflatten(wanted_tree, found),)


_attend.defvjp(_attend_forward, _attend_backward)
