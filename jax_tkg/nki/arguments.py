"""From a problem and its operands to what is launched: the kernel's arrays, plan and results."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array
from jax_tkg.cache import storage
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.cache.paged import Paged
from jax_tkg.masks import NO_POSITION, default_query_positions
from jax_tkg.nki.rope_call import rotary_table
from jax_tkg.nki.tables import by_key, by_run, hidden_cached, hidden_new
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import HIGHEST

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan

MAX_TOKENS = 512
NO_PAGE = -1
LARGEST_BIAS = 1.0e38
EXACT = 1 << 23
LAYOUTS = ("BSKH", "BKSH", "BKHS", "paged")
NARROW = ("float8_e4m3", "float8_e5m2")
"""What the Tensor engine multiplies by 16-bit numbers as it is."""


def kernel_limits(problem: AttentionProblem) -> str | None:
    """What the kernel cannot do of a problem, in words; None if it can do all."""
    if problem.kv.name not in LAYOUTS:
        return f"the kernel takes caches in {', '.join(LAYOUTS)}, not {problem.kv.name}"
    if problem.num_tokens > MAX_TOKENS:
        return f"T = {problem.num_tokens} new tokens; the kernel takes at most {MAX_TOKENS}"
    if problem.exchange:
        return (
            "the kernel exchanges nothing with other devices: merge its parts at the end, with "
            'AttentionSharding(merge="deferred")'
        )
    return None


def rotation_limits(problem: AttentionProblem) -> str | None:
    """Why the kernel does not rotate queries and new keys itself, in words; None if it does."""
    new, dtype = problem.new_key_dtype, problem.compute_dtype
    if new is not None and new != dtype and (dtype != np.float32 or new.itemsize > 4):
        return f"new keys in {new.name} would lose digits in {dtype.name}, which it computes in"
    return None


def plan_kernel(
    problem: AttentionProblem,
    programs: int,
    exchange: str,
    *,
    unseen_values: str = "any",
    has_scales: bool = False,
) -> "KernelPlan":
    """The kernel's plan of a problem.

    Args:
        problem: what is to be computed.
        programs: 2 as on a logical core of two, or 1.
        exchange: of two programs that share a sequence: "deferred" or "every tile".
        unseen_values: what keys and values may be in slots that no query sees: "any", NaN too, or
            "finite", as other kernels demand it; that saves the work of clearing them.
        has_scales: keys or values are stored with a scale.

    Raises:
        ValueError: for an option that does not exist.
    """
    if unseen_values not in ("any", "finite"):
        raise ValueError(f"unseen_values {unseen_values!r}: must be 'any' or 'finite'.")
    from jax_tkg.nki.plan import Features, make_plan

    rule, placed = problem.rule, problem.has_positions
    from_dense = hides_in_dense(problem)
    holes = problem.kv.has_holes and not from_dense
    is_ragged = (
        problem.has_lengths
        or problem.has_starts
        or rule.window is not None
        or (problem.has_query_positions and rule.causal)
    )
    sees_later = rule.causal and problem.num_tokens > 1 and not problem.has_new_kv
    rope = problem.rope
    features = Features(
        scale=float(problem.scale),
        soft_cap=problem.logits_soft_cap,
        has_new_keys=problem.has_new_kv,
        has_sinks=problem.has_sinks,
        has_positions=placed,
        has_holes=holes,
        has_mask=problem.mask is not None,
        has_bias=problem.bias is not None,
        has_scales=has_scales,
        needs_mask=not from_dense and (is_ragged or holes or placed or sees_later),
        has_low=problem.has_starts or rule.window is not None or placed,
        sees_alike=problem.num_tokens == 1
        or (problem.has_new_kv and rule.window is None and not problem.has_query_positions),
        rotary=None if rope is None else "interleaved" if rope.interleaved else "half",
        is_ragged=is_ragged,
        clears_values=problem.is_padded and unseen_values == "any",
    )
    return make_plan(
        batch=problem.batch,
        tokens=problem.num_tokens,
        slots=problem.kv_len,
        heads=problem.num_heads,
        kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        value_head_dim=problem.value_head_dim,
        layout=problem.kv.name,
        features=features,
        programs=programs,
        exchange=exchange,
        most_live=None if problem.has_query_positions else rule.reach(problem.num_tokens),
        page_len=problem.kv.slot_multiple if problem.kv.name == "paged" else 0,
        key_bytes=key_bytes(problem),
    )


def key_bytes(problem: AttentionProblem) -> int:
    """Of a number of a cached key that waits for its matmul; what must be widened is wide."""
    narrow = problem.kv.dtype.name in NARROW and problem.compute_dtype.itemsize == 2
    return 1 if narrow else 2


def hides_in_dense(problem: AttentionProblem) -> bool:
    """Whether the dense mask, made ready in JAX, also hides what positions and pages hide.

    It can where it has a number for every row and token anyway.
    """
    return problem.mask is not None and problem.mask[::2] == (problem.batch, problem.num_tokens)


def biases(given: Array) -> Array:
    """Biases as kernels take them, float32: what makes a logit infinite makes it very large.

    Then the difference of two is a number, and that of a masked one and any other weighs nothing.
    """
    return jnp.minimum(given.astype(jnp.float32), LARGEST_BIAS)


def kernel_arguments(
    problem: AttentionProblem, ops: Operands, plan: "KernelPlan"
) -> dict[str, Array]:
    """The arrays the kernel takes, by name; what the problem does not have is left out.

    Queries and new keys come in the dtype that the kernel computes in. For the meaning of each see
    `jax_tkg.nki.buffers.Inputs`.
    """
    dtype = problem.compute_dtype
    zeros = jnp.zeros((problem.batch,), jnp.int32)
    beside = problem.num_tokens if problem.has_new_kv else 0
    total = zeros + (problem.kv_len + beside) if ops.lengths is None else ops.lengths
    start = zeros if ops.starts is None else ops.starts
    positions = ops.query_positions
    if positions is None:
        positions = default_query_positions(total, problem.num_tokens)
    interval = problem.rule.interval(positions, start[:, None], (total - beside)[:, None])
    bounds = jnp.stack([jnp.broadcast_to(x, positions.shape) for x in interval])
    key_positions = ops.key_positions
    if key_positions is not None:
        bounds, key_positions = _near_zero(bounds, key_positions)
    if plan.features.sees_alike:
        bounds = bounds[:, :, :1]
    arrays: dict[str, Any] = {
        "query": ops.query.astype(dtype),
        "key": storage.logical(ops.kv.key, ops.kv.dtype),
        "value": storage.logical(ops.kv.value, ops.kv.dtype),
        "positions": key_positions,
        "sinks": None if ops.sinks is None else _finite(ops.sinks),
        "hidden": None,
        "bias": None if ops.bias is None else by_key(biases(ops.bias), plan),
    }
    if ops.mask is not None:
        seen = ops.mask[..., : plan.slots]
        if hides_in_dense(problem):
            seen &= _seen_slots(ops, interval)[:, None]
        seen = jnp.broadcast_to(seen, (*seen.shape[:2], problem.num_tokens, plan.slots))
        arrays["hidden"] = hidden_cached(~seen, plan)
    if isinstance(ops.kv, Paged):
        arrays |= _page_tables(ops.kv, plan)
    if problem.has_new_kv:
        arrays |= _new_arrays(problem, ops, plan, positions, start, total)
    if problem.rope is not None:
        table = rotary_table(problem.rope, problem.head_dim)
        arrays |= {"rotary_table": jnp.asarray(table), "query_positions": ops.rotary_positions}
    numbers = {"low": bounds[0], "high": bounds[1], **_scales(problem, ops)}
    if plan.live is not None:
        from jax_tkg.nki.live_tiles import place_live_tiles

        arrays["live_tiles"], numbers["live_edges"] = place_live_tiles(
            bounds[0],
            bounds[1],
            usable_slots(ops.kv),
            problem.kv_len,
            plan.live,
            plan.programs,
            apart=problem.has_query_positions and problem.rule.window is not None,
        )
    arrays["constants"] = constants(plan, numbers)
    return {name: array for name, array in arrays.items() if array is not None}


def constants(plan: "KernelPlan", numbers: Mapping[str, Array]) -> Array | None:
    """What every partition needs, by name, as `Inputs.constants`; edges are of each program."""
    parts = []
    for part in plan.constants:
        given = numbers[part.name].astype(jnp.float32)
        rows = plan.programs if part.name == "live_edges" else 1
        parts.append(jnp.broadcast_to(given.reshape(rows, -1), (plan.programs, part.size)))
    return jnp.concatenate(parts, axis=1) if parts else None


def _near_zero(bounds: Array, key_positions: Array) -> tuple[Array, Array]:
    """The same comparisons of a row's positions with none of its keys' beyond what float32 holds.

    Rows that have gone on for longer are counted from 2^23 tokens before their last one; a ring
    holds no earlier ones.
    """
    base = jnp.maximum(jnp.max(key_positions, axis=1, keepdims=True), EXACT) - EXACT
    low, high = bounds
    return (
        jnp.stack([jnp.maximum(low - base, 0), high - base]),
        jnp.maximum(key_positions - base, NO_POSITION),
    )


def _seen_slots(ops: Operands, interval: tuple[Array, Array]) -> Array:
    """Which slots each token sees by position, where there is a page: `[B, T, S]`."""
    positions = ops.key_positions
    if positions is None:
        positions = jnp.arange(ops.kv.shape.kv_len, dtype=jnp.int32)[None]
    low, high = (x[:, :, None] for x in interval)
    seen = (positions[:, None] >= low) & (positions[:, None] < high)
    usable = ops.kv.usable()
    return seen if usable is None else seen & usable[:, None]


def _new_arrays(
    problem: AttentionProblem,
    ops: Operands,
    plan: "KernelPlan",
    positions: Array,
    start: Array,
    total: Array,
) -> dict[str, Array]:
    """The new keys beside the cache, who does not see them, and their biases."""
    assert ops.new_key is not None
    assert ops.new_value is not None
    batch, heads, tokens = problem.batch, problem.num_heads, problem.num_tokens
    seen = problem.rule.visible(
        positions[:, None, :],
        positions[:, :, None],
        start[:, None, None],
        total[:, None, None],
    )
    if ops.new_seen is not None:
        seen &= ops.new_seen[:, None, None]
    seen = jnp.broadcast_to(seen[:, None], (batch, 1, tokens, tokens))  # b, n or 1, key, token

    def of_new(dense: Array) -> Array:
        return dense[..., problem.kv_len :].swapaxes(2, 3)

    if ops.mask is not None:
        seen = seen & of_new(ops.mask)
    shape = (batch, heads, tokens, tokens)
    used = jnp.broadcast_to(seen.any(axis=3), shape[:3])
    used = used.reshape(batch, problem.num_kv_heads, problem.group, tokens).any(axis=2)
    values = jnp.where(used.swapaxes(1, 2)[..., None], ops.new_value, 0)
    arrays = {
        "new_key": ops.new_key.astype(problem.compute_dtype),
        "new_value": values.astype(problem.compute_dtype),
        "new_hidden": hidden_new(~seen, plan),
    }
    if ops.bias is not None:
        bias = jnp.broadcast_to(of_new(biases(ops.bias)), shape)
        arrays["new_bias"] = jnp.moveaxis(bias, 2, 0).reshape(tokens, -1)
    return arrays


def _finite(sinks: Array) -> Array:
    """Sinks as the kernel takes them, `[B|1, N]`: an infinite one is a very large one."""
    return jnp.minimum(sinks.astype(jnp.float32), HIGHEST)


def _scales(problem: AttentionProblem, ops: Operands) -> dict[str, Array]:
    pairs = (problem.batch, problem.num_kv_heads)
    arrays = {}
    for name, scale, factor in (
        ("logit_scales", ops.kv.k_scale, problem.scale),
        ("value_scales", ops.kv.v_scale, 1.0),
    ):
        full = jnp.float32(factor) * (jnp.float32(1) if scale is None else scale)
        arrays[name] = jnp.broadcast_to(full, pairs).reshape(-1)
    return arrays


def _page_tables(kv: Paged, plan: "KernelPlan") -> dict[str, Array]:
    """Where the runs of both lengths are, if there are two."""
    tables = {}
    for name, run in (("page_rows", plan.runs.long), ("short_rows", plan.runs.short)):
        if name == "page_rows" or run < plan.runs.long:
            rows = page_rows(kv, run)
            tables[name] = by_run(rows if plan.features.has_holes else jnp.maximum(rows, 0), plan)
    return tables


def page_rows(kv: Paged, run: int) -> Array:
    """Where a kernel finds every `run` slots of a paged cache, `[B, K, S / run]`.

    As rows of a pool seen as `[rows, run * H]`; -1 where there is no page.
    """
    _, heads, page_len, _ = kv.key.shape
    runs = page_len // run
    pages = kv.page_indices.astype(jnp.int32)[:, None, :, None]
    head = jnp.arange(heads, dtype=jnp.int32)[None, :, None, None]
    part = jnp.arange(runs, dtype=jnp.int32)
    rows = jnp.where(pages < 0, NO_PAGE, (pages * heads + head) * runs + part)
    return rows.reshape(pages.shape[0], heads, -1)


def usable_slots(kv: KVLayout) -> Array | None:
    """`[B]`, the first slot that has no page, or S; None where no page can lack."""
    if not isinstance(kv, Paged):
        return None
    first = jnp.arange(kv.page_indices.shape[1], dtype=jnp.int32) * kv.page_len
    return jnp.where(kv.page_indices < 0, first, kv.shape.kv_len).min(axis=1)


def has_scales(ops: Operands) -> bool:
    """Whether keys or values are stored with a scale."""
    return ops.kv.k_scale is not None or ops.kv.v_scale is not None


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, whoever compiles it.

    Attributes:
        kernel: takes the arrays by position and `plan` by name.
        arrays: in the order of the kernel's arguments.
        result: shapes and dtypes of what it returns.
        plan: static.
        aliases: pairs of an operand that the kernel changes in place and the result it becomes.
    """

    kernel: Callable[..., Any]
    arrays: tuple[Array, ...]
    result: tuple[jax.ShapeDtypeStruct, ...]
    plan: Any
    aliases: tuple[tuple[int, int], ...] = ()


def make_launch(
    problem: AttentionProblem,
    ops: Operands,
    programs: int,
    exchange: str,
    unseen_values: str = "any",
) -> Launch:
    """The launch of the decode kernel for a problem; for the options see `plan_kernel`."""
    from jax_tkg.nki.attention_tkg import attention_tkg

    rows = (problem.batch, problem.num_tokens, problem.num_heads)
    plan = plan_kernel(
        problem, programs, exchange, unseen_values=unseen_values, has_scales=has_scales(ops)
    )
    given = kernel_arguments(problem, ops, plan)
    arrays = {n: given[n] for n in inspect.signature(attention_tkg).parameters if n in given}
    result = [
        jax.ShapeDtypeStruct((*rows, problem.value_head_dim), problem.compute_dtype),
        jax.ShapeDtypeStruct(rows, np.float32),
    ]
    if problem.rope is not None:
        result.append(jax.ShapeDtypeStruct(arrays["new_key"].shape, problem.compute_dtype))
    return Launch(
        kernel=Named(attention_tkg, tuple(arrays)),
        arrays=tuple(arrays.values()),
        result=tuple(result),
        plan=plan,
    )


@dataclass(frozen=True)
class Named:
    """A kernel called with some of its array arguments, by name; the others are None."""

    kernel: Any
    names: tuple[str, ...]

    @property
    def __name__(self) -> str:
        """For messages."""
        return str(self.kernel.__name__)

    def __call__(self, *arrays: Any, plan: Any) -> Any:
        """Fills in None for what is not there."""
        given = dict.fromkeys(inspect.signature(self.kernel).parameters)
        given.update(zip(self.names, arrays, strict=True), plan=plan)
        return self.kernel(**given)
