"""The PARTS form: BLOCKS for a compiler that may split the slots between devices.

A tile of consecutive slots lies on one device, and the compiler would gather it for all. So the
slots are seen as m equal parts, where m is a multiple of any number of devices that can share them,
and each part is a problem of its own, as on a mesh with an axis for them: here the axis is one that
`jax.vmap` maps. The parts meet as devices do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jax_tkg._typing import Array
from jax_tkg.operands import Operands
from jax_tkg.prefill.blocks import prefill_blocks
from jax_tkg.prefill.plan import PARTS_AXIS, PrefillPlan, divided_slots
from jax_tkg.problem import AttentionProblem
from jax_tkg.sharding.division import Division
from jax_tkg.sharding.merge import merge_parts
from jax_tkg.sharding.operands import (
    Shards,
    localise,
    make_shards,
    result_specs,
    shard_specs,
)


def prefill_parts(problem: AttentionProblem, ops: Operands, plan: PrefillPlan) -> tuple[Array, ...]:
    """Attention in float32; results as `Implementation.run`."""
    division = divided_slots(problem, plan.parts)
    shards = make_shards(division, ops)
    leaves, tree = jax.tree.flatten(shards)
    specs = tree.flatten_up_to(shard_specs(division, shards))  # type: ignore[attr-defined]

    def attend(*leaves: Array) -> tuple[Array, ...]:
        part: Shards = jax.tree.unflatten(tree, leaves)
        own = localise(division, part)
        results = prefill_blocks(division.local, replace(own, sinks=None), plan)
        return merge_parts(division, results, own.sinks)

    return tuple(over_parts(division, attend, leaves, specs, result_specs(division)))


def over_parts(
    division: Division,
    function: Callable[..., Sequence[Array]],
    arrays: Sequence[Array],
    in_specs: Sequence[PartitionSpec],
    out_specs: Sequence[PartitionSpec],
) -> list[Array]:
    """What each part makes of its own; as `jax_tkg.sharding.mapped.on_devices`."""
    parts = division.sharding.size("keys")
    axes, out_axes = ([_split_axis(spec) for spec in specs] for specs in (in_specs, out_specs))
    mapped: Any = jax.vmap(
        lambda *own: list(function(*own)), axes, out_axes, axis_name=PARTS_AXIS, axis_size=parts
    )
    found = mapped(*(_in_parts(x, axis, parts) for x, axis in zip(arrays, axes, strict=True)))
    return [_whole(x, axis) for x, axis in zip(found, out_axes, strict=True)]


def _split_axis(spec: PartitionSpec) -> int | None:
    return next((i for i, name in enumerate(spec) if name == PARTS_AXIS), None)


def _in_parts(array: Array, axis: int | None, parts: int) -> Array:
    if axis is None:
        return array
    shape = array.shape
    return array.reshape(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])


def _whole(array: Array, axis: int | None) -> Array:
    if axis is None:
        return array
    shape = array.shape
    return array.reshape(*shape[:axis], -1, *shape[axis + 2 :])
