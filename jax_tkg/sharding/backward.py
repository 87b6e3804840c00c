"""The backward pass of a divided call: each part has the cotangents of its own keys.

It does not go through the merge: from the whole row's output and log-sum-exp a part has what its
own keys contribute; only the cotangents of what parts share are summed.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.operands import Operands
from jax_tkg.sharding.division import Division
from jax_tkg.sharding.operands import (
    Shards,
    count_sinks_once,
    localise,
    result_specs,
    shard_specs,
    whole_bias,
)

OnParts = Callable[..., list[Array]]
"""As `jax_tkg.sharding.mapped.on_devices`."""


def backward_divided(
    division: Division,
    parts: Shards,
    results: tuple[Array, ...],
    cotangents: tuple[Array, ...],
    differentiate: Callable[..., Operands],
    on_parts: OnParts,
) -> Operands:
    """Cotangents in the operands' tree, None for integers.

    Args:
        division: how the call is divided.
        parts: its operands, taken apart.
        results: of the whole call.
        cotangents: of the results.
        differentiate: the backward pass of a part, `(problem, operands, results, cotangents)`.
        on_parts: does it on all parts.
    """
    shards, of_shards = jax.tree.flatten(parts)
    specs = list(of_shards.flatten_up_to(shard_specs(division, parts)))  # type: ignore[attr-defined]
    floats = [i for i, x in enumerate(shards) if jnp.issubdtype(x.dtype, jnp.floating)]
    of_results = result_specs(division)
    given, of_given = jax.tree.flatten((shards, tuple(results), tuple(cotangents)))

    def on_part(*given: Array) -> list[Array]:
        agreed = _compat.agree_on_varying_axes(given)
        shards, results, cotangents = jax.tree.unflatten(of_given, agreed)
        dtypes = [shards[i].dtype for i in floats]
        own = jax.tree.unflatten(of_shards, shards)

        def local(given: list[Array]) -> Operands:
            filled = dict(enumerate(shards)) | dict(zip(floats, given, strict=True))
            ops = localise(division, jax.tree.unflatten(of_shards, list(filled.values())))
            return count_sinks_once(division, ops)

        wide = [_wide(own, shards[i]) for i in floats]
        _, pull = jax.vjp(lambda given: _floats(local(given)), wide)
        found = differentiate(division.differentiated, local(wide), results, cotangents)
        (summed,) = pull(_floats(found))
        summed = _sum_shared(division, summed, [specs[i] for i in floats])
        return [x.astype(dtype) for x, dtype in zip(summed, dtypes, strict=True)]

    summed = on_parts(
        division,
        on_part,
        given,
        (*specs, *of_results, *of_results),
        [specs[i] for i in floats],
    )
    found = dict(zip(floats, summed, strict=True))
    d_shards = jax.tree.unflatten(of_shards, [found.get(i) for i in range(len(shards))])
    return replace(d_shards.ops, bias=whole_bias(division, d_shards))


def _floats(ops: Operands) -> list[Array]:
    return [x for x in jax.tree.leaves(ops) if jnp.issubdtype(x.dtype, jnp.floating)]


def _wide(shards: Shards, array: Array) -> Array:
    """In float32, so that what is summed over parts is rounded once; not the cache."""
    kv = shards.ops.kv
    return array if array is kv.key or array is kv.value else array.astype(jnp.float32)


def _sum_shared(
    division: Division, cotangents: list[Array], specs: Sequence[PartitionSpec]
) -> list[Array]:
    """Sums each over the devices that have the same part of its operand."""
    shared = defaultdict(list)
    for i, spec in enumerate(specs):
        split = {name for entry in spec for name in _names(entry)}
        shared[tuple(n for n in division.sharding.axis_names if n not in split)].append(i)
    found = list(cotangents)
    for axes, which in shared.items():
        if axes:
            sums = lax.psum([cotangents[i] for i in which], axes)
            for i, total in zip(which, sums, strict=True):
                found[i] = total
    return found


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
