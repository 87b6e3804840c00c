"""All keys in one dot, tried before the loop over rows where most of them are live. For XLA:CPU.

A dot over a whole operand reads it where it lies, with all threads; a loop copies every tile and
has one. But the dot reads every slot, and multiplies the values of those that nobody sees by 0,
which is NaN for an infinity or a NaN. So the lengths say whether it is tried, and its result
whether it was right.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Bool, Float
from jax_tkg.online.blocks import BlockStep, add_sinks
from jax_tkg.online.plan import OnlinePlan
from jax_tkg.online.tiles import MaskTiles
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import HIGHEST, SoftmaxState

MOSTLY = 0.75
"""The live share of all slots from which on one dot is tried. Measured, one dot over all of them
takes 0.7 to 0.85 of the loop's processor time, and 0.4 to 0.6 of its wall time on two cores."""


def try_whole(
    problem: AttentionProblem, ops: Operands, plan: OnlinePlan
) -> tuple[Bool[Array, ""], tuple[Float[Array, "B K M Hv"], Float[Array, "B K M"]]]:
    """Whether it was right; output in float32 and log-sum-exp of the rows of each KV head."""
    whole = replace(plan, tile=problem.kv_len, fold_heads=True)
    rows = (problem.batch, problem.num_kv_heads, problem.rows_per_head)
    first, end = MaskTiles.create(problem, ops).cached.live()
    slots = problem.batch * problem.kv_len
    mostly = jnp.sum((end - first).astype(jnp.float32)) >= MOSTLY * slots

    def attend(i: Array, _: tuple[Array, Array]) -> tuple[Array, Array]:
        # The barrier keeps in the loop what reshapes the arrays: outside, it would be made part of
        # the update of a cache, and the update then be made twice, once into a copy.
        kv = ops.kv
        key, value, _ = lax.optimization_barrier((kv.key, kv.value, i))
        step = _WholeStep(problem, replace(ops, kv=replace(kv, key=key, value=value)), whole)
        state = SoftmaxState.init(rows, problem.value_head_dim)
        if problem.has_new_kv:
            state = step.fold_new(state)
        return add_sinks(step.fold_slots(0, 0, state), problem, ops).finalize()

    nothing = jnp.zeros((*rows, problem.value_head_dim), jnp.float32), jnp.zeros(rows, jnp.float32)
    # A loop of one trip or none: what it captures is not copied.
    out, lse = lax.fori_loop(0, mostly.astype(jnp.int32), attend, nothing)
    return mostly & jnp.all(jnp.abs(out) <= HIGHEST), (out, lse)


class _WholeStep(BlockStep):
    """Folds all slots as they lie: [B, K, S, H], or heads beside each other, [B, S, K, H]."""

    def _values(self, value: Array, seen: Bool[Array, "..."]) -> Array:
        """As they are: a copy would be as large as the cache."""
        del seen
        return value

    def _products(self, key: Array) -> Array:
        if self.problem.kv.heads_contiguous:
            return super()._products(key)
        # Each query with the keys of every head, of which its own are kept: K times the products,
        # and no copy of the keys.
        batch, heads, slots, _ = key.shape
        flat = jnp.swapaxes(key, 1, 2).reshape(batch, 1, slots * heads, -1)
        queries = self.query.reshape(batch, 1, -1, self.query.shape[3])
        products = self._dot(queries, flat, contract=3).reshape(batch, heads, -1, slots, heads)
        return jnp.stack([products[:, i, :, :, i] for i in range(heads)], axis=1)

    def _mixed(self, weights: Array, value: Array) -> Array:
        if self.problem.kv.heads_contiguous:
            return super()._mixed(weights, value)
        # Likewise. Slots outermost on both sides: of the forms tried it takes the least time by the
        # clock, 0.8 to 0.85 of that with the weights spread over all heads.
        batch, heads, slots, width = value.shape
        by_slot = jnp.swapaxes(weights.reshape(batch, -1, slots), 1, 2)
        flat = jnp.swapaxes(value, 1, 2).reshape(batch, slots, heads * width)
        mixed = lax.dot_general(
            by_slot, flat, (((1,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST
        ).reshape(batch, heads, -1, heads, width)
        return jnp.stack([mixed[:, i, :, i] for i in range(heads)], axis=1)
