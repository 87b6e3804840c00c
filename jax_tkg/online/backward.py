"""The backward rule: attention weights are recomputed tile by tile from the log-sum-exp.

With weights P = exp(logits - lse), output O = P V and their cotangents, the cotangent of the logits
is dlogits = P * (dO V^T - rowsum(dO * O) + dlse) (Dao et al., "FlashAttention", 2022, algorithm 4,
with the term of the log-sum-exp added). What turns a query and a key into a logit (scale, soft cap,
bias, mask) is differentiated by JAX, one tile at a time.

It runs on the dense form `[B, K, S, H]` in float32; `jax.vjp` of the layout's own read takes the
cotangents back to pages and transposed keys.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Float
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.online.tiles import (
    MaskTiles,
    adjust_logits,
    grouped_queries,
    ungrouped,
    without_unseen,
)
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import HIGHEST

BACKWARD_TILE = 1024
"""Keys a step: bounds the recomputed scores to `4 * B * N * T * 1024` bytes."""


def attention_backward(
    problem: AttentionProblem,
    ops: Operands,
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
) -> Operands:
    """Cotangents of the operands, in the operands' tree; None for what has none (integers)."""
    (key, value), pull_read = jax.vjp(partial(_read, ops.kv), *_float_arrays(ops.kv))
    k_scale, v_scale = ops.kv.k_scale, ops.kv.v_scale
    step = _BackwardStep(
        problem,
        ops,
        _with_new(_scaled(key, k_scale), ops.new_key),
        _with_new(_scaled(value, v_scale), ops.new_value),
        out,
        lse,
        d_out,
        d_lse,
    )
    d_query, d_key, d_value, d_bias = step.run()
    d_key, d_new_key = _split_new(d_key, problem.kv_len, ops.new_key)
    d_value, d_new_value = _split_new(d_value, problem.kv_len, ops.new_value)
    found = pull_read((_scaled(d_key, k_scale), _scaled(d_value, v_scale)))
    d_stored = dict(zip(("key", "value"), found, strict=True)) if found else {}
    none = jax.tree.map(lambda _: None, ops)  # None: no cotangent, as for integers
    return replace(
        none,
        query=ungrouped(d_query, problem.num_tokens).astype(ops.query.dtype),
        kv=replace(
            none.kv,
            **d_stored,
            k_scale=_scale_cotangent(d_key, key, k_scale),
            v_scale=_scale_cotangent(d_value, value, v_scale),
        ),
        new_key=d_new_key,
        new_value=d_new_value,
        bias=None if ops.bias is None else d_bias.reshape(ops.bias.shape).astype(ops.bias.dtype),
        sinks=None if ops.sinks is None else step.sink_cotangent(ops.sinks),
    )


def _float_arrays(kv: KVLayout) -> tuple[Array, ...]:
    """What of the stored keys and values has a cotangent: both or nothing."""
    return (kv.key, kv.value) if jnp.issubdtype(kv.key.dtype, jnp.floating) else ()


def _read(kv: KVLayout, *stored: Array) -> tuple[Array, Array]:
    """Keys and values `[B, K, S, H]` in float32, without their scales."""
    if stored:
        kv = replace(kv, key=stored[0], value=stored[1])
    return kv.block(0, kv.shape.kv_len, np.dtype(np.float32))


def _scaled(array: Array, scale: Array | None) -> Array:
    return array if scale is None else array * scale[:, :, None, None]


def _scale_cotangent(d_scaled: Array, unscaled: Array, scale: Array | None) -> Array | None:
    if scale is None:
        return None
    # Padding may hold NaN; it is where the cotangent is 0.
    products = jnp.where(d_scaled == 0, 0.0, unscaled) * d_scaled
    per_row = jnp.sum(products, axis=(2, 3))
    return per_row if scale.shape[0] > 1 else jnp.sum(per_row, axis=0, keepdims=True)


def _with_new(cached: Array, new: Array | None) -> Array:
    """The cached keys or values followed by the new ones `[B, T, K, H]` beside the cache."""
    if new is None:
        return cached
    return jnp.concatenate([cached, jnp.moveaxis(new.astype(jnp.float32), 2, 1)], axis=2)


def _split_new(both: Array, kv_len: int, new: Array | None) -> tuple[Array, Array | None]:
    if new is None:
        return both, None
    return both[:, :, :kv_len], jnp.moveaxis(both[:, :, kv_len:], 1, 2).astype(new.dtype)


class _BackwardStep:
    """One pass over tiles of keys; rows are [B, K, G, T]."""

    def __init__(
        self,
        problem: AttentionProblem,
        ops: Operands,
        key: Array,
        value: Array,
        out: Array,
        lse: Array,
        d_out: Array,
        d_lse: Array,
    ) -> None:
        self.problem, self.key, self.value = problem, key, value
        self.masks = MaskTiles.create(problem, ops)
        self.rows = (problem.batch, problem.num_kv_heads, problem.group, problem.num_tokens)
        self.query, self.d_out = self._rows(ops.query), self._rows(d_out)
        lse, d_lse = (self._rows(x[..., None])[..., 0] for x in (lse, d_lse))
        # What an empty row does has no effect, even if its cotangent is infinite.
        self.empty = lse == -jnp.inf
        self.lse = jnp.where(self.empty, 0.0, lse)
        # rowsum(dO * O) - dlse, the part of dlogits that is the same for every key
        delta = jnp.sum(self.d_out * self._rows(out), -1) - d_lse
        self.delta = jnp.where(self.empty, 0.0, delta)

    def _rows(self, array: Array) -> Array:
        grouped = grouped_queries(array.astype(jnp.float32), self.problem.num_kv_heads)
        return grouped.reshape(*self.rows, array.shape[-1])

    def run(self) -> tuple[Array, Array, Array, Array]:
        """Cotangents of query `[B, K, G * T, H]`, dense key and value, and bias."""
        keys = self.key.shape[2]
        tile = min(BACKWARD_TILE, keys)
        bias = self.masks.bias
        carry = (
            jnp.zeros_like(self.query),
            jnp.zeros_like(self.key),
            jnp.zeros_like(self.value),
            jnp.zeros(()) if bias is None else jnp.zeros_like(bias, jnp.float32),
        )
        carry = lax.fori_loop(0, -(-keys // tile), partial(self._tile, tile), carry)
        d_query, d_key, d_value, d_bias = carry
        return d_query.reshape(*self.rows[:2], -1, d_query.shape[-1]), d_key, d_value, d_bias

    def _tile(self, size: int, i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_query, d_key, d_value, d_bias = carry
        fresh = i * size
        start = jnp.minimum(fresh, self.key.shape[2] - size)
        key, value = (
            lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (self.key, self.value)
        )
        seen, bias = self.masks.everything(start, size, fresh)
        # A key that no query sees is padding: keep its NaN out of the products.
        by_any = jnp.any(seen, axis=(2, 3))
        key, value = without_unseen(key, by_any), without_unseen(value, by_any)
        logits, pull = jax.vjp(partial(self._logits, seen), self.query, key, bias)
        weights = jnp.exp(logits - self.lse[..., None])  # 0 all along an empty row
        d_weights = jnp.einsum("bkgth,bksh->bkgts", self.d_out, value, precision="highest")
        d_logits = weights * (d_weights - self.delta[..., None])
        dq, dk, db = pull(d_logits)
        dv = jnp.einsum("bkgts,bkgth->bksh", weights, self.d_out, precision="highest")
        if bias is not None:
            d_bias = _add_slice(d_bias, db, start, axis=4)
        return (
            d_query + dq,
            _add_slice(d_key, dk, start, axis=2),
            _add_slice(d_value, dv, start, axis=2),
            d_bias,
        )

    def _logits(self, seen: Array, query: Array, key: Array, bias: Array | None) -> Array:
        products = jnp.einsum("bkgth,bksh->bkgts", query, key, precision="highest")
        logits = adjust_logits(self.problem, products, self.problem.scale, seen, bias)
        return jnp.minimum(logits, HIGHEST)

    def sink_cotangent(self, sinks: Array) -> Array:
        """The sink's weight is exp(sink - lse); it has no value, so d = -weight * delta."""
        split = jnp.minimum(sinks.astype(jnp.float32), HIGHEST)
        split = split.reshape(sinks.shape[0], *self.rows[1:3], 1)
        d_rows = -jnp.sum(jnp.exp(split - self.lse) * self.delta, axis=3)
        if sinks.shape[0] == 1:
            d_rows = jnp.sum(d_rows, axis=0, keepdims=True)
        return d_rows.reshape(sinks.shape).astype(sinks.dtype)


def _add_slice(total: Array, part: Array, start: Array, axis: int) -> Array:
    old = lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis)
