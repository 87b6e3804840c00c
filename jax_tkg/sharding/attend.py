"""The op on a mesh: each device attends to its shard, then parts of rows are merged.

One `shard_map` over the axes that are named, forward and backward. The backward pass does not go
through the merge: from the whole row's output and log-sum-exp each device has the cotangents of its
own keys; only those of what devices share are summed.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_tkg import _compat, rotation
from jax_tkg._typing import Array
from jax_tkg.implementations import Implementation
from jax_tkg.operands import Operands
from jax_tkg.primitive import bind, result_names
from jax_tkg.sharding.backward import backward_divided
from jax_tkg.sharding.division import Division
from jax_tkg.sharding.mapped import on_devices
from jax_tkg.sharding.merge import merge_parts
from jax_tkg.sharding.operands import (
    Shards,
    check_pages,
    count_sinks_once,
    localise,
    make_shards,
    result_specs,
    shard_specs,
)
from jax_tkg.sharding.placement import typed, typed_shards

Tried = tuple[Implementation, ...]


def attend_on_mesh(division: Division, tried: Tried, ops: Operands) -> tuple[Array, ...]:
    """The op's results, differentiable in reverse mode.

    Raises:
        ValueError: pages that do not divide, another mesh in use.
    """
    if division.is_mapped:
        return _attend(division, tried, _varying_shard(division, ops))
    check_pages(division, ops.kv)
    return _attend(division, tried, _varying(typed(division, ops)))


def _varying_shard(division: Division, ops: Operands) -> Operands:
    """Sinks join after the merge, where devices that share a row are alike."""
    varying = _varying(ops)
    axes = _compat.varying_axes(jax.typeof(varying.query))
    if axes and division.local.exchange:
        raise ValueError(
            'merge="every tile" in a shard_map of your own needs its check_vma=False: what is '
            "exchanged on a tile has no type. Or let the op map these axes itself."
        )
    if ops.sinks is None:
        return varying
    return replace(varying, sinks=_compat.vary(ops.sinks, axes - set(division.key_parts)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(division: Division, tried: Tried, ops: Operands) -> tuple[Array, ...]:
    if division.is_mapped:
        return attend_to_shard(division, tried, make_shards(division, ops))
    leaves, tree = jax.tree.flatten(ops)
    return tuple(_forward_on_mesh(leaves, tree=tree, division=division, tried=tried))


def _attend_forward(division: Division, tried: Tried, ops: Operands) -> Any:
    names = result_names(division.whole)
    found = _attend(division, tried, ops)
    op = division.whole.op
    found = tuple(checkpoint_name(x, f"{op}_{n}") for x, n in zip(found, names, strict=True))
    return found, (ops, found)


def _attend_backward(division: Division, tried: Tried, residuals: Any, cotangents: Any) -> Any:
    del tried
    if division.is_mapped:
        ops, results = residuals
        return (_backward_on_shard(division, ops, results, tuple(cotangents)),)
    leaves, tree = jax.tree.flatten((*residuals, tuple(cotangents)))
    return (_backward_on_mesh(leaves, tree=tree, division=division),)


_attend.defvjp(_attend_forward, _attend_backward)


# --- on a device


def attend_to_shard(division: Division, tried: Tried, shards: Shards) -> tuple[Array, ...]:
    """What a device has of the results; called inside the mesh axes of the division."""
    ops = localise(division, shards)
    if not division.key_parts:
        return bind(division.local, tried, _varying(ops))
    results = bind(division.local, tried, _varying(replace(ops, sinks=None)))
    return merge_parts(division, results, ops.sinks)


def _backward_on_shard(division: Division, ops: Operands, results: Any, cotangents: Any) -> Any:
    """JAX sums the cotangents of what devices share: it was made varying, or has no such type."""
    axes = division.key_parts
    is_typed = bool(_compat.varying_axes(jax.typeof(ops.query)))
    if axes and not is_typed:  # with check_vma=False a sum over devices is its own transpose
        cotangents = lax.psum(cotangents, axes)
    ops, results, cotangents = _varying((ops, results, cotangents))
    ops = count_sinks_once(division, localise(division, make_shards(division, ops)))
    found = rotation.backward(division.differentiated, ops, results, cotangents)
    if found.sinks is not None and axes and is_typed:  # the merge had them as they were
        found = replace(found, sinks=lax.psum(found.sinks, axes))
    return found


# --- on the mesh


@partial(jax.jit, static_argnames=("tree", "division", "tried"))
def _forward_on_mesh(leaves: list[Array], *, tree: Any, division: Division, tried: Tried) -> Any:
    ops = jax.tree.unflatten(tree, leaves)
    shards, of_shards = jax.tree.flatten(typed_shards(division, make_shards(division, ops)))

    def on_device(*shards: Array) -> tuple[Array, ...]:
        return attend_to_shard(division, tried, jax.tree.unflatten(of_shards, shards))

    specs = shard_specs(division, jax.tree.unflatten(of_shards, shards))
    return on_devices(
        division,
        on_device,
        shards,
        of_shards.flatten_up_to(specs),  # type: ignore[attr-defined]
        result_specs(division),
        check_vma=not division.local.exchange,  # an implementation is traced without these types
    )


@partial(jax.jit, static_argnames=("tree", "division"))
def _backward_on_mesh(leaves: list[Array], *, tree: Any, division: Division) -> Operands:
    """Cotangents in the operands' tree, None for integers."""
    ops, results, cotangents = jax.tree.unflatten(tree, leaves)
    parts = typed_shards(division, make_shards(division, ops))
    return backward_divided(division, parts, results, cotangents, rotation.backward, on_devices)


def _varying(tree: Any) -> Any:
    leaves, of_tree = jax.tree.flatten(tree)
    return jax.tree.unflatten(of_tree, _compat.agree_on_varying_axes(leaves))
