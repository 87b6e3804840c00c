"""The op as a JAX primitive: abstract evaluation, lowering, batching, differentiation; in that order.

A primitive, so that the implementation is chosen when the platform is known (lowering) and only its
code is traced, and so that vmap folds into the batch instead of batching a loop.
"""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.implementations import Implementation, choose
from jax_tkg.online.backward import attention_backward
from jax_tkg.online.plan import Target
from jax_tkg.operands import (
    Operands,
    fold_into_batch,
    fold_into_heads,
    only_query_mapped,
    unfold_heads,
)
from jax_tkg.problem import AttentionProblem

attention_tkg_p = Primitive("attention_tkg")
attention_tkg_p.multiple_results = True


def bind(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, Array]:
    """The primitive on a problem's operands: output in the query's dtype, and the log-sum-exp."""
    leaves, tree = jax.tree.flatten(ops)
    out, lse = attention_tkg_p.bind(*leaves, tree=tree, problem=problem, tried=tried)
    return out, lse


# --- abstract evaluation


@attention_tkg_p.def_abstract_eval
def _abstract_eval(*leaves: Any, tree: Any, problem: AttentionProblem, **_: Any) -> Any:
    query = jax.tree.unflatten(tree, leaves).query
    rows = query.shape[:3]
    out = _compat.like_query(query, (*rows, problem.value_head_dim), problem.query_dtype)
    return out, _compat.like_query(query, rows, np.dtype(np.float32))


# --- lowering


def _run(
    *leaves: Array,
    tree: Any,
    problem: AttentionProblem,
    tried: tuple[Implementation, ...],
    target: Target,
) -> tuple[Array, Array]:
    chosen = choose(problem, target, tried).require()
    with jax.named_scope(f"attention_tkg[{chosen.name}]"):
        out, lse = chosen.run(problem, jax.tree.unflatten(tree, leaves), target)
        return out.astype(problem.query_dtype), lse


def _lower(ctx: mlir.LoweringRuleContext, *values: Any, **params: Any) -> Any:
    platforms = tuple(ctx.platforms or ctx.module_context.platforms)
    target = Target(platforms, auto_partitioned=_compat.is_auto_partitioned(ctx))
    lower = mlir.lower_fun(partial(_run, target=target), multiple_results=True)
    # The body is traced without explicit shardings: the compiler propagates those of the operands.
    plain = ctx.replace(avals_in=[_compat.without_sharding(a) for a in ctx.avals_in])
    with _compat.no_explicit_mesh():
        return lower(plain, *values, **params)


mlir.register_lowering(attention_tkg_p, _lower)


@lru_cache(maxsize=256)
def _compiled(tree: Any, problem: AttentionProblem, tried: tuple[Implementation, ...]) -> Any:
    return jax.jit(partial(attention_tkg_p.bind, tree=tree, problem=problem, tried=tried))


@attention_tkg_p.def_impl
def _eager(*leaves: Array, **params: Any) -> Any:
    return _compiled(**params)(*leaves)


# --- batching


def _batch(
    leaves: Any, dims: Any, *, tree: Any, problem: AttentionProblem, tried: Any
) -> tuple[Any, Any]:
    not_mapped = batching.not_mapped
    size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not not_mapped)
    ops = jax.tree.unflatten(tree, leaves)
    axes = jax.tree.unflatten(tree, [None if d is not_mapped else d for d in dims])
    if only_query_mapped(axes):
        ops = fold_into_heads(ops, axes.query, problem.num_kv_heads)
        folded = replace(
            problem,
            num_heads=problem.num_heads * size,
            mask=_shape(ops.mask),
            bias=_shape(ops.bias),
        )
        results = bind(folded, tried, ops)
        return [unfold_heads(r, problem.num_kv_heads, size) for r in results], [0, 0]
    ops = fold_into_batch(ops, axes, size)
    folded = replace(
        problem, batch=problem.batch * size, mask=_shape(ops.mask), bias=_shape(ops.bias)
    )
    results = bind(folded, tried, ops)
    return [r.reshape(size, problem.batch, *r.shape[1:]) for r in results], [0, 0]


def _shape(array: Array | None) -> tuple[int, ...] | None:
    return None if array is None else tuple(array.shape)


batching.primitive_batchers[attention_tkg_p] = _batch


# --- differentiation: recomputation from the log-sum-exp


def attend(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, Array]:
    """The op on validated operands, differentiable in reverse mode.

    Operands that are replicated over a manual axis become varying here, outside the custom rule, so
    that their cotangents are summed over it.
    """
    leaves, tree = jax.tree.flatten(ops)
    return _attend(problem, tried, jax.tree.unflatten(tree, _compat.agree_on_varying_axes(leaves)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, Array]:
    return bind(problem, tried, ops)


def _attend_forward(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
    out, lse = _attend(problem, tried, ops)
    out = checkpoint_name(out, "attention_tkg_out")
    lse = checkpoint_name(lse, "attention_tkg_lse")
    return (out, lse), (ops, out, lse)


def _attend_backward(
    problem: AttentionProblem,
    tried: tuple[Implementation, ...],
    residuals: tuple[Operands, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Operands]:
    del tried
    ops, out, lse = residuals
    return (attention_backward(problem, ops, out, lse, *cotangents),)


_attend.defvjp(_attend_forward, _attend_backward)
