"""The backward rule: attention weights are recomputed tile by tile from the log-sum-exp.

With weights P = exp(logits - lse), output O = P V and their cotangents, the cotangent of the logits
is dlogits = P * (dO V^T - rowsum(dO * O) + dlse) (Dao et al., "FlashAttention", 2022, algorithm 4,
with the term of the log-sum-exp added). What turns a query and a key into a logit (scale, soft cap,
bias) is differentiated by JAX, one tile at a time.

It runs on the dense form `[B, K, S, H]`; `jax.vjp` of the layout's own read takes the cotangents
back to pages, transposed keys and scales.
"""

from dataclasses import replace
from functools import partial
from typing import Any

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

BACKWARD_TILE = 1024
"""Keys a step: bounds the recomputed scores to `4 * B * N * T * 1024` bytes."""

_FLOAT32 = np.dtype(np.float32)


def attention_backward(
    problem: AttentionProblem,
    ops: Operands,
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B T N"],
) -> Operands:
    """Cotangents of the operands, in the operands' tree; None for what has none."""
    (key, value), pull_cache = jax.vjp(partial(_dense, ops.kv), _float_part(ops.kv))
    if ops.new_key is not None and ops.new_value is not None:
        key, value = (
            jnp.concatenate([cached, jnp.moveaxis(new.astype(jnp.float32), 2, 1)], 2)
            for cached, new in ((key, ops.new_key), (value, ops.new_value))
        )
    step = _BackwardStep(problem, ops, key, value, out, lse, d_out, d_lse)
    d_query, d_key, d_value, d_bias = step.run()

    cotangents: dict[str, Any] = {}
    cotangents["query"] = ungrouped(d_query, problem.num_tokens).astype(ops.query.dtype)
    if ops.new_key is not None and ops.new_value is not None:
        split = problem.kv_len
        for name, full, new in (
            ("new_key", d_key, ops.new_key),
            ("new_value", d_value, ops.new_value),
        ):
            cotangents[name] = jnp.moveaxis(full[:, :, split:], 1, 2).astype(new.dtype)
        d_key, d_value = d_key[:, :, :split], d_value[:, :, :split]
    if ops.bias is not None:
        cotangents["bias"] = d_bias.reshape(ops.bias.shape).astype(ops.bias.dtype)
    if ops.sinks is not None:
        cotangents["sinks"] = step.sink_cotangent(ops.sinks)
    (d_floats,) = pull_cache((d_key, d_value))
    none = jax.tree.map(lambda _: None, ops)  # None: no cotangent, as for integers
    return replace(none, kv=replace(none.kv, **d_floats), **cotangents)


def _float_part(kv: KVLayout) -> dict[str, Array | None]:
    """The leaves of a layout that have a cotangent."""
    leaves = {n: getattr(kv, n) for n in ("key", "value", "k_scale", "v_scale")}
    return {
        n: x for n, x in leaves.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    }


def _dense(kv: KVLayout, floats: dict[str, Array]) -> tuple[Array, Array]:
    return replace(kv, **floats).dense(_FLOAT32)


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
        self.query = self._rows(ops.query)
        self.d_out = self._rows(d_out)
        lse = self._rows(lse[..., None])[..., 0]
        self.empty = lse == -jnp.inf
        self.lse = jnp.where(self.empty, 0.0, lse)
        # rowsum(dO * O) - dlse, the part of dlogits that is the same for every key
        self.delta = (
            jnp.sum(self.d_out * self._rows(out), -1) - self._rows(d_lse[..., None])[..., 0]
        )

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
        return adjust_logits(self.problem, products, self.problem.scale, seen, bias)

    def sink_cotangent(self, sinks: Array) -> Array:
        """The sink's weight is exp(sink - lse); it has no value, so d = -weight * delta."""
        split = sinks.reshape(sinks.shape[0], *self.rows[1:3], 1)
        weight = jnp.where(self.empty, 0.0, jnp.exp(split.astype(jnp.float32) - self.lse))
        d_rows = jnp.sum(-weight * self.delta, axis=3)
        if sinks.shape[0] == 1:
            d_rows = jnp.sum(d_rows, axis=0, keepdims=True)
        return d_rows.reshape(sinks.shape).astype(sinks.dtype)


def _add_slice(total: Array, part: Array, start: Array, axis: int) -> Array:
    old = lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis)
