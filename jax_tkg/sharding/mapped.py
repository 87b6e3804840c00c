"""`jax.shard_map` over the axes of a division, as it is needed here: also under `jax.vmap`.

Where types tell how copies are split, JAX's own rule gathers them (0.10, 0.12) or fails (0.7).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.sharding.division import Division

Function = Callable[..., Sequence[Array]]


def on_devices(
    division: Division,
    function: Function,
    arrays: Sequence[Array],
    in_specs: Sequence[PartitionSpec],
    out_specs: Sequence[PartitionSpec],
    *,
    check_vma: bool = True,
) -> list[Array]:
    """What each device makes of its parts.

    Args:
        division: names the axes; what others split, the compiler splits inside.
        function: of a device's parts of the arrays, one by one.
        arrays: whole.
        in_specs: how they are split.
        out_specs: how the results are.
        check_vma: see `jax.shard_map`.
    """
    sharding = division.sharding
    names, specs = frozenset(sharding.axis_names), (tuple(in_specs), tuple(out_specs))
    whole = _Map(sharding.mesh, names, function, *specs, check_vma, division.maps_idle)
    return whole.of(arrays)


class _Map(NamedTuple):
    """A `shard_map`, with a rule for `jax.vmap`: see the arguments of `on_devices`."""

    mesh: Mesh | AbstractMesh
    axes: frozenset[str]
    function: Function
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    check_vma: bool
    maps_idle: bool

    def of(self, arrays: Sequence[Array]) -> list[Array]:
        if not _compat.has_explicit_axes(arrays[0]):
            return self.run(*arrays)
        mappable = custom_vmap(self.run)

        @mappable.def_vmap
        def _copies(size: int, mapped: Sequence[bool], *arrays: Array) -> tuple[list[Array], Any]:
            del size
            copies, given = self.copies(mapped, arrays)
            found = copies.of(given)
            return found, [True] * len(found)

        return list(mappable(*arrays))

    def run(self, *arrays: Array) -> list[Array]:
        axes = self.axes
        if self.maps_idle:
            axes |= _axes_of_nothing(arrays)
            # All that there are: without those that a `jax.vmap` around it has.
            axes = frozenset() if axes == set(self.mesh.axis_names) else axes
        mapped: Any = jax.shard_map(
            lambda *parts: list(self.function(*parts)),
            mesh=_compat.mesh_to_map(self.mesh),
            in_specs=self.in_specs,
            out_specs=list(self.out_specs),
            axis_names=axes,
            check_vma=self.check_vma,
        )
        return list(mapped(*arrays))

    def copies(self, mapped: Sequence[bool], arrays: Sequence[Array]) -> tuple["_Map", list[Array]]:
        """That of all copies, and the arrays with their first axes, of the copies, split alike."""
        names = _split_copies(arrays, mapped)

        def of_copies(spec: PartitionSpec) -> PartitionSpec:
            return PartitionSpec(names or None, *spec)

        pairs = zip(self.in_specs, mapped, strict=True)
        in_specs = tuple(of_copies(x) if is_mapped else x for x, is_mapped in pairs)
        axes = self.axes | set(names)
        given = [
            _compat.as_split(x, spec, [*axes], self.mesh)
            for x, spec in zip(arrays, in_specs, strict=True)
        ]
        function = jax.vmap(self.function, [0 if x else None for x in mapped])
        # JAX 0.7 has no types for what `jax.vmap` makes of an update in place; none are asked for
        # where all axes are mapped.
        maps_idle = self.maps_idle or not _compat.UPDATES_HAVE_TYPES
        specs = in_specs, tuple(map(of_copies, self.out_specs))
        return _Map(self.mesh, axes, function, *specs, self.check_vma, maps_idle), given


def _split_copies(arrays: Sequence[Array], mapped: Sequence[bool]) -> tuple[str, ...]:
    """The axes that split the copies of the largest array, which is not moved."""
    largest = max(
        (x for x, is_mapped in zip(arrays, mapped, strict=True) if is_mapped),
        key=lambda x: math.prod(x.shape),
    )
    return _names(jax.typeof(largest).sharding.spec[0])


def _axes_of_nothing(arrays: Sequence[Array]) -> frozenset[str]:
    """Those that are explicit and split none of the arrays."""
    types = [jax.typeof(x).sharding for x in arrays]
    explicit = frozenset(n for s in types for n in _compat.explicit_axes(s.mesh))
    return explicit - {n for s in types for entry in s.spec for n in _names(entry)}


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
