"""From a problem and its operands to a launch of the prefill kernel: arrays, plan and results."""

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array
from jax_tkg.cache import storage
from jax_tkg.cache.paged import Paged
from jax_tkg.masks import NO_POSITION, default_query_positions
from jax_tkg.nki.arguments import Launch, Named, biases, has_scales, page_rows
from jax_tkg.nki.rope_call import rotary_table
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import HIGHEST

if TYPE_CHECKING:
    from jax_tkg.nki.cte.plan import PrefillPlan
    from jax_tkg.nki.cte.tiles import KeySource

LAYOUTS = ("BSKH", "BKSH", "BKHS", "paged")
MAX_HEAD_DIM = 256
MAX_SLOTS = 1 << 24
"""Slots are compared in float32, which holds all integers up to here."""


def prefill_limits(problem: AttentionProblem) -> str | None:
    """What the kernel cannot do of a problem, in words; None if it can do all."""
    if problem.kv.name not in LAYOUTS:
        return f"the kernel takes caches in {', '.join(LAYOUTS)}, not {problem.kv.name}"
    if max(problem.head_dim, problem.value_head_dim) > MAX_HEAD_DIM:
        return (
            f"head_dim {problem.head_dim} of keys and {problem.value_head_dim} of values; the "
            f"kernel takes at most {MAX_HEAD_DIM}"
        )
    if problem.kv_len > MAX_SLOTS:
        return f"S = {problem.kv_len} cache slots; the kernel takes at most {MAX_SLOTS}"
    return None


def plan_prefill(
    problem: AttentionProblem, programs: int, *, has_scales: bool = False
) -> "PrefillPlan":
    """The kernel's plan of a problem."""
    from jax_tkg.nki.cte.plan import make_plan

    rope = problem.rope
    return make_plan(
        batch=problem.batch,
        tokens=problem.num_tokens,
        heads=problem.num_heads,
        kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        value_head_dim=problem.value_head_dim,
        sources=key_sources(problem, has_scales=has_scales),
        scale=float(problem.scale),
        itemsize=problem.compute_dtype.itemsize,
        soft_cap=problem.logits_soft_cap,
        has_sinks=problem.has_sinks,
        has_mask=problem.mask is not None,
        has_bias=problem.bias is not None,
        has_alibi=problem.has_alibi,
        rotary=None if rope is None else "interleaved" if rope.interleaved else "half",
        normalize=problem.normalize,
        programs=programs,
    )


def key_sources(problem: AttentionProblem, *, has_scales: bool) -> tuple["KeySource", ...]:
    """What is known, before the arrays are, of the keys in the cache and of the new ones beside it.

    Lengths move queries only towards the start of the row: what they cannot see by causality where
    all slots are filled they cannot see at all.
    """
    from jax_tkg.nki.cte.tiles import KeySource

    rule, beside, tokens = problem.rule, problem.has_new_kv, problem.num_tokens
    window_left = None if rule.window is None else rule.window.left
    window_right = None if rule.window is None else rule.window.right
    ahead = 0 if rule.causal else window_right
    in_order = not problem.has_query_positions
    slots_are_positions, has_holes = not problem.has_positions, problem.kv.has_holes
    all_given = not (problem.has_lengths or problem.has_starts or problem.has_key_bounds)
    every_query_sees_itself = all_given and in_order and problem.mask is None
    first_query = problem.kv_len - (0 if beside else tokens)

    before = after = None
    if in_order and slots_are_positions:
        if window_left is not None and not problem.has_lengths:
            before = first_query - window_left
        if ahead is not None and not beside:
            after = first_query + ahead
    covered = every_query_sees_itself and slots_are_positions and first_query == 0
    covered = covered and not has_holes
    # Where causality says little of what is seen before the arrays are there, these may say much.
    says_little = beside or problem.has_key_bounds or not in_order or 2 * tokens <= problem.kv_len
    is_live = not (all_given and in_order) and says_little
    cache = KeySource(
        problem.kv_len,
        problem.kv.name,
        before=before,
        after=after,
        is_exact=all_given and in_order and slots_are_positions,
        has_positions=not slots_are_positions,
        has_holes=has_holes and slots_are_positions,
        is_padded=problem.is_padded and not covered,
        has_scales=has_scales,
        page_len=problem.kv.slot_multiple if problem.kv.name == "paged" else 0,
        is_live=is_live and slots_are_positions,
    )
    if not beside:
        return (cache,)
    new = KeySource(
        tokens,
        "BSKH",
        before=-window_left if window_left is not None and in_order else None,
        after=ahead if in_order else None,
        is_exact=all_given and in_order,
        has_positions=not in_order,
        is_padded=problem.is_padded and not every_query_sees_itself,
    )
    return cache, new


def make_launch(problem: AttentionProblem, ops: Operands, programs: int) -> Launch:
    """The launch of the prefill kernel for a problem."""
    from jax_tkg.nki.cte.kernel import attention_cte

    plan: Any = plan_prefill(problem, programs, has_scales=has_scales(ops))
    given = kernel_arguments(problem, ops, plan)
    names = inspect.signature(attention_cte).parameters
    arrays = {name: given[name] for name in names if name in given}
    rows = (problem.batch, problem.num_tokens, problem.num_heads)
    wide = (*rows, problem.value_head_dim)
    of_row = jax.ShapeDtypeStruct(rows, np.float32)
    result = [jax.ShapeDtypeStruct(wide, problem.compute_dtype), of_row]
    if not problem.normalize:
        result = [jax.ShapeDtypeStruct(wide, np.float32), of_row, of_row]
    if problem.rope is not None:
        result.append(jax.ShapeDtypeStruct(arrays["new_key"].shape, problem.compute_dtype))
    return Launch(
        kernel=Named(attention_cte, tuple(arrays)),
        arrays=tuple(arrays.values()),
        result=tuple(result),
        plan=plan,
    )


def kernel_arguments(
    problem: AttentionProblem, ops: Operands, plan: "PrefillPlan"
) -> dict[str, Array]:
    """The arrays the kernel takes, by name; what the problem does not have is left out.

    Queries and new keys come in the dtype that the kernel computes in. For the meaning of each see
    `jax_tkg.nki.cte.state`.
    """
    arrays: dict[str, Any] = {
        "query": ops.query.astype(problem.compute_dtype),
        "sinks": None if ops.sinks is None else jnp.minimum(_float32(ops.sinks), HIGHEST),
        "slopes": None if ops.alibi_slopes is None else _float32(ops.alibi_slopes),
        "hidden": None if ops.mask is None else (~ops.mask).astype(jnp.uint8),
        "bias": None if ops.bias is None else biases(ops.bias),
    }
    beside = problem.num_tokens if problem.has_new_kv else 0
    zeros = jnp.zeros((problem.batch,), jnp.int32)
    total = zeros + (problem.kv_len + beside) if ops.lengths is None else ops.lengths
    at = ops.query_positions
    if at is None:
        at = default_query_positions(total, problem.num_tokens)
    arrays |= _cache_arrays(problem, ops, plan, at, total - beside)
    if beside:
        arrays |= _new_arrays(problem, ops, plan, at, total)
    if problem.rope is not None:
        table = rotary_table(problem.rope, problem.head_dim)
        arrays |= {"rotary_table": jnp.asarray(table), "query_positions": ops.rotary_positions}
    return {name: array for name, array in arrays.items() if array is not None}


def _cache_arrays(
    problem: AttentionProblem, ops: Operands, plan: "PrefillPlan", at: Array, end: Array
) -> dict[str, Any]:
    from jax_tkg.nki.cte.tiles import paged_run

    source, kv = plan.sources[0], ops.kv
    low, high = _bounds(problem, ops, at, end)
    positions = _slot_positions(ops) if source.has_positions else None
    arrays: dict[str, Any] = {
        "key": storage.logical(kv.key, kv.dtype),
        "value": storage.logical(kv.value, kv.dtype),
        "bounds": _float32(jnp.stack([low, high])),
        "query_at": _float32(at) if problem.has_alibi else None,
        "positions": positions,
        "holes": _holes(ops) if source.has_holes else None,
    }
    if isinstance(kv, Paged):
        # Missing pages are read, as some page, and masked as holes.
        readable = replace(kv, page_indices=jnp.maximum(kv.page_indices, 0))
        run = paged_run(source.page_len, plan.tile_keys)
        arrays["page_rows"] = page_rows(readable, run)
    arrays |= _live_arrays(plan, source, low, high, "")
    if source.is_padded:
        mask = None if ops.mask is None else ops.mask[..., : problem.kv_len]
        unseen = _unseen(problem, low, high, positions, mask, problem.kv_len)
        if source.has_holes:
            unseen = jnp.maximum(unseen, (arrays["holes"][:, None] < 0).astype(jnp.uint8))
        arrays["unseen"] = unseen
    if source.has_scales:
        pairs = (problem.batch, problem.num_kv_heads)
        for name, scale, factor in (
            ("logit_scales", kv.k_scale, problem.scale),
            ("value_scales", kv.v_scale, 1.0),
        ):
            full = jnp.float32(factor) * (jnp.float32(1) if scale is None else _float32(scale))
            arrays[name] = jnp.broadcast_to(full, pairs).reshape(-1)
    return arrays


def _live_arrays(
    plan: "PrefillPlan", source: "KeySource", low: Array, high: Array, prefix: str
) -> dict[str, Array]:
    """Which tiles of a source a loop visits, if there is one; all where positions are given."""
    if not source.live_tiles:
        return {}
    from jax_tkg.nki.cte.live import live_ranges, tile_starts

    if source.has_positions:
        low, high = jnp.zeros_like(low), jnp.full_like(high, source.slots)
    live = live_ranges(low, high, plan, source)
    return {f"{prefix}live": live, f"{prefix}tile_starts": tile_starts(plan, source)}


def _new_arrays(
    problem: AttentionProblem, ops: Operands, plan: "PrefillPlan", at: Array, total: Array
) -> dict[str, Any]:
    """The new keys beside the cache; where they are in order, counted from the first of them."""
    assert ops.new_key is not None
    assert ops.new_value is not None
    source = plan.sources[1]
    low, high = _bounds(problem, ops, at, total)
    if ops.new_seen is not None:
        high = jnp.where(ops.new_seen[:, None], high, low)
    positions = at.astype(jnp.int32)
    if not source.has_positions:
        first = at[:, :1]
        low, high, at = low - first, high - first, at - first
    arrays: dict[str, Any] = {
        "new_key": ops.new_key.astype(problem.compute_dtype),
        "new_value": ops.new_value.astype(problem.compute_dtype),
        "new_bounds": _float32(jnp.stack([low, high])),
        "new_query_at": _float32(at) if problem.has_alibi else None,
        "new_positions": positions if source.has_positions else None,
    }
    arrays |= _live_arrays(plan, source, low, high, "new_")
    if source.is_padded:
        mask = None if ops.mask is None else ops.mask[..., problem.kv_len :]
        given = arrays["new_positions"]
        arrays["new_unseen"] = _unseen(problem, low, high, given, mask, problem.num_tokens)
    return arrays


def _bounds(problem: AttentionProblem, ops: Operands, at: Array, end: Array) -> tuple[Array, Array]:
    """The first position that each query sees, and the one behind the last: `[B, T]` each."""
    start = jnp.zeros((problem.batch,), jnp.int32) if ops.starts is None else ops.starts
    low, high = problem.rule.interval(at, start[:, None], end[:, None])
    if ops.key_bounds is not None:
        low = jnp.maximum(low, ops.key_bounds[..., 0])
        high = jnp.minimum(high, ops.key_bounds[..., 1])
    return jnp.broadcast_to(low, at.shape), jnp.broadcast_to(high, at.shape)


def _holes(ops: Operands) -> Array:
    """bfloat16 `[B, S]`, far below all logits where a slot holds nothing, else 0."""
    from jax_tkg.nki.buffers import MASKED

    usable = ops.kv.usable()
    assert usable is not None
    return jnp.where(usable, jnp.bfloat16(0), jnp.bfloat16(MASKED))


def _slot_positions(ops: Operands) -> Array:
    """The given position of each slot, -1 where it holds nothing."""
    usable, given = ops.kv.usable(), ops.key_positions
    assert given is not None
    positions = given if usable is None else jnp.where(usable, given, NO_POSITION)
    return positions.astype(jnp.int32)


def _unseen(
    problem: AttentionProblem,
    low: Array,
    high: Array,
    positions: Array | None,
    mask: Array | None,
    slots: int,
) -> Array:
    """uint8 `[B, K|1, S]`, 1 where no query of any head of the group sees a slot."""
    if positions is None and mask is None:
        first = jnp.clip(low, 0, slots)
        end = jnp.clip(high, first, slots)
        row = jnp.arange(problem.batch, dtype=jnp.int32)[:, None]
        # Float32, exact for counts: Neuron does not add integers by scatter.
        changes = jnp.zeros((problem.batch, slots + 1), jnp.float32)
        changes = changes.at[row, first].add(1.0).at[row, end].add(-1.0)
        return (jnp.cumsum(changes, axis=1)[:, None, :slots] == 0).astype(jnp.uint8)
    if positions is None:
        positions = jnp.arange(slots, dtype=jnp.int32)[None]
    at = positions[:, None]
    seen = ((at >= low[..., None]) & (at < high[..., None]))[:, None]
    if mask is not None:
        seen = seen & mask
    seen = seen.any(axis=2)
    if seen.shape[1] > 1:
        seen = seen.reshape(problem.batch, problem.num_kv_heads, problem.group, slots).any(axis=2)
    return (~seen).astype(jnp.uint8)


def _float32(array: Array) -> Array:
    return array.astype(jnp.float32)
