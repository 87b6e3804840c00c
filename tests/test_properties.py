"""What must hold for any numbers, sought by hypothesis.

The arrays have one shape, so that a test compiles once; what varies is their content, the live
ranges, the masks, the order and the cuts.
"""

import itertools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jax_tkg
from jax_tkg import SoftmaxState, merge_attention
from tests.conformance import InTiles, run_small

B, T, S, N, K, H = 2, 2, 24, 6, 2, 8
PAGE = 4
EPS = float(np.finfo(np.float32).eps)

FORMS = ["xla", InTiles("cpu", 4), InTiles("tpu", 4), InTiles("neuron", 4)]
in_every_form = pytest.mark.parametrize("form", FORMS, ids=str)
few = settings(max_examples=25)

seeds = st.integers(0, 2**32 - 1)
row_lengths = st.tuples(*[st.integers(0, S)] * B)
key_sizes = st.sampled_from([0.01, 1.0, 10.0])
cuts = st.integers(0, S)


def draw(seed: int, key_size: float = 1.0) -> dict[str, np.ndarray]:
    """Query, keys and values."""
    rng = np.random.default_rng(seed)
    query, key, value = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    )
    return {"query": query, "key": key * np.float32(key_size), "value": value}


def attend(form: Any, arrays: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp."""
    arrays = {n: jnp.asarray(a) if isinstance(a, np.ndarray) else a for n, a in arrays.items()}
    for name, rows in options.items():
        if isinstance(rows, tuple):
            options[name] = jnp.asarray(rows, jnp.int32)
    out, lse = run_small(**arrays, **options, return_residual=True, implementation=form)
    return np.asarray(out), np.asarray(lse)


def rounding(arrays: dict[str, np.ndarray]) -> tuple[float, float]:
    """By how much float32 sums in two orders may differ, in the output and in the log-sum-exp.

    A dot product of H terms is off by up to `H * eps / 2 * |q| |k|` and a sum of S weights by
    `S * eps / 2` of itself, in either order; the output twice as much, times the largest value.
    """
    query, key = (np.linalg.norm(arrays[name], axis=-1).max() for name in ("query", "key"))
    lse = EPS * (H * query * key * H**-0.5 + S)
    return 2 * lse * float(np.abs(arrays["value"]).max()), lse


def assert_same(mine: Any, others: Any, tolerances: tuple[float, float] = (0.0, 0.0)) -> None:
    for x, y, tolerance in zip(mine, others, tolerances, strict=True):
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


# How the keys are walked


@pytest.mark.parametrize("platform", ["cpu", "tpu", "neuron"])
@pytest.mark.parametrize("parts", [2, 5, 24])
@few
@given(seed=seeds, size=key_sizes, lengths=row_lengths)
def test_the_tile_size_does_not_matter(platform, parts, seed, size, lengths):
    arrays = draw(seed, size)
    whole, tiled = (
        attend(InTiles(platform, n), arrays, key_value_seq_lengths=lengths) for n in (1, parts)
    )
    assert_same(tiled, whole, rounding(arrays))


@in_every_form
@few
@given(seed=seeds, lengths=row_lengths)
def test_the_order_of_pages_does_not_matter(form, seed, lengths):
    arrays, rng = draw(seed), np.random.default_rng(seed)
    count = S // PAGE
    pools = [
        arrays[name].reshape(B * count, PAGE, K, H).swapaxes(1, 2) for name in ("key", "value")
    ]
    results = []
    for order in (np.arange(B * count), rng.permutation(B * count)):
        key, value = (jnp.asarray(pool[np.argsort(order)]) for pool in pools)
        pages = jnp.asarray(order.reshape(B, count), jnp.int32)
        kv = jax_tkg.Paged(key, value, page_indices=pages)
        given_kv = {"query": arrays["query"], "key": kv}
        results.append(attend(form, given_kv, key_value_seq_lengths=lengths))
    assert_same(*results)
    flat = attend(form, arrays, key_value_seq_lengths=lengths)
    assert_same(results[0], flat, rounding(arrays))


@in_every_form
@few
@given(
    seed=seeds,
    lengths=row_lengths,
    fill=st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False),
)
def test_the_content_of_padding_does_not_matter(form, seed, lengths, fill):
    arrays, starts = draw(seed), tuple(n // 3 for n in lengths)
    slots = np.arange(S)
    live = (slots >= np.asarray(starts)[:, None]) & (slots < np.asarray(lengths)[:, None])
    padded = arrays | {
        name: np.where(live[..., None, None], arrays[name], np.float32(fill))
        for name in ("key", "value")
    }
    ranges = {"key_value_seq_lengths": lengths, "key_value_seq_starts": starts}
    assert_same(attend(form, padded, **ranges), attend(form, arrays, **ranges))


@in_every_form
@few
@given(seed=seeds, lengths=row_lengths, starts=row_lengths)
def test_a_live_range_is_a_mask(form, seed, lengths, starts):
    arrays = draw(seed)
    slots, at = np.arange(S), np.asarray(lengths)[:, None] - T + np.arange(T)
    live = (slots >= np.asarray(starts)[:, None]) & (slots < np.asarray(lengths)[:, None])
    mask = live[:, None] & (slots <= at[:, :, None])
    masked = attend(form, arrays, mask=jnp.asarray(mask[:, None]), is_causal=False)
    ranged = attend(form, arrays, key_value_seq_lengths=lengths, key_value_seq_starts=starts)
    assert_same(ranged, masked, rounding(arrays))


@in_every_form
@few
@given(seed=seeds, size=key_sizes, lengths=st.tuples(*[st.integers(T, S)] * B))
def test_new_keys_may_be_beside_the_cache_or_in_it(form, seed, size, lengths):
    arrays = draw(seed, size)
    at = np.asarray(lengths)[:, None] - T + np.arange(T)
    new = {
        f"new_{name}": np.take_along_axis(arrays[name], at[..., None, None], axis=1)
        for name in ("key", "value")
    }
    within = attend(form, arrays, key_value_seq_lengths=lengths)
    beside = attend(form, arrays | new, key_value_seq_lengths=lengths)
    assert_same(beside, within, rounding(arrays))


# Splitting and merging


@in_every_form
@few
@given(seed=seeds, size=key_sizes, lengths=row_lengths, first=cuts, second=cuts)
def test_a_cache_split_anywhere_merges_into_the_whole(form, seed, size, lengths, first, second):
    """Three parts, empty ones included; the sink is counted by one of them."""
    arrays = draw(seed, size)
    sinks = np.random.default_rng(seed).standard_normal(N).astype(np.float32)
    at = np.asarray(lengths)[:, None] - T + np.arange(T)
    positions = {"query_positions": jnp.asarray(at, jnp.int32)}
    edges, parts = (0, *sorted((first, second)), S), []
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        part = attend(
            form,
            arrays,
            **positions,
            key_value_seq_lengths=tuple(min(n, end) for n in lengths),
            key_value_seq_starts=(begin,) * B,
            sinks=jnp.asarray(np.where(i == 1, sinks, -np.inf), jnp.float32),
        )
        parts.append([jnp.asarray(x) for x in part])
    whole = attend(
        form,
        arrays,
        **positions,
        key_value_seq_lengths=lengths,
        key_value_seq_starts=(0,) * B,
        sinks=jnp.asarray(sinks),
    )
    merged = merge_attention(*zip(*parts, strict=True))
    assert_same(merged, whole, rounding(arrays))


# What does not depend on what


@in_every_form
@few
@given(seed=seeds, size=key_sizes)
def test_the_order_of_keys_does_not_matter_without_positions(form, seed, size):
    arrays, rng = draw(seed, size), np.random.default_rng(seed)
    mask, order = rng.random((B, 1, T, S)) < 0.6, rng.permutation(S)
    shuffled = arrays | {name: arrays[name][:, order] for name in ("key", "value")}
    results = (
        attend(form, a, mask=jnp.asarray(m), is_causal=False)
        for a, m in ((arrays, mask), (shuffled, mask[..., order]))
    )
    assert_same(*results, rounding(arrays))


@in_every_form
@few
@given(seed=seeds, lengths=row_lengths)
def test_rows_do_not_see_each_other(form, seed, lengths):
    arrays, others = draw(seed), draw(seed + 1)
    swapped = {n: np.stack([arrays[n][0], others[n][1]]) for n in arrays}
    mine, theirs = (attend(form, a, key_value_seq_lengths=lengths) for a in (arrays, swapped))
    assert_same([x[0] for x in mine], [x[0] for x in theirs])


@in_every_form
@few
@given(seed=seeds, lengths=row_lengths, power=st.integers(-6, 6))
def test_powers_of_two_pass_through_exactly(form, seed, lengths, power):
    """From the key to the query, and from the values to the output, not a bit changes."""
    arrays, factor = draw(seed), np.float32(2.0**power)
    out, lse = attend(form, arrays, key_value_seq_lengths=lengths)
    moved = {
        "query": arrays["query"] * factor,
        "key": arrays["key"] / factor,
        "value": arrays["value"] * factor,
    }
    assert_same(attend(form, moved, key_value_seq_lengths=lengths), (out * factor, lse))


@in_every_form
@few
@given(seed=seeds, lengths=row_lengths, shift=st.floats(-30, 30, width=32))
def test_a_constant_bias_moves_the_log_sum_exp_alone(form, seed, lengths, shift):
    arrays = draw(seed)
    results = []
    for bias in (0.0, shift):
        full = jnp.full((1, 1, 1, S), bias, jnp.float32)
        results.append(attend(form, arrays, bias=full, key_value_seq_lengths=lengths))
    (out, lse), moved = results
    free = 2 * EPS * (abs(shift) + 1)  # logits of that size are rounded so
    tolerances = [
        t + f
        for t, f in zip(rounding(arrays), (free * np.abs(arrays["value"]).max(), free), strict=True)
    ]
    assert_same(moved, (out, lse + np.float32(shift)), tolerances)


@in_every_form
@few
@given(seed=seeds, size=key_sizes, lengths=row_lengths)
def test_the_output_lies_between_the_values_seen(form, seed, size, lengths):
    arrays = draw(seed, size)
    out, lse = attend(form, arrays, key_value_seq_lengths=lengths)
    tolerance = rounding(arrays)[0]
    for b, t, n in np.ndindex(B, T, N):
        end = lengths[b] - T + t + 1
        if end > 0:
            seen = arrays["value"][b, :end, n // (N // K)]
            assert (out[b, t, n] <= seen.max(0) + tolerance).all()
            assert (out[b, t, n] >= seen.min(0) - tolerance).all()
        else:
            assert (out[b, t, n] == 0).all()
            assert lse[b, t, n] == -np.inf


@in_every_form
@few
@given(seed=seeds, lengths=row_lengths)
def test_a_quantised_cache_is_a_cache_of_its_values(form, seed, lengths):
    arrays, rng = draw(seed), np.random.default_rng(seed)
    stored = {n: rng.integers(-127, 128, (B, S, K, H)).astype(np.int8) for n in ("key", "value")}
    scales = {n: (rng.random(K) / 50).astype(np.float32) for n in ("k_scale", "v_scale")}
    values = {
        n: stored[n].astype(np.float32) * scales[s][:, None]
        for n, s in (("key", "k_scale"), ("value", "v_scale"))
    }
    dense = arrays | values
    ranges = {"key_value_seq_lengths": lengths}
    quantised = attend(form, arrays | stored | scales, **ranges)
    assert_same(quantised, attend(form, dense, **ranges), rounding(dense))


# The state and the merge alone


def states(seed: int, count: int) -> list[SoftmaxState]:
    """States of three rows, some of which have seen nothing, with maxima far apart."""
    rng = np.random.default_rng(seed)
    empty, made = SoftmaxState.init((3,), 4), []
    for _ in range(count):
        logits = rng.standard_normal((3, 5)) * rng.choice([1, 100])
        logits[rng.random(3) < 0.3] = -np.inf
        values = jnp.asarray(rng.uniform(-1, 1, (5, 4)), jnp.float32)
        made.append(empty.update(jnp.asarray(logits, jnp.float32), lambda w, v=values: w @ v))
    return made


def assert_merged_alike(mine: Any, others: Any) -> None:
    """Up to a rounding or two in each of four merges."""
    (out, lse), (other_out, other_lse) = mine, others
    np.testing.assert_allclose(out, other_out, rtol=0, atol=8 * EPS)
    np.testing.assert_allclose(lse, other_lse, rtol=8 * EPS, atol=8 * EPS)


@few
@given(seeds)
def test_merge_is_associative_and_commutative(seed):
    a, b, c = states(seed, 3)
    jax.tree.map(np.testing.assert_array_equal, a.merge(b), b.merge(a))
    assert_merged_alike(a.merge(b).merge(c).finalize(), a.merge(b.merge(c)).finalize())


@few
@given(seeds, st.permutations(range(4)))
def test_results_merge_in_any_order_and_grouping(seed, order):
    parts = [[x[None, :, None] for x in state.finalize()] for state in states(seed, 4)]
    first, second, third, fourth = (parts[i] for i in order)
    pairs = [merge_attention(*zip(*p, strict=True)) for p in ((first, second), (third, fourth))]
    whole = merge_attention(*zip(*parts, strict=True))
    assert_merged_alike(merge_attention(*zip(*pairs, strict=True)), whole)
