"""The op as a JAX primitive: abstract evaluation, lowering, batching, differentiation, in order.

A primitive, so that the implementation is chosen when the platform is known (lowering) and only its
code is traced, and so that vmap folds into the batch instead of batching a loop.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.choice import choose
from jax_tkg.implementations import Implementation
from jax_tkg.online.backward import attention_backward
from jax_tkg.online.plan import Target
from jax_tkg.operands import (
    Operands,
    fold_into_batch,
    fold_into_heads,
    maps_heads_only,
    unfold_heads,
)
from jax_tkg.problem import AttentionProblem, Op

_PRIMITIVES = {op: Primitive(op.value) for op in Op}


def bind(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    """The op's primitive on a problem's operands.

    Returns:
        Output in the problem's `out_dtype` and log-sum-exp; of a problem that is not normalised,
        output, maximum and sum in float32.
    """
    leaves, tree = jax.tree.flatten(ops)
    primitive = _PRIMITIVES[problem.op]
    return tuple(primitive.bind(*leaves, tree=tree, problem=problem, tried=tried))


# --- abstract evaluation


def _abstract_eval(*leaves: Any, tree: Any, problem: AttentionProblem, **_: Any) -> Any:
    query = jax.tree.unflatten(tree, leaves).query
    rows = query.shape[:3]
    float32 = np.dtype(np.float32)
    out = _compat.like_query(query, (*rows, problem.value_head_dim), problem.out_dtype)
    of_rows = _compat.like_query(query, rows, float32)
    return (out, of_rows) if problem.normalize else (out, of_rows, of_rows)


# --- lowering


def _run(
    *leaves: Array,
    tree: Any,
    problem: AttentionProblem,
    tried: tuple[Implementation, ...],
    target: Target,
) -> tuple[Array, ...]:
    """What is chosen for the platform; for several that differ in it, a branch for each."""
    platforms: dict[Implementation, tuple[str, ...]] = {}
    for platform in target.platforms:
        chosen = choose(problem, replace(target, platforms=(platform,)), tried).require()
        platforms[chosen] = (*platforms.get(chosen, ()), platform)
    branches = {
        platform: partial(
            _run_chosen, chosen, problem, tree, replace(target, platforms=platforms[chosen])
        )
        for chosen in platforms
        for platform in platforms[chosen]
    }
    if len(platforms) == 1:
        return branches[target.platforms[0]](*leaves)
    return tuple(lax.platform_dependent(*leaves, **branches))


def _run_chosen(
    chosen: Implementation, problem: AttentionProblem, tree: Any, target: Target, *leaves: Array
) -> tuple[Array, ...]:
    with jax.named_scope(f"{problem.op}[{chosen.name}]"), _compat.no_explicit_mesh():
        out, *of_rows = chosen.run(problem, jax.tree.unflatten(tree, leaves), target)
        return out.astype(problem.out_dtype), *of_rows


def _lower(ctx: mlir.LoweringRuleContext, *values: Any, **params: Any) -> Any:
    # Partitioning has no rule of its own: inside shard_map a device's shard arrives here, elsewhere
    # the compiler splits what it can see into. A kernel is opaque to it, and refuses that target.
    platforms = tuple(ctx.platforms or ctx.module_context.platforms)
    devices = _compat.devices_to_partition(ctx)
    target = Target(platforms, auto_partitioned=devices > 1, devices=devices)
    lower = mlir.lower_fun(partial(_run, target=target), multiple_results=True)
    # The body is traced without explicit shardings: the compiler propagates those of the operands.
    plain = ctx.replace(avals_in=[_compat.without_sharding(a) for a in ctx.avals_in])
    return lower(plain, *values, **params)


@partial(jax.jit, static_argnames=("tree", "problem", "tried"))
def _compiled(*leaves: Array, problem: AttentionProblem, **params: Any) -> Any:
    return _PRIMITIVES[problem.op].bind(*leaves, problem=problem, **params)


def _eager(*leaves: Array, **params: Any) -> Any:
    with jax.disable_jit(False):  # or it would come back here
        return _compiled(*leaves, **params)


# --- batching


def _batch(
    leaves: Any, dims: Any, *, tree: Any, problem: AttentionProblem, tried: Any
) -> tuple[Any, Any]:
    mapped, axis = next((x, d) for x, d in zip(leaves, dims, strict=True) if d is not None)
    size, axes = mapped.shape[axis], jax.tree.unflatten(tree, dims)
    query = jax.typeof(jax.tree.unflatten(tree, leaves).query)
    sharding = _compat.stacked_sharding(query, axes.query, jax.typeof(mapped), axis)
    by_copy, by_row = sharding.spec[:2]
    if maps_heads_only(axes):
        attend = _attend_in_heads
    elif not jax.tree.leaves(axes.kv) or (by_row is not None and by_copy is None):
        attend = _attend_in_turn
    else:
        attend = _attend_in_batch

    def attend_copies(*leaves: Array) -> list[Array]:
        return attend(problem, tried, jax.tree.unflatten(tree, leaves), axes, size)

    shardings = [sharding] * (2 if problem.normalize else 3)
    results = _compat.partitioned_by_compiler(attend_copies, shardings, *leaves)
    return results, [0] * len(results)


def _attend_in_heads(
    problem: AttentionProblem, tried: Any, ops: Operands, axes: Operands, size: int
) -> list[Array]:
    """All copies as query heads of one problem: what only they have is read with one cache."""
    ops = fold_into_heads(ops, axes, problem.num_kv_heads, size)
    folded = _with_dense_of(ops, replace(problem, num_heads=problem.num_heads * size))
    return [unfold_heads(r, problem.num_kv_heads, size) for r in bind(folded, tried, ops)]


def _attend_in_batch(
    problem: AttentionProblem, tried: Any, ops: Operands, axes: Operands, size: int
) -> list[Array]:
    """All copies as rows of one problem."""
    ops = fold_into_batch(ops, axes, size)
    folded = _with_dense_of(ops, replace(problem, batch=problem.batch * size))
    return [r.reshape(size, problem.batch, *r.shape[1:]) for r in bind(folded, tried, ops)]


def _attend_in_turn(
    problem: AttentionProblem, tried: Any, ops: Operands, axes: Operands, size: int
) -> list[Array]:
    """One copy after another: the cache they share is not repeated, nor its sharded rows moved."""
    del size
    leaves, tree = jax.tree.flatten(ops)
    dims = tree.flatten_up_to(axes)  # type: ignore[attr-defined]
    own = [jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims, strict=True) if d is not None]

    def attend_one(own: list[Array]) -> tuple[Array, ...]:
        given = iter(own)
        filled = [x if d is None else next(given) for x, d in zip(leaves, dims, strict=True)]
        return bind(problem, tried, jax.tree.unflatten(tree, filled))

    return list(lax.map(attend_one, own))


def _with_dense_of(ops: Operands, problem: AttentionProblem) -> AttentionProblem:
    mask, bias = (None if x is None else tuple(x.shape) for x in (ops.mask, ops.bias))
    return replace(problem, mask=mask, bias=bias)


# --- the primitives, one for each op

for _primitive in _PRIMITIVES.values():
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(_abstract_eval)
    _primitive.def_impl(_eager)
    mlir.register_lowering(_primitive, _lower)
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


def _attend_forward(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[tuple[Array, ...], tuple[Operands, tuple[Array, ...]]]:
    names = ("out", "lse") if problem.normalize else ("out", "max", "sum")
    found = _attend(problem, tried, ops)
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
        d_floats = attention_backward(problem, *jax.tree.unflatten(tree, arrays))
        return wanted_tree.flatten_up_to(d_floats)  # type: ignore[attr-defined]

    shardings = [jax.typeof(x).sharding for x in wanted]
    found = _compat.partitioned_by_compiler(backward, shardings, *arrays)
    return (jax.tree.unflatten(wanted_tree, found),)


_attend.defvjp(_attend_forward, _attend_backward)
