"""From a problem and its operands to what is launched: the kernel's arrays, plan and results."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array
from jax_tkg.cache import storage
from jax_tkg.cache.paged import Paged
from jax_tkg.masks import NO_POSITION, PositionRule, default_query_positions
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import HIGHEST

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan

MAX_ROWS = 128
LAYOUTS = ("BSKH", "BKSH", "BKHS", "paged")


def kernel_limits(problem: AttentionProblem) -> str | None:
    """What the kernel cannot do of a problem, in words; None if it can do all."""
    if problem.kv.name not in LAYOUTS:
        return f"the kernel takes caches in {', '.join(LAYOUTS)}, not {problem.kv.name}"
    if problem.rows_per_head > MAX_ROWS:
        return (
            f"G * T = {problem.rows_per_head} rows share a KV head; the kernel takes at most "
            f"{MAX_ROWS}"
        )
    return None


def visible_positions(
    rule: PositionRule, query_positions: Array, start: Array, end: Array
) -> Array:
    """First position that each query sees, and the one behind the last: float32 `[2, B, T]`.

    Args:
        rule: causal and window.
        query_positions: `[B, T]`.
        start: `[B]`, first position with a key.
        end: `[B]`, behind the last.
    """
    low = jnp.broadcast_to(jnp.maximum(start, 0)[:, None], query_positions.shape)
    high = jnp.broadcast_to(end[:, None], query_positions.shape)
    if rule.causal:
        high = jnp.minimum(high, query_positions + 1)
    if rule.window is not None:
        if rule.window.left is not None:
            low = jnp.maximum(low, query_positions - rule.window.left)
        if rule.window.right is not None:
            high = jnp.minimum(high, query_positions + rule.window.right + 1)
    return jnp.stack([low, high]).astype(jnp.float32)


def kernel_arguments(problem: AttentionProblem, ops: Operands) -> dict[str, Array]:
    """The arrays the kernel takes, by name; what the problem does not have is left out.

    Queries and new keys come in the dtype that the kernel computes in.
    """
    dtype = problem.compute_dtype
    zeros = jnp.zeros((problem.batch,), jnp.int32)
    beside = problem.num_tokens if problem.has_new_kv else 0
    total = zeros + (problem.kv_len + beside) if ops.lengths is None else ops.lengths
    start = zeros if ops.starts is None else ops.starts
    positions = ops.query_positions
    if positions is None:
        positions = default_query_positions(total, problem.num_tokens)
    bounds = visible_positions(problem.rule, positions, start, total - beside)
    arrays: dict[str, Any] = {
        "query": ops.query.astype(dtype),
        "key": storage.logical(ops.kv.key, ops.kv.dtype),
        "value": storage.logical(ops.kv.value, ops.kv.dtype),
        "bounds": bounds,
        "positions": _slot_positions(ops),
        "page_rows": page_rows(ops.kv) if isinstance(ops.kv, Paged) else None,
    }
    if problem.has_new_kv:
        assert ops.new_key is not None
        assert ops.new_value is not None
        arrays["new_key"] = ops.new_key.astype(dtype)
        arrays["new_value"] = ops.new_value.astype(dtype)
        arrays["new_bounds"] = visible_positions(problem.rule, positions, start, total)
        arrays["new_positions"] = positions.astype(jnp.int32)
    if ops.sinks is not None:
        rows = (problem.batch, problem.num_heads, problem.num_tokens)
        sinks = jnp.minimum(ops.sinks.astype(jnp.float32), HIGHEST)
        arrays["sinks"] = jnp.broadcast_to(sinks[:, :, None], rows).reshape(-1)
    if ops.mask is not None:
        arrays["hidden"] = (~ops.mask).astype(jnp.uint8)
    if ops.bias is not None:
        arrays["bias"] = ops.bias.astype(jnp.float32)
    if has_scales(ops):
        pairs = (problem.batch, problem.num_kv_heads)
        for name, scale, factor in (
            ("logit_scales", ops.kv.k_scale, problem.scale),
            ("value_scales", ops.kv.v_scale, 1.0),
        ):
            full = jnp.float32(factor) * (jnp.float32(1) if scale is None else scale)
            arrays[name] = jnp.broadcast_to(full, pairs).reshape(-1)
    return {name: array for name, array in arrays.items() if array is not None}


def _slot_positions(ops: Operands) -> Array | None:
    """Position of each slot, -1 where there is none; None where slot s holds position s."""
    usable, given = ops.kv.usable(), ops.key_positions
    if usable is None:
        return given
    slots = jnp.arange(usable.shape[1], dtype=jnp.int32)[None]
    return jnp.where(usable, slots if given is None else given, NO_POSITION)


def page_rows(kv: Paged) -> Array:
    """Where a kernel finds every n slots of a paged cache: see `Inputs.page_rows`."""
    from jax_tkg.nki.plan import paged_run

    _, heads, page_len, _ = kv.key.shape
    runs = page_len // paged_run(page_len)
    pages = jnp.maximum(kv.page_indices, 0).astype(jnp.int32)
    head = jnp.arange(heads, dtype=jnp.int32)[None, :, None, None]
    run = jnp.arange(runs, dtype=jnp.int32)
    rows = (pages[:, None, :, None] * heads + head) * runs + run
    return rows.reshape(pages.shape[0], heads, -1)


def has_scales(ops: Operands) -> bool:
    """Whether keys or values are stored with a scale."""
    return ops.kv.k_scale is not None or ops.kv.v_scale is not None


def plan_kernel(
    problem: AttentionProblem, programs: int, exchange: str, *, has_scales: bool = False
) -> "KernelPlan":
    """The kernel's plan of a problem."""
    from jax_tkg.nki.plan import make_plan

    return make_plan(
        batch=problem.batch,
        tokens=problem.num_tokens,
        slots=problem.kv_len,
        heads=problem.num_heads,
        kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        value_head_dim=problem.value_head_dim,
        layout=problem.kv.name,
        scale=float(problem.scale),
        soft_cap=problem.logits_soft_cap,
        is_padded=problem.is_padded,
        has_new_keys=problem.has_new_kv,
        has_sinks=problem.has_sinks,
        has_positions=problem.has_positions or problem.kv.has_holes,
        has_mask=problem.mask is not None,
        has_bias=problem.bias is not None,
        has_scales=has_scales,
        programs=programs,
        exchange=exchange,
        page_len=problem.kv.slot_multiple if problem.kv.name == "paged" else 0,
    )


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, whoever compiles it.

    Attributes:
        kernel: takes the arrays by position and `plan` by name.
        arrays: in the order of the kernel's arguments.
        result: shapes and dtypes of what it returns.
        plan: static.
    """

    kernel: Callable[..., Any]
    arrays: tuple[Array, ...]
    result: tuple[jax.ShapeDtypeStruct, ...]
    plan: "KernelPlan"


def make_launch(problem: AttentionProblem, ops: Operands, programs: int, exchange: str) -> Launch:
    """The launch of the decode kernel for a problem."""
    from jax_tkg.nki.attention_tkg import attention_tkg

    rows = (problem.batch, problem.num_tokens, problem.num_heads)
    arrays = kernel_arguments(problem, ops)
    return Launch(
        kernel=Named(attention_tkg, tuple(arrays)),
        arrays=tuple(arrays.values()),
        result=(
            jax.ShapeDtypeStruct((*rows, problem.value_head_dim), problem.compute_dtype),
            jax.ShapeDtypeStruct(rows, np.float32),
        ),
        plan=plan_kernel(problem, programs, exchange, has_scales=has_scales(ops)),
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
