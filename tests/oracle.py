"""Decode attention in float64, from the documentation of `jax_tkg.attention_tkg` alone.

No code is shared with the package, and there is no tiling, no running maximum and no layout: the
keys of one sequence are put in a list, and each query picks those it sees. `naive` is the yardstick
of the error budget: attention as one would write it in three lines, all in one dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jax_tkg import RotaryEmbedding

Array = np.ndarray


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call as NumPy arrays, by the names they have there.

    Attributes:
        key, value: stored numbers, before their scale: `[B, S, K, H]`, or pages `[P, K, L, H]`.
        page_indices: `[B, pages]`, -1 for none; None if not paged.
    """

    query: Array
    key: Array
    value: Array
    page_indices: Array | None = None
    k_scale: Array | None = None
    v_scale: Array | None = None
    new_key: Array | None = None
    new_value: Array | None = None
    key_value_seq_lengths: Array | None = None
    key_value_seq_starts: Array | None = None
    query_positions: Array | None = None
    key_positions: Array | None = None
    mask: Array | None = None
    bias: Array | None = None
    sinks: Array | None = None
    key_bounds: Array | None = None
    alibi_slopes: Array | None = None
    scale: float | None = None
    is_causal: bool = True
    local_window_size: int | tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    rope: RotaryEmbedding | None = None

    @property
    def slots(self) -> int:
        """S."""
        if self.page_indices is None:
            return int(self.key.shape[1])
        return int(self.page_indices.shape[1] * self.key.shape[2])

    @property
    def kv_heads(self) -> int:
        """K."""
        return int(self.key.shape[2 if self.page_indices is None else 1])

    @property
    def logit_scale(self) -> float:
        """The scale, or its default."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Row:
    """One sequence: its queries, and the keys they may see, cached ones first, then new ones.

    Attributes:
        query: `[T, N, H]` float64, rotated.
        key: `[S', K, H]` float64, scaled, the new ones rotated.
        value: `[S', K, Hv]` float64, scaled.
        seen: bool `[N, T, S']`.
        bias: float64 `[N, T, S']`.
    """

    query: Array
    key: Array
    value: Array
    seen: Array
    bias: Array


class Exact(NamedTuple):
    """Attention in float64, and what its rounding errors scale with.

    Attributes:
        out: `[B, T, N, Hv]`.
        lse: `[B, T, N]`.
        logit: `[B, T, N]`, average magnitude of a query's logits under its attention weights. One
            rounding of every logit moves the LSE by up to `eps / 2 * logit`.
        value: `[B, T, N]`, the largest magnitude among the values that a query sees.
    """

    out: Array
    lse: Array
    logit: Array
    value: Array


def attention(inputs: Inputs) -> Exact:
    """The results for all sequences."""
    return Exact(
        *map(np.stack, zip(*(_row_attention(inputs, r) for r in rows(inputs)), strict=True))
    )


def _row_attention(inputs: Inputs, row: Row) -> Exact:
    tokens, heads, _ = row.query.shape
    group = heads // inputs.kv_heads
    out = np.zeros((tokens, heads, row.value.shape[-1]))
    lse = np.full((tokens, heads), -np.inf)
    size, largest = np.zeros((2, tokens, heads))
    for n in range(heads):
        sharing = slice(n - n % group, n - n % group + group)
        used = np.flatnonzero(row.seen[sharing].any(axis=(0, 1)))  # the others may hold NaN
        key, value = row.key[used, n // group], row.value[used, n // group]
        for t in range(tokens):
            seen, bias = row.seen[n, t, used], row.bias[n, t, used]
            scaled = key @ row.query[t, n] * inputs.logit_scale
            logits = scaled
            if inputs.logits_soft_cap is not None:
                cap = inputs.logits_soft_cap
                logits = cap * np.tanh(scaled / cap)
            logits = np.where(seen, logits + bias, -np.inf)
            sink = -np.inf if inputs.sinks is None else float(inputs.sinks[n])
            top = max(logits.max(initial=-np.inf), sink)
            if top > -np.inf:
                weights = np.exp(logits - top)
                total = weights.sum() + np.exp(sink - top)
                out[t, n] = weights @ value / total
                lse[t, n] = top + np.log(total)
                counts = weights > 0
                sizes = np.abs(scaled[counts]) + np.abs(bias[counts])
                size[t, n] = weights[counts] @ sizes / total
                largest[t, n] = np.abs(value[seen]).max(initial=0.0)
    return Exact(out, lse, size, largest)


def rows(inputs: Inputs, *, round_rotated: bool = False) -> Iterator[Row]:
    """Each sequence; with `round_rotated`, rotated arrays are rounded to the dtype they came in."""
    for b in range(inputs.query.shape[0]):
        query_at, key_at, seen = visible(inputs, b)
        key = _cached(inputs, inputs.key, inputs.k_scale, b)
        value = _cached(inputs, inputs.value, inputs.v_scale, b)
        query = inputs.query[b].astype(np.float64)
        if inputs.rope is not None:
            query = rotated(inputs.rope, query, query_at)
            if round_rotated:
                query = query.astype(inputs.query.dtype).astype(np.float64)
        if inputs.new_key is not None:
            assert inputs.new_value is not None
            new = inputs.new_key[b].astype(np.float64)
            if inputs.rope is not None:
                new = rotated(inputs.rope, new, query_at)
                if round_rotated:
                    new = new.astype(inputs.new_key.dtype).astype(np.float64)
            key = np.concatenate([key, new])
            value = np.concatenate([value, inputs.new_value[b].astype(np.float64)])
        bias = np.zeros(())
        if inputs.bias is not None:
            bias = _of_row(inputs.bias, b).astype(np.float64)
        if inputs.alibi_slopes is not None:
            distance = np.abs(query_at[:, None] - key_at)
            bias = bias - inputs.alibi_slopes.astype(np.float64)[:, None, None] * distance
        yield Row(query, key, value, seen, np.broadcast_to(bias, seen.shape))


def visible(inputs: Inputs, b: int) -> tuple[Array, Array, Array]:
    """Positions of the queries `[T]` and keys `[S']` of row b, and who sees whom `[N, T, S']`."""
    _, tokens, heads, _ = inputs.query.shape
    beside = tokens if inputs.new_key is not None else 0
    length = inputs.slots + beside
    if inputs.key_value_seq_lengths is not None:
        length = int(inputs.key_value_seq_lengths[b])
    start = 0
    if inputs.key_value_seq_starts is not None:
        start = int(inputs.key_value_seq_starts[b])
    query_at = np.arange(length - tokens, length)
    if inputs.query_positions is not None:
        query_at = inputs.query_positions[b].astype(np.int64)
    cached_at = np.arange(inputs.slots)
    if inputs.key_positions is not None:
        cached_at = inputs.key_positions[b].astype(np.int64)
    live = (cached_at >= max(start, 0)) & (cached_at < length - beside)
    if inputs.page_indices is not None:
        page_len = inputs.key.shape[2]
        for page, index in enumerate(inputs.page_indices[b]):
            if index < 0:
                live[page * page_len : (page + 1) * page_len] = False
    key_at = cached_at
    if beside:
        key_at = np.concatenate([cached_at, query_at])
        live = np.concatenate([live, (query_at >= max(start, 0)) & (query_at < length)])

    window = inputs.local_window_size
    left, right = window if isinstance(window, tuple) else (window, window)
    seen = np.zeros((heads, tokens, len(key_at)), bool)
    for t, here in enumerate(query_at):
        near = live.copy()
        if inputs.is_causal:
            near &= key_at <= here
        if left is not None:
            near &= key_at >= here - left
        if right is not None:
            near &= key_at <= here + right
        if inputs.key_bounds is not None:
            first, behind = inputs.key_bounds[b, t]
            near &= (key_at >= first) & (key_at < behind)
        seen[:, t] = near
    if inputs.mask is not None:
        seen &= _of_row(inputs.mask, b)
    return query_at, key_at, seen


def rotated(rope: RotaryEmbedding, heads: Array, positions: Array) -> Array:
    """`[T, heads, H]` turned: pair i of R by `position * base ** (-i / R)`; float64."""
    width = heads.shape[-1] if rope.rotary_dim is None else rope.rotary_dim
    pairs = width // 2
    out = heads.copy()
    for i in range(pairs):
        x, y = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + pairs)
        angle = positions[:, None] * rope.base ** (-i / pairs)
        out[..., x] = heads[..., x] * np.cos(angle) - heads[..., y] * np.sin(angle)
        out[..., y] = heads[..., x] * np.sin(angle) + heads[..., y] * np.cos(angle)
    return out


def _cached(inputs: Inputs, stored: Array, scale: Array | None, b: int) -> Array:
    """Keys or values `[S, K, H]` of row b: stored numbers times the scale of their head."""
    if inputs.page_indices is None:
        row = stored[b].astype(np.float64)
    else:
        pages = [stored[max(i, 0)].astype(np.float64) for i in inputs.page_indices[b]]
        row = np.concatenate(pages, axis=1).swapaxes(0, 1)
    if scale is not None:
        row *= np.broadcast_to(scale, (row.shape[1],)).astype(np.float64)[:, None]
    return row


def _of_row(array: Array, b: int) -> Array:
    return array[b if array.shape[0] > 1 else 0]


# The yardstick


def naive(inputs: Inputs, dtype: np.dtype) -> tuple[Array, Array]:
    """Einsum, softmax, einsum on keys and values decoded into `dtype`, every result rounded to it.

    Sums are made in float32 at least, as matrix units and XLA do.
    """
    results = [_row_naive(inputs, row, dtype) for row in rows(inputs, round_rotated=True)]
    return np.stack([out for out, _ in results]), np.stack([lse for _, lse in results])


def _row_naive(inputs: Inputs, row: Row, dtype: np.dtype) -> tuple[Array, Array]:
    def rounded(x: Array) -> Array:
        return x.astype(dtype).astype(np.float32)

    tokens, heads, width = row.query.shape
    kv_heads = inputs.kv_heads
    used = row.seen.reshape(kv_heads, -1, row.seen.shape[-1]).any(axis=1)[..., None]
    key, value = (
        rounded(np.where(used, x.swapaxes(0, 1), 0))  # padding may hold NaN
        for x in (row.key, row.value)
    )
    query = rounded(row.query.swapaxes(0, 1)).reshape(kv_heads, -1, width)
    logits = rounded(query @ key.swapaxes(1, 2)).reshape(row.seen.shape)
    logits = rounded(logits * np.float32(inputs.logit_scale))
    if inputs.logits_soft_cap is not None:
        cap = np.float32(inputs.logits_soft_cap)
        logits = rounded(cap * rounded(np.tanh(rounded(logits / cap))))
    logits = np.where(row.seen, rounded(logits + rounded(row.bias)), -np.inf)
    sinks = np.full(heads, -np.inf) if inputs.sinks is None else inputs.sinks
    sink = np.broadcast_to(rounded(sinks)[:, None, None], (heads, tokens, 1))
    logits = np.concatenate([logits, sink], -1, dtype=np.float32)
    top = logits.max(-1, keepdims=True)
    empty = top == -np.inf
    weights = rounded(np.exp(rounded(logits - np.where(empty, 0, top))))
    total = np.where(empty, 1, rounded(weights.sum(-1, keepdims=True)))
    weights = rounded(weights / total)[..., :-1]
    out = rounded(weights.reshape(kv_heads, -1, value.shape[1]) @ value)
    out = out.reshape(heads, tokens, -1).swapaxes(0, 1)
    lse = np.where(empty, -np.inf, rounded(top + rounded(np.log(total))))[..., 0].T
    return out.astype(np.float64), lse.astype(np.float64)
