"""The arrays of one attention call, in one canonical form, as a pytree."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_tkg._typing import Array
from jax_tkg.cache.layouts import KVLayout, fold_axis


@dataclass(frozen=True)
class Operands:
    """Arrays of a call; what is not given is None. Broadcast dimensions are kept at size 1.

    Attributes:
        query: `[B, T, N, H]`.
        kv: the cache, in its layout.
        new_key: `[B, T, K, H]` keys beside the cache, or None when they are already in it.
        new_value: `[B, T, K, Hv]`.
        lengths: int32 `[B]`, tokens of each row, the new ones included.
        starts: int32 `[B]`, first live position of each row.
        query_positions: int32 `[B, T]`, or None for bottom-right alignment.
        key_positions: int32 `[B, S]`, position of each cache slot, or None for slot = position.
        mask: bool `[B|1, N|1, T|1, S']`, True where a query sees a key.
        bias: float `[B|1, N|1, T|1, S']`, added to the logits.
        sinks: float32 `[B|1, N]`.

    S' covers the keys a query can see: S, or S + T with the new keys last when they are beside.
    """

    query: Array
    kv: KVLayout
    new_key: Array | None = None
    new_value: Array | None = None
    lengths: Array | None = None
    starts: Array | None = None
    query_positions: Array | None = None
    key_positions: Array | None = None
    mask: Array | None = None
    bias: Array | None = None
    sinks: Array | None = None


jax.tree_util.register_dataclass(
    Operands, data_fields=[f.name for f in fields(Operands)], meta_fields=[]
)

_PER_ROW = (
    "query",
    "new_key",
    "new_value",
    "lengths",
    "starts",
    "query_positions",
    "key_positions",
)
_PER_ROW_OR_SHARED = ("mask", "bias", "sinks")


def only_query_mapped(axes: Operands) -> bool:
    """Whether vmap maps the query alone, so that all its copies read one cache."""
    others = replace(axes, query=None)  # type: ignore[arg-type]
    return axes.query is not None and not jax.tree.leaves(others)


def fold_into_batch(ops: Operands, axes: Operands, size: int) -> Operands:
    """Joins a mapped axis with B; what is not mapped is repeated, a shared page pool is not."""
    batch = _without(ops.query.shape, axes.query)[0]
    folded: dict[str, Any] = {"kv": ops.kv.fold_batch(axes.kv, size)}
    for name in _PER_ROW:
        array = getattr(ops, name)
        if array is not None:
            folded[name] = fold_axis(array, getattr(axes, name), 0, size)
    for name in _PER_ROW_OR_SHARED:
        array, axis = getattr(ops, name), getattr(axes, name)
        if array is None or (axis is None and array.shape[0] == 1):
            continue
        if _without(array.shape, axis)[0] == 1:  # a copy of vmap's own, shared by its rows
            array = jnp.repeat(jnp.moveaxis(array, axis, 0), batch, axis=1)
            axis = 0
        folded[name] = fold_axis(array, axis, 0, size)
    return replace(ops, **folded)


def fold_into_heads(ops: Operands, axis: Any, num_kv_heads: int) -> Operands:
    """Joins a mapped query axis with the query heads of each KV head: the cache is read once."""
    query = jnp.moveaxis(ops.query, axis, 3)  # [B, T, N, V, H]
    batch, tokens, heads, copies, width = query.shape
    group = heads // num_kv_heads
    query = query.reshape(batch, tokens, num_kv_heads, group, copies, width)
    query = jnp.moveaxis(query, 4, 3).reshape(batch, tokens, heads * copies, width)
    spread = {
        name: _spread_heads(getattr(ops, name), num_kv_heads, copies) for name in ("mask", "bias")
    }
    sinks = ops.sinks
    if sinks is not None:
        sinks = _spread_heads(sinks[:, :, None, None], num_kv_heads, copies)
        assert sinks is not None
        sinks = sinks[:, :, 0, 0]
    return replace(ops, query=query, sinks=sinks, **spread)


def unfold_heads(result: Array, num_kv_heads: int, copies: int) -> Array:
    """Undoes `fold_into_heads` on `[B, T, N * V, ...]`: returns `[V, B, T, N, ...]`."""
    batch, tokens, heads = result.shape[:3]
    group = heads // (num_kv_heads * copies)
    split = result.reshape(batch, tokens, num_kv_heads, copies, group, *result.shape[3:])
    moved = jnp.moveaxis(split, 3, 0)
    return moved.reshape(copies, batch, tokens, num_kv_heads * group, *result.shape[3:])


def _spread_heads(array: Array | None, num_kv_heads: int, copies: int) -> Array | None:
    if array is None or array.shape[1] == 1:
        return array
    batch, heads, *rest = array.shape
    grouped = array.reshape(batch, num_kv_heads, 1, heads // num_kv_heads, *rest)
    spread = jnp.broadcast_to(grouped, (batch, num_kv_heads, copies, heads // num_kv_heads, *rest))
    return spread.reshape(batch, heads * copies, *rest)


def _without(shape: tuple[int, ...], axis: Any) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape) if axis is None or i != int(axis))
