"""Arrays split between devices: the same numbers, and no communication that is not needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg.online.plan import Form, OnlinePlan, Target, make_plan
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from tests import oracle
from tests.calls import QUICKLY, assert_close, quickly

P = PartitionSpec
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # jax 0.7

B, T, N, K, H, S = 4, 2, 8, 4, 16, 96
LENGTHS = np.array([33, 0, 96, 7], np.int32)
Arrays = tuple[jax.Array, ...]

# Specs of query, key, value and lengths.
BY_ROWS_AND_HEADS = (*(P("dp", None, "tp"),) * 3, P("dp"))
BY_ROWS = (P("dp"),) * 4
SHARED_CACHE = (P("dp", None, "tp"), P(None, None, "tp"), P(None, None, "tp"), P("dp"))
MULTI_QUERY = (P("dp", None, "tp"), P("dp"), P("dp"), P("dp"))
BY_SLOTS = (P("dp"), P("dp", "tp"), P("dp", "tp"), P("dp"))


def make_arrays(kv_heads: int = K) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((B, T, N, H), np.float32)
    key, value = rng.standard_normal((2, B, S, kv_heads, H), np.float32)
    return query, key, value, LENGTHS


def make_mesh(kind: str) -> Mesh:
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    return jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(kinds[kind],) * 2)


def put(mesh: Mesh, arrays: Any, specs: tuple[PartitionSpec, ...]) -> Arrays:
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return tuple(jax.device_put(x, s) for x, s in zip(arrays, shardings, strict=True))


def attend(query: Any, key: Any, value: Any, lengths: Any) -> Arrays:
    return jax_tkg.attention_tkg(  # type: ignore[no-any-return]
        query, key, value, key_value_seq_lengths=lengths, return_residual=True
    )


def exact(arrays: Any) -> Any:
    given = oracle.Inputs(*arrays[:3], key_value_seq_lengths=arrays[3])
    found = oracle.attention(given)
    return found.out.astype(np.float32), found.lse.astype(np.float32)


def loss(run: Callable[..., Arrays]) -> Callable[..., jax.Array]:
    def total(*arrays: jax.Array) -> jax.Array:
        out, lse = run(*arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(0.5 * lse))  # also finite for an empty row

    return total


def gradient(run: Callable[..., Arrays]) -> Callable[..., Arrays]:
    return jax.grad(loss(run), argnums=(0, 1, 2))


def collectives(function: Any, *arrays: Any) -> set[str]:
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    text = jax.jit(function).lower(*arrays).compile(QUICKLY).as_text()
    return set(re.findall(names, text))


@pytest.fixture(scope="module")
def gradients() -> dict[int, Arrays]:
    """Those on one device, by the number of KV heads."""
    return {k: quickly(gradient(attend))(*make_arrays(k)) for k in (K, 1)}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_rows_and_heads_need_no_communication(kind: str, gradients: dict[int, Arrays]) -> None:
    mesh, arrays = make_mesh(kind), make_arrays()
    with set_mesh(mesh):
        split = put(mesh, arrays, BY_ROWS_AND_HEADS)
        results, found = quickly(attend)(*split), quickly(gradient(attend))(*split)
        assert_close(results, exact(arrays))
        assert_close(found, gradients[K])
        assert not collectives(attend, *split)
        assert not collectives(gradient(attend), *split)
        for x in (*results, *found):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("dp", None, "tp")), x.ndim)
            if kind == "explicit":
                assert P(*jax.typeof(x).sharding.spec[:3]) == P("dp", None, "tp")


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("specs", "kv_heads"),
    [(SHARED_CACHE, K), (MULTI_QUERY, 1), (BY_SLOTS, K)],
    ids=["shared cache", "multi-query", "by slots"],
)
def test_operands_sharded_unlike_each_other(
    kind: str, specs: Any, kv_heads: int, gradients: dict[int, Arrays]
) -> None:
    mesh, arrays = make_mesh(kind), make_arrays(kv_heads)
    with set_mesh(mesh):
        split = put(mesh, arrays, specs)
        results, found = quickly(attend)(*split), quickly(gradient(attend))(*split)
        assert_close(results, exact(arrays))
        assert_close(found, gradients[kv_heads])
        if specs is BY_SLOTS:  # parts are merged: nothing is gathered, forward or backward
            assert collectives(attend, *split) == {"all-reduce"}
            assert collectives(gradient(attend), *split) == {"all-reduce"}
        if kind == "explicit":
            for x, spec in zip((results[0], *found), (specs[0], *specs), strict=False):
                assert P(*jax.typeof(x).sharding.spec[: len(spec)]) == spec


def test_arrays_that_are_on_no_mesh_join_those_that_are(gradients: dict[int, Arrays]) -> None:
    mesh, arrays = make_mesh("explicit"), make_arrays()
    with set_mesh(mesh):
        query, *_ = put(mesh, arrays, BY_ROWS_AND_HEADS)
        mixed = (query, *map(jnp.asarray, arrays[1:]))
        assert_close(quickly(attend)(*mixed), exact(arrays))
        assert_close(quickly(gradient(attend))(*mixed), gradients[K])


@pytest.mark.parametrize("mapped", ["dp", None])
def test_vmap_keeps_explicit_shardings(mapped: str | None) -> None:
    """The mapped axis is sharded, or the rows of every copy are: no device needs another's."""
    mesh, arrays = make_mesh("explicit"), make_arrays()
    rows = "dp" if mapped is None else None
    with set_mesh(mesh):
        specs = (*(P(mapped, rows, None, "tp"),) * 3, P(mapped, rows))
        split = put(mesh, [np.stack([x, x[::-1]]) for x in arrays], specs)
        out, lse = quickly(jax.vmap(attend))(*split)
        copies = exact(arrays), exact([x[::-1] for x in arrays])
        assert_close((out, lse), jax.tree.map(lambda *x: np.stack(x), *copies))
        assert jax.typeof(out).sharding.spec == P(mapped, rows, None, "tp", None)
        assert not collectives(jax.vmap(attend), *split)


# shard_map


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("manual", [("dp", "tp"), ("dp",)])
def test_shard_map_over_rows_and_heads(
    kind: str, manual: tuple[str, ...], gradients: dict[int, Arrays]
) -> None:
    mesh, arrays = make_mesh(kind), make_arrays()
    specs = BY_ROWS_AND_HEADS if "tp" in manual else BY_ROWS
    mapping = {"mesh": mesh, "in_specs": specs, "axis_names": set(manual), "check_vma": True}
    mapped = jax.shard_map(attend, out_specs=specs[:2], **mapping)
    inside = jax.shard_map(gradient(attend), out_specs=specs[:3], **mapping)
    with set_mesh(mesh):
        split = put(mesh, arrays, BY_ROWS_AND_HEADS)
        assert_close(quickly(mapped)(*split), exact(arrays))
        assert_close(quickly(gradient(mapped))(*split), gradients[K])
        assert_close(quickly(inside)(*split), gradients[K])
        if kind == "auto" or len(manual) == 2:
            assert not collectives(mapped, *split)


def test_replicated_query_in_shard_map(gradients: dict[int, Arrays]) -> None:
    """Devices hold different caches for one query: its gradient is the sum over them."""
    mesh, arrays = jax.make_mesh((4,), ("dp",), axis_types=(AxisType.Auto,)), make_arrays()
    query = arrays[0][:1]
    specs = {"mesh": mesh, "in_specs": (P(), *(P("dp"),) * 3), "check_vma": True}
    mapped = jax.shard_map(attend, out_specs=(P("dp"), P("dp")), **specs)
    repeated = (np.repeat(query, B, axis=0), *arrays[1:])
    assert_close(quickly(mapped)(query, *arrays[1:]), exact(repeated))
    d_query, *d_cache = quickly(gradient(mapped))(query, *arrays[1:])
    want = quickly(gradient(attend))(*repeated)
    assert_close(d_query, jnp.sum(want[0], axis=0, keepdims=True))
    assert_close(d_cache, list(want[1:]))


def attend_over_slots(query: Any, key: Any, value: Any, lengths: Any) -> Arrays:
    """Each device attends to its part of the cache; the parts are merged by their log-sum-exps."""
    begin = lax.axis_index("tp") * key.shape[1]
    positions = begin + jnp.arange(key.shape[1], dtype=jnp.int32)
    parts = jax_tkg.attention_tkg(
        query,
        key,
        value,
        key_positions=jnp.broadcast_to(positions, key.shape[:2]),
        key_value_seq_lengths=lengths,
        return_residual=True,
    )
    return jax_tkg.merge_attention(*(tuple(lax.all_gather(x, "tp")) for x in parts))


def test_parts_of_a_cache_split_by_slots_merge() -> None:
    mesh, arrays = make_mesh("auto"), make_arrays()
    mapped = jax.shard_map(
        attend_over_slots,
        mesh=mesh,
        in_specs=BY_SLOTS,
        out_specs=(P("dp", None, None), P("dp")),
        check_vma=False,  # after the merge all devices hold the same, which the type cannot say
    )
    assert_close(quickly(mapped)(*arrays), exact(arrays))


def test_gradient_of_merged_parts(gradients: dict[int, Arrays]) -> None:
    """On one device: the cotangent of the log-sum-exp is half of it."""
    arrays = make_arrays()

    def in_parts(query: Any, key: Any, value: Any, lengths: Any) -> Arrays:
        run = jax.vmap(attend_over_slots, in_axes=(None, 1, 1, None), axis_name="tp")
        key, value = (x.reshape(B, 4, -1, *x.shape[2:]) for x in (key, value))
        return jax.tree.map(lambda x: x[0], run(query, key, value, lengths))

    assert_close(quickly(in_parts)(*arrays), exact(arrays))
    assert_close(quickly(gradient(in_parts))(*arrays), gradients[K])


# Which form of the loop


class Recorder:
    """The online softmax, remembering its plans."""

    name = "recorder"

    def __init__(self) -> None:
        self.plans: list[OnlinePlan] = []

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        return None

    def plan(self, problem: AttentionProblem, target: Target) -> OnlinePlan:
        return make_plan(problem, target)

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> Any:
        self.plans.append(make_plan(problem, target))
        return jax_tkg.IMPLEMENTATIONS["xla"].run(problem, ops, target)


def test_loop_over_rows_only_where_the_compiler_splits_nothing() -> None:
    """Its nested loops would be run by every device for all rows."""
    mesh, arrays, recorder = make_mesh("auto"), make_arrays(), Recorder()

    def recorded(query: Any, key: Any, value: Any, lengths: Any) -> jax.Array:
        return jax_tkg.attention_tkg(  # type: ignore[no-any-return]
            query, key, value, key_value_seq_lengths=lengths, implementation=recorder
        )

    def mapped(manual: set[str]) -> Any:
        return jax.shard_map(
            recorded, mesh=mesh, in_specs=BY_ROWS, out_specs=P("dp"), axis_names=manual
        )

    split = put(mesh, arrays, BY_ROWS)
    forms = {}
    for name, function, given in (
        ("one device", recorded, arrays),
        ("automatic", recorded, split),
        ("manual", mapped({"dp", "tp"}), split),
        ("partly manual", mapped({"dp"}), split),
    ):
        recorder.plans.clear()
        jax.jit(function).lower(*given)
        forms[name] = {plan.form for plan in recorder.plans}
    assert forms == {
        "one device": {Form.ROWS},
        "automatic": {Form.BLOCKS},
        "manual": {Form.ROWS},
        "partly manual": {Form.BLOCKS},
    }

    # Calls of one shape in one program, inside shard_map and outside, do not share code.
    recorder.plans.clear()
    rows = B // 2
    jax.jit(lambda *x: (mapped({"dp", "tp"})(*x), recorded(*(a[:rows] for a in x)))).lower(*split)
    assert {plan.form for plan in recorder.plans} == {Form.ROWS, Form.BLOCKS}


def test_decode_step_of_a_sharded_cache() -> None:
    """Append and attend inside shard_map: every device works on its own rows alone."""
    mesh = make_mesh("auto")
    query, key, value, _ = make_arrays()
    arguments = (jax_tkg.KVCache.create(B, S, K, H), query, key[:, :T], value[:, :T])

    def step(cache: jax_tkg.KVCache, query: Any, key: Any, value: Any) -> Any:
        cache = cache.append(key, value)
        return jax_tkg.attention_tkg(query, cache), cache

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"))
    out, cache = quickly(mapped)(*arguments)
    lengths = np.full(B, T, np.int32)
    assert_close(out, exact((*arguments[1:], lengths))[0])
    np.testing.assert_array_equal(cache.lengths, lengths)
    assert not collectives(mapped, *jax.device_put(arguments, NamedSharding(mesh, P("dp"))))
