"""The BLOCKS form: all rows at once over tiles of keys; plain XLA that partitions."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Float
from jax_tkg.copies import largest, least
from jax_tkg.online.plan import OnlinePlan
from jax_tkg.online.tiles import (
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


def attend_blocks(
    problem: AttentionProblem, ops: Operands, plan: OnlinePlan
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention in float32 and its log-sum-exp."""
    step = BlockStep(problem, ops, plan)
    rows = (problem.batch, problem.num_kv_heads, problem.rows_per_head)
    state = SoftmaxState.init(rows, problem.value_head_dim)
    if problem.has_new_kv:
        state = step.fold_new(state)
    if plan.num_tiles == 1:
        state = step.fold_slots(0, 0, state)
    else:
        state = lax.fori_loop(*step.trips(), step.fold_tile, state)
    out, lse = add_sinks(state, problem, ops).finalize()
    return ungrouped(out, problem.num_tokens), ungrouped(lse, problem.num_tokens)


def add_sinks(state: SoftmaxState, problem: AttentionProblem, ops: Operands) -> SoftmaxState:
    """The state of all rows with the sinks, if there are any."""
    return state if ops.sinks is None else state.add_sink(grouped_sinks(ops.sinks, problem))


class BlockStep:
    """The steps of the loop: each folds some keys of every row into the state [B, K, G * T]."""

    def __init__(self, problem: AttentionProblem, ops: Operands, plan: OnlinePlan) -> None:
        self.problem, self.ops, self.plan = problem, ops, plan
        self.masks = MaskTiles.create(problem, ops)
        self.query = grouped_queries(ops.query.astype(plan.compute_dtype), problem.num_kv_heads)

    def trips(self) -> tuple[Array | int, Array | int]:
        """First tile and end of the loop over all rows."""
        if not self.plan.dynamic_trips:
            return 0, self.plan.num_tiles
        first, end = self.masks.cached.live()
        return least(first) // self.plan.tile, -(-largest(end) // self.plan.tile)

    def fold_tile(self, i: Array, state: SoftmaxState) -> SoftmaxState:
        """Folds tile i of the cache."""
        fresh = i * self.plan.tile
        return self.fold_slots(
            jnp.minimum(fresh, self.problem.kv_len - self.plan.tile), fresh, state
        )

    def fold_slots(
        self, start: Array | int, fresh: Array | int, state: SoftmaxState
    ) -> SoftmaxState:
        """Folds one tile of slots from `start`, of which those from `fresh` on are new."""
        kv = self.ops.kv
        key, value = kv.block(start, self.plan.tile, self.plan.compute_dtype)
        seen, bias = self.masks.tile(self.masks.cached, start, self.plan.tile, fresh)
        return self._fold(state, key, value, seen, bias, kv.k_scale, kv.v_scale)

    def fold_new(self, state: SoftmaxState) -> SoftmaxState:
        """Folds the new keys beside the cache."""
        assert self.ops.new_key is not None
        assert self.ops.new_value is not None
        key, value = (
            jnp.moveaxis(new.astype(self.plan.compute_dtype), 2, 1)
            for new in (self.ops.new_key, self.ops.new_value)
        )
        assert self.masks.beside is not None
        seen, bias = self.masks.tile(self.masks.beside, 0, self.problem.num_tokens, 0)
        return self._fold(state, key, value, seen, bias, None, None)

    def _fold(
        self,
        state: SoftmaxState,
        key: Array,
        value: Array,
        seen: Array,
        bias: Array | None,
        k_scale: Array | None,
        v_scale: Array | None,
    ) -> SoftmaxState:
        problem = self.problem
        products = self._products(key)
        split = products.reshape(
            *products.shape[:2], problem.group, problem.num_tokens, products.shape[3]
        )
        scale: Array | float = problem.scale
        if k_scale is not None:
            scale = problem.scale * k_scale[:, :, None, None, None]
        logits = adjust_logits(problem, split, scale, seen, bias).reshape(products.shape)
        value = self._values(value, seen)

        def weigh(weights: Array) -> Array:
            mixed = self._mixed(weights.astype(self.plan.compute_dtype), value)
            return mixed if v_scale is None else mixed * v_scale[:, :, None, None]

        return state.update(logits, weigh, self._agree if self.plan.exchange else None)

    def _products(self, key: Array) -> Array:
        """`[B, K, G * T, keys]`."""
        if self.plan.fold_heads and self.problem.kv.keys_transposed:
            # As they lie: XLA:CPU does not see through the reshape that joins rows and heads.
            return self._dot(self.query, jnp.swapaxes(key, 2, 3), contract=2)
        return self._dot(self.query, key, contract=3)

    def _values(self, value: Array, seen: Array) -> Array:
        """Values that can be multiplied by 0."""
        if not self.problem.is_padded:
            return value
        return without_unseen(value, jnp.any(seen, axis=(2, 3)))

    def _mixed(self, weights: Array, value: Array) -> Array:
        """`[B, K, G * T, Hv]`."""
        return self._dot(weights, value, contract=2)

    def _agree(self, peak: Array) -> Array:
        """The maximum over the devices that have other keys of the same rows."""
        return lax.pmax(peak, self.plan.exchange)

    def _dot(self, left: Array, right: Array, *, contract: int) -> Array:
        """`left [B, K, M, x]` with `right`, whose axis `contract` is x, accumulated in float32."""
        shape = left.shape[:2]
        if self.plan.fold_heads:
            left, right = (a.reshape(1, -1, *a.shape[2:]) for a in (left, right))
            left, right, batch, contract = left[0], right[0], (0,), contract - 1
        else:
            batch = (0, 1)  # type: ignore[assignment]
        out = lax.dot_general(
            left,
            right,
            (((left.ndim - 1,), (contract,)), (batch, batch)),
            precision=lax.Precision.HIGHEST if left.dtype == np.float32 else None,
            preferred_element_type=jnp.float32,
        )
        return out.reshape(*shape, *out.shape[-2:])
