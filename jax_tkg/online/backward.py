"""The backward rule: attention weights are recomputed tile by tile from the log-sum-exp.

With weights P = exp(logits - lse), output O = P V and their cotangents, the cotangent of the logits
is dlogits = P * (dO V^T - rowsum(dO * O) + dlse) (Dao et al., "FlashAttention", 2022, algorithm 4,
with the term of the log-sum-exp added). What turns a query and a key into a logit (scale, soft cap,
bias, mask) is differentiated by JAX, one tile at a time. Without normalisation P = exp(logits -
max), O = P V and l = rowsum(P), so dlogits = P * (dO V^T + dl).

It runs on the dense form `[B, K, S, H]` in float32; `jax.vjp` of the layout's own read takes the
cotangents back to pages and transposed keys.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.online.grid import make_grid
from jax_tkg.online.tiles import (
    KeyRun,
    MaskTiles,
    adjust_logits,
    grouped_queries,
    ungrouped,
    without_unseen,
)
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem, Op
from jax_tkg.softmax import HIGHEST

BACKWARD_QUERIES, BACKWARD_TILE = 256, 1024
"""Queries and keys a step: bounds the recomputed scores to `4 * B * N * 256 * 1024` bytes, where
they would be more than the keys and values are."""


def backward_in_tiles(
    problem: AttentionProblem,
    ops: Operands,
    results: tuple[Array, ...],
    cotangents: tuple[Array, ...],
    most: int = sys.maxsize,
) -> Operands:
    """Cotangents of the operands, in the operands' tree; None for what has none (integers).

    Args:
        problem: the static part of the call.
        ops: its arrays.
        results: output `[B, T, N, Hv]` and log-sum-exp `[B, T, N]`; of a problem that is not
            normalised, output, maximum and sum.
        cotangents: of the results. That of the maximum is not used: it is a constant.
        most: keys a step at most.
    """
    (key, value), pull_read = jax.vjp(partial(_read, ops.kv), *_float_arrays(ops.kv))
    k_scale, v_scale = ops.kv.k_scale, ops.kv.v_scale
    step = _BackwardStep(problem, ops, results, cotangents, most)
    shared = step.nothing_found()
    d_key, d_value, shared = step.run(
        step.masks.cached, _scaled(key, k_scale), _scaled(value, v_scale), shared
    )
    d_new_key = d_new_value = None
    if ops.new_key is not None and ops.new_value is not None:
        new_key, new_value = (_by_head(x) for x in (ops.new_key, ops.new_value))
        d_new_key, d_new_value, shared = step.run(step.masks.beside, new_key, new_value, shared)
        d_new_key, d_new_value = (
            jnp.moveaxis(d, 1, 2).astype(x.dtype)
            for d, x in ((d_new_key, ops.new_key), (d_new_value, ops.new_value))
        )
    found = pull_read((_scaled(d_key, k_scale), _scaled(d_value, v_scale)))
    d_stored = dict(zip(("key", "value"), found, strict=True)) if found else {}
    d_query = shared.query.reshape(*shared.query.shape[:2], -1, problem.head_dim)
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
        bias=_like(shared.bias, ops.bias),
        sinks=None if ops.sinks is None else step.sink_cotangent(ops.sinks),
        alibi_slopes=_like(shared.slopes, ops.alibi_slopes),
    )


def key_tile(problem: AttentionProblem, run: KeyRun) -> int:
    """Keys a step."""
    return run.size if takes_all_keys(problem) else min(BACKWARD_TILE, run.size)


def takes_all_keys(problem: AttentionProblem) -> bool:
    """Whether a step takes all keys, where the queries are few.

    Their scores are then no larger than the keys and values in float32 that are there anyway, and
    nothing is cut out of slots that the compiler may have split between devices.
    """
    widths = problem.head_dim + problem.value_head_dim
    return problem.op is Op.TKG and problem.rows_per_head <= widths


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


def _by_head(new: Array) -> Array:
    """`[B, T, K, H]` as `[B, K, T, H]` in float32."""
    return jnp.moveaxis(new.astype(jnp.float32), 2, 1)


def _like(cotangent: Array | None, operand: Array | None) -> Array | None:
    if cotangent is None or operand is None:
        return None
    return cotangent.reshape(operand.shape).astype(operand.dtype)


class _Shared(NamedTuple):
    """Cotangents to which all keys contribute.

    Attributes:
        query: `[B, K, G, T, H]`.
        bias: as `MaskTiles.bias`, or None.
        slopes: as `MaskTiles.slopes`, or None.
    """

    query: Array
    bias: Array | None
    slopes: Array | None


class _BackwardStep:
    """Passes over tiles of queries and keys; rows are [B, K, G, T]."""

    def __init__(
        self,
        problem: AttentionProblem,
        ops: Operands,
        results: tuple[Array, ...],
        cotangents: tuple[Array, ...],
        most: int,
    ) -> None:
        self.problem, self.most = problem, most
        self.masks = MaskTiles.create(problem, ops)
        self.rows = (problem.batch, problem.num_kv_heads, problem.group, problem.num_tokens)
        self.query, self.d_out = self._rows(ops.query), self._rows(cotangents[0])
        d_total = self._of_rows(cotangents[-1])  # of the log-sum-exp or the sum
        reference = self._of_rows(results[1])
        # What an empty row does has no effect, even if its cotangent is infinite.
        if problem.normalize:
            empty = reference == -jnp.inf
            # rowsum(dO * O) - dlse, the part of dlogits that is the same for every key
            delta = jnp.sum(self.d_out * self._rows(results[0]), -1) - d_total
        else:
            empty = self._of_rows(results[2]) == 0
            delta = -d_total
        self.reference = jnp.where(empty, 0.0, reference)
        self.delta = jnp.where(empty, 0.0, delta)

    def _rows(self, array: Array) -> Array:
        grouped = grouped_queries(array.astype(jnp.float32), self.problem.num_kv_heads)
        return grouped.reshape(*self.rows, array.shape[-1])

    def _of_rows(self, array: Array) -> Array:
        return self._rows(array[..., None])[..., 0]

    def nothing_found(self) -> _Shared:
        """Zeros."""
        arrays = _Shared(self.query, self.masks.bias, self.masks.slopes)
        return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), arrays)

    def run(
        self, run: KeyRun | None, key: Array, value: Array, shared: _Shared
    ) -> tuple[Array, Array, _Shared]:
        """Cotangents of the keys and values `[B, K, keys, H]` of a run, and the shared ones."""
        assert run is not None
        grid = make_grid(
            self.problem,
            min(BACKWARD_QUERIES, self.problem.num_tokens),
            min(key_tile(self.problem, run), self.most),
            beside=run is self.masks.beside,
        )
        pairs = jnp.asarray(grid.pairs())

        def fold(i: Array, carry: tuple[Array, Array, _Shared]) -> tuple[Array, Array, _Shared]:
            fresh = pairs[i] * jnp.asarray((grid.query_tile, grid.key_tile), jnp.int32)
            return self._tile(run, key, value, (grid.query_tile, grid.key_tile), fresh, carry)

        carry = (jnp.zeros_like(key), jnp.zeros_like(value), shared)
        return lax.fori_loop(0, grid.computed, fold, carry) if grid.computed else carry

    def _tile(
        self,
        run: KeyRun,
        all_keys: Array,
        all_values: Array,
        sizes: tuple[int, int],
        fresh: Array,
        carry: tuple[Array, Array, _Shared],
    ) -> tuple[Array, Array, _Shared]:
        """Adds what a tile of queries and keys contributes; earlier than `fresh` was counted."""
        d_key, d_value, shared = carry
        tokens, size = sizes
        at = jnp.minimum(fresh[0], self.problem.num_tokens - tokens)
        start = jnp.minimum(fresh[1], run.size - size)
        query, d_out, reference, delta = (
            lax.dynamic_slice_in_dim(x, at, tokens, axis=3)
            for x in (self.query, self.d_out, self.reference, self.delta)
        )
        key, value = (
            lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (all_keys, all_values)
        )
        masks = self.masks.tokens(at, tokens)
        of_queries = masks.beside if run is self.masks.beside else masks.cached
        assert of_queries is not None
        seen, _ = masks.tile(of_queries, start, size, fresh[1])
        if self.problem.num_tokens % tokens:
            seen &= (jnp.arange(tokens, dtype=jnp.int32) + at >= fresh[0])[:, None]
        # A key that no query sees is padding: keep its NaN out of the products.
        by_any = jnp.any(seen, axis=(2, 3))
        key, value = without_unseen(key, by_any), without_unseen(value, by_any)
        bias, slopes = (
            None if x is None else x.astype(jnp.float32)
            for x in (masks.dense_bias(of_queries, start, size), masks.slopes)
        )

        def make_logits(
            query: Array, key: Array, bias: Array | None, slopes: Array | None
        ) -> Array:
            products = jnp.einsum("bkgth,bksh->bkgts", query, key, precision="highest")
            whole = masks.whole_bias(of_queries, start, bias, slopes, size)
            logits = adjust_logits(self.problem, products, self.problem.scale, seen, whole)
            return jnp.minimum(logits, HIGHEST)

        logits, pull = jax.vjp(make_logits, query, key, bias, slopes)
        weights = jnp.exp(logits - reference[..., None])  # 0 all along an empty row
        d_weights = jnp.einsum("bkgth,bksh->bkgts", d_out, value, precision="highest")
        dq, dk, db, ds = pull(weights * (d_weights - delta[..., None]))
        dv = jnp.einsum("bkgts,bkgth->bksh", weights, d_out, precision="highest")
        if shared.bias is not None:
            first = at if shared.bias.shape[3] > 1 else 0
            d_bias = _add_at(shared.bias, db, (0, 0, 0, first, run.offset + start))
        return (
            _add_at(d_key, dk, (0, 0, start, 0)),
            _add_at(d_value, dv, (0, 0, start, 0)),
            _Shared(
                _add_at(shared.query, dq, (0, 0, 0, at, 0)),
                None if shared.bias is None else d_bias,
                None if shared.slopes is None else shared.slopes + ds,
            ),
        )

    def sink_cotangent(self, sinks: Array) -> Array:
        """The sink's weight is exp(sink - reference); it has no value, so d = -weight * delta."""
        split = jnp.minimum(sinks.astype(jnp.float32), HIGHEST)
        split = split.reshape(sinks.shape[0], *self.rows[1:3], 1)
        d_rows = -jnp.sum(jnp.exp(split - self.reference) * self.delta, axis=3)
        if sinks.shape[0] == 1:
            d_rows = jnp.sum(d_rows, axis=0, keepdims=True)
        return d_rows.reshape(sinks.shape).astype(sinks.dtype)


def _add_at(total: Array, part: Array, starts: tuple[Array | int, ...]) -> Array:
    if part.shape == total.shape:
        return total + part
    at = [jnp.asarray(x, jnp.int32) for x in starts]
    old = lax.dynamic_slice(total, at, part.shape)
    return lax.dynamic_update_slice(total, old + part, at)
