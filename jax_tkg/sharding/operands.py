"""The arrays of a call on a mesh: how each is split, and what a device makes of its part."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.cache.paged import NO_PAGE, Paged
from jax_tkg.masks import default_query_positions
from jax_tkg.operands import Operands
from jax_tkg.sharding.division import Division

_LETTERS = {
    "query": "BTNH",
    "new_key": "BTKH",
    "new_value": "BTKH",
    "lengths": "B",
    "starts": "B",
    "query_positions": "BT",
    "key_positions": "BS",
    "mask": "BNTS",
    "bias": "BNTS",
    "sinks": "BN",
    "key_bounds": "BTx",
    "alibi_slopes": "BN",
    "new_seen": "B",
    "rotary_positions": "BT",
}


class Shards(NamedTuple):
    """What is split between devices.

    Attributes:
        ops: the operands; where the slots are split, mask and bias are of the cached keys alone.
        mask: that of the new keys beside the cache, `[B|1, N|1, T|1, T]`, or None.
        bias: likewise.
    """

    ops: Operands
    mask: Array | None
    bias: Array | None


def make_shards(division: Division, ops: Operands) -> Shards:
    """Takes apart what is split differently."""
    if not division.key_parts or division.is_mapped:
        return Shards(ops, None, None)
    return take_apart(division.whole.kv_len, ops)


def take_apart(slots: int, ops: Operands) -> Shards:
    """The mask and bias of the new keys apart from those of the cached ones."""
    if ops.new_key is None:
        return Shards(ops, None, None)
    (mask, new_mask), (bias, new_bias) = (
        (None, None) if x is None else (x[..., :slots], x[..., slots:])
        for x in (ops.mask, ops.bias)
    )
    return Shards(replace(ops, mask=mask, bias=bias), new_mask, new_bias)


def whole_bias(division: Division, shards: Shards) -> Array | None:
    """The bias (or its cotangent) that `make_shards` took apart."""
    cached, new = shards.ops.bias, shards.bias
    if cached is None or new is None:
        return cached
    sharding = division.sharding
    (spec,) = {_spec(division, x, "BNTT") for x in (cached, new)}
    cached = _compat.as_split(cached, spec, sharding.axis_names, sharding.mesh)
    return jnp.concatenate([cached, new], axis=-1)


def shard_specs(division: Division, shards: Shards) -> Shards:
    """How each array is split; None where there is none."""
    return jax.tree.map(partial(_spec, division), shards, letters_of(shards))


def letters_of(shards: Shards) -> Any:
    """The letters of its axes in the place of each array."""
    beside = (None if x is None else "BNTT" for x in (shards.mask, shards.bias))
    return Shards(_letters(shards.ops), *beside)  # type: ignore[arg-type]


def _spec(division: Division, array: Any, axes: str) -> PartitionSpec:
    entries = division.sharding.spec(axes, num_kv_heads=division.whole.num_kv_heads)
    # What has size 1 is shared by rows or heads.
    sizes = zip(entries, array.shape, strict=True)
    return PartitionSpec(*(None if n == 1 else entry for entry, n in sizes))


def result_specs(division: Division) -> tuple[PartitionSpec, ...]:
    """How the results are split."""
    of_rows = division.sharding.spec("BTN")
    keys = () if division.whole.rope is None else (division.sharding.spec("BTKH"),)
    found = division.sharding.spec("BTNH"), *(of_rows,) * (1 if division.whole.normalize else 2)
    return (*found, *keys)


def _letters(ops: Operands) -> Operands:
    """The letters of its axes in the place of each array."""
    given: dict[str, Any] = {
        name: None if getattr(ops, name) is None else axes for name, axes in _LETTERS.items()
    }
    for name in ("mask", "bias"):
        array = getattr(ops, name)
        if array is not None and array.shape[3] != ops.kv.shape.kv_len:
            given[name] = "BNTT"  # the new keys too: not split as the slots are
    return Operands(kv=ops.kv.letters(), **given)


def check_pages(division: Division, kv: KVLayout) -> None:
    """Checks that a pool of pages and its tables can be split.

    Raises:
        ValueError: which number, over which axes, and what to do.
    """
    if not isinstance(kv, Paged):
        return
    sharding, pages = division.sharding, kv.key.shape[0]
    parts, columns = sharding.size("keys"), kv.page_indices.shape[1]
    if columns % parts:
        raise ValueError(
            f"page_indices has {columns} pages for each sequence, which do not divide into the "
            f"{parts} parts of keys={sharding.keys!r}: make them a multiple of {parts}."
        )
    parts *= sharding.size("batch")
    if pages % parts:
        raise ValueError(
            f"the pool has {pages} pages, which do not divide into the {parts} parts of "
            f"batch={sharding.batch!r} and keys={sharding.keys!r}: make them a multiple of {parts}."
        )


def localise(division: Division, shards: Shards) -> Operands:
    """The operands of a device's problem, from its part of each; inside the mapped axes."""
    ops = _joined(shards)
    if division.slices_kv_heads:
        ops = _own_kv_head(division, ops)
    if isinstance(ops.kv, Paged):
        ops = replace(ops, kv=_own_pages(division, ops.kv))
    if not division.key_parts:
        return ops
    part = lax.axis_index(division.key_parts)
    if ops.new_key is not None:
        counted = jnp.broadcast_to(part == 0, ops.query.shape[:1])
        ops = replace(ops, new_seen=counted)
    return _from_own_slot(division, ops, part) if division.counts_from_own_slot else ops


def _joined(shards: Shards) -> Operands:
    """The operands with what was taken apart in one piece."""
    ops = shards.ops
    mask, bias = (
        x if new is None or x is None else jnp.concatenate([x, new], axis=-1)
        for x, new in zip((ops.mask, ops.bias), shards[1:], strict=True)
    )
    return replace(ops, mask=mask, bias=bias)


def count_sinks_once(division: Division, ops: Operands) -> Operands:
    """A device's operands for the backward pass: of those that share a row one has its sinks."""
    if ops.sinks is None or not division.key_parts:
        return ops
    is_first = lax.axis_index(division.key_parts) == 0
    return replace(ops, sinks=jnp.where(is_first, ops.sinks, -jnp.inf))


def _own_kv_head(division: Division, ops: Operands) -> Operands:
    device = lax.axis_index(division.sharding.names("heads"))
    head = device // division.devices_per_kv_head

    def own(array: Array, axes: str) -> Array:
        if "K" not in axes or array.shape[axes.index("K")] == 1:
            return array
        return lax.dynamic_slice_in_dim(array, head, 1, axes.index("K"))

    return jax.tree.map(own, ops, _letters(ops))


def _own_pages(division: Division, kv: Paged) -> Paged:
    """Page numbers count from the device's first page: a row's pages lie where its slots do."""
    names = division.sharding.names("batch") + division.key_parts
    if not names:
        return kv
    pages = kv.key.shape[0]
    own = kv.page_indices - lax.axis_index(names) * pages
    inside = (kv.page_indices >= 0) & (own >= 0) & (own < pages)
    return replace(kv, page_indices=jnp.where(inside, own, NO_PAGE))


def _from_own_slot(division: Division, ops: Operands, part: Array) -> Operands:
    """Counts all positions from the device's first slot."""
    whole, begin = division.whole, part * division.local_slots
    beside = whole.num_tokens if whole.has_new_kv else 0
    lengths = ops.lengths
    if lengths is None:
        lengths = jnp.full(ops.query.shape[:1], whole.kv_len + beside, jnp.int32)
    positions = ops.query_positions
    if positions is None and division.local.has_query_positions:
        positions = default_query_positions(lengths, whole.num_tokens)
    given = {
        "lengths": lengths,
        "starts": ops.starts,
        "query_positions": positions,
        "key_bounds": ops.key_bounds,
    }
    shifted = jax.tree.map(lambda x: x - begin, given)
    return replace(ops, **shifted)
