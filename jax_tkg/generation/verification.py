"""Which drafts a model accepts, so that the tokens are distributed as if it had drawn each itself.

Leviathan et al., "Fast inference from transformers via speculative decoding", arXiv:2211.17192,
algorithm 1; Chen et al., arXiv:2302.01318, algorithm 2. With p the distribution the selector draws
from and q the one a draft x was drawn from: x is accepted with probability `min(1, p(x) / q(x))`;
the first rejected one is replaced by a token drawn from `max(p - q, 0)`, normalised; when all are
accepted, one more is drawn from p. A draft that was not drawn has `q(x) = 1`.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Bool, Float, Int, Key
from jax_tkg.generation.drafts import Drafts
from jax_tkg.sampling import Sample, TokenSelector

DRAW = Sample()
"""Draws from a distribution given as logarithms, normalised or not."""

_LARGEST = float(np.finfo(np.float32).max)


@runtime_checkable
class DistributionSelector(TokenSelector, Protocol):
    """A random selector of one's own that can verify drafts."""

    def log_probs(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Natural logarithms, float32, of the probabilities that `__call__` draws with."""
        ...


class Verdict(NamedTuple):
    """What becomes of the drafts of each row.

    Attributes:
        accepted: int32 `[B]`, how many are accepted, the first ones.
        tokens: int32 `[B]`, what comes after them.
    """

    accepted: Int[Array, " B"]
    tokens: Int[Array, " B"]


def check_selector(selector: TokenSelector) -> None:
    """Whether tokens chosen so can be speculated on.

    Raises:
        TypeError: for a random selector whose distribution is not known.
    """
    if selector.needs_key and not isinstance(selector, Sample | DistributionSelector):
        raise TypeError(
            f"{type(selector).__name__} draws tokens, and speculation must know from which "
            "distribution: give it a method log_probs(logits [B, V]) -> float32 [B, V]."
        )


def log_distribution(selector: TokenSelector, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The distribution that a random selector draws from, float32 natural logarithms.

    `Sample` gives -inf to what its filters exclude. A row that has nothing else gets token 0.
    """
    if isinstance(selector, DistributionSelector):
        return selector.log_probs(logits)
    assert isinstance(selector, Sample)
    kept = selector.kept(logits)
    finite = jnp.clip(logits.astype(jnp.float32), -_LARGEST, _LARGEST)
    finite = jnp.where(kept, finite, -_LARGEST)
    scaled = (finite - jnp.max(finite, axis=-1, keepdims=True)) / selector.temperature
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    kept |= ~jnp.any(kept, axis=-1, keepdims=True) & (index == 0)
    return jax.nn.log_softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)


def verify(
    selector: TokenSelector,
    logits: Float[Array, "B T V"],
    drafts: Drafts,
    key: Key[Array, ""] | None,
) -> Verdict:
    """Accepts drafts and chooses the token after them.

    Args:
        selector: how tokens are chosen; see `check_selector`.
        logits: `[B, T, V]` with T = `max_tokens + 1`: after the newest token, and after each draft.
        drafts: what was drafted.
        key: random numbers, used whole; None if the selector needs none.

    Raises:
        ValueError: for drafts drawn from another vocabulary.
    """
    batch, width, vocabulary = logits.shape
    if drafts.log_probs is not None and drafts.log_probs.shape[-1] != vocabulary:
        raise ValueError(
            f"drafts were drawn from {drafts.log_probs.shape[-1]} tokens, but the model gives "
            f"logits of {vocabulary}: the drafter must know the same ones."
        )
    flat = logits.reshape(batch * width, vocabulary)
    if not selector.needs_key:
        chosen = selector(flat).reshape(batch, width)
        accepted = agreeing(drafts, chosen)
        return Verdict(accepted, _at(chosen, accepted))
    assert key is not None
    log_probs = log_distribution(selector, flat).reshape(logits.shape)
    chance_key, token_key = jax.random.split(key)
    # True with probability exp(log_acceptance), exactly always or never at its ends.
    waiting = jax.random.exponential(chance_key, drafts.tokens.shape, jnp.float32)
    accepted = leading(waiting >= -log_acceptance(log_probs, drafts))
    return Verdict(accepted, DRAW(log_replacement(log_probs, drafts, accepted), token_key))


def agreeing(drafts: Drafts, chosen: Int[Array, "B T"]) -> Int[Array, " B"]:
    """How many drafts are what was chosen in their places: those to accept.

    Also where tokens are drawn, if each place has random numbers of its own that the drafts do not
    depend on: a draft x that was computed is then accepted with probability p(x), and what is drawn
    in its place otherwise has the distribution p without x, normalised. With q(x) = 1 that is
    `min(1, p / q)` and `max(p - q, 0)`. The tokens are those drawn without drafts.

    Args:
        drafts: what was drafted; computed, not drawn.
        chosen: int32 `[B, T]` with T = `max_tokens + 1`, chosen from the logits after the newest
            token and after each draft.
    """
    return leading(_is_drafted(drafts) & (chosen[:, :-1] == drafts.tokens))


def log_acceptance(
    log_probs: Float[Array, "B T V"], drafts: Drafts
) -> Float[Array, "B max_tokens"]:
    """The logarithm of the probability of accepting each draft, if those before it are.

    Args:
        log_probs: `[B, T, V]` with T = `max_tokens + 1`, the logarithm of p.
        drafts: what was drafted; -inf beyond their counts and for what is no token.
    """
    draft = drafts.tokens[:, :, None]
    p = jnp.take_along_axis(log_probs[:, :-1], draft, axis=2, mode="clip")[:, :, 0]
    if drafts.log_probs is None:
        ratio = p
    else:
        q = jnp.take_along_axis(drafts.log_probs, draft, axis=2, mode="clip")[:, :, 0]
        ratio = jnp.where(p > -jnp.inf, p - q, -jnp.inf)
    possible = _is_drafted(drafts) & (drafts.tokens >= 0) & (drafts.tokens < log_probs.shape[-1])
    return jnp.where(possible, jnp.minimum(ratio, 0.0), -jnp.inf)


def log_replacement(
    log_probs: Float[Array, "B T V"], drafts: Drafts, accepted: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """The logarithm, up to a constant, of what the token after the accepted drafts is drawn from.

    Args:
        log_probs: as for `log_acceptance`.
        drafts: what was drafted.
        accepted: int32 `[B]`, how many were accepted.
    """
    p = _at(log_probs, accepted)
    draft = _at(drafts.tokens, accepted)[:, None]
    if drafts.log_probs is None:
        index = lax.broadcasted_iota(jnp.int32, p.shape, 1)
        rest = jnp.where(index == draft, -jnp.inf, p)
    else:
        q = _at(drafts.log_probs, accepted)
        rest = jnp.log(jnp.maximum(jnp.exp(p) - jnp.exp(q), 0.0))
    # Rounding can leave nothing of p - q where both are all but equal.
    is_rejected = (accepted < drafts.counts)[:, None]
    return jnp.where(is_rejected & jnp.any(rest > -jnp.inf, axis=-1, keepdims=True), rest, p)


def leading(flags: Bool[Array, "B n"]) -> Int[Array, " B"]:
    """How many flags of each row are True before the first that is not."""
    index = lax.broadcasted_iota(jnp.int32, flags.shape, 1)
    return jnp.min(jnp.where(flags, flags.shape[1], index), axis=1)


def _is_drafted(drafts: Drafts) -> Bool[Array, "B max_tokens"]:
    return lax.broadcasted_iota(jnp.int32, drafts.tokens.shape, 1) < drafts.counts[:, None]


def _at(values: Array, index: Int[Array, " B"]) -> Array:
    """Element `index` of the second axis of each row; the last one beyond it."""
    place = index.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, place, axis=1, mode="clip")[:, 0]
