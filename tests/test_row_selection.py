"""A selector for each row in one program: each row gets what its own selector gives it alone."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats  # Comes with jax.

from jax_tkg import neuron
from jax_tkg.sampling import (
    Greedy,
    RowSelection,
    Sample,
    argmax_tokens,
    log_probabilities,
    most_likely_tokens,
)
from tests.calls import quickly
from tests.test_sampling import sorted_filter

SELECTORS = [
    Greedy(),
    Sample(),
    Sample(temperature=0.3),
    Sample(top_k=1),
    Sample(top_k=3),
    Sample(top_k=1000),
    Sample(top_p=0.5),
    Sample(top_p=1e-60),
    Sample(top_p=1.0),
    Sample(top_p=1 - 1e-9),  # 1 in float32
    Sample(min_p=0.3),
    Sample(min_p=0.0),
    Sample(temperature=2.5, top_k=9, top_p=0.9, min_p=0.05),
]
BATCH, VOCAB = len(SELECTORS), 23

select = quickly(lambda selection, logits, words: selection(logits, words))
kept = quickly(lambda selection, logits: selection.kept(logits))
alone = quickly(lambda selector, logits, key: (selector(logits, key), selector.kept(logits)))


def words(seed: int, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (batch, 4), np.uint32)


def random_logits(seed: int) -> np.ndarray:
    """With ties, infinities and NaN."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((BATCH, VOCAB)) * 3).astype(np.float32)
    logits[:, seed % VOCAB] = -np.inf
    logits[seed % BATCH, 1:3] = np.inf, np.nan
    return logits


@pytest.mark.parametrize("seed", range(4))
def test_each_row_is_its_selectors(seed: int) -> None:
    logits, random = random_logits(seed), words(seed)
    selectors = np.roll(np.array(SELECTORS), seed).tolist()
    selection = RowSelection.of(selectors)
    tokens = select(selection, logits, random)
    masks = np.asarray(kept(selection, logits))
    assert tokens.dtype == jnp.int32
    for i, selector in enumerate(selectors):
        key = jax.random.wrap_key_data(random[i], impl="unsafe_rbg")
        if isinstance(selector, Greedy):
            assert tokens[i] == argmax_tokens(jnp.asarray(logits[i : i + 1]))[0]
            continue
        token, mask = alone(selector, logits[i : i + 1], key)
        assert tokens[i] == token[0], selector
        np.testing.assert_array_equal(masks[i], mask[0], str(selector))


@hypothesis.given(
    hnp.arrays(np.float32, (4, 11), elements=st.floats(-20, 20, width=16)),
    st.integers(1, 12),
    st.floats(0.01, 1),
    st.floats(0, 0.99),
    st.floats(0.125, 8),
)
@hypothesis.settings(max_examples=60)
def test_kept_sets_match_sorting(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    every = Sample(temperature, top_k, top_p, min_p)
    rows = [Sample(temperature, top_k), Sample(1.0, None, top_p), Sample(min_p=min_p), every]
    masks = np.asarray(kept(RowSelection.of(rows), logits))
    for mask, row, selector in zip(masks, logits, rows, strict=True):
        expected, gap = sorted_filter(row, selector)
        if gap > 1e-5:  # rounding does not decide
            np.testing.assert_array_equal(mask, expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, random = random_logits(3), words(3)
    tokens = np.asarray(select(RowSelection.of(SELECTORS), logits, random))
    order = np.random.default_rng(0).permutation(BATCH)
    others = [SELECTORS[i] for i in order]
    moved = select(RowSelection.of(others), logits[order], random[order])
    np.testing.assert_array_equal(moved, tokens[order])
    again = random.copy()
    again[1:] += 1
    assert select(RowSelection.of(SELECTORS), logits, again)[0] == tokens[0]
    same = np.broadcast_to(random[:1], random.shape)
    logits = np.zeros((BATCH, VOCAB), np.float32)
    drawn = select(RowSelection.of([Sample()] * BATCH), logits, same)
    assert len(set(drawn.tolist())) == 1


def test_frequencies() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32)
    rows = jnp.asarray(logits)[None]
    many = quickly(lambda w: jax.lax.map(lambda w: RowSelection.of([Sample()])(rows, w), w))
    counts = np.bincount(np.asarray(many(words(0, 4000)[:, None])).ravel(), minlength=5)
    weights = np.exp(logits.astype(np.float64))
    assert stats.chisquare(counts, 4000 * weights / weights.sum()).pvalue > 1e-3
    assert stats.chisquare(counts, np.full(5, 800)).pvalue < 1e-9


def test_neuron_can_run_it() -> None:
    selection = RowSelection.of(SELECTORS)
    assert neuron.check(lambda *a: selection(*a), jnp.zeros((BATCH, VOCAB)), words(0)) == ()


def test_log_probabilities() -> None:
    logits = np.random.default_rng(0).standard_normal((4, VOCAB)).astype(np.float32) * 30
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    tokens = np.array([[0, 5], [3, 3], [VOCAB - 1, 1], [2, 4]], np.int32)
    found = quickly(log_probabilities)(logits, tokens)
    np.testing.assert_allclose(found, np.take_along_axis(expected, tokens, 1), atol=2e-5)
    shifted = quickly(log_probabilities)(logits + np.float32(1e4), tokens)
    np.testing.assert_allclose(shifted, found, atol=2e-3)  # a step of float32 at 1e4 is 1e-3


def test_most_likely_tokens() -> None:
    logits = random_logits(1)
    clean = np.where(np.isnan(logits), -np.inf, logits)
    expected = np.argsort(-clean, axis=-1, kind="stable")[:, :5]
    find = jax.jit(most_likely_tokens, static_argnums=1)
    np.testing.assert_array_equal(find(logits, 5), expected)
    assert find(logits, 0).shape == (BATCH, 0)
