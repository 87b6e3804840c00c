"""What a tile of keys needs beside keys and values: which are seen, the bias, the adjusted logits.

Everything is in the order [B, K, G, T, keys] with broadcast dimensions of size 1; `MaskTiles.row`
gives the same object for one KV head of one sequence.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Bool, Float, Int, Leaf
from jax_tkg.masks import NO_POSITION, default_query_positions
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_positions", "live_end", "total", "start", "key_positions", "mask", "bias"],
    meta_fields=["problem"],
)
@dataclass(frozen=True)
class MaskTiles:
    """The masks of a call, ready to be cut into tiles.

    Attributes:
        problem: the static part.
        query_positions: `[B, T]`.
        live_end: `[B]`, positions in the cache end before this one.
        total: `[B]`, tokens of the row with the new ones.
        start: `[B]`, first live position.
        key_positions: `[B, S]`, or None when slot s holds position s.
        mask: `[B|1, K|1, G|1, T|1, S']` or None.
        bias: likewise.
    """

    problem: AttentionProblem
    query_positions: Leaf
    live_end: Leaf
    total: Leaf
    start: Leaf
    key_positions: Leaf | None
    mask: Leaf | None
    bias: Leaf | None

    @classmethod
    def create(cls, problem: AttentionProblem, ops: Operands) -> "MaskTiles":
        """Fills in the defaults of what the caller left out."""
        beside = problem.num_tokens if problem.has_new_kv else 0
        zeros = jnp.zeros((problem.batch,), jnp.int32)
        total = zeros + (problem.kv_len + beside) if ops.lengths is None else ops.lengths
        query_positions = ops.query_positions
        if query_positions is None:
            query_positions = default_query_positions(total, problem.num_tokens)
        key_positions, usable = ops.key_positions, ops.kv.usable()
        if usable is not None:
            slots = jnp.arange(problem.kv_len, dtype=jnp.int32)[None]
            known = slots if key_positions is None else key_positions
            key_positions = jnp.where(usable, known, NO_POSITION)
        return cls(
            problem=problem,
            query_positions=query_positions,
            live_end=total - beside,
            total=total,
            start=zeros if ops.starts is None else ops.starts,
            key_positions=key_positions,
            mask=None if ops.mask is None else _by_group(ops.mask, problem),
            bias=None if ops.bias is None else _by_group(ops.bias, problem),
        )

    def row(self, batch: Array, head: Array) -> "MaskTiles":
        """The same for one KV head of one sequence: B = K = 1."""

        def pick(array: Array | None) -> Array | None:
            return None if array is None else lax.dynamic_slice_in_dim(array, batch, 1, 0)

        def pick_head(array: Array | None) -> Array | None:
            if array is None:
                return None
            for axis, index in ((0, batch), (1, head)):
                if array.shape[axis] > 1:
                    array = lax.dynamic_slice_in_dim(array, index, 1, axis)
            return array

        picked: dict[str, Any] = {
            name: pick(getattr(self, name))
            for name in ("query_positions", "live_end", "total", "start", "key_positions")
        }
        return replace(self, **picked, mask=pick_head(self.mask), bias=pick_head(self.bias))

    def cached(
        self, start: Array | int, size: int, fresh_from: Array | int
    ) -> tuple[Bool[Array, "#B #K #G #T size"], Float[Array, "#B #K #G #T size"] | None]:
        """Seen keys and bias of `size` cache slots from `start`.

        Slots before `fresh_from` were in an earlier tile and are not seen again.
        """
        slots = jnp.arange(size, dtype=jnp.int32) + start
        if self.key_positions is None:
            positions = slots[None]
        else:
            positions = lax.dynamic_slice_in_dim(self.key_positions, start, size, axis=1)
        seen = self._visible(positions, self.live_end[:, None])
        if self.problem.kv_len % size:
            seen &= slots >= fresh_from
        return self._with_dense(seen, start, size)

    def beside(self) -> tuple[Bool[Array, "#B #K #G #T T2"], Float[Array, "#B #K #G #T T2"] | None]:
        """Seen keys and bias of the new keys beside the cache."""
        seen = self._visible(self.query_positions, self.total[:, None])
        return self._with_dense(seen, self.problem.kv_len, self.problem.num_tokens)

    def everything(
        self, start: Array, size: int, fresh_from: Array
    ) -> tuple[Bool[Array, "#B #K #G #T size"], Float[Array, "#B #K #G #T size"] | None]:
        """As `cached`, over the cache followed by the new keys beside it."""
        slots = jnp.arange(size, dtype=jnp.int32) + start
        kv_len = self.problem.kv_len
        positions, end = slots[None], self.live_end[:, None]
        if self.key_positions is not None:
            positions = jnp.take(self.key_positions, slots, axis=1, mode="clip")
        if self.problem.has_new_kv:
            new = jnp.take(self.query_positions, slots - kv_len, axis=1, mode="clip")
            in_cache = (slots < kv_len)[None]
            positions = jnp.where(in_cache, positions, new)
            end = jnp.where(in_cache, end, self.total[:, None])
        return self._with_dense(self._visible(positions, end) & (slots >= fresh_from), start, size)

    def live_slots(self) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """First live slot and the end of the live slots of each row."""
        first = self.problem.rule.first_visible(self.query_positions, self.start)
        if not self.problem.has_positions:
            return first, jnp.clip(self.live_end, 0, self.problem.kv_len)
        assert self.key_positions is not None
        live = (self.key_positions >= first[:, None]) & (
            self.key_positions < self.live_end[:, None]
        )
        slots = jnp.arange(self.problem.kv_len, dtype=jnp.int32)
        low = jnp.min(jnp.where(live, slots, self.problem.kv_len), axis=1)
        return low, jnp.max(jnp.where(live, slots + 1, 0), axis=1)

    def full_slots(self) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """A range of slots of each row that all its queries see, so that no mask is needed there.

        Empty where that is not known from positions alone.
        """
        zero = jnp.zeros_like(self.start)
        if self.problem.has_positions or self.mask is not None:
            return zero, zero
        first, end = self.problem.rule.seen_by_all(
            self.query_positions, self.start, jnp.minimum(self.live_end, self.problem.kv_len)
        )
        if self.key_positions is not None:  # holes: give up on a row that has one in the range
            slots = jnp.arange(self.problem.kv_len, dtype=jnp.int32)
            inside = (slots >= first[:, None]) & (slots < end[:, None])
            holed = jnp.any(inside & (self.key_positions == NO_POSITION), axis=1)
            end = jnp.where(holed, first, end)
        return first, end

    def bias_only(self, start: Array | int, size: int) -> Float[Array, "#B #K #G #T size"] | None:
        """The bias of slots that need no mask."""
        if self.bias is None:
            return None
        return lax.dynamic_slice_in_dim(self.bias, start, size, axis=4).astype(jnp.float32)

    def _visible(self, positions: Array, end: Array) -> Array:
        seen = self.problem.rule.visible(
            self.query_positions[:, :, None],
            positions[:, None, :],
            self.start[:, None, None],
            end[:, None, :],
        )
        return seen[:, None, None]

    def _with_dense(self, seen: Array, start: Array | int, size: int) -> tuple[Array, Array | None]:
        if self.mask is not None:
            seen = seen & lax.dynamic_slice_in_dim(self.mask, start, size, axis=4)
        return seen, self.bias_only(start, size)


def _by_group(array: Array, problem: AttentionProblem) -> Array:
    """`[B, N or 1, T, S']` as `[B, K or 1, G or 1, T, S']`."""
    batch, heads, *rest = array.shape
    split = (1, 1) if heads == 1 else (problem.num_kv_heads, problem.group)
    return array.reshape(batch, *split, *rest)


def adjust_logits(
    problem: AttentionProblem,
    products: Float[Array, "..."],
    scale: Array | float,
    seen: Bool[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
) -> Float[Array, "..."]:
    """Scale, soft cap, bias, mask (None: every key is seen): in that order, in float32."""
    logits = products * scale
    if problem.logits_soft_cap is not None:
        logits = problem.logits_soft_cap * jnp.tanh(logits / problem.logits_soft_cap)
    if bias is not None:
        logits = logits + bias
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def without_unseen(values: Float[Array, "... keys Hv"], seen: Bool[Array, "... keys"]) -> Array:
    """Zeroes the values of keys that no query sees: padding may hold NaN, and 0 * NaN is NaN."""
    return jnp.where(seen[..., None], values, jnp.zeros((), values.dtype))


def grouped_queries(query: Float[Array, "B T N H"], num_kv_heads: int) -> Array:
    """`[B, K, G * T, H]`: the rows that read one KV head, query heads outermost."""
    batch, tokens, heads, width = query.shape
    split = query.reshape(batch, tokens, num_kv_heads, heads // num_kv_heads, width)
    return split.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, width)


def ungrouped(rows: Float[Array, "B K M *rest"], num_tokens: int) -> Array:
    """Undoes `grouped_queries`: `[B, T, N, ...]`."""
    batch, kv_heads, m, *rest = rows.shape
    split = rows.reshape(batch, kv_heads, m // num_tokens, num_tokens, *rest)
    return jnp.moveaxis(split, 3, 1).reshape(batch, num_tokens, -1, *rest)


def grouped_sinks(sinks: Float[Array, "B1 N"], problem: AttentionProblem) -> Array:
    """`[B|1, K, G * T]`: the sink of each row."""
    split = sinks.reshape(sinks.shape[0], problem.num_kv_heads, problem.group, 1)
    full = jnp.broadcast_to(split, (*split.shape[:3], problem.num_tokens))
    return full.reshape(sinks.shape[0], problem.num_kv_heads, problem.rows_per_head)
