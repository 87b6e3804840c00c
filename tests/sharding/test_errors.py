"""Shardings that cannot be: one error or warning each, saying what would do; and what is told."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg.sharding import AttentionSharding
from tests.sharding.cells import make_mesh, set_mesh

P = PartitionSpec
pytestmark = pytest.mark.usefixtures("no_shape_checks")
AUTO = {"axis_types": (AxisType.Auto,) * 2}
MESH = AbstractMesh((2, 4), ("dp", "tp"), **AUTO)
B, T, N, K, H, S = 4, 2, 8, 4, 16, 64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": "x"}, ValueError, r"batch names the mesh axis 'x', and the mesh has 'dp', 'tp'"),
        ({"batch": "dp", "keys": ("tp", "dp")}, ValueError, r"keys and batch both name .* 'dp'"),
        ({"heads": ("tp", "tp")}, ValueError, r"heads and heads both name the mesh axis 'tp'"),
        ({"heads": 2}, TypeError, r"heads must be None, the name of a mesh axis or a tuple"),
        ({"merge": "never"}, ValueError, r"merge must be one of deferred, every tile; got 'never'"),
    ],
)
def test_what_is_no_sharding(options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionSharding(MESH, **options)


def test_no_mesh() -> None:
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh or AbstractMesh"):
        AttentionSharding({"dp": 2})  # type: ignore[arg-type]


def test_specs() -> None:
    sharding = AttentionSharding(MESH, batch="dp", keys=("tp",))
    assert sharding.spec("BSKH") == P("dp", "tp", None, None)
    assert sharding.spec("PKLH") == P(("dp", "tp"), None, None, None)
    assert sharding.named("B") == NamedSharding(MESH, P("dp"))
    assert AttentionSharding(MESH, heads="tp").spec("BKN", num_kv_heads=2) == P(None, None, "tp")
    assert AttentionSharding(MESH, heads="tp").spec("BKN", num_kv_heads=8) == P(None, "tp", "tp")
    assert hash(sharding) == hash(AttentionSharding(MESH, batch="dp", keys=("tp",)))
    assert str(sharding) == "batch over 'dp' (2), keys over 'tp' (4), merged deferred"


def shapes(**sizes: int) -> dict[str, Any]:
    b, s, n, k = (sizes.get(name, x) for name, x in (("B", B), ("S", S), ("N", N), ("K", K)))
    new = {"query": (b, T, n, H), "key": (b, s, k, H), "value": (b, s, k, H)}
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in new.items()}


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"B": 3}, {"batch": "dp"}, r"B = 3 does not divide into 2 parts.*'dp' \(2\).*next is 4"),
        ({"S": 66}, {"keys": "tp"}, r"S = 66 does not divide into 4 parts.*'tp' \(4\).*next is 68"),
        ({"N": 9, "K": 3}, {"heads": "dp"}, r"N = 9 .* K = 3 .* would do: 1, 3, 9; or .*keys="),
        ({"N": 12, "K": 6}, {"heads": "tp"}, r"K = 6 KV heads cannot be split into 4 parts"),
    ],
)
def test_sizes_that_do_not_divide(sizes: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax_tkg.explain(**shapes(**sizes), sharding=AttentionSharding(MESH, **options))


def test_pages_that_do_not_divide() -> None:
    def call(pages: int, columns: int, **options: Any) -> None:
        pool = jnp.zeros((pages, K, 8, H))
        table = jnp.zeros((B, columns), jnp.int32)
        kv = jax_tkg.Paged(pool, pool, page_indices=table)
        jax_tkg.attention_tkg(
            jnp.zeros((B, T, N, H)), kv, sharding=AttentionSharding(make_mesh("all", 8), **options)
        )

    with pytest.raises(ValueError, match=r"pool has 9 pages, .* 2 parts of batch='dp'"):
        call(9, 4, batch="dp")
    with pytest.raises(ValueError, match=r"page_indices has 5 pages .* 2 parts of keys='sp'"):
        call(8, 5, keys="sp")


def arrays(mesh: Any = None, **specs: Any) -> dict[str, Any]:
    given = {name: jnp.zeros(x.shape) for name, x in shapes().items()}
    put = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return given | {name: jax.device_put(given[name], s) for name, s in put.items()}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_cache_that_every_device_has_is_warned_of(kind: str) -> None:
    mesh = make_mesh("all", 8, kind)
    given = arrays(mesh, query=P(), key=P(), value=P())
    for options in ({"keys": "sp"}, {"heads": "tp"}):
        with (
            set_mesh(mesh),
            pytest.warns(UserWarning, match=r"devices hold slots or heads that they do not use"),
        ):
            jax_tkg.attention_tkg(**given, sharding=AttentionSharding(mesh, **options))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_cache_that_lies_otherwise_is_not_moved(kind: str) -> None:
    mesh = make_mesh("all", 8, kind)
    sharding = AttentionSharding(mesh, keys="sp")
    given = arrays(mesh, query=P(), key=P(None, "tp"), value=P(None, "tp"))
    with set_mesh(mesh), pytest.raises(ValueError, match=r"a cache is not moved to be read"):
        jax_tkg.attention_tkg(**given, sharding=sharding)


def test_query_and_cache_over_different_axes() -> None:
    mesh = make_mesh("all", 8, "explicit")
    given = arrays(mesh, query=P("dp"), key=P("tp", "sp"), value=P("tp", "sp"))
    with set_mesh(mesh), pytest.raises(ValueError, match=r"rows of the query .* reshard the query"):
        jax_tkg.attention_tkg(**given)


def test_another_mesh_in_use() -> None:
    sharding = AttentionSharding(make_mesh("keys", 2), keys="sp")
    with set_mesh(make_mesh("batch", 2)), pytest.raises(ValueError, match=r"the mesh in use is"):
        jax_tkg.attention_tkg(**arrays(), sharding=sharding)


def test_a_shard_map_over_some_axes_of_the_keys() -> None:
    mesh = make_mesh("all", 8)
    sharding = AttentionSharding(mesh, keys=("tp", "sp"))
    mapped = jax.shard_map(
        lambda given: jax_tkg.attention_tkg(**given, sharding=sharding),
        mesh=mesh,
        axis_names={"sp"},
        in_specs=({"query": P(), "key": P(None, "sp"), "value": P(None, "sp")},),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"map all axes that it names, or none of those of keys"):
        jax.eval_shape(mapped, shapes())


def test_exchange_on_tiles_is_refused_where_it_is_not_done() -> None:
    sharding = AttentionSharding(MESH, keys="tp", merge="every tile")
    with pytest.raises(ValueError, match=r'merge="every tile" is for attention_tkg'):
        jax_tkg.explain(**shapes(), op="attention_cte", sharding=sharding)
    for name, reason in (("nki", "merge its parts at the end"), ("reference", "it has no tiles")):
        told = jax_tkg.explain(
            **shapes(), sharding=sharding, implementation=name, platform="neuron"
        )
        assert told.implementation is None
        assert reason in str(told)
    mapped = jax.shard_map(
        lambda given: jax_tkg.attention_tkg(**given, sharding=sharding),
        mesh=MESH,
        in_specs=({"query": P(), "key": P(None, "tp"), "value": P(None, "tp")},),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"in a shard_map of your own needs its check_vma=False"):
        jax.eval_shape(mapped, shapes())


def test_explain_tells_the_problem_of_a_device_and_the_merge() -> None:
    sharding = AttentionSharding(MESH, batch="dp", keys="tp")
    lengths = jax.ShapeDtypeStruct((B,), np.int32)
    told = jax_tkg.explain(**shapes(), key_value_seq_lengths=lengths, sharding=sharding)
    assert told.division is not None
    assert (told.division.local.batch, told.division.local.kv_len) == (B // 2, S // 4)
    text = str(told)
    assert "sharded: batch over 'dp' (2), keys over 'tp' (4), merged deferred" in text
    assert f"on each device: B={B // 2} T={T} S={S // 4} N={N} K={K}" in text
    rows = B // 2 * T * N
    assert f"merge of 4 parts: the maximum of {4 * rows} bytes, then one sum of" in text
    assert f"{4 * rows * (H + 1)} bytes" in text
    told = jax_tkg.explain(**shapes(K=1), sharding=AttentionSharding(MESH, heads="tp"))
    assert "all KV heads on every device, of which 4 devices use the same one" in str(told)
    assert "no device needs anything of another" in str(told)
    assert jax_tkg.explain(**shapes()).division is None
