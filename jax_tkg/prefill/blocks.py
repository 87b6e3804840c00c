"""The BLOCKS form: all sequences and heads at once, over a constant list of pairs of tiles."""

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array
from jax_tkg.online.grid import TileGrid
from jax_tkg.online.tiles import (
    MaskTiles,
    adjust_logits,
    grouped_queries,
    without_unseen,
)
from jax_tkg.operands import Operands
from jax_tkg.prefill.plan import PrefillPlan
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import SoftmaxState


def prefill_blocks(
    problem: AttentionProblem, ops: Operands, plan: PrefillPlan
) -> tuple[Array, ...]:
    """Attention in float32; results as `Implementation.run`."""
    step = _PairStep(problem, ops, plan)
    state = SoftmaxState.init(step.rows, problem.value_head_dim)
    for source, grid in enumerate(plan.grids):
        state = step.fold_grid(source, grid, state)
    if ops.sinks is not None:
        sinks = ops.sinks.reshape(-1, problem.num_kv_heads, problem.group, 1)
        state = state.add_sink(sinks)
    found = state.finalize() if problem.normalize else (state.output, state.max, state.sum)
    return tuple(_tokens_second(x) for x in found)


def _tokens_second(rows: Array) -> Array:
    """`[B, K, G, T, ...]` as `[B, T, N, ...]`."""
    batch, kv_heads, group, tokens, *rest = rows.shape
    return jnp.moveaxis(rows, 3, 1).reshape(batch, tokens, kv_heads * group, *rest)


class _PairStep:
    """The steps of the loop: each folds a tile of keys into a tile of rows [B, K, G, T]."""

    def __init__(self, problem: AttentionProblem, ops: Operands, plan: PrefillPlan) -> None:
        self.problem, self.ops, self.plan = problem, ops, plan
        self.masks = MaskTiles.create(problem, ops)
        self.rows = (problem.batch, problem.num_kv_heads, problem.group, problem.num_tokens)
        query = grouped_queries(ops.query.astype(plan.compute_dtype), problem.num_kv_heads)
        self.query = query.reshape(*self.rows, -1)

    def fold_grid(self, source: int, grid: TileGrid, state: SoftmaxState) -> SoftmaxState:
        """Folds the cached keys, or (source 1) the new ones beside them."""
        pairs = jnp.asarray(grid.pairs())
        sizes = jnp.asarray((grid.query_tile, grid.key_tile), jnp.int32)

        def fold(i: Array, state: SoftmaxState) -> SoftmaxState:
            fresh = pairs[i] * sizes
            at = jnp.minimum(fresh[0], grid.tokens - grid.query_tile)
            rows: SoftmaxState = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, at, grid.query_tile, axis=3), state
            )
            rows = self._fold(source, grid, at, fresh, rows)
            return jax.tree.map(
                lambda x, part: lax.dynamic_update_slice_in_dim(x, part, at, axis=3), state, rows
            )

        return lax.fori_loop(0, grid.computed, fold, state) if grid.computed else state

    def _fold(
        self, source: int, grid: TileGrid, at: Array, fresh: Array, state: SoftmaxState
    ) -> SoftmaxState:
        problem, kv = self.problem, self.ops.kv
        tokens, size = grid.query_tile, grid.key_tile
        start = jnp.minimum(fresh[1], grid.keys - size)
        key, value = self._keys(source, start, size)
        masks = self.masks.tokens(at, tokens)
        seen, bias = masks.tile(masks.runs[source], start, size, fresh[1])
        if grid.tokens % tokens:
            seen &= (jnp.arange(tokens, dtype=jnp.int32) + at >= fresh[0])[:, None]
        k_scale, v_scale = (kv.k_scale, kv.v_scale) if source == 0 else (None, None)
        scale: Array | float = problem.scale
        if k_scale is not None:
            scale = problem.scale * k_scale[:, :, None, None, None]
        query = lax.dynamic_slice_in_dim(self.query, at, tokens, axis=3)
        logits = adjust_logits(problem, self._dot(query, key, contract=3), scale, seen, bias)
        if problem.is_padded:
            value = without_unseen(value, jnp.any(seen, axis=(2, 3)))

        def weigh(weights: Array) -> Array:
            mixed = self._dot(weights.astype(self.plan.compute_dtype), value, contract=2)
            return mixed if v_scale is None else mixed * v_scale[:, :, None, None, None]

        return state.update(logits, weigh)

    def _keys(self, source: int, start: Array, size: int) -> tuple[Array, Array]:
        if source == 0:
            return self.ops.kv.block(start, size, self.plan.compute_dtype)
        assert self.ops.new_key is not None
        assert self.ops.new_value is not None
        key, value = (
            jnp.moveaxis(lax.dynamic_slice_in_dim(new, start, size, axis=1), 2, 1)
            for new in (self.ops.new_key, self.ops.new_value)
        )
        return key.astype(self.plan.compute_dtype), value.astype(self.plan.compute_dtype)

    def _dot(self, left: Array, right: Array, *, contract: int) -> Array:
        """`left [B, K, G, T, x]` with `right [B, K, ...]`, whose axis `contract` is x; float32."""
        *rows, width = left.shape
        out = lax.dot_general(
            left.reshape(*rows[:2], -1, width),
            right,
            (((3,), (contract,)), ((0, 1), (0, 1))),
            precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        return out.reshape(*rows, out.shape[-1])
