"""A cache on a mesh: every device runs a method of the cache on its own shard of it.

`run` is the one way from a whole cache to its shards. Where the caller is on a shard already, in a
`jax.shard_map` of its own, the method is just called. What a method needs to know of the whole it
asks with `part` and `parts`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.sharding.spec import AttentionSharding, axis_kinds

if TYPE_CHECKING:
    from jax_tkg.cache.kv_cache import KVCache

try:
    from jax import reshard
except ImportError:  # jax 0.7
    from jax.sharding import reshard


def parts(sharding: AttentionSharding | None, role: str) -> int:
    """Into how many parts a dimension is split, of which one is seen here."""
    return 1 if sharding is None or not _is_shard(sharding) else sharding.size(role)


def part(sharding: AttentionSharding | None, role: str) -> Array | int:
    """Which of the `parts` that is, int32 `[]`."""
    names = () if sharding is None or not _is_shard(sharding) else sharding.names(role)
    return lax.axis_index(names) if names else 0


def _is_shard(sharding: AttentionSharding) -> bool:
    """Whether a `shard_map` around the caller is over all axes that the sharding names."""
    names = sharding.axis_names
    return bool(names) and mapped_axes().issuperset(names)


def mapped_axes() -> frozenset[str]:
    """Mesh axes over which arrays are those of one device, in a `shard_map` around the caller."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def run(
    method: Callable[..., Any], cache: "KVCache", *new: tuple[Array, str], result: str | None = None
) -> Any:
    """`method(cache, *arrays)` on each device's shard.

    Args:
        method: a function of a cache and arrays, always the same object for the same work: it is
            part of what a compiled program is found by.
        cache: with a `sharding`, or with arrays whose types on an explicit mesh tell it.
        *new: the arrays, each with the letters of its axes.
        result: letters of the result; None for a cache.

    Raises:
        ValueError: if the arrays of the cache do not lie as its sharding says.
    """
    arrays = [array for array, _ in new]
    sharding = sharding_of(cache)
    if sharding is None or _is_shard(sharding):
        return _on_shard(method, result, cache, *arrays)
    _check_placed(cache, sharding)
    letters = tuple(axes for _, axes in new)
    return _on_shards(method, sharding, letters, result, cache, *arrays)


def _on_shard(
    method: Callable[..., Any], result: str | None, cache: "KVCache", *arrays: Array
) -> Any:
    found = method(cache._on_shard(), *arrays)
    return found._of_whole() if result is None else found


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _on_shards(
    method: Callable[..., Any],
    sharding: AttentionSharding,
    letters: tuple[str, ...],
    result: str | None,
    cache: "KVCache",
    *arrays: Array,
) -> Any:
    """All mesh axes become manual: over those not named the cache is, and stays, replicated."""
    given, cache = cache.sharding, replace(cache, sharding=sharding)
    mesh = _compat.mesh_to_map(sharding.mesh)
    kinds = axis_kinds(jax.sharding.get_abstract_mesh() if mesh is None else mesh)
    unmapped = sharding.without(mapped_axes())
    spec = partial(unmapped.spec, num_kv_heads=cache.kv.shape.num_kv_heads)
    of_cache = jax.tree.map(spec, cache.letters())
    specs = (of_cache, *map(spec, letters))
    found = jax.shard_map(
        partial(_on_shard, method, result),
        mesh=mesh,
        in_specs=specs,
        out_specs=of_cache if result is None else spec(result),
        axis_names={n for n, kind in kinds.items() if kind != AxisType.Manual},
    )(*_typed((cache, *arrays), specs, mesh))
    return replace(found, sharding=given) if result is None else found


def _typed(arrays: Any, specs: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """Arrays with the types that an explicit mesh asks of what is given to `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    explicit = frozenset(n for n, kind in axis_kinds(mesh).items() if kind == AxisType.Explicit)
    if not explicit:
        return arrays

    def typed(array: Array, spec: PartitionSpec) -> Array:
        names = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
        entries = (tuple(n for n in some if n in explicit) for some in names)
        return reshard(array, NamedSharding(mesh, PartitionSpec(*(e or None for e in entries))))

    return jax.tree.map(typed, arrays, specs)


# --- which sharding a cache has


def sharding_of(cache: "KVCache") -> AttentionSharding | None:
    """What the cache was made with, or what the types of its arrays tell."""
    return cache.sharding or _sharding_of_types(cache)


def _sharding_of_types(cache: "KVCache") -> AttentionSharding | None:
    """How the arrays are split over the explicit axes of a mesh; None if they are not."""
    if jax.typeof(cache.kv.key).sharding.mesh.empty:
        return None
    found: dict[str, Any] = {}
    for array, letters in _leaves(cache):
        entries = jax.typeof(array).sharding.spec
        for letter, entry in zip(letters, entries, strict=False):
            found.setdefault(letter, entry)
            if entry is not None and (letter not in cache.splittable or found[letter] != entry):
                raise ValueError(
                    f"the arrays of this cache can be split by {', '.join(cache.splittable)}, all "
                    f"of them alike; found {letters} split as {entries}. Make the cache with "
                    "create(..., sharding=AttentionSharding(...))."
                )
    roles = {"batch": found["B"], "heads": found["K"], "keys": found["S"]}
    if not any(roles.values()):
        return None
    keys: Any = cache.kv.key
    mesh = (jax.typeof(keys) if isinstance(keys, jax.core.Tracer) else keys).sharding.mesh
    return AttentionSharding(mesh, **roles)


def _leaves(cache: "KVCache") -> list[tuple[Array, str]]:
    letters = jax.tree.leaves(cache.letters())
    return list(zip(jax.tree.leaves(cache), letters, strict=True))


def check_same_shard(cache: "KVCache", source: Any, target: Any) -> None:
    """Refuses two rows, given as ints, of which one device does not hold both."""
    sharding = sharding_of(cache)
    if sharding is None or not isinstance(source, int) or not isinstance(target, int):
        return
    rows = cache.lengths.shape[0] * parts(sharding, "batch") // sharding.size("batch")
    if source // rows != target // rows:
        raise ValueError(
            f"row {target} cannot share pages with row {source}: {sharding}, so each device has "
            f"{rows} rows and their pages. Put what shares a beginning in one of these."
        )


def _check_placed(cache: "KVCache", sharding: AttentionSharding) -> None:
    """Refuses arrays that would have to be moved; of traced ones only XLA knows where they are."""
    if not isinstance(sharding.mesh, Mesh):
        return
    for array, letters in _leaves(cache):
        if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
            continue
        wanted = sharding.named(letters, num_kv_heads=cache.kv.shape.num_kv_heads)
        if not array.sharding.is_equivalent_to(wanted, array.ndim):
            raise ValueError(
                f"this cache says {sharding}, but an array {letters} {tuple(array.shape)} of it "
                f"lies as {array.sharding}. Make it with create(..., sharding=), or move it "
                "there with jax.device_put(cache, cache.shardings())."
            )


# --- new caches


@dataclass(frozen=True)
class Maker:
    """Makes the arrays of a new cache where they belong.

    Attributes:
        sharding: None for arrays on one device.
        batch: rows B.
        num_kv_heads: KV heads K.
        slots: slots S; None if they cannot be split.

    Raises:
        ValueError: if the mesh does not divide one of the numbers.
    """

    sharding: AttentionSharding | None
    batch: int
    num_kv_heads: int
    slots: int | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self._named is not None:
            self._named.check(batch=self.batch, slots=self.slots, num_kv_heads=self.num_kv_heads)

    @property
    def _named(self) -> AttentionSharding | None:
        """The sharding; None on one device, and where the arrays to be made are of one device."""
        if self.sharding is None or _is_shard(self.sharding):
            return None
        return self.sharding

    def full(self, axes: str, sizes: Mapping[str, int], number: int, dtype: np.dtype) -> Array:
        """An array of one number. No device ever holds more than its shard of it."""
        shape = tuple(sizes[a] for a in axes)
        if self._named is None:
            return jnp.full(shape, number, dtype)
        return _full(shape, number, dtype, self._named.named(axes, num_kv_heads=self.num_kv_heads))

    def placed(self, axes: str, array: Array | None) -> Array | None:
        """A small array that is there already."""
        if array is None or self._named is None:
            return array
        return jax.device_put(array, self._named.named(axes, num_kv_heads=self.num_kv_heads))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _full(shape: tuple[int, ...], number: int, dtype: np.dtype, sharding: NamedSharding) -> Array:
    def shard() -> Array:
        return jnp.full(sharding.shard_shape(shape), number, dtype)

    mesh = _compat.mesh_to_map(sharding.mesh)
    return jax.shard_map(shard, mesh=mesh, in_specs=(), out_specs=sharding.spec)()
