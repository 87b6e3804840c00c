"""The PARTS form: BLOCKS for a compiler that may split the slots between devices.

A tile of consecutive slots lies on one device, and the compiler gathers it for all. So the slots
are seen as m parts of S / m, where m is a multiple of any number of devices they can be split over,
and a tile is the same piece of each part. Every part has a softmax state of its own; the states
meet after the loop, and with them the devices.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Float
from jax_tkg.cache import storage
from jax_tkg.cache.axes import in_order, slice_axes
from jax_tkg.copies import largest, least
from jax_tkg.online.blocks import BlockStep, add_sinks
from jax_tkg.online.plan import OnlinePlan
from jax_tkg.online.tiles import MaskTiles, adjust_logits, ungrouped, without_unseen
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import SoftmaxState


def attend_parts(
    problem: AttentionProblem, ops: Operands, plan: OnlinePlan
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention in float32 and its log-sum-exp."""
    step = _PartStep(problem, ops, plan)
    rows = (problem.batch, problem.num_kv_heads, problem.rows_per_head, plan.parts)
    state = SoftmaxState.init(rows, problem.value_head_dim)
    if plan.num_tiles == 1:
        state = step.fold_tile(0, state)
    else:
        state = lax.fori_loop(*step.trips(), step.fold_tile, state)
    state = _merged(state)
    if problem.has_new_kv:
        state = BlockStep(problem, ops, plan).fold_new(state)
    out, lse = add_sinks(state, problem, ops).finalize()
    return ungrouped(out, problem.num_tokens), ungrouped(lse, problem.num_tokens)


def _merged(state: SoftmaxState) -> SoftmaxState:
    """The state over the keys of all parts, the last axis of its rows."""
    top = jnp.max(state.max, axis=-1)
    factor = jnp.exp(state.max - top[..., None])
    return replace(
        state,
        max=top,
        sum=jnp.sum(state.sum * factor, axis=-1),
        output=jnp.sum(state.output * factor[..., None], axis=-2),
    )


class _PartStep:
    """The steps of the loop: each folds a piece of every part into the state [B, K, G * T, m]."""

    def __init__(self, problem: AttentionProblem, ops: Operands, plan: OnlinePlan) -> None:
        self.problem, self.ops, self.plan = problem, ops, plan
        self.masks = MaskTiles.create(problem, ops)
        self.query = BlockStep(problem, ops, plan).query
        self.slots = problem.kv_len // plan.parts
        letters = ops.kv.letters()
        self.key, self.key_axes = self._split(ops.kv.key, str(letters.key))
        self.value, self.value_axes = self._split(ops.kv.value, str(letters.value))

    def _split(self, array: Array, axes: str) -> tuple[Array, str]:
        """The axis S as m parts of S / m slots: the letters m and S."""
        at = axes.index("S")
        shape = (*array.shape[:at], self.plan.parts, self.slots, *array.shape[at + 1 :])
        return array.reshape(shape), axes.replace("S", "mS")

    def trips(self) -> tuple[Array | int, Array | int]:
        """First tile and end of the loop, over the parts of all rows."""
        tile = self.plan.tile
        if not self.plan.dynamic_trips:
            return 0, self.plan.num_tiles
        begin = jnp.arange(self.plan.parts, dtype=jnp.int32) * self.slots
        first, end = (jnp.clip(x[:, None] - begin, 0, self.slots) for x in self.masks.cached.live())
        lives = first < end
        first, end = jnp.where(lives, first, self.slots), jnp.where(lives, end, 0)
        return least(first) // tile, -(-largest(end) // tile)

    def fold_tile(self, i: Array | int, state: SoftmaxState) -> SoftmaxState:
        """Folds slots from `i * tile` on of every part."""
        problem, plan, kv = self.problem, self.plan, self.ops.kv
        fresh = jnp.asarray(i * plan.tile, jnp.int32)
        start = jnp.minimum(fresh, self.slots - plan.tile)
        key, value = (
            in_order(
                storage.decode(
                    slice_axes(array, axes, {"S": (start, plan.tile)}), kv.dtype, plan.compute_dtype
                ),
                axes,
                "BKmSH",
            )
            for array, axes in ((self.key, self.key_axes), (self.value, self.value_axes))
        )
        seen, bias = self._seen(start, fresh), self._bias(start)
        products = _dot("bkxh,bkmsh->bkxms", self.query, key)
        split = (*products.shape[:2], problem.group, problem.num_tokens, *products.shape[3:])
        scale: Array | float = problem.scale
        if kv.k_scale is not None:
            scale = problem.scale * kv.k_scale.reshape(*kv.k_scale.shape, 1, 1, 1, 1)
        logits = adjust_logits(problem, products.reshape(split), scale, seen, bias)
        if problem.is_padded:
            value = without_unseen(value, jnp.any(seen, axis=(2, 3)))

        def weigh(weights: Array) -> Array:
            mixed = _dot("bkxms,bkmsh->bkxmh", weights.astype(plan.compute_dtype), value)
            v_scale = kv.v_scale
            return mixed if v_scale is None else mixed * v_scale[:, :, None, None, None]

        return state.update(logits.reshape(products.shape), weigh)

    def _seen(self, start: Array, fresh: Array) -> Array:
        """`[B, K|1, G|1, T|1, m, tile]`."""
        run, offsets = self.masks.cached, jnp.arange(self.plan.tile, dtype=jnp.int32) + start
        positions = self._positions(start)[:, None]
        low, high = run.low[..., None, None], run.high[..., None, None]
        seen = (positions >= low) & (positions < high)
        if self.slots % self.plan.tile:
            seen &= offsets >= fresh
        seen = seen[:, None, None]
        return seen if self.masks.mask is None else seen & self._dense(self.masks.mask, start)

    def _positions(self, start: Array) -> Array:
        """`[B, m, tile]`."""
        run, size = self.masks.cached, self.plan.tile
        if run.positions is not None:
            split = run.positions.reshape(-1, self.plan.parts, self.slots)
            return lax.dynamic_slice_in_dim(split, start, size, axis=2)
        begin = jnp.arange(self.plan.parts, dtype=jnp.int32) * self.slots
        return run.first[:, None, None] + begin[:, None] + start + jnp.arange(size, dtype=jnp.int32)

    def _bias(self, start: Array) -> Array | None:
        masks, bias = self.masks, None
        if masks.bias is not None:
            bias = self._dense(masks.bias, start).astype(jnp.float32)
        if masks.slopes is None:
            return bias
        far = jnp.abs(masks.query_positions[..., None, None] - self._positions(start)[:, None])
        linear = -masks.slopes[..., None].astype(jnp.float32)
        linear = linear * far[:, None, None].astype(jnp.float32)
        return linear if bias is None else bias + linear

    def _dense(self, array: Array, start: Array) -> Array:
        """A tile of what has a number for each key, those beside the cache left out."""
        cached = array[..., : self.problem.kv_len]
        split = cached.reshape(*cached.shape[:-1], self.plan.parts, self.slots)
        return lax.dynamic_slice_in_dim(split, start, self.plan.tile, axis=split.ndim - 1)


def _dot(subscripts: str, left: Array, right: Array) -> Array:
    """Accumulated in float32."""
    return jnp.einsum(
        subscripts,
        left,
        right,
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
