"""The arrays of one attention call, in one canonical form, as a pytree."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_tkg._typing import Array, Leaf
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
        key_bounds: int32 `[B, T, 2]`: of each query, the first position it may see and the one
            behind the last.
        alibi_slopes: float32 `[B|1, N]`: `-slope * |query position - key position|` is added to the
            logits, with the bias.
        new_seen: bool `[B]`, whether a row's keys beside the cache are seen at all: of the devices
            that share a row one counts them. None where they are.
        rotary_positions: int32 `[B, T]`, by which queries and new keys are still to be rotated;
            None where they are, or need not be.

    S' covers the keys a query can see: S, or S + T with the new keys last when they are beside.
    """

    query: Leaf
    kv: KVLayout
    new_key: Leaf | None = None
    new_value: Leaf | None = None
    lengths: Leaf | None = None
    starts: Leaf | None = None
    query_positions: Leaf | None = None
    key_positions: Leaf | None = None
    mask: Leaf | None = None
    bias: Leaf | None = None
    sinks: Leaf | None = None
    key_bounds: Leaf | None = None
    alibi_slopes: Leaf | None = None
    new_seen: Leaf | None = None
    rotary_positions: Leaf | None = None


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
    "key_bounds",
    "new_seen",
    "rotary_positions",
)
_PER_ROW_OR_SHARED = ("mask", "bias", "sinks", "alibi_slopes")
_HEAD_AXIS = {"query": 2, "mask": 1, "bias": 1, "sinks": 1, "alibi_slopes": 1}


def maps_heads_only(axes: Operands) -> bool:
    """Whether vmap maps nothing but what a query head has of its own."""
    others: dict[str, Any] = dict.fromkeys(_HEAD_AXIS)
    return not jax.tree.leaves(replace(axes, **others))


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


def fold_into_heads(ops: Operands, axes: Operands, num_kv_heads: int, size: int) -> Operands:
    """Joins a mapped axis with the query heads of each KV head: the cache is read once for all."""
    heads = _without(ops.query.shape, axes.query)[2]

    def fold(name: str, head_axis: int) -> Array | None:
        array, axis = getattr(ops, name), getattr(axes, name)
        shared = name != "query" and axis is None
        if array is None or (shared and array.shape[head_axis] == 1):
            return array
        stacked = (
            jnp.expand_dims(array, head_axis)
            if axis is None
            else jnp.moveaxis(array, axis, head_axis)
        )
        before, after = stacked.shape[:head_axis], stacked.shape[head_axis + 2 :]
        stacked = jnp.broadcast_to(stacked, (*before, size, heads, *after))
        by_kv_head = stacked.reshape(*before, size, num_kv_heads, heads // num_kv_heads, *after)
        by_kv_head = jnp.moveaxis(by_kv_head, head_axis, head_axis + 1)
        return by_kv_head.reshape(*before, heads * size, *after)

    folded: dict[str, Any] = {name: fold(name, axis) for name, axis in _HEAD_AXIS.items()}
    return replace(ops, **folded)


def unfold_heads(result: Array, num_kv_heads: int, copies: int) -> Array:
    """Undoes `fold_into_heads` on `[B, T, N * V, ...]`: returns `[V, B, T, N, ...]`."""
    batch, tokens, heads = result.shape[:3]
    group = heads // (num_kv_heads * copies)
    split = result.reshape(batch, tokens, num_kv_heads, copies, group, *result.shape[3:])
    moved = jnp.moveaxis(split, 3, 0)
    return moved.reshape(copies, batch, tokens, num_kv_heads * group, *result.shape[3:])


def _without(shape: tuple[int, ...], axis: Any) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape) if axis is None or i != int(axis))
