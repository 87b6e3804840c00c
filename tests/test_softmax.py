"""The running softmax and the merge of partial results, against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import SoftmaxState, merge_attention
from jax_tkg.softmax import HIGHEST, LOWEST

EPS = float(np.finfo(np.float32).eps)


def fold(state, logits, values):
    """Folds `logits [rows, keys]` and `values [keys, Hv]` in."""
    values = jnp.asarray(values, jnp.float32)
    return state.update(jnp.asarray(logits, jnp.float32), lambda weights: weights @ values)


def softmax(logits, values):
    """Output and log-sum-exp in float64."""
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total @ values, (top + np.log(total))[..., 0]


def assert_close(results, expected, roundings=16):
    for mine, exact in zip(results, expected, strict=True):
        size = np.maximum(1.0, np.abs(exact).max(initial=0.0, where=np.isfinite(exact)))
        np.testing.assert_allclose(mine, exact, rtol=0, atol=roundings * EPS * size)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 24)) * 5, rng.standard_normal((24, 4))


def test_a_new_state_has_seen_nothing():
    state = SoftmaxState.init((2, 3), 5)
    assert (state.max == LOWEST).all()
    assert (state.sum == 0).all()
    out, lse = state.finalize()
    np.testing.assert_array_equal(out, np.zeros((2, 3, 5)))
    np.testing.assert_array_equal(lse, np.full((2, 3), -np.inf))


def test_not_a_number_shows(data):
    logits, values = data
    logits[1, 7] = np.nan
    state = fold(SoftmaxState.init((3,), 4), logits, values)
    for out, lse in (
        state.finalize(),
        merge_attention([state.output[None, None]], [state.max[None, None] + jnp.log(state.sum)]),
    ):
        np.testing.assert_array_equal(np.isnan(np.squeeze(lse)), [False, True, False])
        np.testing.assert_array_equal(np.isnan(np.squeeze(out)).all(-1), [False, True, False])


@pytest.mark.parametrize("order", ["as they come", "ascending", "descending"])
@pytest.mark.parametrize("tile", [1, 5, 24])
def test_folding_tiles_is_softmax(data, tile, order):
    """Ascending logits move the maximum with every tile, descending ones never."""
    logits, values = data
    if order != "as they come":
        logits = np.sort(logits, axis=-1)[:, :: 1 if order == "ascending" else -1]
    state = SoftmaxState.init((3,), 4)
    for begin in range(0, 24, tile):
        part = slice(begin, begin + tile)
        state = fold(state, logits[:, part], values[part])
    assert_close(state.finalize(), softmax(logits, values))


def test_the_state_means_what_it_says(data):
    logits, values = data
    state = fold(
        fold(SoftmaxState.init((3,), 4), logits[:, :9], values[:9]), logits[:, 9:], values[9:]
    )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_array_equal(state.max, logits.max(-1).astype(np.float32))
    assert_close((state.sum, state.output), (weights.sum(-1), weights @ values))


def test_keys_may_lie_on_another_axis(data):
    logits, values = data
    state = SoftmaxState.init((3,), 4, key_axis=0)
    for part in (slice(0, 7), slice(7, 24)):
        of = jnp.asarray(values[part], jnp.float32)
        state = state.update(
            jnp.asarray(logits[:, part].T, jnp.float32), lambda weights, of=of: weights.T @ of
        )
    assert_close(state.finalize(), softmax(logits, values))


def test_masked_tiles_leave_a_state_as_it_is(data):
    logits, values = data
    masked = np.full((3, 8), -np.inf)
    first = fold(SoftmaxState.init((3,), 4), masked, values[:8])
    assert (first.sum == 0).all()
    assert (first.output == 0).all()
    state = fold(fold(fold(first, masked, values[:8]), logits, values), masked, values[:8])
    assert_close(state.finalize(), softmax(logits, values))


def test_rows_do_not_mix():
    logits = np.asarray([[-np.inf, -np.inf], [0.0, -np.inf], [3.0, 3.0]])
    out, lse = fold(SoftmaxState.init((3,), 1), logits, [[2.0], [4.0]]).finalize()
    assert_close((out, lse), ([[0], [2], [3]], [-np.inf, 0, 3 + np.log(2)]))


@pytest.mark.parametrize("tile", [1, 3])
def test_infinite_and_huge_logits_stay_finite(tile):
    logits = np.asarray([[-3e38, np.inf, 1e4], [3e38, -3e38, -np.inf], [1e4, 1e4, -1e4]])
    values = np.asarray([[1.0], [2.0], [4.0]])
    state = SoftmaxState.init((3,), 1)
    for begin in range(0, 3, tile):
        part = slice(begin, begin + tile)
        state = fold(state, logits[:, part], values[part])
    out, lse = state.finalize()
    assert_close((out,), ([[2], [1], [1.5]],))
    np.testing.assert_array_equal(lse, np.float32([HIGHEST, 3e38, 1e4 + np.log(2)]))


def test_the_lowest_logit_is_not_a_mask():
    out, lse = fold(SoftmaxState.init((1,), 1), [[LOWEST]], [[7.0]]).finalize()
    assert out.item() == 7
    assert lse.item() == np.float32(LOWEST)


def test_merged_states_are_one(data):
    logits, values = data
    empty = SoftmaxState.init((3,), 4)
    cuts = (slice(0, 3), slice(3, 20), slice(20, 24))
    first, second, third = (fold(empty, logits[:, c], values[c]) for c in cuts)
    exact = softmax(logits, values)
    assert_close(first.merge(second).merge(third).finalize(), exact)
    assert_close(first.merge(second.merge(third)).finalize(), exact)
    assert_close(third.merge(first).merge(second).finalize(), exact)


def test_an_empty_state_is_neutral_in_a_merge(data):
    logits, values = data
    empty = SoftmaxState.init((3,), 4)
    full = fold(empty, logits, values)
    for merged in (full.merge(empty), empty.merge(full)):
        jax.tree.map(np.testing.assert_array_equal, merged, full)
    jax.tree.map(np.testing.assert_array_equal, empty.merge(empty), empty)


@pytest.mark.parametrize("sink", [-40.0, 0.0, 40.0])
def test_a_sink_joins_the_sum_without_a_value(data, sink):
    logits, values = data
    state = fold(SoftmaxState.init((3,), 4), logits, values).add_sink(jnp.float32(sink))
    with_sink = np.concatenate([logits, np.full((3, 1), sink)], -1)
    exact = softmax(with_sink, np.concatenate([values, np.zeros((1, 4))]))
    assert_close(state.finalize(), exact)


def test_sinks_of_rows_differ_and_infinite_ones_are_nothing_or_everything():
    sinks = jnp.asarray([-jnp.inf, 1.5, jnp.inf])
    seen = fold(SoftmaxState.init((3,), 1), np.zeros((3, 1)), [[6.0]]).add_sink(sinks).finalize()
    assert_close(seen, ([[6], [6 / (1 + np.exp(1.5))], [0]], [0, np.log(1 + np.exp(1.5)), HIGHEST]))
    empty = SoftmaxState.init((3,), 1).add_sink(sinks).finalize()
    assert_close(empty, ([[0], [0], [0]], [-np.inf, 1.5, HIGHEST]))


# merge_attention


def shaped(out, lse, dtype=jnp.float32):
    """Rows as `[B = 1, T, N = 1, Hv]` and `[1, T, 1]`."""
    out, lse = jnp.asarray(out, dtype), jnp.asarray(lse, jnp.float32)
    return out[None, :, None], lse[None, :, None]


@pytest.mark.parametrize("cuts", [(0, 24), (0, 1, 24), (0, 5, 6, 13, 24)])
def test_merged_parts_are_the_whole(data, cuts):
    logits, values = data
    parts = [
        shaped(*softmax(logits[:, begin:end], values[begin:end]))
        for begin, end in itertools.pairwise(cuts)
    ]
    merged = merge_attention(*zip(*parts, strict=True))
    assert_close(merged, shaped(*softmax(logits, values)))


def test_a_part_that_saw_nothing_counts_for_nothing():
    nothing = shaped([[99.0], [99.0]], [-np.inf, -np.inf])
    something = shaped([[3.0], [0.0]], [2.0, -np.inf])
    for parts in ((nothing, something), (something, nothing)):
        out, lse = merge_attention(*zip(*parts, strict=True))
        assert out.ravel().tolist() == [3, 0]
        assert lse.ravel().tolist() == [2, -np.inf]


def test_a_sink_is_counted_by_one_part():
    first, second = shaped([[6.0]], [0.0]), shaped([[0.0]], [np.log(2)])
    out, lse = merge_attention(*zip(first, second, strict=True))
    assert_close((out.ravel(), lse.ravel()), ([2], [np.log(3)]))


@pytest.mark.parametrize("size", [-3e38, 1e4, 3e38])
def test_merging_huge_log_sum_exps(size):
    parts = shaped([[1.0]], [size]), shaped([[2.0]], [size])
    out, lse = merge_attention(*zip(*parts, strict=True))
    assert_close((out.ravel(),), ([1.5],))
    np.testing.assert_array_equal(lse.ravel(), np.float32([size + np.log(2)]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_merged_output_has_the_dtype_of_the_parts(dtype):
    part = shaped([[1.0, 3.0]], [0.0], dtype)
    out, lse = merge_attention(*zip(part, part, strict=True))
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    assert out.ravel().tolist() == [1, 3]


@pytest.mark.parametrize(("outputs", "lses"), [(0, 0), (1, 0), (2, 1)])
def test_parts_must_be_complete(outputs, lses):
    out, lse = shaped([[1.0]], [0.0])
    with pytest.raises(ValueError, match=f"{outputs} outputs and {lses} log-sum-exps"):
        merge_attention([out] * outputs, [lse] * lses)
