"""The op under jit, scan, checkpoint and vmap: the same numbers, and no work that is not needed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jax_tkg
from tests import oracle
from tests.calls import QUICKLY, STATIC, Arrays, assert_close, make_call, quickly
from tests.cases import Case, inputs
from tests.conformance import jax_arguments
from tests.hlo import operations_of_size
from tests.lowered import walk
from tests.oracle import Inputs

SMALL = Case("small", batch=2, tokens=2, slots=40, heads=6, kv_heads=2, head_dim=16, growth=1.0)
FULL = replace(
    SMALL, rows="starts", beside=True, mask="full", bias="shared", sinks=True, window=(30, 1)
)


def exact(given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    found = oracle.attention(given)
    return found.out.astype(np.float32), found.lse.astype(np.float32)


def test_eager_and_jit_agree_with_the_oracle() -> None:
    call, want = make_call(SMALL), exact(inputs(SMALL))
    assert_close(call.ours(call.arrays), want)
    assert_close(quickly(call.ours)(call.arrays), want)
    with jax.disable_jit():
        assert_close(call.ours(call.arrays), want)


def test_scan_over_queries_with_the_cache_as_carry() -> None:
    steps, batch, kv_heads, width = 5, 2, 2, 16
    rng = np.random.default_rng(0)
    query = rng.standard_normal((steps, batch, 1, 4, width), np.float32)
    key, value = rng.standard_normal((2, steps, batch, 1, kv_heads, width), np.float32)

    @quickly
    def decode(cache: jax_tkg.KVCache, *tokens: jax.Array) -> Any:
        def step(cache: jax_tkg.KVCache, token: tuple[jax.Array, ...]) -> Any:
            cache = cache.append(*token[1:])
            return cache, jax_tkg.attention_tkg(token[0], cache)

        return lax.scan(step, cache, tokens)

    cache, outs = decode(jax_tkg.KVCache.create(batch, 8, kv_heads, width), query, key, value)
    np.testing.assert_array_equal(cache.lengths, steps)
    for i, out in enumerate(outs):
        held_key, held_value = (np.moveaxis(x[: i + 1, :, 0], 0, 1) for x in (key, value))
        want, _ = exact(Inputs(query[i], held_key, held_value))
        assert_close(out, want)


@pytest.mark.parametrize("saved", [True, False])
def test_checkpoint_policy_saves_the_forward(saved: bool) -> None:
    call = make_call(SMALL)

    def loss(query: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(call.ours(call.arrays | {"query": query})[0]))

    names = ("attention_tkg_out", "attention_tkg_lse") if saved else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    gradient = jax.grad(jax.checkpoint(loss, policy=policy))
    jaxpr = str(jax.make_jaxpr(gradient)(call.arrays["query"]))
    assert jaxpr.count("= attention_tkg[") == (1 if saved else 2)
    assert_close(
        quickly(gradient)(call.arrays["query"]), quickly(jax.grad(loss))(call.arrays["query"])
    )


# vmap

COPIES = 3


def arguments_of(case: Case, given: Inputs) -> tuple[Arrays, Arrays]:
    """What is traced and what is not."""
    held = {n: x for n, x in jax_arguments(case, given).items() if x is not None}
    static = {n: held.pop(n) for n in STATIC if n in held}
    return held, static


def check_vmap(
    case: Case, mapped: Collection[str], axis: int = 0, out_axes: tuple[int, int] = (0, 0)
) -> None:
    """Compares vmap over the named arguments with the oracle on each copy.

    The i-th array is mapped along its axis number `axis + i`, modulo how many it has.
    """
    bases = [inputs(replace(case, name=f"copy {i}")) for i in range(COPIES)]
    bases = [replace(x, key=np.nan_to_num(x.key), value=np.nan_to_num(x.value)) for x in bases]
    copies = [replace(bases[0], **{n: getattr(x, n) for n in mapped}) for x in bases]
    results = zip(*map(exact, copies), strict=True)
    want = tuple(np.stack(x, at) for x, at in zip(results, out_axes, strict=True))

    arguments, static = arguments_of(case, copies[0])
    tree = jax.tree.structure(arguments)
    by_copy = zip(*(jax.tree.leaves(arguments_of(case, x)[0]) for x in copies), strict=True)
    arrays, axes = [], []
    for i, same in enumerate(by_copy):
        differ = any(not np.array_equal(same[0], x, equal_nan=True) for x in same)
        axes.append((axis + i) % (same[0].ndim + 1) if differ else None)
        arrays.append(jnp.stack(same, axes[-1]) if differ else same[0])

    def attend(arrays: list[jax.Array]) -> Any:
        return jax_tkg.attention_tkg(
            **jax.tree.unflatten(tree, arrays), **static, return_residual=True
        )

    assert any(at is not None for at in axes)
    got = quickly(jax.vmap(attend, in_axes=(axes,), out_axes=out_axes))(arrays)
    assert_close(got, want)


ARGUMENTS = (
    *("query", "key", "value", "new_key", "new_value", "mask", "bias", "sinks"),
    *("key_value_seq_lengths", "key_value_seq_starts"),
)


@settings(max_examples=10)
@given(
    mapped=st.sets(st.sampled_from(ARGUMENTS), min_size=1),
    axis=st.integers(0, 4),
    out_axes=st.tuples(st.integers(0, 4), st.integers(0, 3)),
)
def test_vmap_over_any_arguments(mapped: set[str], axis: int, out_axes: tuple[int, int]) -> None:
    check_vmap(FULL, mapped, axis, out_axes)


@pytest.mark.parametrize("mapped", [("query",), ("query", "mask"), ("bias",), ("sinks", "query")])
def test_vmap_over_what_heads_have(mapped: tuple[str, ...]) -> None:
    check_vmap(replace(FULL, mask="shared", rows="lengths"), mapped)


@pytest.mark.parametrize("name", ["mask", "bias", "sinks"])
def test_vmap_over_what_the_only_head_has(name: str) -> None:
    query, key = (
        jnp.ones((1, 1, 1, 8)),
        jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 1, 8)),
    )
    wide = {"mask": jnp.tri(4, dtype=bool)[1:], "bias": -jnp.eye(4)[1:], "sinks": jnp.arange(3.0)}
    mapped = wide[name] if name == "sinks" else wide[name][:, None, None, None]
    mapped = mapped.reshape(3, 1) if name == "sinks" else mapped

    def attend(given: jax.Array) -> jax.Array:
        return jax_tkg.attention_tkg(query, key, key, **{name: given})

    each = jnp.stack([attend(given) for given in mapped])
    np.testing.assert_allclose(jax.vmap(attend)(mapped), each, rtol=1e-6)
    assert len(np.unique(each)) == 3


PAGED = replace(SMALL, layout="paged", page_len=8, beside=True)
QUANTISED = replace(SMALL, layout="BKHS", cache_dtype="int8", scales="head")


@pytest.mark.parametrize(
    ("case", "mapped"),
    [
        (PAGED, ("query", "page_indices")),
        (PAGED, ("key", "value")),
        (PAGED, ("query", "key", "value", "page_indices", "key_value_seq_lengths")),
        (QUANTISED, ("query", "key", "value", "k_scale", "v_scale")),
        (QUANTISED, ("k_scale",)),
        (replace(SMALL, positions="ring", window=(20, 0)), ("query", "key", "key_positions")),
        (replace(SMALL, positions="given", layout="BKSH"), ("query_positions",)),
    ],
    ids=lambda x: x.layout if isinstance(x, Case) else "+".join(x),
)
def test_vmap_over_layouts(case: Case, mapped: tuple[str, ...]) -> None:
    check_vmap(case, mapped, axis=1)


def test_nested_vmap() -> None:
    """The inner axis has its own queries, the outer one its own queries and cache."""
    rng = np.random.default_rng(3)
    query = rng.standard_normal((2, 3, 2, 1, 4, 16), np.float32)
    key, value = rng.standard_normal((2, 2, 2, 24, 2, 16), np.float32)
    inner = jax.vmap(jax_tkg.attention_tkg, in_axes=(0, None, None))
    got = quickly(jax.vmap(jax.jit(inner)))(query, key, value)
    for i, j in np.ndindex(2, 3):
        assert_close(got[i, j], exact(Inputs(query[i, j], key[i], value[i]))[0])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    "mapped", [("query",), ("query", "mask"), ("lengths",), ("query", "lengths", "new")]
)
def test_vmap_does_not_repeat_a_shared_cache(mapped: tuple[str, ...], platform: str) -> None:
    copies, batch, slots, kv_heads, width = 4, 2, 16384, 2, 16
    shapes = {
        "query": (batch, 1, 4, width),
        "mask": (batch, 1, 1, slots + 1),
        "lengths": (batch,),
        "new": (batch, 1, kv_heads, width),
        "cache": (batch, slots, kv_heads, width),
    }
    dtypes = {"mask": jnp.bool_, "lengths": jnp.int32}

    def attend(query: Any, mask: Any, lengths: Any, new: Any, cache: Any) -> jax.Array:
        given = {"mask": mask, "new_key": new, "new_value": new, "key_value_seq_lengths": lengths}
        return jax_tkg.attention_tkg(query, cache, cache, **given)  # type: ignore[no-any-return]

    arguments = [
        jax.ShapeDtypeStruct((copies,) * (n in mapped) + shape, dtypes.get(n, jnp.float32))
        for n, shape in shapes.items()
    ]
    axes = [0 if n in mapped else None for n in shapes]
    traced = jax.jit(jax.vmap(attend, in_axes=axes)).trace(*arguments)
    if not {"lengths", "new"} & set(mapped):  # as heads of one problem: the cache is read once
        assert "scan[" not in str(traced.jaxpr)
    cache_size = math.prod(shapes["cache"])
    lowered = traced.lower(lowering_platforms=(platform,))
    types = [str(x.type) for op in walk(lowered) for x in op.results]
    shapes_made = [re.findall(r"(\d+)x", t) for t in types if t.startswith("tensor")]
    assert max(math.prod(map(int, shape)) for shape in shapes_made) < copies * cache_size
    if platform == "cpu":
        compiled = traced.lower().compile(QUICKLY)
        assert not operations_of_size(compiled.as_text(), copies * cache_size)
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * cache_size


@pytest.fixture
def counting_in_64_bits() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("counting_in_64_bits")
def test_indices_of_64_bits() -> None:
    """What JAX makes of Python numbers is int64 then: all indices of an update must be alike."""
    ones = jnp.ones((2, 24, 2, 8), jnp.float32)
    query, lengths = ones[:, :1], jnp.array([4, 20])
    paged = jax_tkg.PagedKVCache.create(2, 12, 8, 4, 2, 8).append(ones, ones, lengths)
    ring = jax_tkg.RingKVCache.create(2, 16, 2, 8, dtype=jnp.bfloat16).append(ones, ones)
    results = [
        jax_tkg.attention_tkg(query, ones, ones, key_value_seq_lengths=lengths),
        jax_tkg.attention_cte(ones, ones, ones),
        jax_tkg.attention_tkg(query, paged.truncate(jnp.array([3, 4])).fork(0, 1)),
        jax_tkg.attention_tkg(query, ring, local_window_size=(3, 0)),
    ]
    for result in results:
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, jnp.ones_like(result), rtol=1e-6)
