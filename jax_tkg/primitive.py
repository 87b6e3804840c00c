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
from jax.interpreters import batching

from jax_tkg import _compat, rotation
from jax_tkg._typing import Array
from jax_tkg.choice import choose
from jax_tkg.implementations import Implementation
from jax_tkg.lowering import lower_as_chosen, run_compiled
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
        output, maximum and sum in float32. With `rope`, behind them the rotated new keys.
    """
    leaves, tree = jax.tree.flatten(ops)
    primitive = _PRIMITIVES[problem.op]
    return tuple(primitive.bind(*leaves, tree=tree, problem=problem, tried=tried))


# --- abstract evaluation


def _abstract_eval(*leaves: Any, tree: Any, problem: AttentionProblem, **_: Any) -> Any:
    ops = jax.tree.unflatten(tree, leaves)
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
) -> Implementation:
    del leaves, tree
    return choose(problem, target, tried).require()


def _run(
    chosen: Implementation,
    target: Target,
    *leaves: Array,
    tree: Any,
    problem: AttentionProblem,
    tried: tuple[Implementation, ...],
) -> tuple[Array, ...]:
    del tried
    with jax.named_scope(f"{problem.op}[{chosen.name}]"):
        out, *rest = rotation.run(chosen, problem, jax.tree.unflatten(tree, leaves), target)
        return out.astype(problem.out_dtype), *rest


# --- batching


def _batch(
    leaves: Any, dims: Any, *, tree: Any, problem: AttentionProblem, tried: Any
) -> tuple[Any, Any]:
    mapped, axis = next((x, d) for x, d in zip(leaves, dims, strict=True) if d is not None)
    size, axes = mapped.shape[axis], jax.tree.unflatten(tree, dims)
    ops = jax.tree.unflatten(tree, leaves)

    def stacked(name: str) -> Any:
        type_, own = jax.typeof(getattr(ops, name)), getattr(axes, name)
        return _compat.stacked_sharding(type_, own, jax.typeof(mapped), axis)

    sharding = stacked("query")
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
    shardings += [] if problem.rope is None else [stacked("new_key")]
    results = _compat.partitioned_by_compiler(attend_copies, shardings, *leaves)
    return results, [0] * len(results)


def _attend_in_heads(
    problem: AttentionProblem, tried: Any, ops: Operands, axes: Operands, size: int
) -> list[Array]:
    """All copies as query heads of one problem: what only they have is read with one cache."""
    ops = fold_into_heads(ops, axes, problem.num_kv_heads, size)
    folded = _with_dense_of(ops, replace(problem, num_heads=problem.num_heads * size))
    results = list(bind(folded, tried, ops))
    keys = [] if problem.rope is None else [results.pop()]  # of all copies, the same
    copies = [jnp.broadcast_to(x, (size, *x.shape)) for x in keys]
    return [unfold_heads(r, problem.num_kv_heads, size) for r in results] + copies


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
    run_compiled(_primitive, ("tree", "problem", "tried"))
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
