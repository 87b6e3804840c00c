"""The ROWS form: one (sequence, KV head) after another, each to its own length. For XLA:CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Float
from jax_tkg.online.plan import OnlinePlan
from jax_tkg.online.tiles import (
    KeyRun,
    MaskTiles,
    adjust_logits,
    grouped_queries,
    grouped_sinks,
    ungrouped,
    without_unseen,
)
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import SoftmaxState

Fold = Callable[[Array, SoftmaxState], SoftmaxState]
"""Folds the tile of a number into the state."""


def attend_rows(
    problem: AttentionProblem, ops: Operands, plan: OnlinePlan
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention in float32 and its log-sum-exp."""
    masks = MaskTiles.create(problem, ops)
    queries = grouped_queries(ops.query.astype(jnp.float32), problem.num_kv_heads)
    tiles = TileRanges.create(masks, masks.cached, plan.tile)
    sinks = None if ops.sinks is None else grouped_sinks(ops.sinks, problem)

    def attend_row(r: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        batch, head = r // problem.num_kv_heads, r % problem.num_kv_heads
        step = _RowStep(
            problem, ops, plan, masks.row(batch, head), queries[batch, head], batch, head
        )
        state = SoftmaxState.init((problem.rows_per_head,), problem.value_head_dim, key_axis=0)
        if problem.has_new_kv:
            state = step.fold_new(state)
        state = tiles.fold(batch, step.fold_full, step.fold_edge, state)
        if sinks is not None:
            state = state.add_sink(sinks[batch if sinks.shape[0] > 1 else 0, head])
        out, lse = state.finalize()
        return (
            lax.dynamic_update_slice(results[0], out[None, None], (batch, head, 0, 0)),
            lax.dynamic_update_slice(results[1], lse[None, None], (batch, head, 0)),
        )

    shape = (problem.batch, problem.num_kv_heads, problem.rows_per_head)
    empty = (
        jnp.zeros((*shape, problem.value_head_dim), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    rows = problem.batch * problem.num_kv_heads
    out, lse = lax.fori_loop(0, rows, attend_row, empty)
    return ungrouped(out, problem.num_tokens), ungrouped(lse, problem.num_tokens)


@dataclass(frozen=True)
class TileRanges:
    """Tiles of each row, `[B]`: first..end are live, full_first..full_end of them need no mask.

    The distinction is worth a factor of two: without a mask a tile goes from memory to the dot as
    it is, with one its values are rewritten (padding may be NaN).
    """

    first: Array
    end: Array
    full_first: Array
    full_end: Array

    @classmethod
    def create(cls, masks: MaskTiles, run: KeyRun, tile: int) -> "TileRanges":
        """Turns ranges of keys into ranges of tiles."""
        (first, end), (full_first, full_end) = run.live(), masks.full(run)
        first, end = first // tile, -(-end // tile)
        # Clipped so that first <= full_first <= full_end <= end also for rows without a live tile.
        end = jnp.maximum(first, end)
        full_first = jnp.clip(-(-full_first // tile), first, end)
        full_end = jnp.clip(full_end // tile, full_first, end)
        return cls(first, end, full_first, full_end)

    def fold(self, batch: Array | int, full: Fold, edge: Fold, state: SoftmaxState) -> SoftmaxState:
        """Folds the live tiles of one row: with `full` where it can, then with `edge`."""
        first, full_first, full_end, end = (
            x[batch] for x in (self.first, self.full_first, self.full_end, self.end)
        )
        state = lax.fori_loop(full_first, full_end, full, state)
        before = full_first - first

        def fold_edge(i: Array, state: SoftmaxState) -> SoftmaxState:
            return edge(jnp.where(i < before, first + i, full_end + i - before), state)

        return lax.fori_loop(0, before + end - full_end, fold_edge, state)


class _RowStep:
    """The steps of one row: each folds some keys into the state. Logits are [keys, G * T]."""

    def __init__(
        self,
        problem: AttentionProblem,
        ops: Operands,
        plan: OnlinePlan,
        masks: MaskTiles,
        query: Array,
        batch: Array,
        head: Array,
    ) -> None:
        self.problem, self.ops, self.plan, self.masks = problem, ops, plan, masks
        self.query, self.batch, self.head = query, batch, head

    def fold_full(self, i: Array, state: SoftmaxState) -> SoftmaxState:
        """Folds tile i of the cache, all of whose keys every query sees."""
        start = i * self.plan.tile
        bias = self.masks.bias_tile(self.masks.cached, start, self.plan.tile)
        return self._fold_cached(state, start, None, bias)

    def fold_edge(self, i: Array, state: SoftmaxState) -> SoftmaxState:
        """Folds tile i of the cache under its mask."""
        fresh = i * self.plan.tile
        start = jnp.minimum(fresh, self.problem.kv_len - self.plan.tile)
        seen, bias = self.masks.tile(self.masks.cached, start, self.plan.tile, fresh)
        return self._fold_cached(state, start, seen, bias)

    def _fold_cached(
        self, state: SoftmaxState, start: Array, seen: Array | None, bias: Array | None
    ) -> SoftmaxState:
        kv = self.ops.kv
        key, value = kv.row_tile(self.batch, self.head, start, self.plan.tile)
        products = kv.row_products(key, self.query)
        k_scale, v_scale = self._scale_of(kv.k_scale), self._scale_of(kv.v_scale)
        return self._fold(state, products, value, seen, bias, k_scale, v_scale)

    def fold_new(self, state: SoftmaxState) -> SoftmaxState:
        """Folds the new keys beside the cache."""
        assert self.ops.new_key is not None
        assert self.ops.new_value is not None
        key, value = (
            new[self.batch, :, self.head].astype(jnp.float32)
            for new in (self.ops.new_key, self.ops.new_value)
        )
        products = lax.dot_general(key, self.query, (((1,), (1,)), ((), ())))
        assert self.masks.beside is not None
        seen, bias = self.masks.tile(self.masks.beside, 0, self.problem.num_tokens, 0)
        return self._fold(state, products, value, seen, bias, None, None)

    def _fold(
        self,
        state: SoftmaxState,
        products: Array,
        value: Array,
        seen: Array | None,
        bias: Array | None,
        k_scale: Array | None,
        v_scale: Array | None,
    ) -> SoftmaxState:
        problem = self.problem
        scale = problem.scale if k_scale is None else problem.scale * k_scale
        logits = adjust_logits(
            problem,
            products.reshape(-1, problem.group, problem.num_tokens),
            scale,
            None if seen is None else _keys_first(seen),
            None if bias is None else _keys_first(bias),
        ).reshape(-1, problem.rows_per_head)
        if seen is not None and problem.is_padded:
            value = without_unseen(value, jnp.any(seen[0, 0], axis=(0, 1)))

        def weigh(weights: Array) -> Array:
            mixed = lax.dot_general(weights, value, (((0,), (0,)), ((), ())))
            return mixed if v_scale is None else mixed * v_scale

        return state.update(logits, weigh)

    def _scale_of(self, scale: Array | None) -> Array | None:
        if scale is None:
            return None
        return scale[self.batch if scale.shape[0] > 1 else 0, self.head]


def _keys_first(array: Array) -> Array:
    """`[1, 1, G, T, keys]` as `[keys, G, T]`."""
    return jnp.moveaxis(array[0, 0], -1, 0)
