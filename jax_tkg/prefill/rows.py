"""The ROWS form: a tile of queries of one KV head after another, each over the keys it sees."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array
from jax_tkg.cache import storage
from jax_tkg.cache.axes import slice_in_loop
from jax_tkg.cache.layouts import BSKH, KVLayout
from jax_tkg.online.grid import TileGrid
from jax_tkg.online.rows import TileRanges
from jax_tkg.online.tiles import KeyRun, MaskTiles, adjust_logits, without_unseen
from jax_tkg.operands import Operands
from jax_tkg.prefill.plan import PrefillPlan
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import SoftmaxState

_FLOAT32 = np.dtype(np.float32)


def prefill_rows(problem: AttentionProblem, ops: Operands, plan: PrefillPlan) -> tuple[Array, ...]:
    """Attention in float32; results as `Implementation.run`."""
    masks = MaskTiles.create(problem, ops)
    tokens, group = plan.cached.query_tile, problem.group
    tiles = len(plan.cached.spans)

    def attend(i: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        i = i.astype(jnp.int32)  # also where JAX counts in 64 bits
        row, tile = i // tiles, i % tiles
        batch, head = row // problem.num_kv_heads, row % problem.num_kv_heads
        at = jnp.minimum(tile * tokens, problem.num_tokens - tokens)
        step = _TileStep(problem, ops, masks.row(batch, head).tokens(at, tokens), batch, head, at)
        state = SoftmaxState.init((group, tokens), problem.value_head_dim)
        for run, grid, kv in zip(step.masks.runs, plan.grids, _sources(ops), strict=True):
            state = step.fold_run(run, grid, kv, state)
        if ops.sinks is not None:
            state = state.add_sink(step.of_heads(ops.sinks)[:, None])
        found = state.finalize() if problem.normalize else (state.output, state.max, state.sum)
        return tuple(
            lax.dynamic_update_slice(
                whole,
                jnp.swapaxes(part, 0, 1)[None],
                (batch, at, head * group, *(jnp.int32(0),) * (whole.ndim - 3)),
            )
            for whole, part in zip(results, found, strict=True)
        )

    rows = (problem.batch, problem.num_tokens, problem.num_heads)
    of_rows = (jnp.zeros(rows, jnp.float32),) * (1 if problem.normalize else 2)
    empty = (jnp.zeros((*rows, problem.value_head_dim), jnp.float32), *of_rows)
    return lax.fori_loop(0, problem.batch * problem.num_kv_heads * tiles, attend, empty)


def _sources(ops: Operands) -> tuple[KVLayout, ...]:
    """The cache, and what lies beside it read in the same way."""
    if ops.new_key is None or ops.new_value is None:
        return (ops.kv,)
    dtype = np.dtype(jnp.promote_types(ops.new_key.dtype, ops.new_value.dtype))
    key, value = (x.astype(dtype) for x in (ops.new_key, ops.new_value))
    return ops.kv, BSKH(key, value)


class _TileStep:
    """The steps of one tile of queries of one KV head: logits are [G, T, keys]."""

    def __init__(
        self,
        problem: AttentionProblem,
        ops: Operands,
        masks: MaskTiles,
        batch: Array,
        head: Array,
        at: Array,
    ) -> None:
        self.problem, self.masks, self.batch, self.head = problem, masks, batch, head
        tokens, group = masks.query_positions.shape[1], problem.group
        where = {"B": (batch, 1), "T": (at, tokens), "N": (head * group, group)}
        query = slice_in_loop(ops.query, "BTNH", where)[0]
        query = storage.decode(query, problem.query_dtype, _FLOAT32)
        self.query = jnp.swapaxes(query, 0, 1).reshape(group * tokens, -1)

    def of_heads(self, array: Array) -> Array:
        """`[B|1, N]` for the query heads of this KV head, `[G]`."""
        row = self.batch if array.shape[0] > 1 else jnp.zeros_like(self.batch)
        start = self.head * self.problem.group
        return lax.dynamic_slice(array, (row, start), (1, self.problem.group))[0]

    def fold_run(
        self, run: KeyRun, grid: TileGrid, kv: KVLayout, state: SoftmaxState
    ) -> SoftmaxState:
        """Folds the tiles of a run that the queries see."""
        size = grid.key_tile

        def fold_full(i: Array, state: SoftmaxState) -> SoftmaxState:
            bias = self.masks.bias_tile(run, i * size, size)
            return self._fold(kv, i * size, size, None, bias, state)

        def fold_edge(i: Array, state: SoftmaxState) -> SoftmaxState:
            start = jnp.minimum(i * size, run.size - size)
            seen, bias = self.masks.tile(run, start, size, i * size)
            return self._fold(kv, start, size, seen, bias, state)

        return TileRanges.create(self.masks, run, size).fold(0, fold_full, fold_edge, state)

    def _fold(
        self,
        kv: KVLayout,
        start: Array,
        size: int,
        seen: Array | None,
        bias: Array | None,
        state: SoftmaxState,
    ) -> SoftmaxState:
        key, value = kv.row_tile(self.batch, self.head, start, size)
        # The dot of a layout has the keys first, and XLA turns it: queries first are twice as fast.
        products = kv.row_products(key, self.query).T.reshape(*state.max.shape, size)
        k_scale, v_scale = self._scale_of(kv.k_scale), self._scale_of(kv.v_scale)
        scale = self.problem.scale if k_scale is None else self.problem.scale * k_scale
        seen, bias = (None if x is None else x[0, 0] for x in (seen, bias))
        logits = adjust_logits(self.problem, products, scale, seen, bias)
        if seen is not None and self.problem.is_padded:
            value = without_unseen(value, jnp.any(seen, axis=(0, 1)))

        def weigh(weights: Array) -> Array:
            mixed = lax.dot_general(weights.reshape(-1, size), value, (((1,), (0,)), ((), ())))
            mixed = mixed.reshape(*state.max.shape, -1)
            return mixed if v_scale is None else mixed * v_scale

        return state.update(logits, weigh)

    def _scale_of(self, scale: Array | None) -> Array | None:
        if scale is None:
            return None
        return scale[self.batch if scale.shape[0] > 1 else 0, self.head]
