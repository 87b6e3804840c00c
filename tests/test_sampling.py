"""Token selection: kept sets against a sorting oracle, frequencies, and the lowered program."""

import dataclasses
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from scipy import stats  # Comes with jax.

from jax_tkg.neuron import check, check_module
from jax_tkg.sampling import Greedy, Sample, TokenSelector, _exponential, _fewest, argmax_tokens
from tests.lowered import lower_for_neuron, operations

# Jitted, with the selector as a static argument.
kept = jax.jit(lambda selector, logits: selector.kept(logits))
select = jax.jit(lambda selector, logits, key: selector(logits, key))

# The most likely first: 1, 4, 2, 0, 5; 3 never.
ROW = np.array([0.5, 3.0, 1.0, -np.inf, 2.0, -1.0], np.float32)


def masses(logits, temperature):
    """Tokens of one row, most likely first (ties by index), and their float64 probabilities."""
    logits = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    logits = np.clip(logits, None, np.finfo(np.float32).max) / temperature
    order = [t for t in np.argsort(-logits, kind="stable") if logits[t] > -np.inf]
    weights = np.exp(logits[order] - logits[order[0]]) if order else np.zeros(0)
    return np.array(order, int), weights


def sorted_filter(logits, selector):
    """The kept set of one row by sorting; also how close a probability came to a threshold."""
    order, weights = masses(logits, selector.temperature)
    gap = math.inf
    order, weights = order[: selector.top_k], weights[: selector.top_k]
    if selector.top_p is not None and selector.top_p < 1 and len(order):
        cumulative = np.cumsum(weights) / weights.sum()
        gap = min(gap, np.abs(cumulative - selector.top_p).min())
        count = 1 + np.count_nonzero(cumulative < selector.top_p)
        order, weights = order[:count], weights[:count]
    if selector.min_p and len(order):
        gap = min(gap, np.abs(weights - selector.min_p).min())
        order = order[weights >= selector.min_p]
    mask = np.zeros(logits.shape, bool)
    mask[order] = True
    return mask, gap


def distribution(logits, selector):
    """Exact float64 probabilities of a row after the filters."""
    mask, _ = sorted_filter(logits, selector)
    order, weights = masses(logits, selector.temperature)
    probabilities = np.zeros(logits.shape)
    probabilities[order] = weights
    probabilities *= mask
    return probabilities / probabilities.sum()


def assert_kept(selector, *rows):
    """Compares the kept set of float rows with the oracle; returns it."""
    result = np.asarray(kept(selector, np.stack(rows)))
    assert result.dtype == bool
    for row, mask in zip(rows, result, strict=True):
        np.testing.assert_array_equal(
            np.flatnonzero(mask), np.flatnonzero(sorted_filter(row, selector)[0])
        )
    return [np.flatnonzero(mask).tolist() for mask in result]


# Argmax


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_argmax(dtype):
    nan, inf = np.nan, np.inf
    rows = {
        (1.0, 3.0, 3.0, 2.0): 1,
        (-5.0, -1.0, -2.0, -1.0): 1,
        (nan, -2.0, nan, -3.0): 1,
        (-inf, -inf, 0.0, -inf): 2,
        (1.0, inf, 5.0, inf): 1,
        (-inf, -inf, -inf, -inf): 0,
        (nan, nan, -inf, nan): 0,
        (0.0, 0.0, 0.0, 0.0): 0,
    }
    tokens = jax.jit(argmax_tokens)(jnp.asarray(list(rows), dtype))
    assert tokens.dtype == jnp.int32
    assert tokens.tolist() == list(rows.values())
    assert jax.jit(Greedy())(jnp.asarray(list(rows), dtype)).tolist() == list(rows.values())


@hypothesis.given(hnp.arrays(np.float32, (2, 19), elements=st.floats(-10, 10, width=16)))
@hypothesis.settings(max_examples=50, deadline=None)
def test_argmax_is_numpys(logits):
    np.testing.assert_array_equal(select(Greedy(), logits, None), np.argmax(logits, axis=-1))


# Kept sets

TIES = np.array([1.0, 2.0, 2.0, 2.0, 0.0, 2.0], np.float32)
FLAT = np.zeros(6, np.float32)


@pytest.mark.parametrize(
    ("selector", "row", "expected"),
    [
        (Sample(), ROW, [0, 1, 2, 4, 5]),
        (Sample(top_k=1), ROW, [1]),
        (Sample(top_k=3), ROW, [1, 2, 4]),
        (Sample(top_k=5), ROW, [0, 1, 2, 4, 5]),
        (Sample(top_k=6), ROW, [0, 1, 2, 4, 5]),  # -inf stays out.
        (Sample(top_k=1000), ROW, [0, 1, 2, 4, 5]),
        (Sample(top_k=2), TIES, [1, 2]),  # Ties: the lowest indices.
        (Sample(top_k=5), TIES, [0, 1, 2, 3, 5]),
        (Sample(top_k=3), FLAT, [0, 1, 2]),
        (Sample(top_p=0.5), FLAT, [0, 1, 2]),
        (Sample(top_p=0.51), FLAT, [0, 1, 2, 3]),
        (Sample(top_p=1e-60), ROW, [1]),
        (Sample(top_p=1.0), FLAT, [0, 1, 2, 3, 4, 5]),
        (Sample(top_p=1 - 1e-7), ROW, [0, 1, 2, 4, 5]),
        (Sample(top_p=0.6), ROW, [1]),
        (Sample(top_p=0.7), ROW, [1, 4]),
        (Sample(top_p=0.9), ROW, [1, 2, 4]),
        (Sample(top_p=0.9, temperature=0.25), ROW, [1]),
        (Sample(top_p=0.9, temperature=4.0), ROW, [0, 1, 2, 4, 5]),
        (Sample(top_k=2, top_p=0.7), ROW, [1]),  # Of the two kept, 1 has 0.73.
        (Sample(min_p=0.99), TIES, [1, 2, 3, 5]),
        (Sample(min_p=0.1), ROW, [1, 2, 4]),
        (Sample(min_p=0.0), ROW, [0, 1, 2, 4, 5]),
        (Sample(min_p=0.1, temperature=0.5), ROW, [1, 4]),
        (Sample(top_k=4, top_p=0.95, min_p=0.2), ROW, [1, 4]),
    ],
    ids=str,
)
def test_kept_sets(selector, row, expected):
    assert assert_kept(selector, row) == [expected]


def test_filters_apply_in_order():
    # Top-p of the whole row needs three tokens; of the best two, renormalised, only one.
    row = np.log(np.array([0.4, 0.25, 0.2, 0.15], np.float32))
    assert assert_kept(Sample(top_p=0.6), row) == [[0, 1]]
    assert assert_kept(Sample(top_k=2, top_p=0.6), row) == [[0]]


FILTERS = [
    Sample(top_k=1),
    Sample(top_k=5, temperature=0.3),
    Sample(top_k=32),
    Sample(top_p=0.3),
    Sample(top_p=0.9, temperature=1.7),
    Sample(min_p=0.07),
    Sample(temperature=0.8, top_k=12, top_p=0.83, min_p=0.03),
]
COARSE = st.integers(-24, 24).map(lambda n: n / 4)  # Many ties.
FINE = st.floats(-30, 30, width=32, allow_subnormal=False)
ODD = st.sampled_from([-np.inf, np.nan, -0.0, 0.0, 1e30, -1e30, np.inf])


@pytest.mark.parametrize("selector", FILTERS, ids=str)
@hypothesis.given(
    logits=st.one_of(
        hnp.arrays(np.float32, (3, 33), elements=elements)
        for elements in (COARSE, FINE, st.one_of(COARSE, ODD))
    )
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_kept_sets_match_sorting(selector, logits):
    for row in logits:
        # A sum that lands on the threshold depends on the order of summation.
        hypothesis.assume(sorted_filter(row, selector)[1] > 1e-5)
    assert_kept(selector, *logits)


def test_top_k_tells_neighbouring_floats_apart():
    for base in (-1000.0, -1e-30, 1e-30, 1.0, 3e38):
        bits = np.float32(base).view(np.int32) + np.arange(50, dtype=np.int32)
        descending = -np.sort(-bits.view(np.float32))
        for k in (7, 8):
            # The first token left out has index 0.
            assert_kept(Sample(top_k=k, temperature=3.0), np.roll(descending, -k))


@pytest.mark.parametrize("vocab", [1, 2, 8, 9, 129])
def test_ties_at_vocabulary_sizes_around_powers_of_two(vocab):
    for k in {1, vocab // 2, vocab - 1} - {0}:
        assert assert_kept(Sample(top_k=k), np.zeros(vocab, np.float32)) == [list(range(k))]


def test_large_vocabulary():
    logits = 3 * np.random.default_rng(1).standard_normal((2, 50_000), np.float32)
    assert_kept(Sample(top_k=1000), *logits)
    assert_kept(
        Sample(top_k=1000), *np.asarray(jnp.asarray(logits, jnp.bfloat16).astype(jnp.float32))
    )
    for row, mask in zip(logits, np.asarray(kept(Sample(top_p=0.9), logits)), strict=True):
        order, weights = masses(row, 1.0)
        count = np.count_nonzero(mask)
        cumulative = np.cumsum(weights) / weights.sum()
        np.testing.assert_array_equal(np.sort(order[:count]), np.flatnonzero(mask))
        assert cumulative[count - 2] - 1e-5 < 0.9 <= cumulative[count - 1] + 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits(dtype):
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((2, 300)), dtype)
    selector = Sample(top_k=20, top_p=0.8)
    exact = np.asarray(logits.astype(jnp.float32))
    expected = np.stack([sorted_filter(row, selector)[0] for row in exact])
    np.testing.assert_array_equal(kept(selector, logits), expected)


def test_target_missed_by_rounding_keeps_the_row():
    weights = np.array([[0.25, 0.5, 0.125], [0.25, 0.5, 0.25]], np.float32)
    mask = jax.jit(_fewest)(weights, weights, np.ones(2, np.float32))
    assert mask.tolist() == [[True] * 3, [True] * 3]
    mask = jax.jit(_fewest)(-weights, weights, np.full(2, 1.5, np.float32))
    assert mask.tolist() == [[True] * 3, [True] * 3]


def test_rows_without_a_finite_logit():
    rows = np.array([[-np.inf] * 4, [np.nan] * 4, [-np.inf, -2.0, -np.inf, np.nan]], np.float32)
    selector = Sample(top_k=3, top_p=0.9, min_p=0.1)
    assert kept(selector, rows).tolist() == [[False] * 4, [False] * 4, [False, True, False, False]]
    assert select(selector, rows, jax.random.key(0)).tolist() == [0, 0, 1]


# Draws

SAMPLERS = [
    Sample(),
    Sample(temperature=2.0),
    Sample(top_k=3),
    Sample(top_p=0.9),
    Sample(temperature=1.5, top_k=5, top_p=0.95, min_p=0.05),
]
DRAWS = 40_000


def chi_square(selector, target, seed, impl):
    """P-value of draws of `selector` under the exact distribution of `target`."""
    logits = np.broadcast_to(ROW, (DRAWS, ROW.size))
    draws = select(selector, logits, jax.random.key(seed, impl=impl))
    assert draws.shape == (DRAWS,)
    assert draws.dtype == jnp.int32
    expected = distribution(ROW, target) * DRAWS
    observed = np.bincount(draws, minlength=ROW.size)
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    return stats.chisquare(observed[possible], expected[possible]).pvalue


@pytest.mark.parametrize(
    ("selector", "impl"),
    [
        *((selector, "rbg") for selector in SAMPLERS),
        (SAMPLERS[-1], "unsafe_rbg"),
        (SAMPLERS[-1], "threefry2x32"),
    ],
    ids=str,
)
def test_frequencies(selector, impl):
    assert chi_square(selector, selector, 11, impl) > 1e-3


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class UniformRace(Sample):
    """A biased sampler: uniform noise in place of Gumbel noise."""

    def __call__(self, logits, key=None):
        return argmax_tokens(logits + 4 * jax.random.uniform(key, logits.shape))


@pytest.mark.parametrize(
    ("biased", "target"),
    [
        (Sample(temperature=1.05), Sample()),
        (Sample(top_k=3), Sample(top_k=3, temperature=0.95)),
        (UniformRace(), Sample()),
    ],
    ids=str,
)
def test_frequency_check_detects_bias(biased, target):
    assert chi_square(biased, target, 11, "rbg") < 1e-6


def test_rows_draw_independently_and_keys_matter():
    logits = np.zeros((200, 2), np.float32)
    first, again, other = (select(Sample(), logits, jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 60 < np.sum(first) < 140
    assert 60 < np.sum(np.asarray(first) != np.asarray(other)) < 140


def test_top_k_of_one_is_greedy():
    logits = np.round(np.random.default_rng(3).standard_normal((64, 50)) * 2).astype(np.float32)
    assert (np.sort(logits)[:, -1] == np.sort(logits)[:, -2]).any()
    np.testing.assert_array_equal(
        select(Sample(top_k=1), logits, jax.random.key(0)), select(Greedy(), logits, None)
    )


def test_noise_is_positive_finite_and_fine_near_zero():
    noise = np.sort(jax.jit(_exponential, static_argnums=1)(jax.random.key(5), (1 << 21,)))
    assert noise[0] > 0
    assert np.isfinite(noise[-1])
    assert stats.kstest(noise, "expon").pvalue > 1e-3
    # A race among 2^21 equals is decided here: ties would favour low indices.
    assert np.unique(noise[:1000]).size >= 995


@pytest.mark.parametrize("fill", [0, 0xFFFFFFFF])
def test_extreme_random_bits(monkeypatch, fill):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, fill, dtype))
    noise = np.asarray(_exponential(jax.random.key(0), (3,)))
    assert np.all((noise > 0) & (noise < 100))


# Programs


# Nor what is slow there or needs 64-bit integers.
UNWANTED = {"stablehlo.gather", "stablehlo.scatter", "stablehlo.dot_general"}
LOGITS = jnp.zeros((2, 100))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("selector", [Greedy(), *SAMPLERS], ids=str)
def test_neuron_can_run_the_lowered_program(selector, impl):
    key = jax.random.key(0, impl=impl) if selector.needs_key else None
    lowered = lower_for_neuron(selector, LOGITS, key)
    assert check_module(lowered) == ()
    assert "xi64>" not in lowered.as_text()
    used = operations(lowered)
    assert not UNWANTED & used.keys()
    assert used["stablehlo.reduce"] > 0
    filters = 0 if selector == Greedy() else (bool(selector.top_k) + bool(selector.top_p))
    assert used["stablehlo.while"] == 2 * filters


def test_filters_that_keep_everything_cost_nothing():
    selector = Sample(top_k=LOGITS.shape[-1], top_p=1.0, min_p=0.0)
    lowered = lower_for_neuron(selector, LOGITS, jax.random.key(0, impl="rbg"))
    assert "stablehlo.while" not in operations(lowered)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda x: jnp.argmax(x, axis=-1), "variadic-reduce"),
        (lambda x: jnp.sort(x, axis=-1), "float-sort"),
        (lambda x: lax.top_k(x, 5), "chlo"),
        (lambda x: jax.random.categorical(jax.random.key(0), x), "threefry"),
        (lambda x: lax.cond(x[0, 0] > 0, lambda: 1, lambda: 2), "conditional"),
        (
            lambda x: lax.while_loop(lambda c: c < jnp.max(x), lambda c: c + 1.0, 0.0),
            "dynamic-loop",
        ),
        (
            lambda x: lax.fori_loop(0, x[0, 0].astype(jnp.int32), lambda i, c: c + 1.0, 0.0),
            "dynamic-loop",
        ),
    ],
)
def test_what_neuron_refuses_is_found(function, rule):
    assert rule in {x.rule for x in check(function, LOGITS)}


def test_inside_vmap():
    logits = np.random.default_rng(4).standard_normal((3, 4, 40)).astype(np.float32)
    selector = Sample(top_k=7)
    keys = jax.random.split(jax.random.key(0), 3)
    looped = [select(selector, rows, key) for rows, key in zip(logits, keys, strict=True)]
    np.testing.assert_array_equal(jax.jit(jax.vmap(selector))(logits, keys), np.stack(looped))


def test_inside_shard_map():
    logits = np.random.default_rng(5).standard_normal((2, 40)).astype(np.float32)
    selector = Sample(top_p=0.8)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, replicated = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(selector, mesh=mesh, in_specs=(rows, replicated), out_specs=rows)
    key = jax.random.key(0)
    np.testing.assert_array_equal(jax.jit(sharded)(logits, key), select(selector, logits, key))


# Configuration


def test_selectors_are_static_and_share_a_protocol():
    selectors: list[TokenSelector] = [Greedy(), Sample(top_k=3)]
    assert [selector.needs_key for selector in selectors] == [False, True]
    assert Sample(top_k=3) == selectors[1] != Sample(top_k=4)
    assert hash(Sample(top_k=3)) == hash(selectors[1])
    assert jax.tree.leaves(selectors) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, r"use Greedy\(\) for temperature 0"),
        ({"temperature": -1.0}, "temperature must be a positive finite number, got -1.0"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": 1e-40}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None, got 0.0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\) or None, got -0.1"),
        ({"min_p": 1.0}, "min_p must be"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_invalid_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        Sample(**fields)


@pytest.mark.usefixtures("no_shape_checks")
def test_invalid_calls():
    with pytest.raises(ValueError, match="needs a random key, got None"):
        Sample()(LOGITS)
    for logits in (LOGITS[0], LOGITS[None], LOGITS[:, :0], LOGITS.astype(jnp.int32)):
        for selector in (Greedy(), Sample()):
            with pytest.raises(ValueError, match=r"needs float logits \[B, V\]"):
                selector(logits, jax.random.key(0))
