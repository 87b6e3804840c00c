"""Each pinned meaning of positions, masks and logits, on numbers worked out by hand."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from tests.conformance import run_small
from tests.worked import assert_close, attend, in_every_implementation

pytestmark = in_every_implementation

LOG = math.log
FLOAT32_MAX = float(np.finfo(np.float32).max)
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
    out = attend(implementation, ZEROS, COUNT, tokens=3, query_positions=[[7, 0, 3]])
    assert_close(out, [3.5, 0, 1.5], [LOG(8), 0, LOG(4)])


def test_queries_before_the_end_do_not_touch_what_comes_after_them(implementation):
    values = np.where(COUNT < 4, COUNT, np.nan)
    out = attend(implementation, values, values, query_positions=[[3]])
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
        query_positions=[[5]],
        local_window_size=window,
        is_causal=False,
    )
    assert_close(out, [(first + last) / 2], [LOG(last - first + 1)])


@pytest.mark.parametrize("window", [(None, 2**31 - 1), (2**31 - 1, 2**40), (2**30 - 1, 2**30 - 1)])
def test_a_window_wider_than_any_row_is_none(implementation, window):
    out = attend(
        implementation,
        ZEROS,
        COUNT,
        key_value_seq_lengths=[8],
        local_window_size=window,
        is_causal=False,
    )
    assert_close(out, [3.5], [LOG(8)])


def test_windows_far_apart_show_nothing_between_them(implementation):
    positions = [220, 41, 290, 139, 90, 176]
    values = np.full(300, np.nan)
    seen = np.array(positions)[:, None] - [0, 1]
    values[seen] = seen
    out = attend(
        implementation,
        np.zeros(300),
        values,
        tokens=6,
        query_positions=[positions],
        local_window_size=(1, 0),
    )
    assert_close(out, np.array(positions) - 0.5, np.full(6, LOG(2)))


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
    append = jax.jit(lambda ring, new: ring.append(new, new))
    for begin, end in ((0, 4), (4, 9), (9, 11)):
        ring = append(ring, jnp.asarray(history[:, begin:end]))
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
        "query_positions": [[40]],
        "local_window_size": (5, 0),
    },
    "mask": {"mask": np.zeros((1, 1, 1, 12), bool)},
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
    bias = np.full((1, 1, 1, 12), -np.inf)
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
    out = attend(implementation, ZEROS, values, mask=inside[None, None, None])
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
        bias=np.full((1, 1, 1, 1), 10.0),
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
        bias=bias[None, None, None],
        sinks=[sink],
    )
    assert_close(out, [np.exp(logits) @ [1, 2, 4] / total], [LOG(total)])


def test_alibi_through_bias(implementation):
    bias = 0.5 * (COUNT - 11.0)
    weights = np.exp(bias)
    out = attend(implementation, ZEROS, COUNT, bias=bias[None, None, None])
    assert_close(out, [weights @ COUNT / weights.sum()], [LOG(weights.sum())])


def test_minus_infinity_in_the_bias_masks(implementation):
    bias = np.where(COUNT < 9, -np.inf, 1.0).astype(np.float32)
    out = attend(implementation, ZEROS, COUNT, bias=bias[None, None, None])
    assert_close(out, [10], [1 + LOG(3)])


def test_plus_infinity_in_the_bias_takes_all_and_stays_finite(implementation):
    bias = np.where((COUNT == 2) | (COUNT == 9), np.inf, 0).astype(np.float32)
    out, lse = attend(implementation, ZEROS, COUNT, bias=bias[None, None, None])
    assert_close((out, lse), [5.5], [FLOAT32_MAX])


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_huge_logits_stay_finite(implementation, size):
    logits = np.asarray([-size, 0, size, -size, size, 0])
    out, lse = attend(implementation, logits, [9, 9, 1, 9, 2, 9])
    assert_close((out, lse), [1.5], [size + LOG(2)])


def test_not_a_number_among_the_logits_shows(implementation):
    """A model that diverged is not taken for padding."""
    out, lse = attend(implementation, np.where(COUNT == 3, np.nan, 0.0), COUNT)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_small_differences_of_large_logits_count(implementation):
    weights = np.exp([-2.0, 0.0, -1.0])
    out = attend(implementation, [9998.0, 10000.0, 9999.0], [1, 2, 3])
    assert_close(out, [weights @ [1, 2, 3] / weights.sum()], [10000 + LOG(weights.sum())])


def test_only_large_negative_logits(implementation):
    out = attend(implementation, [-3e38, -3e38], [1, 2])
    assert_close(out, [1.5], [-3e38])
