"""Kernels where the compiler decides how arrays lie: the op's partitioning rule.

Each device attends to its part with the implementation asked for, as it does when the sharding is
said. The cache stays where it lies, and the query follows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jax_tkg import _compat, rotation
from jax_tkg._typing import Array
from jax_tkg.choice import choose
from jax_tkg.implementations import Implementation
from jax_tkg.nki.host import Host
from jax_tkg.nki.implementation import Interpreter
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.primitive import attend
from jax_tkg.problem import AttentionProblem
from jax_tkg.sharding.attend import attend_on_mesh, attend_to_shard
from jax_tkg.sharding.division import Division, divide
from jax_tkg.sharding.operands import letters_of, result_specs, shard_specs, take_apart
from jax_tkg.sharding.partitioning import Local, Names, asking_for_mesh, partitioned
from jax_tkg.sharding.spec import AttentionSharding


def attend_undivided(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    """The op where nobody says how its operands lie.

    If nothing that is tried lets the compiler split it, all of it gets the rule. Not in a
    `shard_map`, over some axes or all: a rule is asked of programs of which nothing is mapped.
    """
    split = Target(platforms=(), auto_partitioned=True)
    if _compat.all_axes_mapped() or choose(problem, split, tried).chosen is not None:
        return attend(problem, tried, ops)
    return _attend_by_rule(problem, tuple(map(ByRule, tried)), ops)


def attend_divided(
    division: Division, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    """The op where it is said how its operands lie.

    Automatic axes of the mesh of which nothing is said are left to the compiler. If nothing that is
    tried lets it split the op, what is done between the others' devices gets the rule.
    """
    split = Target(platforms=(), auto_partitioned=True)
    can_split = choose(division.local, split, tried).chosen is not None
    sharding = division.sharding
    left = set(sharding.mesh.axis_names) - {*sharding.axis_names, *_compat.mapped_axes()}
    if division.is_mapped or not left or can_split:
        return attend_on_mesh(division, tried, ops)
    idle = left.intersection(_compat.explicit_axes(sharding.mesh))
    division = replace(division, maps_idle=bool(idle))
    if left == idle:
        return attend_on_mesh(division, tried, ops)
    return _divide_by_rule(division, tuple(map(ByRule, tried)), ops)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _divide_by_rule(
    division: Division, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    return attend_on_mesh(division, tried, replace(ops, query=asking_for_mesh(ops.query)))


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _attend_by_rule(
    problem: AttentionProblem, tried: tuple[Implementation, ...], ops: Operands
) -> tuple[Array, ...]:
    return attend(problem, tried, replace(ops, query=asking_for_mesh(ops.query)))


@dataclass(frozen=True)
class ByRule:
    """An implementation that also runs where the compiler may split its operands.

    Attributes:
        inner: the implementation, which the compiler cannot see into.
    """

    inner: Implementation

    @property
    def name(self) -> str:
        """That of the implementation."""
        return self.inner.name

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """What the implementation cannot do on a device."""
        return self.inner.why_not(problem, _of_device(target))

    def plan(self, problem: AttentionProblem, target: Target) -> object:
        """That of the implementation, for the whole."""
        return self.inner.plan(problem, _of_device(target))

    def why_not_rotate(self, problem: AttentionProblem, target: Target) -> str | None:
        """See `jax_tkg.rotation`: the compiler splits a rotation without a rule."""
        if target.auto_partitioned:
            return "the compiler decides how they lie"
        return rotation.why_in_jax(self.inner, problem, target)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> tuple[Array, ...]:
        """Runs it, on each device's part where there are several."""
        if not target.auto_partitioned:
            return self.inner.run(problem, ops, target)
        shards = take_apart(problem.kv_len, ops)
        leaves, tree = jax.tree.flatten(shards)
        letters = tuple(tree.flatten_up_to(letters_of(shards)))  # type: ignore[attr-defined]
        rows = ops.query.shape[:3]
        out = jax.ShapeDtypeStruct((*rows, problem.value_head_dim), problem.out_dtype)
        of_rows = jax.ShapeDtypeStruct(rows, "float32")
        result = (out, of_rows) if problem.normalize else (out, of_rows, of_rows)
        rule = AttentionRule(problem, self.inner, tree, letters)
        return partitioned(rule, result, *leaves)


def _of_device(target: Target) -> Target:
    return replace(target, auto_partitioned=False, devices=1)


@dataclass(frozen=True)
class AttentionRule:
    """How attention is split; a `jax_tkg.sharding.partitioning.Rule`.

    Attributes:
        problem: the whole.
        implementation: what runs on a device.
        tree: of the operands, `Shards` with what is of the new keys apart.
        operands: letters of the axes of each.
    """

    problem: AttentionProblem
    implementation: Implementation
    tree: Any
    operands: tuple[str, ...]

    @property
    def results(self) -> tuple[str, ...]:
        """Letters of the axes of each result."""
        return "BTNH", *("BTN",) * (1 if self.problem.normalize else 2)

    def local(
        self, mesh: Mesh, lie: Sequence[tuple[Names, ...]], shapes: Sequence[Any], host: Host | None
    ) -> Local:
        """Attention to the device's part of the cache, and the merge of the parts of a row."""
        number: Any = jax.tree.unflatten(self.tree, range(len(lie)))
        cache = [(self.operands[i], lie[i]) for i in jax.tree.leaves(number.ops.kv)]
        query = dict(zip("BTNH", lie[number.ops.query], strict=True))
        sharding = sharding_of_cache(mesh, cache)
        sharding = _with_query(sharding, query, self.problem)
        division = divide(self.problem, sharding)
        tried = (_hosted(self.implementation, host),)

        def run(*leaves: Array) -> tuple[Array, ...]:
            return attend_to_shard(division, tried, jax.tree.unflatten(self.tree, leaves))

        shards = jax.tree.unflatten(self.tree, shapes)
        specs = self.tree.flatten_up_to(shard_specs(division, shards))
        return Local(run, specs, result_specs(division))


def _hosted(implementation: Any, host: Host | None) -> Any:
    """With its launches in the program that was lowered before it was partitioned."""
    compiler = getattr(implementation, "compiler", None)
    if not isinstance(compiler, Interpreter):
        return implementation
    return replace(implementation, compiler=replace(compiler, host=host))


# --- how the compiler has decided that arrays lie


def sharding_of_cache(
    mesh: Mesh, cache: Sequence[tuple[str, tuple[Names, ...]]]
) -> AttentionSharding:
    """How a cache lies: it is not moved.

    Args:
        mesh: of all devices.
        cache: of each of its arrays the letters of its axes, and the mesh axes that split these.

    Raises:
        ValueError: if it is split in a way in which attention to it cannot be.
    """
    found: dict[str, Names] = {}
    is_paged = any("P" in letters for letters, _ in cache)
    for letters, axes in cache:
        for letter, names in zip(letters, axes, strict=True):
            if names and (is_paged and letter != "K"):
                raise ValueError(
                    f"a paged cache is split as {letters} over {axes}, and which device has the "
                    "pages of a row is not known here: say it with sharding=jax_tkg.sharding."
                    "AttentionSharding(mesh, ...), or split KV heads alone."
                )
            if names and (letter not in "BKS" or found.get(letter, names) != names):
                raise ValueError(
                    f"an array {letters} of the cache is split over {axes}; it can be split by "
                    "rows B, KV heads K and slots S, keys and values alike, and is not moved to be "
                    "read. Place it with jax.device_put, or say it with sharding=jax_tkg.sharding."
                    "AttentionSharding(mesh, ...)."
                )
            if names:
                found[letter] = names
    return AttentionSharding(mesh, found.get("B"), found.get("K"), found.get("S"))


def _with_query(
    sharding: AttentionSharding, query: dict[str, Names], problem: AttentionProblem
) -> AttentionSharding:
    """Where the cache has whole rows and KV heads these may be split as the query's.

    Everything whole is cut without communication; not the pool of pages, whose rows are anywhere.
    """
    taken = set(sharding.axis_names)
    for role, letter in (("batch", "B"), ("heads", "N")):
        names = query[letter]
        if not names or sharding.names(role) or taken & set(names):
            continue
        if role == "batch" and problem.kv.has_holes:
            continue
        roles: Any = {role: names}
        split = replace(sharding, **roles)
        try:
            split.check(
                batch=problem.batch,
                num_kv_heads=problem.num_kv_heads,
                num_heads=problem.num_heads,
            )
        except ValueError:  # then the query is gathered, of which there is little
            continue
        sharding, taken = split, taken | set(names)
    return sharding
