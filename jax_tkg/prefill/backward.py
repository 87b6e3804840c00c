"""The backward pass where it is known what is compiled for: in tiles, of parts of the slots or not.

A tile of consecutive slots lies on one device, and a compiler that may split the slots would gather
it for all. There the slots are seen as equal parts, as in the forms PARTS of the forward passes,
and a step takes a tile of each. A primitive, as that is known when it is lowered.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_tkg._typing import Array
from jax_tkg.copies import Level, Levels, over, type_of_all, type_of_one
from jax_tkg.lowering import lower_as_chosen, run_compiled
from jax_tkg.online import backward as tiles
from jax_tkg.online.backward import backward_in_tiles, takes_all_keys
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.prefill.parts import over_parts
from jax_tkg.prefill.plan import divided_slots
from jax_tkg.problem import AttentionProblem
from jax_tkg.sharding.backward import backward_divided
from jax_tkg.sharding.operands import make_shards

SMALLEST_TILE = 128
"""Keys of each part in a step, where there are so many parts that it would be less."""

_BACKWARD = Primitive("attention_backward")
_BACKWARD.multiple_results = True


def attention_backward(
    problem: AttentionProblem,
    ops: Operands,
    results: tuple[Array, ...],
    cotangents: tuple[Array, ...],
) -> Operands:
    """See `jax_tkg.online.backward.backward_in_tiles`."""
    in_one = takes_all_keys(problem) or problem.kv_len <= tiles.BACKWARD_TILE
    if in_one or problem.kv.has_holes:
        return backward_in_tiles(problem, ops, results, cotangents)
    leaves, tree = jax.tree.flatten((ops, tuple(results), tuple(cotangents)))
    found = iter(_BACKWARD.bind(*leaves, tree=tree, problem=problem, levels=()))
    return jax.tree.map(lambda x: next(found) if _is_float(x) else None, ops)


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


@_BACKWARD.def_abstract_eval
def _abstract_eval(*leaves: Any, tree: Any, problem: AttentionProblem, levels: Levels) -> Any:
    del problem
    one = [type_of_one(levels, i, x) for i, x in enumerate(leaves)]
    ops, *_ = jax.tree.unflatten(tree, one)
    found = [x for x in jax.tree.leaves(ops) if _is_float(x)]
    return [type_of_all(levels, x.update(weak_type=False)) for x in found]


def _choose_parts(target: Target, *leaves: Array, problem: AttentionProblem, **_: Any) -> int:
    """Into how many the slots are divided."""
    del leaves
    return math.gcd(problem.kv_len, target.devices) if target.auto_partitioned else 1


def _run(
    parts: int,
    target: Target,
    *leaves: Array,
    tree: Any,
    problem: AttentionProblem,
    levels: Levels,
) -> list[Array]:
    del target

    def run(*leaves: Array) -> list[Array]:
        ops, results, cotangents = jax.tree.unflatten(tree, leaves)
        if parts == 1:
            found = backward_in_tiles(problem, ops, results, cotangents)
        else:
            division = divided_slots(problem, parts)
            most = max(tiles.BACKWARD_TILE // parts, SMALLEST_TILE)
            in_tiles = partial(backward_in_tiles, most=most)
            shards = make_shards(division, ops)
            found = backward_divided(division, shards, results, cotangents, in_tiles, over_parts)
        wanted, of_ops = jax.tree.flatten(ops)
        given = of_ops.flatten_up_to(found)  # type: ignore[attr-defined]
        return [d for d, x in zip(given, wanted, strict=True) if _is_float(x)]

    return list(over(levels, run)(*leaves))


def _batch(leaves: Any, dims: Any, *, levels: Levels, **params: Any) -> tuple[Any, Any]:
    mapped = tuple(d is not None for d in dims)
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims, strict=True)]
    level = Level(moved[mapped.index(True)].shape[0], mapped)
    found = _BACKWARD.bind(*moved, levels=(level, *levels), **params)
    return found, [0] * len(found)


def _differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
    """A second derivative: of the tiles, that is, without parts."""
    whole = partial(_run, 1, Target(platforms=()), **params)
    return jax.jvp(whole, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


run_compiled(_BACKWARD, ("tree", "problem", "levels"))
lower_as_chosen(_BACKWARD, _choose_parts, _run)
batching.primitive_batchers[_BACKWARD] = _batch
ad.primitive_jvps[_BACKWARD] = _differentiate
