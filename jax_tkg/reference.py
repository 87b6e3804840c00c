"""The oracle: attention as its definition says, all scores at once, in float32.

Nothing here is shared with the implementations but the description of the problem, so that an error
in theirs cannot hide. Use it to test; it materialises `[B, N, T, S]` several times.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import LOWEST


def attend_reference(problem: AttentionProblem, ops: Operands) -> tuple[Array, ...]:
    """Attention in float32 by softmax over the whole row; results as `Implementation.run`."""
    p, tokens = problem, problem.num_tokens
    keys, values = (jnp.moveaxis(x, 1, 2) for x in ops.kv.dense(np.dtype(np.float32)))  # BSKH
    slots = jnp.broadcast_to(jnp.arange(p.kv_len), (p.batch, p.kv_len))
    position = slots if ops.key_positions is None else ops.key_positions
    beside = tokens if p.has_new_kv else 0
    total = jnp.full(p.batch, p.kv_len + beside) if ops.lengths is None else ops.lengths
    query_at = total[:, None] - tokens + jnp.arange(tokens)
    query_at = query_at if ops.query_positions is None else ops.query_positions
    live = position < (total - beside)[:, None]
    usable = ops.kv.usable()
    live = live if usable is None else live & usable
    if ops.new_key is not None and ops.new_value is not None:
        keys = jnp.concatenate([keys, ops.new_key.astype(jnp.float32)], 1)
        values = jnp.concatenate([values, ops.new_value.astype(jnp.float32)], 1)
        position = jnp.concatenate([position, query_at], 1)
        new_seen = True if ops.new_seen is None else ops.new_seen[:, None]
        live = jnp.concatenate([live, (query_at < total[:, None]) & new_seen], 1)
    start = 0 if ops.starts is None else ops.starts[:, None]
    live &= (position >= 0) & (position >= start)
    k_at, q_at = position[:, None, :], query_at[:, :, None]  # against [B, T, S]
    seen = live[:, None, :] & ((k_at <= q_at) | (not p.rule.causal))
    if (window := p.rule.window) is not None:
        seen &= (window.left is None) | (k_at >= q_at - (window.left or 0))
        seen &= (window.right is None) | (k_at <= q_at + (window.right or 0))
    if ops.key_bounds is not None:
        low, high = jnp.moveaxis(ops.key_bounds, 2, 0)[..., None]
        seen &= (k_at >= low) & (k_at < high)
    seen = seen[:, None] if ops.mask is None else seen[:, None] & ops.mask  # [B, N or 1, T, S]
    seen_by_any = jnp.broadcast_to(seen, (p.batch, p.num_heads, tokens, seen.shape[-1]))
    grouped = seen_by_any.reshape(p.batch, p.num_kv_heads, -1, seen.shape[-1]).any(2)
    values = jnp.where(jnp.moveaxis(grouped, 1, 2)[..., None], values, 0)  # padding may be NaN

    keys, values = (jnp.repeat(x, p.group, axis=2) for x in (keys, values))
    query, exact = ops.query.astype(jnp.float32), jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btnh,bsnh->bnts", query, keys, precision=exact) * p.scale
    if p.logits_soft_cap is not None:
        logits = p.logits_soft_cap * jnp.tanh(logits / p.logits_soft_cap)
    logits = logits if ops.bias is None else logits + ops.bias.astype(jnp.float32)
    if ops.alibi_slopes is not None:
        far = jnp.abs(q_at - k_at)[:, None].astype(jnp.float32)
        logits = logits - ops.alibi_slopes[:, :, None, None].astype(jnp.float32) * far
    top = float(np.finfo(np.float32).max)
    logits = jnp.where(seen, jnp.minimum(logits, top), -jnp.inf)
    if ops.sinks is not None:
        sink = jnp.broadcast_to(ops.sinks[:, :, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink.astype(jnp.float32)], -1)
    # The results do not depend on it; through it, autodiff asks which logit equals it once more.
    peak = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    empty = peak == -jnp.inf
    weights = jnp.exp(logits - jnp.where(empty, 0, peak))
    sums = jnp.sum(weights, -1, keepdims=True)
    divisor = jnp.where(empty, 1, sums) if p.normalize else 1
    weights = (weights / divisor)[..., : values.shape[1]]
    out = jnp.einsum("bnts,bsnh->btnh", weights, values, precision=exact)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1, sums)))
    of_rows = (lse,) if p.normalize else (jnp.where(empty, LOWEST, peak), sums)
    return out, *(jnp.moveaxis(x[..., 0], 1, 2) for x in of_rows)
