"""Drafts: tokens that a cheap guess says come next, for the model to verify several at a time."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._checks import described, whole_number
from jax_tkg._typing import Array, Bool, Int, Key, Leaf
from jax_tkg.generation.model import vocabulary_of
from jax_tkg.generation.prompts import PaddedPrompts
from jax_tkg.sampling import TokenSelector


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "counts", "log_probs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Drafts:
    """What a drafter thinks comes next.

    Attributes:
        tokens: int32 `[B, max_tokens]`.
        counts: int32 `[B]`, how many of them there are in each row, the first ones; may be 0.
        log_probs: float32 `[B, max_tokens, V]`, natural logarithms: the distribution that each
            token was drawn from, given the drafts before it. None for tokens that were not drawn
            but computed from the tokens before them.
    """

    tokens: Leaf
    counts: Leaf
    log_probs: Leaf | None = None


@runtime_checkable
class Drafter(Protocol):
    """Makes drafts: what `generate(..., speculate=...)` takes.

    A drafter is a pytree, an argument of the compiled loop: weights are its leaves; one that has
    only settings is a frozen dataclass under `jax.tree_util.register_static`. Whatever it drafts,
    the tokens generated are the model's; bad drafts cost time.

    One that has an attribute `vocab_size` is refused where the model has another.
    """

    @property
    def max_tokens(self) -> int:
        """The most tokens drafted at a time, at least 1."""
        ...

    def start(self, prompts: PaddedPrompts, capacity: int, chunk: int) -> Any:
        """Reads the prompts, on the host, before the first draft.

        Args:
            prompts: of all rows.
            capacity: no row gets more tokens than this and one more.
            chunk: prompt tokens to take in at a time.

        Returns:
            The state of `draft`, any pytree of arrays; it is donated to the compiled loop.
        """
        ...

    def draft(
        self,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        alive: Bool[Array, " B"],
        state: Any,
        *,
        key: Key[Array, ""] | None,
        selector: TokenSelector,
    ) -> tuple[Drafts, Any]:
        """Drafts the next tokens of each row, within the compiled step.

        Args:
            tokens: int32 `[B, W]`, the prompt of each row and what was generated.
            lengths: int32 `[B]`, tokens of each row, at least 2; what follows them is anything.
                Since the last draft at most `max_tokens + 1` were added.
            alive: bool `[B]`, rows that go on; what is drafted for others is ignored.
            state: from `start` or the last draft.
            key: random numbers for this step; None if the selector needs none.
            selector: how the model's own tokens are chosen.

        Returns:
            The drafts and the next state, of the same types and shapes.
        """
        ...


def check_drafter(name: str, drafter: Any, model: Any = None, *, also: str = "") -> None:
    """Whether it is a drafter, and of the model's vocabulary as far as both tell theirs.

    Args:
        name: of the setting, for the error.
        drafter: what was given.
        model: whose tokens are drafted; None if it is not known yet.
        also: what else the setting can be, for the error.

    Raises:
        TypeError: if it is no `Drafter`.
        ValueError: for another vocabulary.
    """
    if isinstance(drafter, type) or not isinstance(drafter, Drafter):
        raise TypeError(
            f"{name} must be PromptLookup(), DraftModel(model) or another Drafter of "
            f"jax_tkg.generation{also}; got {described(drafter)}."
        )
    own, wanted = vocabulary_of(drafter), vocabulary_of(model)
    if own is not None and wanted is not None and own != wanted:
        raise ValueError(
            f"{name}: the {type(drafter).__name__} has a vocabulary of {own} ids and the model one "
            f"of {wanted}, but a draft must mean the same to both: give a draft model with the "
            f"model's tokenizer and {wanted} ids, or PromptLookup(), which needs no second model."
        )


def check_drafts(drafts: Drafts, batch: int, max_tokens: int) -> None:
    """Raises a ValueError if drafts are of other shapes than `[batch, max_tokens]`."""
    width = (batch, max_tokens)
    for name, shape in (("tokens", width), ("counts", width[:1]), ("log_probs", width)):
        given = getattr(drafts, name)
        if given is not None and given.shape[: len(width)] != shape:
            more = ", V" if name == "log_probs" else ""
            raise ValueError(
                f"a drafter of {max_tokens} tokens for {batch} rows must give {name} of shape "
                f"[{', '.join(map(str, shape))}{more}]; got {given.shape}."
            )


@jax.tree_util.register_static
@dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the last tokens where they stood before, in the same row.

    No second model: for texts that repeat themselves or their prompt, such as edits of a given
    text, extraction, code. Saxena, "Prompt lookup decoding", 2023.

    The longest n-gram that ends the row, up to `ngram` tokens, is looked for among the tokens
    before it, the latest occurrence first; a text that ends sooner than the draft is continued
    periodically. Neuron-safe: comparisons and maxima over the row, one gather of the drafts.

    Attributes:
        max_tokens: tokens drafted at a time; a step of the model computes one more.
        ngram: tokens compared at most.
        min_ngram: tokens that must agree; a row with fewer gets no draft.

    Raises:
        TypeError: for anything but whole numbers.
        ValueError: for a number below 1, or `min_ngram` above `ngram`.
    """

    max_tokens: int = 4
    ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name in ("max_tokens", "ngram", "min_ngram"):
            whole_number(f"PromptLookup: {name}", getattr(self, name), least=1)
        if self.min_ngram > self.ngram:
            raise ValueError(
                "PromptLookup: min_ngram <= ngram is needed, got "
                f"min_ngram={self.min_ngram}, ngram={self.ngram}."
            )

    def start(self, prompts: PaddedPrompts, capacity: int, chunk: int) -> tuple[()]:
        """Nothing: all that is looked at is in the row."""
        del prompts, capacity, chunk
        return ()

    def draft(
        self,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        alive: Bool[Array, " B"],
        state: tuple[()],
        *,
        key: Key[Array, ""] | None = None,
        selector: TokenSelector | None = None,
    ) -> tuple[Drafts, tuple[()]]:
        """See `Drafter.draft`."""
        del key, selector
        place = lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        last = lengths[:, None] - 1
        agreeing = _agreeing(tokens, place, last, self.ngram)
        longest = jnp.max(agreeing, axis=1, keepdims=True)
        is_match = (agreeing == longest) & (agreeing >= self.min_ngram)
        match = jnp.max(jnp.where(is_match, place, -1), axis=1, keepdims=True)
        ahead = jnp.arange(self.max_tokens, dtype=jnp.int32)
        period = jnp.maximum(last - match, 1)
        source = match + 1 + jnp.remainder(ahead, period)
        drafted = jnp.take_along_axis(tokens, source, axis=1, mode="clip")
        counts = jnp.where(alive & (match[:, 0] >= 0), jnp.int32(self.max_tokens), 0)
        return Drafts(drafted, counts), state

    def follow(
        self, tokens: Int[Array, "B W"], lengths: Int[Array, " B"], state: tuple[()], *, chunk: int
    ) -> tuple[()]:
        """See `PausableDrafter.follow`: nothing to do."""
        del tokens, lengths, chunk
        return state


def _agreeing(tokens: Array, place: Array, last: Array, ngram: int) -> Int[Array, "B W"]:
    """How many tokens up to each place equal the last ones of the row; 0 from `last` on."""
    agrees, total = place < last, jnp.zeros_like(tokens)
    for back in range(ngram):
        wanted = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1, mode="clip")
        before = jnp.roll(tokens, back, axis=1) if back else tokens
        agrees &= (before == wanted) & (place >= back)
        total += agrees.astype(jnp.int32)
    return total
