"""Where arrays lie already: what their types on an explicit mesh tell, and what must not move."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.sharding.division import Division, divide
from jax_tkg.sharding.operands import Shards, shard_specs
from jax_tkg.sharding.spec import AttentionSharding, axis_kinds

Names = tuple[str, ...]


def sharding_of_types(ops: Operands) -> AttentionSharding | None:
    """How the types of query and cache split them over explicit axes.

    Rows and heads are split as query and cache are, where both say it in the same way, or one of
    them: what is whole is cut without communication. Slots are split as the cache's.

    Returns:
        None if nothing is split, or in a way in which the op cannot be divided: the compiler then
        partitions it.

    Raises:
        ValueError: if query and cache are split over different axes.
    """
    queries = _by_letter([(ops.query, "BTNH")])
    mesh = jax.typeof(ops.query).sharding.mesh
    leaves, tree = jax.tree.flatten(ops.kv)
    letters = tree.flatten_up_to(ops.kv.letters())  # type: ignore[attr-defined]
    stored = _by_letter(zip(leaves, letters, strict=True))
    if mesh.empty:
        mesh = next((m for m in (jax.typeof(x).sharding.mesh for x in leaves) if not m.empty), mesh)
    splittable = set("BNKSP")
    if {a for found in (queries, stored) for a, names in found.items() if names} - splittable:
        return None
    batch = _agreed("rows", queries["B"], stored["B"])
    heads = _agreed("heads", queries["N"], stored["K"])
    sharding = AttentionSharding(mesh, batch, heads, stored["S"] or None)
    if not sharding.axis_names or ("P" in stored and stored["P"] != _all(batch, stored["S"])):
        return None
    shape = ops.kv.shape
    try:
        sharding.check(num_kv_heads=shape.num_kv_heads, num_heads=ops.query.shape[2])
    except ValueError:  # the compiler can split heads unevenly
        return None
    return sharding


def _by_letter(arrays: Any) -> dict[str, Names]:
    """The explicit axes over which each letter is split; of arrays that differ, the first that is.

    A scale says nothing of rows that it does not have.
    """
    found: dict[str, Names] = {}
    for array, letters in arrays:
        entries = jax.typeof(array).sharding.spec
        for letter, entry in zip(letters, entries, strict=True):
            found[letter] = found.get(letter) or _names(entry)
    return {"B": (), "S": (), **found}


def _agreed(what: str, query: Names, cache: Names) -> Names | None:
    if query and cache and query != cache:
        raise ValueError(
            f"the {what} of the query are split over {_listed(query)} and those of the cache over "
            f"{_listed(cache)}: reshard the query, the smaller of the two."
        )
    return query or cache or None


def _all(*names: Names | None) -> Names:
    return tuple(n for some in names for n in some or ())


def _names(entry: Any) -> Names:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _listed(names: Names) -> str:
    return ", ".join(map(repr, names))


# --- a cache stays where it is


def divide_here(
    problem: AttentionProblem, kv: KVLayout, sharding: AttentionSharding
) -> Division | None:
    """Divides a call as its sharding says, over the axes that no `shard_map` around it has mapped.

    Raises:
        ValueError: sizes that do not divide, a cache that lies otherwise.

    Warns:
        UserWarning: as `check_placed`.
    """
    if not sharding.axis_names:
        return None
    mapped = _compat.mapped_axes() & set(sharding.axis_names)
    if mapped == set(sharding.axis_names):
        return divide(problem, sharding, is_mapped=True)
    if mapped & set(sharding.names("keys")):
        raise ValueError(
            f"this is inside a shard_map over {_listed(tuple(sorted(mapped)))}, and the sharding "
            f"({sharding}) splits more than that: to merge parts of the keys there, map all axes "
            "that it names, or none of those of keys."
        )
    division = divide(problem, sharding.without(mapped) if mapped else sharding)
    check_placed(division, kv)
    return division


def check_placed(division: Division, kv: KVLayout) -> None:
    """Checks that keys and values lie as the division splits them, as far as that can be seen.

    It can be seen of concrete arrays on several devices, and of types on an explicit mesh.

    Raises:
        ValueError: if they are split otherwise: they would have to move.

    Warns:
        UserWarning: if every device has all of what each should have a part of.
    """
    letters = kv.letters()
    for name in ("key", "value"):
        array, axes = getattr(kv, name), getattr(letters, name)
        wanted = division.sharding.spec(axes, num_kv_heads=division.whole.num_kv_heads)
        visible = _visible_axes(array)
        if not visible & set(division.sharding.axis_names):
            continue
        given, needed = _only(_spec(array), visible), _only(wanted, visible)
        described = f"{name} [{', '.join(axes)}] is split as {given}, and the sharding splits it "
        pairs = list(zip(axes, given, needed, strict=True))
        named = set(division.sharding.axis_names)
        if any(had not in ((), need) and (need or named & set(had)) for _, had, need in pairs):
            raise ValueError(
                f"{described}as {needed} ({division.sharding}): a cache is not moved to be read. "
                "Place it with jax.device_put(cache, sharding.named(axes)), or name other axes."
            )
        if any(need and not had for axis, had, need in pairs if axis in "KS"):
            warnings.warn(
                f"{described}as {needed}: devices hold slots or heads that they do not use. Make "
                "the cache with the sharding, or place it with jax.device_put.",
                UserWarning,
                stacklevel=6,
            )
            return


def _visible_axes(array: Any) -> frozenset[str]:
    """The mesh axes of which it can be seen whether the array is split over them."""
    if isinstance(array, jax.core.Tracer):
        return frozenset(_compat.explicit_axes(jax.typeof(array).sharding.mesh))
    placed = getattr(array, "sharding", None)
    if not isinstance(placed, NamedSharding) or placed.num_devices == 1:
        return frozenset()
    return frozenset(placed.mesh.axis_names)


def _spec(array: Any) -> Sequence[Any]:
    placed = jax.typeof(array) if isinstance(array, jax.core.Tracer) else array
    entries = tuple(placed.sharding.spec)
    return (*entries, *(None,) * (array.ndim - len(entries)))


def _only(spec: Any, axes: frozenset[str]) -> tuple[Names, ...]:
    return tuple(tuple(n for n in _names(entry) if n in axes) for entry in spec)


# --- types on an explicit mesh


def typed(division: Division, ops: Operands) -> Operands:
    """The operands with the types that `shard_map` asks for; what is whole is cut in place."""
    if not any(kind.name == "Explicit" for kind in axis_kinds(division.sharding.mesh).values()):
        return ops
    return typed_shards(division, Shards(ops, None, None)).ops


def typed_shards(division: Division, shards: Shards) -> Shards:
    """Likewise."""
    names = division.sharding.axis_names

    def as_split(array: Array, spec: PartitionSpec) -> Array:
        return _compat.as_split(array, spec, names, division.sharding.mesh)

    return jax.tree.map(as_split, shards, shard_specs(division, shards))
