"""Who rotates queries and new keys of a problem with `rope`: the implementation, or JAX before it.

An implementation that can do it says so (`Rotates`) and returns the rotated new keys; every other
one is given a problem without `rope`, whose queries and keys are rotated here, in one place.
"""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jax_tkg._typing import Array
from jax_tkg.masks import default_query_positions
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.prefill.backward import attention_backward
from jax_tkg.problem import AttentionProblem


@runtime_checkable
class Rotates(Protocol):
    """An implementation that can rotate by itself."""

    def why_not_rotate(self, problem: AttentionProblem, target: Target) -> str | None:
        """None if it rotates for this problem on this target, else the reason in words."""


def why_in_jax(implementation: Any, problem: AttentionProblem, target: Target) -> str | None:
    """Why JAX rotates before an implementation runs, in words; None if nobody need, or it does."""
    if problem.rope is None:
        return None
    if not isinstance(implementation, Rotates):
        return "the implementation takes them rotated"
    return implementation.why_not_rotate(problem, target)


def problem_for(implementation: Any, problem: AttentionProblem, target: Target) -> AttentionProblem:
    """What is left to an implementation: with `rope` if it rotates itself."""
    by_jax = why_in_jax(implementation, problem, target) is not None
    return replace(problem, rope=None) if by_jax else problem


def describe(implementation: Any, problem: AttentionProblem, target: Target) -> str | None:
    """Who rotates, in a line; None if nobody need."""
    if problem.rope is None:
        return None
    reason = why_in_jax(implementation, problem, target)
    return "queries and new keys are rotated " + (
        "inside it" if reason is None else f"in JAX, before it: {reason}"
    )


def rotary_positions(ops: Operands, tokens: int) -> Array:
    """int32 `[B, T]`, by which positions the new tokens of a call are rotated."""
    if ops.query_positions is not None:
        return ops.query_positions.astype(jnp.int32)
    total = ops.lengths
    if total is None:
        total = jnp.full(ops.query.shape[0], ops.kv.shape.kv_len + tokens, jnp.int32)
    return default_query_positions(total, tokens)


def rotated(problem: AttentionProblem, ops: Operands) -> tuple[AttentionProblem, Operands]:
    """The same call without `rope`: queries and new keys rotated in JAX."""
    if problem.rope is None:
        return problem, ops
    query, new_key = _turned(problem, ops)(ops.query, ops.new_key)
    ops = replace(ops, query=query, new_key=new_key, rotary_positions=None)
    return replace(problem, rope=None), ops


def _turned(problem: AttentionProblem, ops: Operands) -> Any:
    rope, positions = problem.rope, ops.rotary_positions
    assert rope is not None
    assert positions is not None

    def turn(query: Array, new_key: Array) -> tuple[Array, Array]:
        angles = rope.cos_sin(positions, problem.head_dim)
        # A backward pass may have them in float32: they are rounded as they were.
        kept = ((query, problem.query_dtype), (new_key, problem.new_key_dtype))
        query, new_key = (rope.rotate(x, *angles).astype(d).astype(x.dtype) for x, d in kept)
        return query, new_key

    return turn


def run(
    implementation: Any, problem: AttentionProblem, ops: Operands, target: Target
) -> tuple[Array, ...]:
    """Results of an implementation (`implementations.Implementation`), then the rotated new keys.

    The latter only of a problem with `rope`, in the dtype that they came in.
    """
    if problem.rope is None:
        return tuple(implementation.run(problem, ops, target))
    assert ops.new_key is not None
    if why_in_jax(implementation, problem, target) is None:
        *results, keys = implementation.run(problem, ops, target)
        return (*results, keys.astype(ops.new_key.dtype))
    problem, ops = rotated(problem, ops)
    return (*implementation.run(problem, ops, target), ops.new_key)


def backward(
    problem: AttentionProblem,
    ops: Operands,
    results: tuple[Array, ...],
    cotangents: tuple[Array, ...],
) -> Operands:
    """`attention_backward` of a problem that may have `rope`: through the rotation, in JAX."""
    if problem.rope is None:
        return attention_backward(problem, ops, results, cotangents)
    (query, new_key), pull = jax.vjp(_turned(problem, ops), ops.query, ops.new_key)
    turned = replace(ops, query=query, new_key=new_key, rotary_positions=None)
    plain, d_keys = replace(problem, rope=None), cotangents[-1]
    found = attention_backward(plain, turned, results[:-1], cotangents[:-1])
    assert found.new_key is not None
    d_query, d_new_key = pull((found.query, found.new_key + d_keys.astype(new_key.dtype)))
    return replace(found, query=d_query, new_key=d_new_key)
