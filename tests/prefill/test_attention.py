"""What `attention_cte` promises beyond numbers: pieces equal the whole, transformations, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg.implementations import XLA
from jax_tkg.neuron import check_module
from tests.calls import assert_close, make_call, quickly
from tests.cases import Case
from tests.lowered import lower_for_neuron, operations
from tests.test_sharding import make_mesh, set_mesh

P = PartitionSpec
B, T, N, K, H = 2, 48, 4, 2, 8


def arrays(tokens: int = T, batch: int = B) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (N, K, K)
    return tuple(
        jax.random.normal(k, (batch, tokens, h, H)) * jnp.linspace(0.5, 3.0, tokens)[:, None, None]
        for k, h in zip(keys, heads, strict=True)
    )


@quickly
def whole(*given: jax.Array) -> Any:
    return jax_tkg.attention_cte(*given, return_residual=True)


# Pieces equal the whole


def test_packed_sequences_are_separate_calls() -> None:
    given, cuts = arrays(), (0, 15, 30, 45)
    ids = np.full((B, T), -1)
    for i, (a, b) in enumerate(pairwise(cuts)):
        ids[:, a:b] = i
    bounds = jax_tkg.segment_key_bounds(jnp.asarray(ids))
    attend = quickly(lambda *x: jax_tkg.attention_cte(*x, key_bounds=bounds, return_residual=True))
    out, lse = attend(*given)
    for a, b in pairwise(cuts):
        alone = whole(*(x[:, a:b] for x in given))
        assert_close((out[:, a:b], lse[:, a:b]), alone)
    np.testing.assert_array_equal(out[:, cuts[-1] :], 0)  # padding
    np.testing.assert_array_equal(lse[:, cuts[-1] :], -np.inf)


@pytest.mark.parametrize("paged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_chunks_equal_the_whole(paged: bool) -> None:
    """Each chunk beside the cache, then appended to it."""
    query, key, value = arrays()
    want, _ = whole(query, key, value)
    cache: Any = jax_tkg.KVCache.create(B, T, K, H)
    if paged:
        cache = jax_tkg.PagedKVCache.create(B, 2 * T // 8, 8, T // 8, K, H)

    @quickly
    def step(cache: Any, *chunk: jax.Array) -> Any:
        out = jax_tkg.attention_cte(chunk[0], cache, new_key=chunk[1], new_value=chunk[2])
        return cache.append(*chunk[1:]), out

    found = []
    for begin in range(0, T, 16):
        cache, out = step(cache, *(x[:, begin : begin + 16] for x in (query, key, value)))
        found.append(out)
    assert_close(jnp.concatenate(found, 1), want)


def test_states_of_keys_on_several_devices_merge() -> None:
    """Keys split by position: each device folds its own, the states are reduced across devices."""
    given = arrays()
    want = whole(*given)
    mesh = jax.make_mesh((4,), ("sp",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        size = key.shape[1]
        begin = lax.axis_index("sp") * size
        at = begin + jnp.arange(size, dtype=jnp.int32)
        state = jax_tkg.attention_cte(
            query, key, value, normalize=False,
            key_positions=jnp.broadcast_to(at, (B, size)), key_value_seq_lengths=jnp.full(B, T),
        )  # fmt: skip
        top = lax.pmax(state.max, "sp")
        shrink = jnp.exp(state.max - top)
        total = lax.psum(state.sum * shrink, "sp")
        output = lax.psum(state.output * shrink[..., None], "sp")
        return jax_tkg.SoftmaxState(top, total, output).finalize()

    specs = (P(), P(None, "sp"), P(None, "sp"))
    split = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P())
    assert_close(quickly(split)(*given), want)


def test_equals_the_decode_op() -> None:
    given = arrays()
    decode = quickly(lambda *x: jax_tkg.attention_tkg(*x, return_residual=True))
    assert_close(whole(*given), decode(*given))


def test_a_length_beyond_the_keys_counts_as_all_of_them() -> None:
    given = arrays()
    long = jnp.asarray([T, T + 9])  # not known on the host
    found = quickly(
        lambda n, *x: jax_tkg.attention_cte(*x, key_value_seq_lengths=n, return_residual=True)
    )(long, *given)
    assert_close(found, whole(*given))


def test_positions_of_alibi_are_exact_far_out() -> None:
    """At 2 ** 20, in bfloat16: distances are integers in float32, never rounded positions."""
    query, key, value = (x.astype(jnp.bfloat16) for x in arrays(8))
    far = 2**20 + jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (B, 8))
    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.0625])

    @quickly
    def attend(at: dict[str, Any]) -> Any:
        return jax_tkg.attention_cte(
            query, key, value, alibi_slopes=slopes, return_residual=True, **at
        )

    length = jnp.full(B, 2**20 + 8)
    at = {"query_positions": far, "key_positions": far, "key_value_seq_lengths": length}
    assert_close(attend(at), attend({}))


# Transformations

SMALL = Case("small", op="attention_cte", batch=2, tokens=20, slots=24, head_dim=8)
FULL = replace(SMALL, rows="starts", bounds="packed", slopes=True, sinks=True, bias="shared")


@pytest.mark.parametrize(
    "mapped",
    [
        ("key_bounds", "alibi_slopes"),
        pytest.param(("query",), marks=pytest.mark.slow),
        pytest.param(("key", "query"), marks=pytest.mark.slow),
    ],
)
def test_vmap_over(mapped: tuple[str, ...]) -> None:
    call = make_call(replace(FULL, name=str(mapped), holder="arrays"))
    copies = {n: jnp.stack([call.clean[n], call.clean[n][::-1]]) for n in mapped}
    axes = ({n: 0 if n in mapped else None for n in call.clean},)
    found = quickly(jax.vmap(call.ours, in_axes=axes))(call.clean | copies)
    one = quickly(call.ours)
    want = [one(call.clean | {n: x[i] for n, x in copies.items()}) for i in range(2)]
    assert_close(found, jax.tree.map(lambda *x: jnp.stack(x), *want))


@pytest.mark.slow
def test_vmap_of_a_state() -> None:
    given = arrays()
    stacked = [jnp.stack([x, x[::-1]]) for x in given]

    def attend(*x: jax.Array) -> Any:
        return jax_tkg.attention_cte(*x, normalize=False)

    found = quickly(jax.vmap(attend))(*stacked)
    assert_close(jax.tree.map(lambda x: x[0], found), quickly(attend)(*given))


@pytest.mark.parametrize("kind", [pytest.param("auto", marks=pytest.mark.slow), "explicit"])
def test_rows_and_heads_on_several_devices(kind: str) -> None:
    given = (*arrays(batch=4)[:1], *(jnp.repeat(x, 2, 2) for x in arrays(batch=4)[1:]))
    mesh, spec = make_mesh(kind), P("dp", None, "tp")

    def loss(*x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jax_tkg.attention_cte(*x)))

    want = quickly(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*given)
    with set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in given]
        found = quickly(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*split)
        assert_close(found, want)
        for x in found[1]:
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


# Lowering for Neuron: constant loops only

LARGE = tuple(
    jax.ShapeDtypeStruct((1, 4096, h, 64), jnp.bfloat16) for h in (8, 2, 2)
)  # fmt: skip
EXTRA = {
    "key_bounds": jax.ShapeDtypeStruct((1, 4096, 2), jnp.int32),
    "alibi_slopes": jax.ShapeDtypeStruct((8,), jnp.float32),
    "key_value_seq_lengths": jax.ShapeDtypeStruct((1,), jnp.int32),
    "sinks": jax.ShapeDtypeStruct((8,), jnp.float32),
}


def gradient(*given: Any, **extra: Any) -> Any:
    def loss(*given: Any) -> jax.Array:
        return jnp.sum(jax_tkg.attention_cte(*given, **extra).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(*given)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "plain": lambda q, k, v, **_: jax_tkg.attention_cte(q, k, v),
    "everything": lambda q, k, v, **x: jax_tkg.attention_cte(
        q[:, :1000], k, v, new_key=k[:, :1000], new_value=v[:, :1000], local_window_size=(700, 0),
        **x | {"key_bounds": x["key_bounds"][:, :1000]},
    ),
    "state": lambda q, k, v, **x: jax_tkg.attention_cte(q, k, v, normalize=False, **x),
    "gradient": gradient,
    "bounds": lambda *_, key_bounds, **__: jax_tkg.segment_key_bounds(key_bounds[..., 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_neuron_can_run(name: str) -> None:
    program = PROGRAMS[name]
    lowered = lower_for_neuron(lambda given, extra: program(*given, **extra), LARGE, EXTRA)
    assert check_module(lowered) == ()
    if name != "bounds":
        assert operations(lowered)["stablehlo.while"] >= 1


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key_bounds": jnp.zeros((B, T), jnp.int32)}, ValueError, r"key_bounds must be \[B, T, 2"),
        ({"key_bounds": jnp.zeros((B, T, 2))}, TypeError, "key_bounds must be integers"),
        ({"alibi_slopes": jnp.ones(3)}, ValueError, r"alibi_slopes must be \[N\] = \(4,\)"),
        ({"alibi_slopes": jnp.ones(N, jnp.int32)}, TypeError, "alibi_slopes must be a float"),
        ({"normalize": jnp.bool_(True)}, TypeError, "normalize must be a Python bool"),
        ({"normalize": False, "return_residual": True}, ValueError, "leave return_residual out"),
        ({"implementation": "fastest"}, ValueError, "unknown implementation 'fastest'"),
        ({"mask": jnp.ones((B, N, T, 3), jnp.bool_)}, ValueError, "mask must be"),
        ({"implementation": XLA}, NotImplementedError, "for attention_tkg and not for attention_c"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_says_what_is_wrong(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jax_tkg.attention_cte(*arrays(), **options)


def test_lengths_beyond_the_keys_count_as_all_of_them() -> None:
    array = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 2, 4)), jnp.float32)

    def attend(lengths: Any) -> jax.Array:
        return jax_tkg.attention_cte(array, array, array, key_value_seq_lengths=lengths)

    want = attend(jnp.array([8, 3]))
    for lengths in ([30, 3], jnp.array([30, 3])):
        np.testing.assert_array_equal(attend(lengths), want)
