"""Partitioning rules: what a device does of an operation that the compiler may split.

Where nobody says how arrays lie, the compiler (Shardy) decides it, after JAX has lowered the
program. An operation it cannot see into then needs a rule: which dimensions of operands and results
go together, and, once it is decided how the operands lie, what each device does with its parts.
`jax.experimental.custom_partitioning` asks both of these; here they are a `Rule`, and the operation
a primitive, of which only the local part is ever traced.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.nki.host import Host

Names = tuple[str, ...]

Meshes = tuple[Mesh, Mesh]
"""In a `shard_map` over some axes of a mesh: that mesh, and one of the others' axes."""

COPIES = "UVW"
"""Letters of the axes of `jax.vmap`, innermost first."""

NUMBERS = "ACDEFGIJ"
"""Letters of the axes of what numbers devices."""

SPLIT_ALIKE = "BKNSP" + COPIES + NUMBERS
"""Letters of axes that operands and results have in common; others are each array's own."""

PLATFORMS = ("cpu", "gpu", "cuda", "rocm")
"""Whose compilers are known to ask for such rules; that of TPUs does not (jax-ml/jax#38196)."""


class Local(NamedTuple):
    """What a device does.

    Attributes:
        run: a function of the device's parts of the operands, inside all axes of the mesh.
        operands: how it needs each operand to be split.
        results: how its results are.
    """

    run: Callable[..., Sequence[Array]]
    operands: Sequence[PartitionSpec]
    results: Sequence[PartitionSpec]


@runtime_checkable
class Rule(Protocol):
    """How an operation is split; hashable."""

    @property
    def operands(self) -> tuple[str, ...]:
        """Letters of the axes of each operand."""

    @property
    def results(self) -> tuple[str, ...]:
        """Letters of the axes of each result."""

    def local(
        self, mesh: Mesh, lie: Sequence[tuple[Names, ...]], shapes: Sequence[Any], host: Host | None
    ) -> Local:
        """What a device does of operands that lie so.

        Args:
            mesh: of all devices.
            lie: for each axis of each operand, the mesh axes that split it.
            shapes: of the operands, whole.
            host: by which kernels can be launched in the interpreter; None off the CPU.

        Raises:
            ValueError: if much would have to move; with what to do.
        """


_PARTITIONED = Primitive("partitioned")
_PARTITIONED.multiple_results = True


def partitioned(
    rule: Rule, result: Sequence[jax.ShapeDtypeStruct], *operands: Array
) -> tuple[Array, ...]:
    """The operation, in a computation that the compiler splits between devices."""
    types = tuple((tuple(r.shape), np.dtype(r.dtype)) for r in result)
    return tuple(_PARTITIONED.bind(*operands, rule=rule, result=types))


@_PARTITIONED.def_abstract_eval
def _abstract_eval(*operands: Any, rule: Rule, result: Any) -> list[Any]:
    del operands, rule
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in result]


def _lower(ctx: mlir.LoweringRuleContext, *values: Any, rule: Rule, result: Any) -> Any:
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        raise NotImplementedError(
            "the partitioning rule is Shardy's, which is switched off: say how arrays lie with "
            "sharding=jax_tkg.sharding.AttentionSharding(mesh, ...)."
        )
    platforms = tuple(ctx.platforms or ctx.module_context.platforms)
    host = Host(ctx) if platforms == ("cpu",) else None

    meshes = _compat.partly_mapped(ctx)
    split = _split(rule, result, host) if meshes is None else _numbered(rule, result, host, meshes)
    with _compat.no_explicit_mesh():
        return mlir.lower_fun(split, multiple_results=True)(ctx, *values)


def _numbered(rule: Rule, result: Any, host: Host | None, meshes: Meshes) -> Any:
    whole, rest = meshes
    axes = tuple(name for name, size in rest.shape.items() if size > 1)
    sizes = tuple(rest.shape[name] for name in axes)
    results = ((sizes, np.dtype(np.int32)), *result)
    split = _split(NumberedRule(rule, axes), results, host, meshes)

    def with_numbers(*operands: Array) -> Sequence[Array]:
        where = NamedSharding(whole, PartitionSpec(*axes))
        numbers = lax.with_sharding_constraint(jnp.zeros(sizes, np.int32), where)
        _, *found = split(numbers, *operands)
        return found

    return with_numbers


def _split(rule: Rule, result: Any, host: Host | None, meshes: Meshes | None = None) -> Any:
    def shape_of_it(*operands: Array) -> tuple[Array, ...]:
        del operands
        return tuple(jnp.zeros(shape, dtype) for shape, dtype in result)

    split = custom_partitioning(shape_of_it)
    split.def_partition(
        partial(_partition, rule, host, meshes),
        sharding_rule=partial(_sharding_rule, rule, meshes),
    )
    return split


mlir.register_lowering(_PARTITIONED, _lower)


# --- some axes of the mesh mapped already


@dataclass(frozen=True)
class NumberedRule:
    """A `Rule` in a `shard_map` over some axes of a mesh, split over the others.

    There the compiler numbers the devices of a group in the order in which the first result is
    split, and does not tell the axes. So the first operand, and result, is split in a known order.

    Attributes:
        one: the rule.
        axes: those of the mesh that are left, in its order.
    """

    one: Rule
    axes: Names

    @property
    def operands(self) -> tuple[str, ...]:
        """See `Rule.operands`."""
        return NUMBERS[: len(self.axes)], *self.one.operands

    @property
    def results(self) -> tuple[str, ...]:
        """See `Rule.results`."""
        return NUMBERS[: len(self.axes)], *self.one.results

    def local(
        self, mesh: Mesh, lie: Sequence[tuple[Names, ...]], shapes: Sequence[Any], host: Host | None
    ) -> Local:
        """See `Rule.local`."""
        if lie[0] != tuple((n,) for n in self.axes):
            raise ValueError(
                f"inside a shard_map over other axes the compiler does not tell how {self.axes} "
                "split the arrays: say it with sharding=jax_tkg.sharding.AttentionSharding(mesh, "
                "...), or map these axes too."
            )
        local = self.one.local(mesh, lie[1:], shapes[1:], host)
        numbers = PartitionSpec(*self.axes)

        def run(numbers: Array, *parts: Array) -> tuple[Array, ...]:
            return numbers, *local.run(*parts)

        return Local(run, [numbers, *local.operands], [numbers, *local.results])


# --- copies


@dataclass(frozen=True)
class CopiesRule:
    """How the copies are split that `jax.vmap` makes of an operation; a `Rule`.

    Attributes:
        one: the rule of one of them.
        mapped: which operands have an axis for the copies, the first; all results have.
        letter: of that axis.
    """

    one: Rule
    mapped: tuple[bool, ...]
    letter: str

    @property
    def operands(self) -> tuple[str, ...]:
        """See `Rule.operands`."""
        given = zip(self.one.operands, self.mapped, strict=True)
        return tuple(self.letter * is_mapped + letters for letters, is_mapped in given)

    @property
    def results(self) -> tuple[str, ...]:
        """See `Rule.results`."""
        return tuple(self.letter + letters for letters in self.one.results)

    def local(
        self, mesh: Mesh, lie: Sequence[tuple[Names, ...]], shapes: Sequence[Any], host: Host | None
    ) -> Local:
        """What a device does of its copies, which are split as those of the largest operand."""
        of_one = [x[is_mapped:] for x, is_mapped in zip(lie, self.mapped, strict=True)]
        types = [
            jax.ShapeDtypeStruct(x.shape[is_mapped:], x.dtype)
            for x, is_mapped in zip(shapes, self.mapped, strict=True)
        ]
        which = [i for i, is_mapped in enumerate(self.mapped) if is_mapped]
        names = lie[max(which, key=lambda i: math.prod(shapes[i].shape))][0]
        local = self.one.local(mesh, of_one, types, host)
        taken = {n for spec in (*local.operands, *local.results) for e in spec for n in _names(e)}
        if taken & set(names):
            raise ValueError(
                f"jax.vmap maps an axis that is split over {names}, and operands of one copy are "
                f"split over {tuple(sorted(taken))}: give each mesh axis one thing to split."
            )
        axes = tuple(0 if is_mapped else None for is_mapped in self.mapped)
        operands = [
            PartitionSpec(names or None, *spec) if is_mapped else spec
            for spec, is_mapped in zip(local.operands, self.mapped, strict=True)
        ]
        results = [PartitionSpec(names or None, *spec) for spec in local.results]
        return Local(jax.vmap(local.run, in_axes=axes), operands, results)


def _batch(operands: Any, dims: Any, *, rule: Rule, result: Any) -> tuple[Any, Any]:
    mapped = tuple(d is not None for d in dims)
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]
    size = moved[mapped.index(True)].shape[0]
    used = set("".join(rule.results))
    letter = next((x for x in COPIES if x not in used), None)
    if letter is None:
        raise NotImplementedError(
            f"more than {len(COPIES)} levels of jax.vmap around an operation with a partitioning "
            "rule: reshape their axes into one, or say how arrays lie with sharding=jax_tkg."
            "sharding.AttentionSharding(mesh, ...)."
        )
    of_all = tuple(((size, *shape), dtype) for shape, dtype in result)
    results = _PARTITIONED.bind(*moved, rule=CopiesRule(rule, mapped, letter), result=of_all)
    return results, [0] * len(results)


batching.primitive_batchers[_PARTITIONED] = _batch


# --- asking JAX for the mesh

_ASKING = Primitive("asking_for_mesh")


def asking_for_mesh(array: Array) -> Array:
    """The array; lowering the program that it is part of, JAX knows the mesh.

    JAX tells it to programs that have an operation with a partitioning rule when they are traced.
    Ours has one when it is lowered, and until then a program of it as a parameter.
    """
    return _ASKING.bind(array, program=_with_a_rule())


@cache
def _with_a_rule() -> Any:
    def itself(x: Array) -> Array:
        return x

    split = custom_partitioning(itself)
    split.def_partition(lambda *_: None, sharding_rule="i -> i")
    return jax.make_jaxpr(split)(jax.ShapeDtypeStruct((1,), "float32"))


_ASKING.def_impl(lambda x, program: x)
_ASKING.def_abstract_eval(lambda x, program: x)
mlir.register_lowering(_ASKING, lambda ctx, x, program: [x])
batching.defvectorized(_ASKING)
ad.deflinear2(_ASKING, lambda cotangent, x, program: [cotangent])


# --- which dimensions go together


def _sharding_rule(
    rule: Rule, meshes: Meshes | None, mesh: Mesh, operands: Any, results: Any
) -> SdyShardingRule:
    shapes = [tuple(x.shape) for x in (*operands, *results)]
    letters = (*rule.operands, *rule.results)
    sizes = _sizes(letters, shapes)
    group = _group(sizes, mesh if meshes is None else meshes[1])
    mappings = [
        ArrayMapping(*(_factor(a, n, sizes, group, f"x{i}x{j}") for j, (a, n) in enumerate(axes)))
        for i, axes in enumerate(
            zip(given, shape, strict=True) for given, shape in zip(letters, shapes, strict=True)
        )
    ]
    of_operands = tuple(mappings[: len(rule.operands)])
    of_results = tuple(mappings[len(rule.operands) :])
    sizes_of: Any = {"g": group} if group > 1 else {}
    return SdyShardingRule(of_operands, of_results, **sizes_of)


def _sizes(letters: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The largest that each letter has: of size 1 are axes that rows or heads share."""
    sizes: dict[str, int] = {}
    for given, shape in zip(letters, shapes, strict=True):
        for letter, n in zip(given, shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), n)
    return sizes


def _group(sizes: dict[str, int], mesh: Mesh) -> int:
    """Query heads of each KV head where both are split alike; 0 where an axis would be cut up."""
    heads, kv_heads = sizes.get("N", 0), sizes.get("K", 0)
    alike = heads and kv_heads > 1 and all(kv_heads % n == 0 for n in mesh.shape.values())
    return heads // kv_heads if alike else 0


def _factor(letter: str, size: int, sizes: dict[str, int], group: int, own: str) -> Any:
    if letter not in SPLIT_ALIKE or size == 1 or size != sizes[letter]:
        return own
    if letter == "N" and group:
        return CompoundFactor("k", "g") if group > 1 else "k"
    return letter.lower()


# --- what a device does


def _partition(
    rule: Rule,
    host: Host | None,
    meshes: Meshes | None,
    mesh: Mesh,
    operands: Sequence[Any],
    results: Sequence[Any],
) -> Any:
    """In a `shard_map` over some axes of a mesh, which JAX does not tell, the meshes are given.

    What is mapped there is all of it: the compiler has told apart devices that the `shard_map` has.
    """
    del results  # what follows from the operands; the compiler splits it further, or gathers it
    whole, rest = meshes or (mesh, mesh)
    if meshes is None and not all(isinstance(x.sharding, NamedSharding) for x in operands):
        raise ValueError(
            "the compiler does not say by which mesh arrays are split: place them with "
            "jax.sharding.NamedSharding, or say it with sharding=jax_tkg.sharding."
            "AttentionSharding(mesh, ...)."
        )
    lie = [_axes_of(x, rest) for x in operands]
    local = rule.local(rest, lie, operands, host)
    named = partial(NamedSharding, rest)
    return whole, local.run, tuple(map(named, local.results)), tuple(map(named, local.operands))


def _axes_of(operand: Any, mesh: Mesh) -> tuple[Names, ...]:
    axes = len(operand.shape)
    if not isinstance(operand.sharding, NamedSharding):
        return _compat.axes_that_split(operand.sharding, axes, mesh)
    entries = tuple(operand.sharding.spec)
    return tuple(map(_names, (*entries, *(None,) * (axes - len(entries)))))


def _names(entry: Any) -> Names:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
