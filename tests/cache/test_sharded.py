"""Caches on a mesh: the same tokens in the same places, and no device touches another's shard."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg import KVCache, PagedKVCache, RingKVCache
from jax_tkg.cache import layouts, sharded
from jax_tkg.sharding import AttentionSharding
from tests.calls import QUICKLY, assert_close, quickly
from tests.compiling import AS_USERS
from tests.hlo import cache_copies, operations_of_size

P = PartitionSpec
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # jax 0.7

BATCH, HEADS, WIDTH = 4, 2, 4
DENSE = ("BKSH", "BSKH", "BKHS")
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def make_mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(kind,) * 3)


def whole_mesh(kind: AxisType = AxisType.Auto, **names: Any) -> AttentionSharding:
    names = names or {"batch": "data", "heads": "tensor", "keys": "sequence"}
    return AttentionSharding(make_mesh(kind), **names)


def for_kind(kind: str, axes: AxisType = AxisType.Auto) -> AttentionSharding:
    sharding = whole_mesh(axes)
    return replace(sharding, keys=None) if kind == "paged" else sharding


def empty(kind: str, sharding: AttentionSharding | None = None, **options: Any) -> KVCache:
    """16 slots a row, 8 a device; of a ring 8, and 4."""
    options["sharding"] = sharding
    if kind == "paged":
        return PagedKVCache.create(BATCH, 32, 2, 8, HEADS, WIDTH, **options)
    if kind == "ring":
        return RingKVCache.create(BATCH, 8, HEADS, WIDTH, layout="BKSH", **options)
    return KVCache.create(BATCH, 16, HEADS, WIDTH, layout=kind, **options)


def new_tokens(count: int, seed: int = 0, heads: int = HEADS) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((BATCH, count, heads, WIDTH)), jnp.float32)


def calls() -> list[tuple[Any, ...]]:
    """Across the border of two shards, more than a shard holds, past the end; ragged."""
    counts = ([3, 2, 0, 1], [9, 3, 8, 9], [1, 1, 1, 1], [3, 6, 0, 6])
    sizes = enumerate((3, 9, 1, 6))
    return [
        (new_tokens(n, i), new_tokens(n, i + 9), jnp.int32(c))
        for (i, n), c in zip(sizes, counts, strict=True)
    ]


@quickly
def grow(cache: KVCache, calls: Any) -> list[KVCache]:
    found = []
    for call in calls:
        cache = cache.append(*call)
        found.append(cache)
    lengths = jnp.int32([1, 30, 5, 0])
    found.append(cache.truncate(lengths))
    found.append(cache.reset(lengths > 4))
    key, value, _ = calls[1]
    found.append(cache.prefill(key, value, jnp.int32([9, 4, 7, 0]), starts=jnp.int32([2, 0, 0, 0])))
    return found


def contents(cache: KVCache) -> Any:
    """What can be seen: in a pool, pages may lie elsewhere."""
    if not isinstance(cache, PagedKVCache):
        return cache.kv, cache.lengths, cache.starts
    cache = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), replace(cache, sharding=None))
    is_live = jnp.arange(cache.capacity) < cache.lengths[:, None]
    live = np.asarray(cache.kv.usable() & is_live)[:, None, :, None]
    seen = (np.where(live, x, 0) for x in cache.kv.dense(np.dtype(np.float32)))
    return *seen, live, cache.lengths, cache.starts, cache.overflowed()


def lies_as_it_says(cache: KVCache) -> bool:
    at = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), cache, cache.shardings())
    return all(jax.tree.leaves(at))


def test_made_where_a_mesh_is_in_use() -> None:
    sharding = whole_mesh(AxisType.Explicit)
    with set_mesh(sharding.mesh):
        assert lies_as_it_says(empty("BKSH", sharding))


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        *((kind, AxisType.Auto) for kind in (*DENSE, "ring", "paged")),
        *((kind, AxisType.Explicit) for kind in ("BSKH", "paged")),
    ],
)
def test_same_contents_as_on_one_device(kind: str, axes: AxisType) -> None:
    cache = empty(kind, for_kind(kind, axes))
    assert lies_as_it_says(cache)
    for got, want in zip(grow(cache, calls()), grow(empty(kind), calls()), strict=True):
        assert lies_as_it_says(got)
        jax.tree.map(np.testing.assert_array_equal, contents(got), contents(want))


def test_types_of_an_explicit_mesh_will_do() -> None:
    """Nobody said `sharding`: the types of the arrays tell it."""
    sharding = whole_mesh(AxisType.Explicit)
    typed = replace(empty("BSKH", sharding), sharding=None)
    with set_mesh(sharding.mesh):
        for got, want in zip(grow(typed, calls()), grow(empty("BSKH"), calls()), strict=True):
            assert got.sharding is None
            assert jax.typeof(got.kv.key).sharding.spec[:3] == ("data", "sequence", "tensor")
            jax.tree.map(np.testing.assert_array_equal, contents(got), contents(want))


def test_eager_and_in_a_scan() -> None:
    key, value, counts = calls()[0]
    eager = empty("BKSH", whole_mesh()).append(key, value, counts)
    want = empty("BKSH").append(key, value, counts)
    jax.tree.map(np.testing.assert_array_equal, contents(eager), contents(want))

    @quickly
    def scanned(cache: KVCache, keys: Any) -> KVCache:
        return jax.lax.scan(lambda c, k: (c.append(k, k), None), cache, keys)[0]

    keys = jnp.stack([new_tokens(1, i) for i in range(12)])
    got, want = (scanned(empty("BKSH", s), keys) for s in (whole_mesh(), None))
    jax.tree.map(np.testing.assert_array_equal, contents(got), contents(want))


def test_kv_heads_that_are_too_few_are_on_every_device() -> None:
    """2 KV heads over 4 devices: each keeps both."""
    sharding = whole_mesh(heads=("data", "tensor"), keys="sequence")
    cache = empty("BKSH", sharding)
    assert cache.specs().kv.key == P(None, None, "sequence", None)
    for got, want in zip(grow(cache, calls()), grow(empty("BKSH"), calls()), strict=True):
        jax.tree.map(np.testing.assert_array_equal, contents(got), contents(want))


@pytest.mark.parametrize("kind", ["BKSH", "ring", "paged"])
def test_append_and_attend_automatically_and_in_a_shard_map_of_ones_own(kind: str) -> None:
    sharding = for_kind(kind)
    window = (5, 0) if kind == "ring" else None

    def step(cache: KVCache, query: Any, key: Any, value: Any) -> Any:
        cache = cache.append(key, value)
        return jax_tkg.attention_tkg(query, cache, local_window_size=window), cache

    cache = empty(kind, sharding)
    specs, of_new = cache.specs(), sharding.spec("BTNH")
    mapped = jax.shard_map(
        step,
        mesh=sharding.mesh,
        in_specs=(specs, of_new, of_new, of_new),
        out_specs=(of_new, specs),
    )
    ways = {"automatic": (quickly(step), cache), "mapped": (quickly(mapped), cache)}
    run_whole, whole = quickly(step), empty(kind)
    for i in range(3):
        arrays = new_tokens(3, i, 2 * HEADS), new_tokens(3, i + 5), new_tokens(3, i + 7)
        want, whole = run_whole(whole, *arrays)
        for name, (run, mine) in ways.items():
            out, mine = run(mine, *arrays)
            assert_close(out, want)
            jax.tree.map(np.testing.assert_array_equal, contents(mine), contents(whole))
            assert lies_as_it_says(mine)
            ways[name] = run, mine


def test_gradients_and_vmap_pass_through() -> None:
    def loss(new: Any, sharding: AttentionSharding | None) -> Any:
        cache = KVCache.create(BATCH, 8, HEADS, WIDTH, layout="BKSH", sharding=sharding)
        cache = cache.append(new, 2 * new).append(0.5 * new, new)
        out = jax_tkg.attention_tkg(jnp.repeat(new, 2, axis=2), cache)
        return jnp.sum(jnp.sin(out)), cache.kv.key

    def both(new: Any, sharding: AttentionSharding | None) -> Any:
        gradient = jax.grad(lambda n: loss(n, sharding)[0])(new)
        return gradient, jax.vmap(lambda n: loss(n, sharding)[1])(jnp.stack([new, -new]))

    split, whole = (quickly(partial(both, sharding=s)) for s in (whole_mesh(), None))
    assert_close(split(new_tokens(3)), whole(new_tokens(3)))


# Memory and communication


def abstract(kind: str, capacity: int = 1 << 15, heads: int = 2, width: int = 64) -> KVCache:
    """A sharded cache without its memory."""
    sharding = whole_mesh()
    if kind == "paged":
        sharding = whole_mesh(batch=("data", "sequence"), heads="tensor")
        make = partial(PagedKVCache.create, BATCH, BATCH * capacity // 64, 64, capacity // 64)
    else:
        make = partial(KVCache.create, BATCH, capacity)
    options = {"dtype": jnp.bfloat16, "sharding": sharding}
    shapes = jax.eval_shape(lambda: make(heads, width, **options))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shapes.shardings()
    )


def shard_of(cache: KVCache) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), cache
    )


def append(cache: KVCache, key: jax.Array) -> KVCache:
    return cache.append(key, key)


@pytest.mark.parametrize("kind", ["BKSH", "paged"])
def test_a_donated_step_is_in_place_and_append_needs_nobody(kind: str) -> None:
    cache = abstract(kind)
    new = jax.ShapeDtypeStruct((BATCH, 1, 2, 64), jnp.float32)
    program = jax.jit(append, donate_argnums=0).lower(cache, new).compile(AS_USERS)
    assert not re.search(COLLECTIVES, program.as_text())
    assert cache_copies(program, shard_of(cache)) == []

    def step(cache: KVCache, new: jax.Array, query: jax.Array) -> Any:
        cache = append(cache, new)
        return cache, jax_tkg.attention_tkg(query, cache)

    query = jax.ShapeDtypeStruct((BATCH, 1, 4, 64), jnp.float32)
    program = jax.jit(step, donate_argnums=0).lower(cache, new, query).compile(AS_USERS)
    assert cache_copies(program, shard_of(cache)) == []
    assert "all-gather" not in program.as_text()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", program.as_text())
    assert aliased is not None
    assert aliased[1].count("alias") == len(jax.tree.leaves(cache))


def test_a_loop_over_rows_would_gather_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others would find: the compiler cannot split such a loop."""
    monkeypatch.setattr(layouts, "scatter_rows", layouts.write_rows)
    cache = replace(abstract("BKSH"), sharding=None)
    new = jax.ShapeDtypeStruct((BATCH, 1, 2, 64), jnp.float32)
    write = jax.jit(lambda cache, new: append(cache, new), donate_argnums=0)
    program = write.lower(cache, new).compile(QUICKLY)
    assert "all-gather" in program.as_text()


def test_no_device_makes_more_than_its_shard() -> None:
    sharding = whole_mesh().named("BKSH")
    shape = (4, 2, 64, 8)
    text = sharded._full.lower(shape, 0, np.dtype(np.float32), sharding).compile(AS_USERS).as_text()
    assert operations_of_size(text, 4 * 2 * 64)
    assert not operations_of_size(text, 4 * 2 * 64 + 1)


# Pages


def paged(pages: int = 16, **options: Any) -> PagedKVCache:
    """Two shards of two rows; 8 pages of 2 slots each."""
    return PagedKVCache.create(BATCH, pages, 2, 4, HEADS, WIDTH, **options)


@quickly
def paged_append(cache: PagedKVCache, new: Any, counts: Any) -> PagedKVCache:
    return cache.append(new, new, counts)


@quickly
def paged_fork(cache: PagedKVCache, source: Any, target: Any) -> PagedKVCache:
    return cache.fork(source, target)


def test_each_shard_has_a_pool_of_its_own() -> None:
    cache = paged(8, sharding=for_kind("paged"))
    cache = paged_append(cache, new_tokens(8), jnp.int32([8, 2, 2, 3]))
    table = np.asarray(cache.page_table)
    assert set(table[:2].ravel()) <= {-1, 0, 1, 2, 3}
    assert set(table[2:].ravel()) <= {-1, 4, 5, 6, 7}
    # The first shard has 4 pages, and its first row takes them all, whatever the other has.
    np.testing.assert_array_equal(cache.overflowed(), [False, True, False, False])
    np.testing.assert_array_equal(cache.free_pages(), [False] * 4 + [False] * 3 + [True])
    assert int(cache.num_free_pages()) == 1


def test_rows_fork_within_a_shard() -> None:
    cache = paged(sharding=for_kind("paged"))
    cache = paged_append(cache, new_tokens(3), jnp.int32([3, 1, 3, 2]))
    forked = paged_fork(cache, jnp.int32([0, 3]), jnp.int32([1, 2]))
    table = np.asarray(forked.page_table)
    assert table[0, 0] == table[1, 0] != table[0, 1] != table[1, 1]
    assert table[2, 0] == table[3, 0]
    np.testing.assert_array_equal(forked.lengths, [3, 3, 2, 2])
    key = np.asarray(forked.kv.dense(np.dtype(np.float32))[0])
    np.testing.assert_array_equal(key[1, :, :3], key[0, :, :3])
    assert not np.any(forked.overflowed())
    assert lies_as_it_says(forked)

    across = paged_fork(cache, jnp.int32([0]), jnp.int32([3]))
    np.testing.assert_array_equal(across.overflowed(), [False, False, False, True])
    np.testing.assert_array_equal(across.page_table[3], [-1] * 4)
    with pytest.raises(ValueError, match="row 3 cannot share pages with row 0: batch over 'data'"):
        cache.fork(0, 3)


# Errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 16, 2), "B = 3 does not divide into 2 parts.*'data'"),
        ((4, 15, 2), "S = 15 does not divide into 2 parts.*'sequence'"),
        ((4, 16, 3), "K = 3 KV heads cannot be split into 2 parts.*keys="),
    ],
)
def test_sizes_that_the_mesh_does_not_divide(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache.create(*sizes, 4, sharding=whole_mesh())


def test_what_pages_cannot() -> None:
    with pytest.raises(ValueError, match=r"slots of a PagedKVCache cannot be split.*'sequence'"):
        paged(sharding=whole_mesh())
    with pytest.raises(ValueError, match="num_pages = 9 does not divide into 2 parts"):
        paged(9, sharding=for_kind("paged"))


def test_a_cache_that_lies_elsewhere_is_refused() -> None:
    cache = replace(empty("BKSH"), sharding=whole_mesh())
    with pytest.raises(ValueError, match=r"lies as SingleDevice.*cache.shardings\(\)"):
        cache.append(new_tokens(1), new_tokens(1))
    moved = jax.device_put(cache, cache.shardings())
    assert moved.append(new_tokens(1), new_tokens(1)).lengths.tolist() == [1] * 4
    replicated = jax.device_put(cache, NamedSharding(make_mesh(), P()))
    with pytest.raises(ValueError, match="lies as NamedSharding"):
        replicated.append(new_tokens(1), new_tokens(1))


def test_other_errors() -> None:
    cache = empty("BKSH", whole_mesh())
    with pytest.raises(ValueError, match="17 tokens to a cache of 16 slots"):
        cache.append(new_tokens(17), new_tokens(17))
    with pytest.raises(ValueError, match="on no mesh: make it with create"):
        empty("BKSH").specs()
    explicit = make_mesh(AxisType.Explicit)
    by_width = jax.device_put(empty("BKSH"), NamedSharding(explicit, P()))
    key = jax.device_put(by_width.kv.key, NamedSharding(explicit, P(None, None, None, "data")))
    split = replace(by_width, kv=replace(by_width.kv, key=key))
    with pytest.raises(ValueError, match="split by B, K, S, all of them alike; found BKSH"):
        split.append(new_tokens(1), new_tokens(1))


def test_in_a_shard_map_over_some_of_the_axes() -> None:
    sharding = whole_mesh(batch="data", heads="tensor")

    def in_part(cache: KVCache, new: Any) -> KVCache:
        return cache.append(new, new)

    partly = jax.shard_map(
        in_part,
        mesh=sharding.mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    got = quickly(partly)(empty("BKSH", sharding), new_tokens(3))
    want = empty("BKSH").append(new_tokens(3), new_tokens(3))
    jax.tree.map(np.testing.assert_array_equal, contents(got), contents(want))
