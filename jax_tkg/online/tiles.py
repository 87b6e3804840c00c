"""What a tile of keys needs beside keys and values: which are seen, the bias, the adjusted logits.

Everything is in the order [B, K, G, T, keys] with broadcast dimensions of size 1; `MaskTiles.row`
gives the same object for one KV head of one sequence, `MaskTiles.tokens` for some of the queries.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Bool, Float, Int, Leaf
from jax_tkg.masks import NO_POSITION, default_query_positions
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem

_FAR = np.iinfo(np.int32).max


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "first", "low", "high"],
    meta_fields=["size", "offset", "in_order"],
)
@dataclass(frozen=True)
class KeyRun:
    """Keys that follow each other: the slots of the cache, or the new keys beside it.

    Attributes:
        positions: `[B, size]`, negative for no token; None where key i of a row is at `first + i`.
        first: `[B]`.
        low, high: `[B, T]`, the positions that each query sees here: low <= position < high.
        size: how many keys.
        offset: where they begin among the S' of mask and bias.
        in_order: key i is at `first + i` or, where `positions` says so, nowhere.
    """

    positions: Leaf | None
    first: Leaf
    low: Leaf
    high: Leaf
    size: int
    offset: int
    in_order: bool

    def at(self, start: Array | int, size: int) -> Int[Array, "B size"]:
        """Positions of `size` keys from `start`."""
        if self.positions is not None:
            return lax.dynamic_slice_in_dim(self.positions, start, size, axis=1)
        return self.first[:, None] + (jnp.arange(size, dtype=jnp.int32) + start)

    def live(self) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """First key and end of the keys of each row that some query may see."""
        seeing, size = self.low < self.high, self.size
        if self.in_order:
            first = self.first[:, None]
            low = jnp.min(jnp.where(seeing, self.low - first, size), axis=1)
            high = jnp.max(jnp.where(seeing, self.high - first, 0), axis=1)
            return jnp.clip(low, 0, size), jnp.clip(high, 0, size)
        positions, index = self.at(0, size), jnp.arange(size, dtype=jnp.int32)
        low = jnp.min(jnp.where(seeing, self.low, _FAR), axis=1)[:, None]
        high = jnp.max(jnp.where(seeing, self.high, 0), axis=1)[:, None]
        near = (positions >= low) & (positions < high)
        first = jnp.min(jnp.where(near, index, size), axis=1)
        return first, jnp.max(jnp.where(near, index + 1, 0), axis=1)

    def full(self) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """A range of keys of each row that every query sees, so that no mask is needed there.

        Empty where that is not known from positions alone.
        """
        if not self.in_order:
            zero = jnp.zeros_like(self.first)
            return zero, zero
        low, high = jnp.max(self.low, axis=1), jnp.min(self.high, axis=1)
        first, end = (jnp.clip(x - self.first, 0, self.size) for x in (low, high))
        if self.positions is not None:  # holes: give up on a row that has one in the range
            index = jnp.arange(self.size, dtype=jnp.int32)
            inside = (index >= first[:, None]) & (index < end[:, None])
            holed = jnp.any(inside & (self.positions == NO_POSITION), axis=1)
            end = jnp.where(holed, first, end)
        return first, jnp.maximum(first, end)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_positions", "cached", "beside", "mask", "bias", "slopes"],
    meta_fields=["problem"],
)
@dataclass(frozen=True)
class MaskTiles:
    """The masks of a call, ready to be cut into tiles.

    Attributes:
        problem: the static part.
        query_positions: `[B, T]`.
        cached: the keys in the cache.
        beside: the new keys beside it, or None.
        mask: `[B|1, K|1, G|1, T|1, S']` or None.
        bias: likewise.
        slopes: of ALiBi, `[B|1, K, G, 1, 1]` or None.
    """

    problem: AttentionProblem
    query_positions: Leaf
    cached: KeyRun
    beside: KeyRun | None
    mask: Leaf | None
    bias: Leaf | None
    slopes: Leaf | None

    @classmethod
    def create(cls, problem: AttentionProblem, ops: Operands) -> "MaskTiles":
        """Fills in the defaults of what the caller left out."""
        new = problem.num_tokens if problem.has_new_kv else 0
        zeros = jnp.zeros((problem.batch,), jnp.int32)
        total = zeros + (problem.kv_len + new) if ops.lengths is None else ops.lengths
        at = ops.query_positions
        if at is None:
            at = default_query_positions(total, problem.num_tokens)
        start = (zeros if ops.starts is None else ops.starts)[:, None]
        slopes = ops.alibi_slopes

        def interval(end: Array) -> tuple[Array, Array]:
            low, high = problem.rule.interval(at, start, end[:, None])
            low, high = (jnp.broadcast_to(x, at.shape) for x in (low, high))
            if ops.key_bounds is None:
                return low, high
            first, behind = ops.key_bounds[..., 0], ops.key_bounds[..., 1]
            return jnp.maximum(low, first), jnp.minimum(high, behind)

        def of_new_keys() -> tuple[Array, Array]:
            low, high = interval(total)
            return low, high if ops.new_seen is None else jnp.where(
                ops.new_seen[:, None], high, low
            )

        return cls(
            problem=problem,
            query_positions=at,
            cached=KeyRun(
                _slot_positions(ops),
                zeros,
                *interval(total - new),
                size=problem.kv_len,
                offset=0,
                in_order=not problem.has_positions,
            ),
            beside=KeyRun(
                at if problem.has_query_positions else None,
                total - new,
                *of_new_keys(),
                size=new,
                offset=problem.kv_len,
                in_order=not problem.has_query_positions,
            )
            if new
            else None,
            mask=None if ops.mask is None else _by_group(ops.mask, problem),
            bias=None if ops.bias is None else _by_group(ops.bias, problem),
            slopes=None if slopes is None else _by_group(slopes[..., None, None], problem),
        )

    @property
    def runs(self) -> tuple[KeyRun, ...]:
        """The cached keys, and those beside them."""
        return (self.cached,) if self.beside is None else (self.cached, self.beside)

    def row(self, batch: Array, head: Array) -> "MaskTiles":
        """The same for one KV head of one sequence: B = K = 1."""

        def pick(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, batch, 1, 0)

        def pick_head(array: Array) -> Array:
            for axis, index in ((0, batch), (1, head)):
                if array.shape[axis] > 1:
                    array = lax.dynamic_slice_in_dim(array, index, 1, axis)
            return array

        rows = (self.query_positions, self.cached, self.beside)
        query_positions, cached, beside = jax.tree.map(pick, rows)
        mask, bias, slopes = jax.tree.map(pick_head, (self.mask, self.bias, self.slopes))
        return MaskTiles(self.problem, query_positions, cached, beside, mask, bias, slopes)

    def tokens(self, start: Array | int, size: int) -> "MaskTiles":
        """The same for `size` queries from `start`: T = size."""

        def pick(array: Array, axis: int = 1) -> Array:
            if array.shape[axis] == 1:
                return array
            return lax.dynamic_slice_in_dim(array, start, size, axis)

        def pick_run(run: KeyRun) -> KeyRun:
            return replace(run, low=pick(run.low), high=pick(run.high))

        return replace(
            self,
            query_positions=pick(self.query_positions),
            cached=pick_run(self.cached),
            beside=None if self.beside is None else pick_run(self.beside),
            mask=None if self.mask is None else pick(self.mask, 3),
            bias=None if self.bias is None else pick(self.bias, 3),
        )

    def tile(
        self, run: KeyRun, start: Array | int, size: int, fresh_from: Array | int
    ) -> tuple[Bool[Array, "#B #K #G #T size"], Float[Array, "#B #K #G #T size"] | None]:
        """Seen keys and bias of `size` keys of a run from `start`.

        Keys before `fresh_from` were in an earlier tile and are not seen again.
        """
        positions = run.at(start, size)[:, None]
        seen = (positions >= run.low[..., None]) & (positions < run.high[..., None])
        if run.size % size:
            seen &= jnp.arange(size, dtype=jnp.int32) + start >= fresh_from
        seen = seen[:, None, None]
        if self.mask is not None:
            seen = seen & lax.dynamic_slice_in_dim(self.mask, run.offset + start, size, axis=4)
        return seen, self.bias_tile(run, start, size)

    def full(self, run: KeyRun) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """As `KeyRun.full`, with the dense mask."""
        zero = jnp.zeros_like(run.first)
        return run.full() if self.mask is None else (zero, zero)

    def bias_tile(
        self, run: KeyRun, start: Array | int, size: int
    ) -> Float[Array, "#B #K #G #T size"] | None:
        """The bias of `size` keys of a run from `start`, or None without one."""
        return self.whole_bias(run, start, self.dense_bias(run, start, size), self.slopes, size)

    def dense_bias(self, run: KeyRun, start: Array | int, size: int) -> Array | None:
        """The part of it that is an operand, in the operand's dtype."""
        if self.bias is None:
            return None
        return lax.dynamic_slice_in_dim(self.bias, run.offset + start, size, axis=4)

    def whole_bias(
        self, run: KeyRun, start: Array | int, dense: Array | None, slopes: Array | None, size: int
    ) -> Float[Array, "#B #K #G #T size"] | None:
        """The sum of a tile of the dense bias and of ALiBi's, a function of both."""
        bias = None if dense is None else dense.astype(jnp.float32)
        if slopes is None:
            return bias
        far = jnp.abs(self.query_positions[..., None] - run.at(start, size)[:, None])
        linear = -slopes.astype(jnp.float32) * far[:, None, None].astype(jnp.float32)
        return linear if bias is None else bias + linear


def _slot_positions(ops: Operands) -> Array | None:
    """`[B, S]`, or None where slot s holds position s."""
    usable = ops.kv.usable()
    if usable is None:
        return ops.key_positions
    slots = jnp.arange(usable.shape[1], dtype=jnp.int32)[None]
    return jnp.where(usable, slots if ops.key_positions is None else ops.key_positions, NO_POSITION)


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
