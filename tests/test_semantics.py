"""Each pinned meaning of the op, on numbers small enough to work out by hand.

With a head size and a scale of 1 and queries of 1, a key is its own logit: keys `x`, values `v`,
output `sum softmax(x) v`. With all keys 0 the output is the mean of the values seen and the
log-sum-exp the log of their number.
"""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.cache.layouts import DENSE_LAYOUTS
from jax_tkg.implementations import Implementation
from tests.conformance import InTiles, run_small

LOG = math.log
FLOAT32_MAX = float(np.finfo(np.float32).max)
RELATIVE = 8 * float(np.finfo(np.float32).eps)

IMPLEMENTATIONS = ["xla", "reference", InTiles("cpu", 3), InTiles("tpu", 3)]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda i: i if isinstance(i, str) else i.name)
def implementation(request: pytest.FixtureRequest) -> str | Implementation:
    return request.param


def attend(
    implementation: str | Implementation,
    logits: Any,
    values: Any,
    *,
    tokens: int = 1,
    layout: Any = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and LSE, `[B, T]` or `[T]`, of rows of logits and values `[B, S]` or `[S]`."""
    logits, values = (np.asarray(x, np.float32) for x in (logits, values))
    batch = logits.shape[0] if logits.ndim == 2 else 1
    key, value = (x.reshape(batch, -1, 1, 1) for x in (logits, values))
    kv = {"key": jnp.asarray(key), "value": jnp.asarray(value)}
    if layout is not None:
        kv = {"key": layout(key, value)}
    for name in ("key_value_seq_lengths", "key_value_seq_starts", "key_positions", "sinks"):
        if name in options:
            dtype = np.float32 if name == "sinks" else np.int32
            options[name] = jnp.asarray(options[name], dtype)
    out, lse = run_small(
        jnp.ones((batch, tokens, 1, 1)),
        **kv,
        scale=options.pop("scale", 1.0),
        return_residual=True,
        implementation=implementation,
        **options,
    )
    shape = (batch, tokens) if logits.ndim == 2 else (tokens,)
    return np.asarray(out).reshape(shape), np.asarray(lse).reshape(shape)


append = jax.jit(lambda cached, key, value: cached.append(key, value))


def assert_close(results: Any, *expected: Any) -> None:
    """Equal up to a few float32 roundings."""
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, exact, rtol=RELATIVE, atol=RELATIVE)


ZEROS, COUNT = np.zeros(12), np.arange(12)


# Positions


def test_every_slot_is_live_by_default(implementation):
    assert_close(attend(implementation, ZEROS, COUNT), [5.5], [LOG(12)])


def test_new_tokens_are_aligned_with_the_end_of_each_row(implementation):
    out = attend(
        implementation,
        np.zeros((3, 12)),
        np.broadcast_to(COUNT, (3, 12)),
        tokens=2,
        key_value_seq_lengths=[2, 5, 12],
    )
    assert_close(out, [[0, 0.5], [1.5, 2], [5, 5.5]], np.log([[1, 2], [4, 5], [11, 12]]))


def test_a_row_shorter_than_the_new_tokens_has_them_before_its_start(implementation):
    out = attend(implementation, ZEROS, COUNT, tokens=3, key_value_seq_lengths=[2])
    assert_close(out, [0, 0, 0.5], [-np.inf, 0, LOG(2)])


def test_starts_hide_left_padding(implementation):
    out = attend(implementation, ZEROS, COUNT, key_value_seq_lengths=[9], key_value_seq_starts=[6])
    assert_close(out, [7], [LOG(3)])


def test_starts_alone_leave_the_rest_live(implementation):
    out = attend(implementation, ZEROS, COUNT, key_value_seq_starts=[10])
    assert_close(out, [10.5], [LOG(2)])


def test_without_causality_new_tokens_see_each_other(implementation):
    out = attend(implementation, ZEROS, COUNT, tokens=2, key_value_seq_lengths=[5], is_causal=False)
    assert_close(out, [2, 2], [LOG(5), LOG(5)])


def test_query_positions_replace_the_alignment(implementation):
    out = attend(
        implementation, ZEROS, COUNT, tokens=3, query_positions=jnp.asarray([[7, 0, 3]], jnp.int32)
    )
    assert_close(out, [3.5, 0, 1.5], [LOG(8), 0, LOG(4)])


def test_queries_before_the_end_do_not_touch_what_comes_after_them(implementation):
    values = np.where(COUNT < 4, COUNT, np.nan)
    out = attend(implementation, values, values, query_positions=jnp.asarray([[3]], jnp.int32))
    weights = np.exp(np.arange(4))
    assert_close(out, [weights @ np.arange(4) / weights.sum()], [LOG(weights.sum())])


def test_key_positions_say_where_slots_are(implementation):
    """A ring of 6 slots that holds tokens 4 to 9; two of four new tokens seen, and all before."""
    out = attend(
        implementation,
        np.zeros(6),
        [6, 7, 8, 9, 4, 5],
        tokens=2,
        key_positions=[[6, 7, 8, 9, 4, 5]],
        key_value_seq_lengths=[10],
    )
    assert_close(out, [6, 6.5], [LOG(5), LOG(6)])


def test_negative_key_positions_are_never_seen(implementation):
    out = attend(
        implementation,
        [0, np.nan, 0],
        [1, np.nan, 3],
        key_positions=[[1, -1, 0]],
        key_value_seq_lengths=[2],
        is_causal=False,
    )
    assert_close(out, [2], [LOG(2)])


# The window


@pytest.mark.parametrize(
    ("window", "first", "last"),
    [
        ((2, 0), 3, 5),
        ((0, 0), 5, 5),
        ((3, 2), 2, 7),
        (2, 3, 7),
        ((None, 1), 0, 6),
        ((1, None), 4, 11),
    ],
)
def test_both_ends_of_the_window_are_inclusive(implementation, window, first, last):
    out = attend(
        implementation,
        ZEROS,
        COUNT,
        query_positions=jnp.asarray([[5]], jnp.int32),
        local_window_size=window,
        is_causal=False,
    )
    assert_close(out, [(first + last) / 2], [LOG(last - first + 1)])


def test_causality_cuts_the_window(implementation):
    out = attend(
        implementation, ZEROS, COUNT, key_value_seq_lengths=[8], local_window_size=2, tokens=2
    )
    assert_close(out, [5, 6], [LOG(3), LOG(3)])


def test_the_window_counts_positions_not_slots(implementation):
    out = attend(
        implementation,
        np.zeros(4),
        [8, 9, 6, 7],
        key_positions=[[8, 9, 6, 7]],
        key_value_seq_lengths=[10],
        local_window_size=(2, 0),
    )
    assert_close(out, [8], [LOG(3)])


@cache
def ring_and_history() -> tuple[jax_tkg.RingKVCache, jax.Array]:
    """Eleven tokens, and a ring of five slots after they went through it."""
    history = np.random.default_rng(0).standard_normal((1, 11, 1, 4)).astype(np.float32)
    ring = jax_tkg.RingKVCache.create(1, 5, 1, 4)
    for begin, end in ((0, 4), (4, 9), (9, 11)):
        part = jnp.asarray(history[:, begin:end])
        ring = append(ring, part, part)
    return ring, jnp.asarray(history)


def test_a_ring_cache_sees_the_window_of_the_whole_history(implementation):
    ring, history = ring_and_history()
    given = {"query": history[:, -2:], "local_window_size": (3, 0), "return_residual": True}
    windowed = run_small(key=ring, **given, implementation=implementation)
    whole = run_small(key=history, value=history, **given, implementation="reference")
    assert_close(windowed, *whole)


# Rows that see nothing

PAGES_OF_FOUR = {
    "layout": lambda key, value: jax_tkg.Paged(
        key=jnp.asarray(key.reshape(3, 1, 4, 1)),
        value=jnp.asarray(value.reshape(3, 1, 4, 1)),
        k_scale=None,
        v_scale=None,
        dtype=np.dtype(np.float32),
        page_indices=jnp.full((1, 3), -1, jnp.int32),
    )
}

EMPTY = {
    "no tokens": {"key_value_seq_lengths": [0]},
    "start after the end": {"key_value_seq_lengths": [7], "key_value_seq_starts": [7]},
    "start far after the end": {"key_value_seq_lengths": [3], "key_value_seq_starts": [11]},
    "window": {
        "query_positions": jnp.asarray([[40]], jnp.int32),
        "local_window_size": (5, 0),
    },
    "mask": {"mask": jnp.zeros((1, 1, 1, 12), bool)},
    "nothing in the ring": {"key_positions": [[-1] * 12], "key_value_seq_lengths": [5]},
    "no pages": PAGES_OF_FOUR,
}


@pytest.mark.parametrize("why", EMPTY)
def test_an_empty_row_gives_zero_and_minus_infinity(implementation, why):
    nan = np.full(12, np.nan)
    out, lse = attend(implementation, nan, nan, **EMPTY[why])
    assert out.tolist() == [0]
    assert lse.tolist() == [-np.inf]


@pytest.mark.parametrize("why", ["no tokens", "window", "mask"])
def test_an_empty_row_with_a_sink_gives_zero_and_the_sink(implementation, why):
    nan = np.full(12, np.nan)
    out, lse = attend(implementation, nan, nan, **EMPTY[why], sinks=[-2.5])
    assert out.tolist() == [0]
    assert lse.tolist() == [-2.5]


def test_a_row_whose_bias_is_minus_infinity_everywhere_is_empty(implementation):
    bias = jnp.full((1, 1, 1, 12), -jnp.inf)
    out, lse = attend(implementation, COUNT, COUNT, bias=bias)
    assert out.tolist() == [0]
    assert lse.tolist() == [-np.inf]


def test_a_full_row_next_to_an_empty_one(implementation):
    out, lse = attend(
        implementation,
        np.zeros((2, 12)),
        np.stack([np.full(12, np.nan), COUNT]),
        key_value_seq_lengths=[0, 12],
    )
    assert_close((out, lse), [[0], [5.5]], [[-np.inf], [LOG(12)]])


@pytest.mark.parametrize(("begin", "end"), [(8, 12), (4, 8), (0, 4), (9, 10)])
def test_whole_tiles_may_be_masked_before_and_after(implementation, begin, end):
    """In thirds, a tile is 4 keys: one or two are masked before the first key that is seen."""
    inside = (begin <= COUNT) & (end > COUNT)
    values = np.where(inside, COUNT, np.nan)
    out = attend(implementation, ZEROS, values, mask=jnp.asarray(inside[None, None, None]))
    assert_close(out, [(begin + end - 1) / 2], [LOG(end - begin)])


# Logits


def test_scale_defaults_to_one_over_the_root_of_the_head_size(implementation):
    ones = jnp.ones((1, 1, 1, 16))
    arguments = {"return_residual": True, "implementation": implementation}
    assert run_small(ones, ones, ones, **arguments)[1].item() == 4.0
    assert run_small(ones, ones, ones, scale=0.5, **arguments)[1].item() == 8.0


def test_soft_cap_comes_after_the_scale_and_before_the_bias(implementation):
    out = attend(
        implementation,
        [8.0],
        [3.0],
        scale=0.5,
        logits_soft_cap=2.0,
        bias=jnp.full((1, 1, 1, 1), 10.0),
    )
    assert_close(out, [3], [10 + 2 * math.tanh(0.5 * 8 / 2)])


def test_soft_cap_comes_before_the_mask(implementation):
    """A masked logit stays -inf; capped it would be -2."""
    out = attend(
        implementation,
        ZEROS,
        COUNT,
        logits_soft_cap=2.0,
        key_value_seq_lengths=[1],
    )
    assert_close(out, [0], [0])


def test_a_sink_joins_the_denominator_only(implementation):
    out = attend(implementation, [0.0], [8.0], sinks=[LOG(3)])
    assert_close(out, [2], [LOG(4)])


def test_a_sink_belongs_to_its_query_head(implementation):
    ones = jnp.ones((1, 1, 4, 1))
    zeros = jnp.zeros((1, 1, 2, 1))
    out, lse = run_small(
        ones,
        zeros,
        zeros + 12,
        sinks=jnp.log(jnp.asarray([1.0, 2.0, 3.0, 5.0])),
        return_residual=True,
        implementation=implementation,
    )
    assert_close((out.ravel(), lse.ravel()), [6, 4, 3, 2], np.log([2, 3, 4, 6]))


def test_lse_is_natural_and_holds_scale_cap_bias_and_sink(implementation):
    keys, bias, sink = np.asarray([1.0, -2.0, 4.0]), np.asarray([0.5, 1.0, -1.0]), 0.7
    logits = 3 * np.tanh(0.25 * keys / 3) + bias
    total = np.exp(logits).sum() + math.exp(sink)
    out = attend(
        implementation,
        keys,
        [1.0, 2.0, 4.0],
        scale=0.25,
        logits_soft_cap=3.0,
        bias=jnp.asarray(bias[None, None, None], jnp.float32),
        sinks=[sink],
    )
    assert_close(out, [np.exp(logits) @ [1, 2, 4] / total], [LOG(total)])


def test_alibi_through_bias(implementation):
    bias = 0.5 * (COUNT - 11.0)
    weights = np.exp(bias)
    out = attend(
        implementation, ZEROS, COUNT, bias=jnp.asarray(bias[None, None, None], jnp.float32)
    )
    assert_close(out, [weights @ COUNT / weights.sum()], [LOG(weights.sum())])


def test_minus_infinity_in_the_bias_masks(implementation):
    bias = np.where(COUNT < 9, -np.inf, 1.0).astype(np.float32)
    out = attend(implementation, ZEROS, COUNT, bias=jnp.asarray(bias[None, None, None]))
    assert_close(out, [10], [1 + LOG(3)])


def test_plus_infinity_in_the_bias_takes_all_and_stays_finite(implementation):
    bias = np.where((COUNT == 2) | (COUNT == 9), np.inf, 0).astype(np.float32)
    out, lse = attend(implementation, ZEROS, COUNT, bias=jnp.asarray(bias[None, None, None]))
    assert_close((out, lse), [5.5], [FLOAT32_MAX])


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_huge_logits_stay_finite(implementation, size):
    logits = np.asarray([-size, 0, size, -size, size, 0])
    out, lse = attend(implementation, logits, [9, 9, 1, 9, 2, 9])
    assert_close((out, lse), [1.5], [size + LOG(2)])


def test_small_differences_of_large_logits_count(implementation):
    weights = np.exp([-2.0, 0.0, -1.0])
    out = attend(implementation, [9998.0, 10000.0, 9999.0], [1, 2, 3])
    assert_close(out, [weights @ [1, 2, 3] / weights.sum()], [10000 + LOG(weights.sum())])


def test_only_large_negative_logits(implementation):
    out = attend(implementation, [-3e38, -3e38], [1, 2])
    assert_close(out, [1.5], [-3e38])


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
