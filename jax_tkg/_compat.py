"""Differences between JAX versions, in one place. Supported: jax 0.7.0 and later.

Everything here is about types that carry more than shape and dtype: the sharding of an explicit
mesh and the manual axes over which a value varies inside `shard_map`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
)

try:
    from jax.sharding import use_abstract_mesh
except ImportError:  # jax 0.7
    from jax._src.mesh import use_abstract_mesh

try:
    from jax import reshard
except ImportError:  # jax 0.7
    from jax.sharding import reshard

try:  # jax 0.8 and later
    from jax.lax import pcast as _pcast

    def _vary(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return _pcast(array, axes, to="varying")
except ImportError:

    def _vary(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return jax.lax.pvary(array, axes)  # type: ignore[attr-defined]


UPDATES_HAVE_TYPES = jax.__version_info__ >= (0, 8)
"""Whether JAX types, on an explicit mesh, what `jax.vmap` makes of an update in place."""


def varying_axes(aval: Any) -> frozenset[str]:
    """Manual mesh axes over which a value of this type differs between devices."""
    manual = getattr(aval, "mat", None)  # jax 0.10 and later
    return frozenset(aval.vma if manual is None else manual.varying)


def agree_on_varying_axes(arrays: Sequence[Any]) -> list[Any]:
    """Marks every array as varying over the axes that any of them varies over."""
    axes = [varying_axes(jax.typeof(a)) for a in arrays]
    union = frozenset().union(*axes)
    return [vary(a, union) for a in arrays]


def vary(array: Any, axes: frozenset[str]) -> Any:
    """Marks an array as varying over these manual axes too."""
    more = axes - varying_axes(jax.typeof(array))
    return _vary(array, tuple(sorted(more))) if more else array


def like_query(query: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """The type of a result: new shape and dtype, B, T and N sharded as the query's."""
    spec = PartitionSpec(*query.sharding.spec[:3], *(None,) * (len(shape) - 3))
    sharding = NamedSharding(query.sharding.mesh, spec)
    return query.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def stacked_sharding(
    query: Any, query_axis: int | None, mapped: Any, axis: int, levels: int
) -> NamedSharding:
    """The sharding of results `[V, ..., B, T, N, ...]` of vmap, given types and their mapped axes.

    B, T and N are sharded as the query's, V as the mapped operand's axis; the axes of the levels
    of vmap inside it are not.
    """
    rows = [s for i, s in enumerate(query.sharding.spec) if i != query_axis]
    rows = [None] * levels + rows[len(rows) - 4 : -1]
    spec = PartitionSpec(mapped.sharding.spec[axis], *rows)
    return NamedSharding(query.sharding.mesh, spec)


def without_sharding(aval: Any) -> Any:
    """The type with shape and dtype alone."""
    return jax.core.ShapedArray(aval.shape, aval.dtype)


def no_explicit_mesh() -> AbstractContextManager[Any]:
    """Traces as if no mesh were set, so that operations need not say how results are sharded."""
    return use_abstract_mesh(AbstractMesh((), ()))


def partitioned_by_compiler(
    fun: Callable[..., Sequence[jax.Array]], shardings: Sequence[NamedSharding], *arrays: jax.Array
) -> Sequence[jax.Array]:
    """`fun(*arrays)` where explicit mesh axes are automatic inside; results get `shardings`.

    For code that reshapes sharded axes in ways JAX cannot type, or that reads operands sharded
    unlike each other.
    """
    meshes = [s.mesh for s in shardings] + [jax.typeof(a).sharding.mesh for a in arrays]
    mesh = next((m for m in meshes if not m.empty), AbstractMesh((), ()))
    explicit = explicit_axes(mesh)
    if not explicit:
        return fun(*arrays)
    on_mesh = [NamedSharding(mesh, s.spec) for s in shardings]
    return auto_axes(fun, axes=explicit, out_sharding=on_mesh)(*arrays)


def explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes whose use types tell."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def has_explicit_axes(array: jax.Array) -> bool:
    """Whether types on an explicit mesh may tell how arrays are split here."""
    meshes = (jax.typeof(array).sharding.mesh, get_abstract_mesh())
    return any(explicit_axes(mesh) for mesh in meshes)


def as_split(
    array: jax.Array, spec: PartitionSpec, axes: Sequence[str], mesh: Mesh | AbstractMesh
) -> jax.Array:
    """The array with a type that is split as `spec` over those of these axes that are explicit."""
    given = jax.typeof(array).sharding
    used = next((m for m in (given.mesh, get_abstract_mesh()) if not m.empty), mesh)
    explicit = [name for name in explicit_axes(used) if name in axes]
    if not explicit:
        return array

    def names(entry: Any) -> tuple[str, ...]:
        return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)

    entries = [
        (*(n for n in names(had) if n not in axes), *(n for n in names(want) if n in explicit))
        for had, want in zip(given.spec, spec, strict=True)
    ]
    if entries == [names(had) for had in given.spec] and not given.mesh.empty:
        return array
    return reshard(array, NamedSharding(used, PartitionSpec(*(e or None for e in entries))))


def mapped_axes() -> frozenset[str]:
    """The mesh axes that a `shard_map` has made manual here: arrays are those of a device."""
    return frozenset(get_abstract_mesh().manual_axes)


def all_axes_mapped() -> bool:
    """Whether a `shard_map` has made every axis of the mesh manual here."""
    mesh = get_abstract_mesh()
    return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


def partly_mapped(ctx: mlir.LoweringRuleContext) -> tuple[Mesh, Mesh] | None:
    """In a `shard_map` over some axes of a mesh: that mesh, and one of the other axes alone.

    Raises:
        NotImplementedError: if the mesh has no devices yet.
    """
    axis_context: Any = ctx.module_context.axis_context
    if not isinstance(axis_context, mlir.SPMDAxisContext):
        return None
    mesh: Any = axis_context.mesh
    left = [name for name in mesh.axis_names if name not in axis_context.manual_axes]
    if not left or len(left) == len(mesh.axis_names):
        return None
    if not isinstance(mesh, Mesh):
        raise NotImplementedError(
            "a kernel in a shard_map over some axes of an abstract mesh: say how the others split "
            "the arrays with sharding=jax_tkg.sharding.AttentionSharding(mesh, ...)."
        )
    first = tuple(slice(None) if name in left else 0 for name in mesh.axis_names)
    return mesh, Mesh(mesh.devices[first], left)


def axes_that_split(sharding: Any, axes: int, mesh: Mesh) -> tuple[tuple[str, ...], ...]:
    """For each axis of an array, the mesh axes that split it; of a sharding that names devices.

    Args:
        sharding: as the compiler gives it, by the numbers of devices in the mesh.
        axes: how many axes the array has.
        mesh: of these devices.

    Raises:
        ValueError: if a mesh axis splits something in part.
    """
    placed = sharding._to_xla_hlo_sharding(axes)
    if placed.is_replicated():
        return ((),) * axes
    sizes = tuple(placed.tile_assignment_dimensions())
    order = np.argsort(np.asarray(placed.tile_assignment_devices()))
    place = np.stack(np.unravel_index(order, sizes)).reshape(-1, *mesh.devices.shape)
    found = []
    for of_axis in place[:axes]:
        steps = {  # how far the next device along a mesh axis has its part of the array's
            name: int(np.take(of_axis, 1, i).flat[0])
            for i, name in enumerate(mesh.axis_names)
            if mesh.devices.shape[i] > 1
        }
        strides = [steps.get(name, 0) for name in mesh.axis_names]
        if not np.array_equal(of_axis, np.tensordot(strides, np.indices(mesh.devices.shape), 1)):
            raise ValueError(f"an array is split over a part of an axis of {dict(mesh.shape)}.")
        found.append(tuple(sorted((n for n, x in steps.items() if x), key=lambda n: -steps[n])))
    return tuple(found)


def mesh_to_map(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh | None:
    """The mesh to give to `shard_map` over some axes of `mesh`: None where one is in use already.

    Raises:
        ValueError: if another mesh is in use.
    """
    used = get_abstract_mesh()
    if used.empty:
        return mesh
    if dict(used.shape) != dict(mesh.shape):
        raise ValueError(
            f"the sharding is for the mesh {dict(mesh.shape)}, and the mesh in use is "
            f"{dict(used.shape)}: make the sharding with that one."
        )
    return None


def devices_to_partition(ctx: mlir.LoweringRuleContext) -> int:
    """Between how many devices the compiler may split the arrays of this computation."""
    axis_context: Any = ctx.module_context.axis_context
    if isinstance(axis_context, mlir.SPMDAxisContext):
        sizes: dict[str, int] = dict(axis_context.mesh.shape)
        return math.prod(n for name, n in sizes.items() if name not in axis_context.manual_axes)
    if isinstance(axis_context, mlir.ShardingContext):
        return int(axis_context.num_devices)
    return 1
