"""The ROWS form: one (sequence, KV head) after another, each to its own length. For XLA:CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Float
from jax_tkg.cache.layouts import KVLayout
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
from jax_tkg.online.whole import try_whole
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import SoftmaxState

State = TypeVar("State")
Fold = Callable[[Array, State], State]
"""Folds the tile of a number into the state."""

BUFFER_TAIL = 16
"""Slots by which a buffer is longer than a tile."""


def attend_rows(
    problem: AttentionProblem, ops: Operands, plan: OnlinePlan
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention in float32 and its log-sum-exp."""
    masks = MaskTiles.create(problem, ops)
    queries = grouped_queries(ops.query.astype(jnp.float32), problem.num_kv_heads)
    tiles = TileRanges.create(masks, masks.cached, plan.tile, plan.edge_tile)
    sinks = None if ops.sinks is None else grouped_sinks(ops.sinks, problem)

    def attend_row(r: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        r = r.astype(jnp.int32)  # also where JAX counts in 64 bits
        batch, head, zero = r // problem.num_kv_heads, r % problem.num_kv_heads, jnp.int32(0)
        step = _RowStep(
            problem, ops, plan, masks.row(batch, head), queries[batch, head], batch, head
        )
        state = SoftmaxState.init((problem.rows_per_head,), problem.value_head_dim, key_axis=0)
        if problem.has_new_kv:
            state = step.fold_new(state)
        carry = (state, step.buffers())
        state, _ = tiles.fold(batch, step.fold_full, step.fold_edge, carry)
        if sinks is not None:
            state = state.add_sink(sinks[batch if sinks.shape[0] > 1 else 0, head])
        out, lse = state.finalize()
        return (
            lax.dynamic_update_slice(results[0], out[None, None], (batch, head, zero, zero)),
            lax.dynamic_update_slice(results[1], lse[None, None], (batch, head, zero)),
        )

    shape = (problem.batch, problem.num_kv_heads, problem.rows_per_head)
    empty = (
        jnp.zeros((*shape, problem.value_head_dim), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    rows: Array | int = problem.batch * problem.num_kv_heads
    if plan.whole_first:
        done, empty = try_whole(problem, ops, plan)
        rows = jnp.where(done, 0, rows)
    out, lse = lax.fori_loop(0, rows, attend_row, empty)
    return ungrouped(out, problem.num_tokens), ungrouped(lse, problem.num_tokens)


@dataclass(frozen=True)
class TileRanges:
    """Tiles of each row, `[B]`: first..end are live, full_first..full_end of them need no mask.

    The distinction is worth a factor of two: without a mask a tile goes from memory to the dot as
    it is, with one its values are rewritten (padding may be NaN).

    Attributes:
        first, end: in edge tiles.
        full_first, full_end: in full tiles.
        ratio: edge tiles in a full one.
    """

    first: Array
    end: Array
    full_first: Array
    full_end: Array
    ratio: int

    @classmethod
    def create(
        cls, masks: MaskTiles, run: KeyRun, tile: int, edge: int | None = None
    ) -> "TileRanges":
        """Turns ranges of keys into ranges of tiles, at the edges of others that divide them."""
        edge = edge or tile
        (first, end), (full_first, full_end) = run.live(), masks.full(run)
        first, end, ratio = first // edge, -(-end // edge), tile // edge
        # Clipped so that first <= full_first <= full_end <= end also for rows without a live tile.
        end = jnp.maximum(first, end)
        full_first = jnp.clip(-(-full_first // tile), -(-first // ratio), end // ratio)
        full_end = jnp.clip(full_end // tile, full_first, end // ratio)
        return cls(first, end, full_first, full_end, ratio)

    def fold(self, batch: Array | int, full: Fold[State], edge: Fold[State], state: State) -> State:
        """Folds the live tiles of one row: with `full` where it can, then with `edge`."""
        first, full_first, full_end, end = (
            x[batch] for x in (self.first, self.full_first, self.full_end, self.end)
        )
        state = lax.fori_loop(full_first, full_end, full, state)
        # Where no tile is full the two numbers say nothing.
        none = full_first >= full_end
        full_first, full_end = (
            jnp.where(none, first, x * self.ratio) for x in (full_first, full_end)
        )
        before = full_first - first

        def fold_edge(i: Array, state: State) -> State:
            return edge(jnp.where(i < before, first + i, full_end + i - before), state)

        return lax.fori_loop(0, before + end - full_end, fold_edge, state)


class TileBuffers(NamedTuple):
    """Memory that a loop carries, to decode tiles of native bfloat16 or 8-bit floats into.

    XLA:CPU takes the read of such a tile, which bitcasts the array that it is cut from, for a read
    of all of it, and divides it between the threads: they meet on every tile. Measured, that takes
    1.6 to 3 times the processor time and no less wall time. It never divides an update in place.
    As an update of a whole buffer would be simplified away, each has a tail of slots that stay 0.

    Attributes:
        key: `[tile + BUFFER_TAIL, H]`, or transposed, as `KVLayout.row_tile` has it.
        value: `[tile + BUFFER_TAIL, Hv]`.
    """

    key: Array
    value: Array

    @classmethod
    def create(cls, problem: AttentionProblem, kv: KVLayout, tile: int) -> "TileBuffers":
        """Empty ones for tiles of a layout."""
        key = (tile + BUFFER_TAIL, problem.head_dim)
        value = (tile + BUFFER_TAIL, problem.value_head_dim)
        return cls(
            jnp.zeros(key[::-1] if kv.keys_transposed else key, jnp.float32),
            jnp.zeros(value, jnp.float32),
        )

    def put(self, key: Array, value: Array) -> "TileBuffers":
        """With a tile in them."""
        return TileBuffers(
            lax.dynamic_update_slice(self.key, key, (0, 0)),
            lax.dynamic_update_slice(self.value, value, (0, 0)),
        )


_Carry = tuple[SoftmaxState, TileBuffers | None]


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

    def buffers(self) -> TileBuffers | None:
        """What the loop carries beside the state, if the plan says so."""
        if not self.plan.buffered:
            return None
        return TileBuffers.create(self.problem, self.ops.kv, self.plan.tile)

    def fold_full(self, i: Array, carry: _Carry) -> _Carry:
        """Folds tile i of the cache, all of whose keys every query sees."""
        start = i * self.plan.tile
        bias = self.masks.bias_tile(self.masks.cached, start, self.plan.tile)
        return self._fold_cached(carry, start, self.plan.tile, None, bias)

    def fold_edge(self, i: Array, carry: _Carry) -> _Carry:
        """Folds edge tile i of the cache under its mask."""
        size = self.plan.edge_tile
        fresh = i * size
        start = jnp.minimum(fresh, self.problem.kv_len - size)
        seen, bias = self.masks.tile(self.masks.cached, start, size, fresh)
        return self._fold_cached(carry, start, size, seen, bias)

    def _fold_cached(
        self, carry: _Carry, start: Array, size: int, seen: Array | None, bias: Array | None
    ) -> _Carry:
        kv, (state, buffers) = self.ops.kv, carry
        key, value = kv.row_tile(self.batch, self.head, start, size)
        value = self._seen_values(value, seen)
        if buffers is not None:
            buffers = buffers.put(key, value)
            key, value = buffers
        products = kv.row_products(key, self.query)[:size]
        k_scale, v_scale = self._scale_of(kv.k_scale), self._scale_of(kv.v_scale)
        return self._fold(state, products, value, seen, bias, k_scale, v_scale), buffers

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
        value = self._seen_values(value, seen)
        return self._fold(state, products, value, seen, bias, None, None)

    def _seen_values(self, value: Array, seen: Array | None) -> Array:
        if seen is None or not self.problem.is_padded:
            return value
        return without_unseen(value, jnp.any(seen[0, 0], axis=(0, 1)))

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
        tail = value.shape[0] - logits.shape[0]

        def weigh(weights: Array) -> Array:
            weights = jnp.pad(weights, ((0, tail), (0, 0))) if tail else weights
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
