"""Accepted drafts leave the distribution of the tokens as it is: computed, counted, and refuted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import Greedy, Sample, argmax_tokens, generate
from jax_tkg.generation import DraftModel, Drafts, PromptLookup, portable_key
from jax_tkg.generation.verification import (
    check_selector,
    log_acceptance,
    log_distribution,
    log_replacement,
    verify,
)
from tests.calls import quickly
from tests.generation.tiny_model import pytree_of_its_own

pytestmark = pytest.mark.usefixtures("compile_quickly")

VOCAB, DRAFTED = 4, 2
PATHS = np.array(list(itertools.product(range(VOCAB), repeat=DRAFTED)))

# Every text of up to DRAFTED + 1 tokens has its own distribution of what follows.
Tree = list[np.ndarray]


def random_tree(seed: int, sharpness: float = 1.5) -> Tree:
    """Float64 probabilities `[V] * depth` for texts of 0, 1, 2 tokens; some are exactly 0."""
    rng = np.random.default_rng(seed)
    tree = []
    for depth in range(1, DRAFTED + 2):
        weights = np.exp(sharpness * rng.standard_normal((VOCAB,) * depth))
        weights[rng.random(weights.shape) < 0.2] = 0
        weights[..., 0] += 1e-2
        tree.append(weights / weights.sum(-1, keepdims=True))
    return tree


def joint(tree: Tree) -> np.ndarray:
    """The probability of each text of DRAFTED + 1 tokens, token by token."""
    result = np.ones(())
    for level in tree:
        result = result[..., None] * level
    return result


def along_paths(tree: Tree) -> np.ndarray:
    """What each path of drafts meets: `[paths, DRAFTED + 1, V]`."""
    return np.stack(
        [[level[tuple(path[:depth])] for depth, level in enumerate(tree)] for path in PATHS]
    )


def drafts_of(tree: Tree | None, counts: int) -> tuple[np.ndarray, Drafts]:
    """Every path as a row, with its probability; without a tree one path, not drawn."""
    lengths = jnp.full(len(PATHS), counts, jnp.int32)
    tokens = jnp.asarray(PATHS, jnp.int32)
    if tree is None:
        return np.eye(len(PATHS))[6], Drafts(tokens, lengths)
    level = along_paths(tree)[:, :DRAFTED]
    chances = np.take_along_axis(level, PATHS[:, :, None], axis=2)[:, :, 0].prod(axis=1)
    with np.errstate(divide="ignore"):
        return chances, Drafts(tokens, lengths, jnp.asarray(np.log(level), jnp.float32))


Acceptance = Callable[[jax.Array, Drafts], jax.Array]
Replacement = Callable[[jax.Array, Drafts, jax.Array], jax.Array]


@partial(jax.jit, static_argnums=(0, 1))
def tables(
    acceptance: Acceptance, replacement: Replacement, log_p: jax.Array, drafts: Drafts
) -> tuple[jax.Array, list[jax.Array]]:
    """How likely each draft is accepted, and what is drawn after each number of them."""
    after = [
        jax.nn.softmax(replacement(log_p, drafts, jnp.full(len(PATHS), n, jnp.int32)))
        for n in range(DRAFTED + 1)
    ]
    return jnp.exp(acceptance(log_p, drafts)), after


def speculated_joint(
    p: Tree,
    q: Tree | None,
    counts: int = DRAFTED,
    acceptance: Acceptance = log_acceptance,
    replacement: Replacement = log_replacement,
) -> np.ndarray:
    """The probability of each text of DRAFTED + 1 tokens: a step, then plain decoding.

    A sum over all that can happen: all drafts, how many are accepted, what comes after them.
    """
    chances, drafts = drafts_of(q, counts)
    with np.errstate(divide="ignore"):
        log_p = jnp.asarray(np.log(along_paths(p)), jnp.float32)
    accepts, after = jax.device_get(tables(acceptance, replacement, log_p, drafts))
    accepts, after = np.asarray(accepts, np.float64), np.asarray(after, np.float64)
    result = np.zeros((VOCAB,) * (DRAFTED + 1))
    for row, path in enumerate(PATHS.tolist()):
        if not chances[row]:
            continue
        for accepted in range(DRAFTED + 1):
            chance = chances[row] * accepts[row, :accepted].prod()
            if accepted < DRAFTED:
                chance *= 1 - accepts[row, accepted]
            text = tuple(path[:accepted])
            for token in range(VOCAB):
                begun = (*text, token)
                rest = np.ones(())
                for level in p[len(begun) :]:
                    rest = (
                        rest[..., None]
                        * level[(*begun, *[slice(None)] * (level.ndim - len(begun)))]
                    )
                result[begun] += chance * after[accepted][row, token] * rest
    return result


TREES = {"drawn": random_tree(1), "flat": random_tree(2, 0.1), "equal": random_tree(0)}


@pytest.mark.parametrize("counts", [0, 1, 2])
@pytest.mark.parametrize("q", [*TREES, None])
def test_the_distribution_stays_the_same(q: str | None, counts: int) -> None:
    p = random_tree(0)
    found = speculated_joint(p, None if q is None else TREES[q], counts)
    np.testing.assert_allclose(found, joint(p), rtol=0, atol=2e-6)


def accept_half(log_p: jax.Array, drafts: Drafts) -> jax.Array:
    return log_acceptance(log_p, drafts) - jnp.log(2.0)


def accept_likely(log_p: jax.Array, drafts: Drafts) -> jax.Array:
    """As soon as p is at least q / 2."""
    return jnp.where(log_acceptance(log_p, drafts) > -jnp.log(2.0), 0.0, -jnp.inf)


def draw_from_p(log_p: jax.Array, drafts: Drafts, accepted: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_p, accepted[:, None, None], axis=1)[:, 0]


@pytest.mark.parametrize("q", ["drawn", None])
@pytest.mark.parametrize(
    "wrong",
    [
        {"acceptance": accept_half},
        {"acceptance": accept_likely},
        {"replacement": draw_from_p},
    ],
    ids=["half", "likely", "from-p"],
)
def test_a_wrong_rule_is_found(wrong: dict[str, Any], q: str | None) -> None:
    p = random_tree(0)
    found = speculated_joint(p, None if q is None else TREES[q], **wrong)
    assert np.abs(found - joint(p)).max() > 1e-2


def test_equal_distributions_accept_everything() -> None:
    chances, drafts = drafts_of(random_tree(0), DRAFTED)
    with np.errstate(divide="ignore"):
        log_p = jnp.asarray(np.log(along_paths(random_tree(0))), jnp.float32)
    accepted = np.asarray(log_acceptance(log_p, drafts))
    assert (accepted[chances > 0] == 0).all()


def test_what_is_no_token_is_never_accepted() -> None:
    drafts = Drafts(jnp.array([[VOCAB, -1]]), jnp.array([2]))
    assert np.isneginf(log_acceptance(jnp.zeros((1, 3, VOCAB)), drafts)).all()


# Random numbers


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How far counts are from what is expected, in standard deviations of the statistic."""
    counts, probabilities = counts.ravel(), probabilities.ravel()
    expected = counts.sum() * probabilities
    assert not counts[expected == 0].any()
    likely = expected > 0
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@partial(jax.jit, static_argnums=0)
def verified(selector: Sample, logits: jax.Array, drafts: Drafts, key: jax.Array) -> Any:
    return verify(selector, logits, drafts, key)


@pytest.mark.parametrize("q", ["drawn", None])
def test_verdicts_are_as_frequent_as_computed(q: str | None) -> None:
    rows, p = 20_000, random_tree(0)
    tree = None if q is None else TREES[q]
    chances, drafts = drafts_of(tree, DRAFTED)
    row = int(chances.argmax())
    with np.errstate(divide="ignore"):
        log_p = jnp.asarray(np.log(along_paths(p)), jnp.float32)
    accepts, after = jax.device_get(tables(log_acceptance, log_replacement, log_p, drafts))
    # Temperature 2 on twice the logits: the selector's distribution is what counts.
    many = jax.tree.map(lambda x: jnp.repeat(x[row : row + 1], rows, axis=0), drafts)
    logits = jnp.repeat(2 * log_p[row : row + 1], rows, axis=0)
    key = portable_key(jax.random.key(3))
    accepted, tokens = verified(Sample(temperature=2.0), logits, many, key)
    counts = np.zeros((DRAFTED + 1, VOCAB))
    np.add.at(counts, (np.asarray(accepted), np.asarray(tokens)), 1)
    keep = accepts[row].astype(np.float64)
    reach = np.cumprod([1, *keep]) * [*(1 - keep), 1]
    expected = reach[:, None] * np.stack([a[row] for a in after])
    assert chi_square(counts, expected / expected.sum()) < 4
    twin = np.roll(expected, 1, axis=1)
    likely = twin > 0
    assert chi_square(np.where(likely, counts, 0), twin / twin.sum()) > 100


SELECTORS = [
    Sample(),
    Sample(temperature=0.7, top_k=3),
    Sample(temperature=1.5, top_p=0.8),
    Sample(top_k=3, min_p=0.2),
    Sample(temperature=0.5, top_k=1),
]


def test_the_distribution_of_a_sample() -> None:
    logits = np.array([[1.0, 0.5, -2, 0.2, 3], [0, 0, 0, 0, 0], [1, -np.inf, 2, np.nan, 2]])
    for selector in SELECTORS:
        found = np.asarray(log_distribution(selector, jnp.asarray(logits, jnp.float32)))
        np.testing.assert_allclose(np.exp(found), filtered(selector, logits), atol=1e-6)


def filtered(selector: Sample, logits: np.ndarray) -> np.ndarray:
    """The same in float64, by sorting."""
    result = np.zeros(logits.shape)
    for row, out in zip(np.where(np.isnan(logits), -np.inf, logits), result, strict=True):
        order = np.argsort(-row, kind="stable")
        p = np.exp((row[order] - row.max()) / selector.temperature)
        p[len(row) if selector.top_k is None else selector.top_k :] = 0
        p /= p.sum()
        if selector.top_p is not None:
            p[np.cumsum(p) - p >= selector.top_p] = 0
        if selector.min_p is not None:
            p[p < selector.min_p * p.max()] = 0
        out[order] = p / p.sum()
    return result


def test_rows_without_a_token_get_the_first() -> None:
    logits = jnp.full((1, 3), -jnp.inf)
    np.testing.assert_array_equal(np.exp(log_distribution(Sample(), logits)), [[1, 0, 0]])


# Whole generations


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=[])
@dataclass(frozen=True)
class Chain:
    """What follows depends on the last two tokens; the caches are arrays, with their own way back.

    A token that is not taken back would be one of the two.
    """

    table: jax.Array  # logits [V, V, V]

    def init_caches(self, batch: int, capacity: int) -> dict[str, jax.Array]:
        slots = jnp.zeros((batch, capacity), jnp.int32)
        return {"tokens": slots, "lengths": jnp.zeros(batch, jnp.int32)}

    def __call__(self, tokens: jax.Array, caches: Any, counts: Any = None) -> Any:
        batch, width = tokens.shape
        counts = jnp.full(batch, width) if counts is None else counts
        slots, lengths = caches["tokens"], caches["lengths"]
        place = jnp.arange(slots.shape[1]) - lengths[:, None]
        given = jnp.take_along_axis(tokens, jnp.clip(place, 0, width - 1), axis=1)
        slots = jnp.where((place >= 0) & (place < counts[:, None]), given, slots)
        at = jnp.clip(lengths[:, None] + jnp.arange(width), 0, slots.shape[1] - 1)
        before = jnp.take_along_axis(slots, jnp.maximum(at - 1, 0), axis=1)
        logits = self.table[before, tokens]
        return logits, {"tokens": slots, "lengths": lengths + counts}

    def next_token_logits(self, tokens: jax.Array, caches: Any, counts: Any = None) -> Any:
        logits, caches = self(tokens, caches, counts)
        last = jnp.maximum(counts - 1, 0)
        return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], caches

    def truncate_caches(self, caches: Any, lengths: jax.Array) -> Any:
        return {**caches, "lengths": jnp.minimum(caches["lengths"], lengths)}

    def probabilities(self, selector: Sample, text: list[int]) -> np.ndarray:
        logits = np.asarray(self.table, np.float64)[text[-2], text[-1]]
        return filtered(selector, logits[None])[0]


@pytree_of_its_own
class Forgetful(Chain):
    """Takes nothing back."""

    def truncate_caches(self, caches: Any, lengths: jax.Array) -> Any:
        return caches


PROMPT, ROWS, NEW = [1, 2, 0, 1, 3, 1, 2], 6000, 4
SELECTOR = Sample(temperature=0.8, top_k=3)


def chain(seed: int, kind: type[Chain] = Chain) -> Chain:
    table = np.random.default_rng(seed).standard_normal((VOCAB,) * 3)
    return kind(jnp.asarray(table, jnp.float32))


def chain_joint(model: Chain) -> np.ndarray:
    result = np.zeros((VOCAB,) * NEW)
    for text in itertools.product(range(VOCAB), repeat=NEW):
        chance = 1.0
        for i, token in enumerate(text):
            chance *= model.probabilities(SELECTOR, [*PROMPT, *text[:i]])[token]
        result[text] = chance
    return result


def distance(model: Chain, drafter: Any) -> tuple[float, float]:
    """From the distribution of the first tokens, and how many a step gave."""
    options = {"max_new_tokens": NEW, "selector": SELECTOR, "prefill_chunk": 8, "capacity": 16}
    result = generate(
        model,
        [PROMPT] * ROWS,
        **options,
        speculate=drafter,
        steps_per_call=3,
        key=jax.random.key(2),
    )
    counts = np.zeros((VOCAB,) * NEW)
    np.add.at(counts, tuple(result.tokens.T), 1)
    assert result.acceptance is not None
    return chi_square(counts, chain_joint(model)), result.acceptance.tokens_per_step


@pytest.mark.parametrize(
    "drafter",
    [PromptLookup(max_tokens=2, ngram=2), DraftModel(chain(9), max_tokens=2)],
    ids=["lookup", "model"],
)
def test_generated_texts_are_as_frequent_as_computed(drafter: Any) -> None:
    far, per_step = distance(chain(0), drafter)
    assert far < 4
    assert 1.2 < per_step < 2.9


def test_drafts_that_stay_in_the_caches_are_found() -> None:
    with pytest.raises(AssertionError):
        assert distance(chain(0, Forgetful), PromptLookup(max_tokens=2, ngram=2))[0] < 4


# Other selectors


@dataclass(frozen=True)
class Uniform:
    """Draws a token without looking, and says so."""

    needs_key = True

    def __call__(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
        assert key is not None
        return Sample()(self.log_probs(logits), key)

    def log_probs(self, logits: jax.Array) -> jax.Array:
        return jnp.full(logits.shape, -jnp.log(logits.shape[-1]), jnp.float32)


class Secretive:
    needs_key = True

    def __call__(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return argmax_tokens(logits)


def test_random_selectors_must_tell_their_distribution() -> None:
    for selector in (Greedy(), Sample(), Uniform()):
        check_selector(selector)
    np.testing.assert_allclose(np.exp(log_distribution(Uniform(), jnp.ones((1, 4)))), 0.25)
    with pytest.raises(TypeError, match=r"Secretive draws .* give it a method log_probs"):
        check_selector(Secretive())


def test_greedy_rows_accept_what_they_would_choose() -> None:
    logits = jnp.asarray(np.eye(VOCAB)[[[2, 1, 3], [0, 0, 0], [1, 2, 2]]], jnp.float32)
    drafts = Drafts(jnp.array([[2, 1], [1, 0], [1, 2]]), jnp.array([2, 2, 1]))
    verdict = quickly(lambda *given: verify(Greedy(), *given, None))(logits, drafts)
    assert verdict.accepted.tolist() == [2, 0, 1]
    assert verdict.tokens.tolist() == [3, 0, 2]
