"""Prefill problems as the kernel takes them, and their answers in float64, one row at a time.

Nothing here knows of tiles: every query has a list of keys that it sees.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_tkg.nki import interpreter
from jax_tkg.nki.buffers import MASKED
from jax_tkg.nki.cte.kernel import attention_cte
from jax_tkg.nki.cte.live import live_ranges, tile_starts
from jax_tkg.nki.cte.plan import UNROLLED_STEPS, PrefillPlan, make_plan
from jax_tkg.nki.cte.tiles import KeySource, paged_run
from jax_tkg.nki.rope_call import rotary_table
from jax_tkg.rope import RotaryEmbedding
from tests.cases import DTYPES
from tests.nki.test_rope_kernel import exact_rotation

Array = np.ndarray
NAMES = (
    "query", "key", "value", "bounds", "query_at", "positions", "holes", "page_rows", "unseen",
    "logit_scales", "value_scales", "new_key", "new_value", "new_bounds", "new_query_at",
    "new_positions", "new_unseen", "sinks", "slopes", "hidden", "bias", "live", "tile_starts",
    "new_live", "new_tile_starts", "rotary_table", "query_positions",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What is asked; letters as in the plan, S the slots of the cache.

    Attributes:
        batch, tokens, slots, heads, kv_heads, head_dim, value_head_dim: B T S N K H Hv.
        dtype: name of that of queries, and of what is computed.
        stored: name of that of the cache, if another; 8-bit ones have scales.
        layout, page_len: of the cache.
        causal: bottom-right aligned.
        window: (left, right).
        lengths: tokens of each row, new ones included; slots behind them are NaN.
        packed: the queries of a row belong to sequences of these lengths, one after another.
        beside: T new keys beside the cache.
        ring: slots hold positions in a rotated order.
        live: what of the cache is loaded is found out at run time.
        looped: loops at run time over row blocks and key tiles, however few.
        holes: every fifth slot, or page, holds nothing.
        rope: rotates queries and new keys.
        sinks, alibi, bias, mask, cap, scale, normalize, programs: see the plan. `bias` and `mask`
            are the sizes of their first three dimensions.
        growth: how much larger the last keys are than the first.
    """

    batch: int = 1
    tokens: int = 144
    slots: int = 144
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    value_head_dim: int = 32
    dtype: str = "float32"
    stored: str | None = None
    layout: str = "BKSH"
    page_len: int = 0
    causal: bool = True
    window: tuple[int | None, int | None] = (None, None)
    lengths: tuple[int, ...] | None = None
    packed: tuple[int, ...] = ()
    beside: bool = False
    ring: bool = False
    holes: bool = False
    live: bool = False
    looped: bool = False
    sinks: bool = False
    alibi: bool = False
    rope: RotaryEmbedding | None = None
    bias: tuple[int, int, int] | None = None
    mask: tuple[int, int, int] | None = None
    cap: float | None = None
    scale: float = 0.125
    normalize: bool = True
    programs: int = 1
    growth: float = 4.0

    @property
    def is_static(self) -> bool:
        """Causality and window say all there is to know."""
        return self.lengths is None and not self.packed and not self.ring

    @property
    def rotary(self) -> str | None:
        """As the plan calls it."""
        if self.rope is None:
            return None
        return "interleaved" if self.rope.interleaved else "half"

    @property
    def total(self) -> Array:
        """Tokens of each row."""
        if self.lengths is not None:
            return np.array(self.lengths)
        return np.full(self.batch, self.slots + (self.tokens if self.beside else 0))

    def sources(self) -> tuple[KeySource, ...]:
        """What the plan knows of the keys."""
        left, right = self.window
        after = 0 if self.causal else right
        if self.causal and right is not None:
            after = min(0, right)
        # Slot of the first query, where it is known.
        first = self.slots - (0 if self.beside else self.tokens)
        exact = self.is_static
        cache = KeySource(
            self.slots,
            self.layout,
            before=first - left if left is not None and exact else None,
            after=None if self.beside or after is None or self.ring else first + after,
            is_exact=exact,
            has_positions=self.ring,
            has_holes=self.holes,
            is_padded=not exact or left is not None or self.mask is not None or self.holes,
            has_scales=self.stored is not None and DTYPES[self.stored].itemsize == 1,
            page_len=self.page_len,
            is_live=self.live,
        )
        if not self.beside:
            return (cache,)
        new = KeySource(
            self.tokens,
            "BSKH",
            before=None if left is None else -left,
            after=after,
            is_exact=exact,
            is_padded=not exact or left is not None or self.mask is not None,
        )
        return cache, new

    def plan(self) -> PrefillPlan:
        """The kernel's plan."""
        return make_plan(
            batch=self.batch, tokens=self.tokens, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, value_head_dim=self.value_head_dim, sources=self.sources(),
            scale=self.scale, itemsize=DTYPES[self.dtype].itemsize, soft_cap=self.cap,
            has_sinks=self.sinks, has_mask=self.mask is not None, has_bias=self.bias is not None,
            has_alibi=self.alibi, rotary=self.rotary, normalize=self.normalize,
            programs=self.programs, unrolled_steps=0 if self.looped else UNROLLED_STEPS,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What float64 gives, and what rounding errors scale with.

    Attributes:
        out, lse: as the kernel's; before the division `out` is multiplied by the sum.
        logit: average magnitude of a query's logits under its weights `[B, T, N]`.
        value: the largest magnitude among the values that a query sees `[B, T, N]`.
        naive_out, naive_lse: all at once with every result rounded to the query's dtype; the
            log-sum-exp to float32.
    """

    out: Array
    lse: Array
    logit: Array
    value: Array
    naive_out: Array
    naive_lse: Array


class Case:
    """A problem with numbers in it: keys grow along the row, what nobody sees is NaN."""

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        self.random = np.random.default_rng(7)
        b, t, s, k = p.batch, p.tokens, p.slots, p.kv_heads
        self.group = p.heads // k
        self.query = self._normal(b, t, p.heads, p.head_dim).astype(DTYPES[p.dtype])
        beside = t if p.beside else 0
        size = 0.5 * (1 + (p.growth - 1) * np.arange(s + beside) / (s + beside))
        keys = self._normal(b, s + beside, k, p.head_dim) * size[:, None, None]
        values = self._normal(b, s + beside, k, p.value_head_dim)
        self.query_at = p.total[:, None] - t + np.arange(t)
        self.key_at = np.broadcast_to(np.arange(s), (b, s))
        if p.ring:
            self.key_at = np.stack([np.roll(np.arange(s), 5 + row) for row in range(b)])
        self.live = (self.key_at < (p.total - beside)[:, None]) & (self.key_at >= 0)
        self.filled = np.ones((b, s), bool)
        if p.holes:
            self.filled[:, np.arange(s) // max(p.page_len, 1) % 5 == 2] = False
        self.live &= self.filled
        if p.beside:
            self.key_at = np.concatenate([self.key_at, self.query_at], 1)
            self.live = np.concatenate([self.live, self.query_at >= 0], 1)
        self.slopes = 2.0 ** -np.arange(1, p.heads + 1).astype(np.float32)
        self.sinks = self._normal(p.heads).astype(np.float32)
        self.sinks[-1] = 60  # far above all logits: its square would overflow
        self.low, self.high = self._bounds()
        self.mask = np.ones((1, 1, 1, s + beside), bool)
        if p.mask is not None:
            self.mask = self.random.random((*p.mask, s + beside)) < 0.6
        self.bias = np.zeros((1, 1, 1, s + beside), np.float32)
        if p.bias is not None:
            self.bias = self._normal(*p.bias, s + beside).astype(np.float32)
        at = self.key_at[:, None]
        seen = self.live[:, None] & (at >= self.low[..., None]) & (at < self.high[..., None])
        self.seen: Array = np.asarray(seen[:, None] & self.mask)  # [B, N|1, T, S']
        full = np.broadcast_to(self.seen, (b, p.heads, t, s + beside))
        self.unseen: Array = np.asarray(~full.reshape(b, k, -1, s + beside).any(2))  # [B, K, S']
        self._store(keys, values)
        self.exact_query = self.query.astype(np.float64)
        if p.rope is not None:
            self.exact_query = exact_rotation(p.rope, self.exact_query, self.query_at)
            self.keys[:, s:] = exact_rotation(p.rope, self.keys[:, s:], self.query_at)
        # What naive attention starts from: what was rotated is rounded, as all else was.
        self.naive_query = self.exact_query.astype(DTYPES[p.dtype])
        self.naive_keys = self.keys.copy()
        self.naive_keys[:, s:] = self.keys[:, s:].astype(DTYPES[p.dtype])

    def _normal(self, *shape: int) -> Array:
        return self.random.normal(size=shape)

    def _bounds(self) -> tuple[Array, Array]:
        """Of each query: the first position it sees, and the one behind the last."""
        p, at = self.problem, self.query_at
        low, high = np.zeros_like(at), np.broadcast_to(p.total[:, None], at.shape)
        left, right = p.window
        if p.causal:
            high = np.minimum(high, at + 1)
        if left is not None:
            low = np.maximum(low, at - left)
        if right is not None:
            high = np.minimum(high, at + right + 1)
        if p.packed:
            starts = np.repeat(np.cumsum((0, *p.packed[:-1])), p.packed)
            ends = np.repeat(np.cumsum(p.packed), p.packed)
            low, high = np.maximum(low, starts), np.minimum(high, ends)
        return low, high

    def _store(self, keys: Array, values: Array) -> None:
        """The cache in its layout and dtype, and the numbers that it then holds."""
        p, s = self.problem, self.problem.slots
        stored = DTYPES[p.stored or p.dtype]
        self.k_scale, self.v_scale = 1 + self.random.random((2, p.batch, p.kv_heads))
        has_scales = stored.itemsize == 1
        if not has_scales:
            self.k_scale, self.v_scale = np.ones((2, p.batch, p.kv_heads))
        if stored == np.int8:
            keys[:, :s], values[:, :s] = 20 * keys[:, :s], 20 * values[:, :s]
            self.k_scale, self.v_scale = self.k_scale / 20, self.v_scale / 20
        cached = []
        for numbers, scale in ((keys, self.k_scale), (values, self.v_scale)):
            cache = numbers[:, :s]
            cache = np.clip(np.rint(cache), -127, 127) if stored == np.int8 else cache
            cached.append(cache.astype(stored))
            numbers[:, :s] = cached[-1].astype(np.float64) * scale[:, None, :, None]
            numbers[:, s:] = numbers[:, s:].astype(DTYPES[p.dtype])
        self.keys, self.values = keys, values  # float64, as stored
        self.new = [x[:, s:].astype(DTYPES[p.dtype]) for x in (keys, values)]
        hidden = self.unseen.transpose(0, 2, 1)[..., None]
        if stored.kind != "i":
            for x, n in zip(cached, self.new, strict=True):
                x[...] = np.where(hidden[:, :s], np.nan, x.astype(np.float32))
                n[...] = np.where(hidden[:, s:], np.nan, n.astype(np.float32))
        self.cached = [self._laid_out(x, i) for i, x in enumerate(cached)]

    def _laid_out(self, array: Array, which: int) -> Array:
        p = self.problem
        if p.layout == "paged":
            b, s, k, width = array.shape
            pages = array.reshape(b * s // p.page_len, p.page_len, k, width).transpose(0, 2, 1, 3)
            order = np.random.default_rng(1).permutation(len(pages))
            self.pages = np.argsort(order).reshape(b, -1)
            return np.ascontiguousarray(pages[order])
        axes = {"BSKH": (0, 1, 2, 3), "BKSH": (0, 2, 1, 3), "BKHS": (0, 2, 3, 1)}[p.layout]
        if which == 1 and p.layout == "BKHS":
            axes = (0, 2, 1, 3)
        return np.ascontiguousarray(array.transpose(axes))

    def arrays(self) -> dict[str, Array | None]:
        """The kernel's arguments by name."""
        p, s = self.problem, self.problem.slots
        given: dict[str, Any] = dict.fromkeys(NAMES)
        given |= {"query": self.query, "key": self.cached[0], "value": self.cached[1]}
        end = np.minimum(self.high, (p.total - (p.tokens if p.beside else 0))[:, None])
        plan = p.plan()
        self._add_live(given, plan, 0, self.low, end)
        given["bounds"] = np.stack([self.low, end]).astype(np.float32)
        sources = p.sources()
        flags = self.unseen.astype(np.uint8)
        if sources[0].is_padded:
            given["unseen"] = flags[:, :, :s]
        if p.ring:
            given["positions"] = self.key_at[:, :s].astype(np.int32)
        if p.holes:
            given["holes"] = np.where(self.filled, 0, MASKED).astype(ml_dtypes.bfloat16)
        if sources[0].has_scales:
            given["logit_scales"] = (p.scale * self.k_scale).astype(np.float32).reshape(-1)
            given["value_scales"] = self.v_scale.astype(np.float32).reshape(-1)
        if p.layout == "paged":
            run = paged_run(p.page_len, p.plan().tile_keys)
            runs = p.page_len // run
            head = np.arange(p.kv_heads)[None, :, None, None]
            rows = (self.pages[:, None, :, None] * p.kv_heads + head) * runs + np.arange(runs)
            given["page_rows"] = rows.reshape(p.batch, p.kv_heads, -1).astype(np.int32)
        if p.beside:
            given["new_key"], given["new_value"] = self.new
            first = self.query_at[:, :1]
            bounds = np.stack([self.low, self.high]) - first
            given["new_bounds"] = np.maximum(bounds, -first).astype(np.float32)
            self._add_live(given, plan, 1, *bounds)
            given["new_query_at"] = (self.query_at - first).astype(np.float32)
            if sources[1].is_padded:
                given["new_unseen"] = flags[:, :, s:]
        if p.rope is not None:
            given["rotary_table"] = rotary_table(p.rope, p.head_dim)
            given["query_positions"] = self.query_at.astype(np.int32)
        if p.alibi:
            given["query_at"] = self.query_at.astype(np.float32)
            given["slopes"] = self.slopes[None]
        else:
            given["new_query_at"] = None
        if p.sinks:
            given["sinks"] = self.sinks[None]
        if p.mask is not None:
            given["hidden"] = (~self.mask).astype(np.uint8)
        if p.bias is not None:
            given["bias"] = self.bias
        return given

    def _add_live(
        self, given: dict[str, Any], plan: PrefillPlan, s: int, low: Array, high: Array
    ) -> None:
        """Which tiles of a source a loop visits, if there is one."""
        source, prefix = plan.sources[s], "new_" if s else ""
        if source.live_tiles:
            if source.has_positions:
                low, high = np.zeros_like(low), np.full_like(high, source.slots)
            ranges = live_ranges(jnp.array(low), jnp.array(high), plan, source)
            given[f"{prefix}live"] = np.asarray(ranges)
            given[f"{prefix}tile_starts"] = np.asarray(tile_starts(plan, source))

    def run(self, **options: Any) -> interpreter.Run:
        """Launches the kernel."""
        p = self.problem
        return interpreter.run(
            attention_cte, *self.arrays().values(), p.plan(), programs=p.programs, **options
        )

    @cached_property
    def answer(self) -> Answer:
        """In float64, one head of one sequence at a time."""
        p = self.problem
        rows = (p.batch, p.tokens, p.heads)
        out, naive_out = np.zeros((2, *rows, p.value_head_dim))
        lse, naive_lse = np.full((2, *rows), -np.inf)
        logit, value = np.zeros((2, *rows))
        for b in range(p.batch):
            for n in range(p.heads):
                k = n // self.group
                seen = np.broadcast_to(self.seen[b], (p.heads, *self.seen.shape[2:]))[n]
                unseen = self.unseen[b, k][:, None]
                key, naive_key, v = (
                    np.where(unseen, 0, x[b, :, k])
                    for x in (self.keys, self.naive_keys, self.values)
                )
                rest = (v, seen, self._bias_of(b, n), self._sink(n), p)
                exact = softmax_rows(self.exact_query[b, :, n], key, *rest, None)
                out[b, :, n], lse[b, :, n], logit[b, :, n] = exact
                args = (self.naive_query[b, :, n], naive_key, *rest)
                value[b, :, n] = np.where(seen, np.abs(v).max(1), 0).max(1)
                naive_out[b, :, n], _, _ = softmax_rows(*args, DTYPES[p.dtype])
                _, naive_lse[b, :, n], _ = softmax_rows(*args, np.dtype(np.float32))
        return Answer(out, lse, logit, value, naive_out, naive_lse)

    def _bias_of(self, b: int, n: int) -> Array:
        """All that is added to the logits of a head: `[T, S']`."""
        p = self.problem
        shape = (p.batch, p.heads, p.tokens, self.key_at.shape[1])
        bias = np.broadcast_to(self.bias, shape)[b, n].astype(np.float64)
        if p.alibi:
            far = np.abs(self.query_at[b][:, None] - self.key_at[b])
            bias = bias - float(self.slopes[n]) * far
        return bias

    def _sink(self, n: int) -> float:
        return float(self.sinks[n]) if self.problem.sinks else -np.inf


def softmax_rows(
    query: Array, key: Array, value: Array, seen: Array, bias: Array, sink: float, p: Problem,
    dtype: np.dtype | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Output, log-sum-exp and size of the logits; every result rounded to `dtype`, None for none.

    Before the division where the problem says so.
    """

    def rounded(x: Array) -> Array:
        return x if dtype is None else x.astype(dtype).astype(np.float32)

    query, key, value = (rounded(x.astype(np.float64)) for x in (query, key, value))
    raw = rounded(rounded(query @ key.T) * (p.scale if dtype is None else np.float32(p.scale)))
    logits = raw
    if p.cap is not None:
        logits = rounded(p.cap * rounded(np.tanh(rounded(raw / p.cap)))).astype(raw.dtype)
    logits = np.where(seen, rounded(logits + rounded(bias)), -np.inf)
    top = np.maximum(logits.max(1), rounded(np.array(sink)))
    empty = top == -np.inf
    top = np.where(empty, 0, top)
    weights = rounded(np.exp(rounded(logits - top[:, None])))
    total = rounded(weights.sum(1) + np.exp(sink - top))
    divisor = np.where(empty, 1, total)
    out = rounded(rounded(weights / divisor[:, None]) @ value)
    sizes = np.where(weights > 0, np.abs(raw) + np.abs(bias), 0)
    size = (weights * sizes).sum(1) / divisor
    with np.errstate(divide="ignore"):
        lse = np.where(empty, -np.inf, rounded(top + rounded(np.log(divisor))))
    return out, lse, size


FACTOR = 2.0
"""How much worse than naive attention in the same dtype the kernel may be."""


def excess(case: Case, **options: Any) -> float:
    """The largest error in units of what is allowed: 1 is the limit. Inf for NaN, wrong empty rows.

    Allowed: twice the error of naive attention in the same dtype, and one rounding of the result
    and, to float32, of the logits.
    """
    p, want = case.problem, case.answer
    outputs = [np.asarray(x).astype(np.float64) for x in case.run(**options).outputs]
    if p.rope is not None and not is_rotated(case, outputs.pop()):
        return np.inf
    out, lse = outputs[0], outputs[1]
    if not p.normalize:
        largest, total = outputs[1:]
        if not np.isfinite(largest).all():
            return np.inf
        with np.errstate(divide="ignore"):
            lse = np.where(total > 0, largest + np.log(total), -np.inf)
        out = out / np.where(total > 0, total, 1)[..., None]
    seen = np.isfinite(want.lse)
    if np.isnan(out).any() or not np.array_equal(np.isfinite(lse), seen):
        return np.inf
    if (out[want.value == 0] != 0).any():
        return np.inf
    eps, eps32 = float(ml_dtypes.finfo(DTYPES[p.dtype]).eps), float(np.finfo(np.float32).eps)
    free = np.max((eps / 2 + eps32 * want.logit) * want.value)
    free_lse = eps32 * np.max((np.abs(want.lse) + want.logit)[seen] / 2, initial=1)
    return max(
        _ratio(out - want.out, want.naive_out - want.out, free),
        _ratio(lse[seen] - want.lse[seen], want.naive_lse[seen] - want.lse[seen], free_lse),
    )


def is_rotated(case: Case, found: Array) -> bool:
    """Whether the new keys that somebody sees were rotated in float32 and rounded once."""
    slots = case.problem.slots
    seen = ~case.unseen[:, :, slots:].transpose(0, 2, 1)
    exact, eps = case.keys[:, slots:][seen], float(ml_dtypes.finfo(DTYPES[case.problem.dtype]).eps)
    size = np.abs(exact).max(initial=0)
    budget = np.abs(exact) * eps / 2 + 8 * size * float(np.finfo(np.float32).eps)
    return bool((np.abs(found[seen] - exact) <= budget).all())


def _ratio(error: Array, naive: Array, free: float) -> float:
    if not error.any():
        return 0.0
    largest = np.abs(error).max() / (FACTOR * np.abs(naive).max() + free)
    mean = np.sqrt(np.mean(error**2)) / (FACTOR * np.sqrt(np.mean(naive**2)) + free)
    return float(max(largest, mean))


def variant(problem: Problem, **changes: Any) -> Case:
    """A case of a problem with changes."""
    return Case(replace(problem, **changes))
