"""Differences between JAX versions, in one place. Supported: jax 0.7.0 and later.

Everything here is about types that carry more than shape and dtype: the sharding of an explicit mesh
and the manual axes over which a value varies inside `shard_map`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

try:
    from jax.sharding import use_abstract_mesh
except ImportError:  # jax 0.7
    from jax._src.mesh import use_abstract_mesh

try:  # jax 0.8 and later
    from jax.lax import pcast as _pcast

    def _vary(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return _pcast(array, axes, to="varying")
except ImportError:

    def _vary(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return jax.lax.pvary(array, axes)


def varying_axes(aval: Any) -> frozenset[str]:
    """Manual mesh axes over which a value of this type differs between devices."""
    manual = getattr(aval, "mat", None)  # jax 0.10 and later
    return frozenset(aval.vma if manual is None else manual.varying)


def agree_on_varying_axes(arrays: Sequence[Any]) -> list[Any]:
    """Marks every array as varying over the axes that any of them varies over."""
    axes = [varying_axes(jax.typeof(a)) for a in arrays]
    union = frozenset().union(*axes)
    return [
        _vary(a, tuple(sorted(union - mine))) if union - mine else a
        for a, mine in zip(arrays, axes, strict=True)
    ]


def like_query(query: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """The type of a result: new shape and dtype, B, T and N sharded as the query's."""
    spec = (*query.sharding.spec, *(None,) * 4)[:3]
    padded = PartitionSpec(*spec, *(None,) * (len(shape) - 3))
    return query.update(
        shape=shape,
        dtype=dtype,
        weak_type=False,
        sharding=NamedSharding(query.sharding.mesh, padded),
    )


def without_sharding(aval: Any) -> Any:
    """The type with shape and dtype alone."""
    return jax.core.ShapedArray(aval.shape, aval.dtype)


def no_explicit_mesh() -> AbstractContextManager[Any]:
    """Traces as if no mesh were set, so that operations need not say how results are sharded."""
    return use_abstract_mesh(AbstractMesh((), ()))


def is_auto_partitioned(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the compiler may split the arrays of this computation between devices."""
    axis_context: Any = ctx.module_context.axis_context
    if isinstance(axis_context, mlir.SPMDAxisContext):
        sizes: dict[str, int] = dict(axis_context.mesh.shape)
        return any(n > 1 for name, n in sizes.items() if name not in axis_context.manual_axes)
    if isinstance(axis_context, mlir.ShardingContext):
        return int(axis_context.num_devices) > 1
    return False
