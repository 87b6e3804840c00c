"""Kernels where nobody says how arrays lie: the compiler decides, and asks the op's rule."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg import _compat
from jax_tkg.nki.arguments import Launch
from jax_tkg.nki.implementation import Nki
from jax_tkg.sharding import AttentionSharding, partitioning
from tests.calls import QUICKLY, assert_close
from tests.sharding.cells import (
    LETTERS,
    SPLITS,
    H,
    arrays,
    attend,
    collectives,
    gathers_of_the_cache,
    make_mesh,
    placed,
    wanted,
    with_gradient,
)

SLOW = pytest.mark.slow(reason="a program of its own; the quick one splits everything")
NUMBERED_OTHERWISE = ("batch", ("sp", "tp", "dp"))  # than in the order of the mesh, by itself
OF_ROWS = 4 * 2 * 8  # on a device of eight
MERGE = [("all-reduce", 4 * OF_ROWS), ("all-reduce", 4 * OF_ROWS * (H + 1))]


def interpreted(given: dict[str, Any]) -> Any:
    return attend(given, implementation="nki_interpret")


def sharding_of(split: str) -> AttentionSharding:
    return AttentionSharding(make_mesh(split, 8), **SPLITS[split])


def compiled(function: Any, given: Any) -> Any:
    return jax.jit(function).lower(given).compile(QUICKLY)


def test_the_interpreted_kernel_runs_on_each_shard() -> None:
    """Results and gradients, and what is exchanged for the results: one merge."""
    sharding = sharding_of("all")
    given = placed(sharding)
    program = compiled(with_gradient(interpreted), given)
    found = collectives(program.as_text())
    assert not gathers_of_the_cache(program.as_text(), sharding)
    assert {name for name, _ in found} == {"all-reduce"}
    assert set(MERGE) <= set(found)
    for _ in range(3):  # its launches are those of the program, not of a run
        results, gradients = program(given)
        assert_close(results, wanted()[0])
    assert_close(gradients, wanted()[1])
    for name, gradient in gradients.items():
        assert gradient.sharding.is_equivalent_to(given[name].sharding, gradient.ndim), name


@dataclass(frozen=True)
class StandIn:
    """Compiles a kernel to a call that the CPU's compiler knows, and that is never run."""

    platform: str = "cpu"

    def why_not(self, programs: int) -> str | None:
        del programs
        return None

    def call(self, launch: Launch, programs: int) -> Sequence[jax.Array]:
        del programs
        emit = jax.ffi.ffi_call(STANDS_IN, tuple(launch.result))
        return tuple(emit(*launch.arrays, index=np.uint64(0)))


STANDS_IN = "xla_ffi_python_cpu_callback"
COMPILED = Nki(compiler=StandIn(), self_test=False)


def test_the_compiled_kernel_is_called_with_shards() -> None:
    sharding = sharding_of("all")
    text = compiled(lambda x: attend(x, implementation=COMPILED), placed(sharding)).as_text()
    assert collectives(text) == MERGE
    (call,) = (line for line in text.splitlines() if f'"{STANDS_IN}"' in line)
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", call)
    assert operands is not None
    # Query, keys and values: half of the rows, heads and slots.
    assert re.findall(r"f32\[([\d,]+)\]", operands[1])[:3] == ["4,2,8,16", "4,32,4,16", "4,32,4,16"]


def test_keys_that_would_have_to_move_are_refused() -> None:
    """Split by head_dim, the compiler would gather them."""
    sharding = sharding_of("keys")
    given = placed(sharding)
    by_head_dim = NamedSharding(sharding.mesh, PartitionSpec(None, None, None, "sp"))
    given["key"] = jax.device_put(arrays()["key"], by_head_dim)
    with pytest.raises(Exception, match=r"an array BSKH of the cache is split over .*sharding="):
        compiled(interpreted, given)


@pytest.mark.parametrize("named", ["keys", pytest.param("heads", marks=SLOW)])
def test_axes_of_which_nothing_is_said_are_the_compilers(named: str) -> None:
    """The sharding names one axis; rows lie over another, which is not moved."""
    everything = SPLITS["all"]
    sharding = AttentionSharding(make_mesh("all", 8), **{named: everything[named]})

    def divided(given: dict[str, Any]) -> Any:
        return attend(given, implementation="nki_interpret", sharding=sharding)

    rows_and_one = AttentionSharding(
        sharding.mesh, **{"batch": everything["batch"], named: everything[named]}
    )
    given = placed(rows_and_one)
    program = compiled(with_gradient(divided), given)
    assert not gathers_of_the_cache(program.as_text(), rows_and_one)
    assert {name for name, _ in collectives(program.as_text())} <= {"all-reduce"}
    results, gradients = program(given)
    assert_close(results, wanted()[0])
    assert_close(gradients, wanted()[1])


# --- inside a shard_map over some axes of the mesh


def partly_mapped(role: str, order: tuple[str, ...]) -> tuple[Any, dict[str, jax.Array]]:
    """The call in a `shard_map` over what splits rows or heads, on a mesh of axes in this order."""
    mesh = jax.make_mesh((2, 2, 2), order, axis_types=(AxisType.Auto,) * 3)
    own = AttentionSharding(mesh, **SPLITS[role])
    mapped = jax.shard_map(
        interpreted,
        mesh=mesh,
        axis_names=set(own.axis_names),
        in_specs=({name: own.spec(axes) for name, axes in LETTERS.items()},),
        out_specs=(own.spec("BTNH"), own.spec("BTN")),
    )
    return mapped, placed(AttentionSharding(mesh, **SPLITS["all"]))


@pytest.mark.parametrize(
    ("role", "order"),
    [
        pytest.param(role, order, marks=() if (role, order) == NUMBERED_OTHERWISE else SLOW)
        for role in ("batch", "heads")
        for order in itertools.permutations(("dp", "tp", "sp"))
    ],
)
def test_in_a_shard_map_over_other_axes(role: str, order: tuple[str, ...]) -> None:
    """What the compiler splits there it splits as outside: one merge, whatever the mesh's order."""
    mapped, given = partly_mapped(role, order)
    program = compiled(mapped, given)
    assert collectives(program.as_text()) == MERGE
    for _ in range(2):
        assert_close(program(given), wanted()[0])


@SLOW
def test_gradient_in_a_shard_map_over_other_axes() -> None:
    mapped, given = partly_mapped("batch", ("dp", "tp", "sp"))
    program = compiled(with_gradient(mapped), given)
    sizes = [size for name, size in collectives(program.as_text()) if name != "all-reduce"]
    assert max(sizes, default=0) < given["key"].nbytes // 8
    results, gradients = program(given)
    assert_close(results, wanted()[0])
    assert_close(gradients, wanted()[1])


def test_on_an_abstract_mesh_it_is_refused() -> None:
    """There are no devices to be numbered: what is to be done is said."""
    mesh = AbstractMesh((2, 2, 2), ("dp", "tp", "sp"), axis_types=(AxisType.Auto,) * 3)
    rows = AttentionSharding(mesh, batch="dp")
    mapped = jax.shard_map(
        interpreted,
        mesh=mesh,
        axis_names={"dp"},
        in_specs=({name: rows.spec(axes) for name, axes in LETTERS.items()},),
        out_specs=(rows.spec("BTNH"), rows.spec("BTN")),
    )
    traced = jax.jit(mapped).trace(jax.eval_shape(placed_nowhere))
    with pytest.raises(NotImplementedError, match=r"sharding=.*AttentionSharding"):
        traced.lower(lowering_platforms=("cpu",))


def placed_nowhere() -> dict[str, jax.Array]:
    return {n: jax.numpy.asarray(x) for n, x in arrays().items()}


class NothingAtAll:
    """A rule that is not asked."""

    operands = results = ()

    def local(self, *given: Any) -> Any:
        raise AssertionError(given)


def test_axes_that_the_compiler_does_not_tell() -> None:
    """What numbers the devices must be split as it was."""

    mesh = make_mesh("batch", 8)
    rule = partitioning.NumberedRule(NothingAtAll(), ("dp",))
    with pytest.raises(ValueError, match=r"does not tell how .*sharding=.*AttentionSharding"):
        rule.local(mesh, [((),), (("dp",),)], [], None)


def test_what_splits_an_array_is_read_off_the_numbers_of_devices() -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec in (("a", "b"), ("b", "a"), (None, ("b", "a")), (("a", "b"), None), ("b", None)):
        axes = tuple((x,) if isinstance(x, str) else x or () for x in spec)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        assert _compat.axes_that_split(sharding, 2, mesh) == axes
    finer = jax.make_mesh((2, 2, 2), ("a", "c", "d"), axis_types=(AxisType.Auto,) * 3)
    halves = NamedSharding(finer, PartitionSpec("c"))
    with pytest.raises(ValueError, match=r"a part of an axis"):
        _compat.axes_that_split(halves, 1, mesh)


@SLOW
def test_outside_jit() -> None:
    results = interpreted(placed(sharding_of("all")))
    assert_close(results, wanted()[0])


@SLOW
def test_the_query_follows_the_cache() -> None:
    """It and what is small may lie anywhere."""
    sharding = sharding_of("all")
    given = {n: x if n in ("key", "value") else arrays()[n] for n, x in placed(sharding).items()}
    program = compiled(interpreted, given)
    assert not gathers_of_the_cache(program.as_text(), sharding)
    assert_close(program(given), wanted()[0])


@SLOW
def test_mapped_queries_share_the_cache() -> None:
    sharding = sharding_of("all")
    given = placed(sharding)
    queries = jax.numpy.stack([given["query"], -given["query"]])
    mapped = jax.vmap(lambda query, given: interpreted({**given, "query": query}), (0, None))
    program = jax.jit(mapped).lower(queries, given).compile(QUICKLY)
    assert not gathers_of_the_cache(program.as_text(), sharding)
    results = program(queries, given)
    assert_close(jax.tree.map(lambda x: x[0], results), wanted()[0])
    assert_close(jax.tree.map(lambda x: x[1], results), interpreted({**given, "query": queries[1]}))


@SLOW
def test_devices_that_use_the_same_kv_head() -> None:
    """Two KV heads and eight parts of the query's: the cache is whole, and nothing moves."""
    sharding = sharding_of("heads")
    whole = dict(arrays())
    for name in ("key", "value", "new_key", "new_value"):
        whole[name] = whole[name][:, :, :2]
    given = {
        n: jax.device_put(x, sharding.named(LETTERS[n], num_kv_heads=2)) for n, x in whole.items()
    }
    program = compiled(interpreted, given)
    assert collectives(program.as_text()) == []
    assert_close(program(given), jax.jit(lambda x: attend(x, implementation="reference"))(whole))


@SLOW
def test_the_prefill_kernel() -> None:
    sharding = sharding_of("all")
    names = ("query", "key", "value", "key_value_seq_lengths")
    whole = {n: arrays()[n] for n in names}

    def attend_cte(given: dict[str, Any], implementation: str) -> Any:
        return jax_tkg.attention_cte(**given, return_residual=True, implementation=implementation)

    given = {n: placed(sharding)[n] for n in names}
    program = compiled(lambda x: attend_cte(x, "nki_interpret"), given)
    assert collectives(program.as_text()) == MERGE
    want = jax.jit(lambda x: attend_cte(x, "reference"))(jax.tree.map(jax.numpy.asarray, whole))
    assert_close(program(given), want)
