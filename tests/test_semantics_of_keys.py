"""Each pinned meaning of heads, caches, scales and rotation, on numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.cache.layouts import DENSE_LAYOUTS
from tests.conformance import run_small
from tests.worked import assert_close, attend, in_every_implementation

pytestmark = in_every_implementation

LOG = math.log
append = jax.jit(lambda cached, key, value: cached.append(key, value))


# Heads


def test_query_heads_share_kv_heads_in_consecutive_groups(implementation):
    query = jnp.ones((1, 1, 6, 1))
    value = jnp.asarray([10.0, 20.0]).reshape(1, 1, 2, 1)
    out = run_small(query, jnp.zeros_like(value), value, implementation=implementation)
    assert out.ravel().tolist() == [10, 10, 10, 20, 20, 20]


def test_a_mask_may_differ_between_heads_that_share_keys(implementation):
    mask = np.asarray([[1, 1, 0], [0, 1, 1]], bool).reshape(1, 2, 1, 3)
    value = jnp.asarray([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    out = run_small(
        jnp.ones((1, 1, 2, 1)),
        jnp.zeros_like(value),
        value,
        mask=jnp.asarray(mask),
        implementation=implementation,
    )
    assert_close((out.ravel(),), [1.5, 4])


# Where keys are


@pytest.mark.parametrize("lengths", [None, [8, 5]])
def test_new_keys_beside_the_cache_are_as_good_as_in_it(implementation, lengths):
    rng = np.random.default_rng(1)
    batch, slots, tokens, heads, width = 2, 6, 2, 2, 4
    query = jnp.asarray(rng.standard_normal((batch, tokens, 4, width)), jnp.float32)
    keys, values = (
        rng.standard_normal((batch, slots + tokens, heads, width)).astype(np.float32)
        for _ in range(2)
    )
    ends = [slots + tokens] * batch if lengths is None else lengths
    new_key, new_value = (
        jnp.asarray(np.stack([row[end - tokens : end] for row, end in zip(x, ends, strict=True)]))
        for x in (keys, values)
    )
    given = {} if lengths is None else {"key_value_seq_lengths": jnp.asarray(lengths, jnp.int32)}
    given |= {
        "sinks": jnp.asarray([0.0, 1.0, 2.0, 3.0]),
        "return_residual": True,
        "implementation": implementation,
    }
    within = run_small(query, jnp.asarray(keys), jnp.asarray(values), **given)
    beside = run_small(
        query,
        jnp.asarray(keys[:, :slots]),
        jnp.asarray(values[:, :slots]),
        new_key=new_key,
        new_value=new_value,
        **given,
    )
    assert_close(beside, *within)


def test_parts_of_a_cache_merge_into_the_whole_with_the_sink_counted_once(implementation):
    logits, values = np.asarray([1.0, 3.0, -2.0, 0.0, 2.0]), np.asarray([1.0, 2.0, 3.0, 4.0, 5.0])
    first = attend(implementation, logits[:2], values[:2], sinks=[0.5])
    second = attend(implementation, logits[2:], values[2:])
    merged = jax_tkg.merge_attention(
        [jnp.asarray(out).reshape(1, 1, 1, 1) for out, _ in (first, second)],
        [jnp.asarray(lse).reshape(1, 1, 1) for _, lse in (first, second)],
    )
    total = np.exp(logits).sum() + math.exp(0.5)
    assert_close((x.ravel() for x in merged), [np.exp(logits) @ values / total], [LOG(total)])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("how", ["per head", "per tensor", "appended"])
def test_a_quantised_number_is_the_stored_one_times_its_scale(implementation, dtype, how):
    k_scale, v_scale = (4.0, 7.0) if how == "per tensor" else ([0.5, 2.0], [10.0, 100.0])
    scales = {"k_scale": jnp.asarray(k_scale), "v_scale": jnp.asarray(v_scale)}
    key, value = (jnp.full((1, 1, 2, 1), stored, jnp.float32) for stored in (2, 3))
    if how == "appended":
        empty = jax_tkg.KVCache.create(1, 1, 2, 1, dtype=dtype, **scales)
        by_head = (x.reshape(2, 1) for x in scales.values())
        kv = {"key": append(empty, *(x * s for x, s in zip((key, value), by_head, strict=True)))}
    else:
        kv = {"key": key.astype(dtype), "value": value.astype(dtype), **scales}
    out, lse = run_small(
        jnp.ones((1, 1, 4, 1)), **kv, return_residual=True, implementation=implementation
    )
    expected = ([21] * 4, [8] * 4) if how == "per tensor" else ([30, 30, 300, 300], [1, 1, 4, 4])
    assert_close((out.ravel(), lse.ravel()), *expected)


def test_a_cache_knows_its_lengths_and_starts(implementation):
    cached = jax_tkg.KVCache.create(2, 8, 1, 1)
    values = jnp.asarray([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]).reshape(2, 4, 1, 1)
    cached = cached.prefill(
        jnp.zeros_like(values), values, jnp.asarray([3, 4]), starts=jnp.asarray([0, 2])
    )
    out = run_small(jnp.ones((2, 1, 1, 1)), cached, implementation=implementation)
    assert_close((out.ravel(),), [2, 7.5])


# Rotary embedding


def test_rope_turns_queries_and_new_keys_at_their_positions(implementation):
    """The first pair turns by one radian a token: a key (1, 0) at position p is (cos p, sin p)."""
    tokens, slots = 2, 3
    east = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (1, tokens, 1, 2))
    cached = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (1, slots, 1, 2))
    out, lse, keys = run_small(
        east,
        cached,
        cached,
        new_key=east,
        new_value=east,
        rope=jax_tkg.RotaryEmbedding(),
        scale=1.0,
        return_residual=True,
        implementation=implementation,
    )
    at = np.asarray([3.0, 4.0])
    turned = np.stack([np.cos(at), np.sin(at)], -1).reshape(keys.shape)
    # Cached keys are used as they are: angle p to the query at p. New ones: 0 to itself, 1 back.
    logits = [[math.cos(3)] * 3 + [1], [math.cos(4)] * 3 + [math.cos(1), 1]]
    assert_close(
        (keys, lse.ravel(), out[0, :, 0, 0]),
        turned,
        [LOG(np.exp(x).sum()) for x in logits],
        [1, 1],
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_the_same_as_rotating_by_hand(implementation, interleaved):
    rng = np.random.default_rng(2)
    rope = jax_tkg.RotaryEmbedding(interleaved=interleaved)
    query, cached, new = (
        jnp.asarray(rng.standard_normal((2, n, 2, 8)), jnp.float32) for n in (2, 5, 2)
    )
    lengths = jnp.asarray([7, 4], jnp.int32)
    given = {"key_value_seq_lengths": lengths, "implementation": implementation}
    out, keys = run_small(query, cached, cached, new_key=new, new_value=new, rope=rope, **given)
    at = jnp.asarray([[5, 6], [2, 3]], jnp.int32)
    by_hand = run_small(
        rope(query, at), cached, cached, new_key=rope(new, at), new_value=new, **given
    )
    assert_close((out, keys), by_hand, rope(new, at))


# Dtypes and padding


@pytest.mark.parametrize(
    ("query_dtype", "cache_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "int8")],
)
def test_the_output_has_the_dtype_of_the_query(implementation, query_dtype, cache_dtype):
    cached = jnp.ones((1, 3, 1, 2), cache_dtype)
    out, lse = run_small(
        jnp.ones((1, 1, 1, 2), query_dtype),
        cached,
        cached,
        return_residual=True,
        implementation=implementation,
    )
    assert (out.dtype, lse.dtype) == (query_dtype, jnp.float32)


@pytest.mark.parametrize("padding", [np.nan, np.inf, -3e38])
@pytest.mark.parametrize("layout", ["BSKH", "BKSH", "BKHS", "paged", "ring"])
def test_what_is_in_the_padding_does_not_matter(implementation, layout, padding):
    rng = np.random.default_rng(3)
    query = jnp.asarray(rng.standard_normal((2, 2, 4, 8)), jnp.float32)
    key, value = (rng.standard_normal((2, 16, 2, 8)).astype(np.float32) for _ in range(2))
    results = [
        run_small(
            query,
            padded_cache(layout, key, value, fill),
            return_residual=True,
            implementation=implementation,
        )
        for fill in (0.0, padding)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def padded_cache(layout: str, key: np.ndarray, value: np.ndarray, fill: float) -> jax_tkg.KVCache:
    """Two rows of 16 slots, of which 5 and 11 hold tokens."""
    lengths = np.asarray([5, 11], np.int32)
    live = (np.arange(16) < lengths[:, None])[..., None, None]
    key, value = (np.where(live, x, np.float32(fill)) for x in (key, value))
    rest = {"k_scale": None, "v_scale": None, "dtype": np.dtype(np.float32)}
    kv: jax_tkg.KVLayout
    if layout == "paged":
        key, value = (jnp.asarray(x.reshape(8, 4, 2, 8).swapaxes(1, 2)) for x in (key, value))
        table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
        kv = jax_tkg.Paged(key, value, **rest, page_indices=table)
    else:
        of = DENSE_LAYOUTS.get(layout, jax_tkg.BSKH)
        key, value = (
            jnp.asarray(x.transpose(["BSKH".index(a) for a in axes]))
            for x, axes in ((key, of.key_axes), (value, of.value_axes))
        )
        kv = of(key=key, value=value, **rest)
    cache_type = jax_tkg.RingKVCache if layout == "ring" else jax_tkg.KVCache
    return cache_type(kv, jnp.asarray(lengths), jnp.zeros(2, jnp.int32))
