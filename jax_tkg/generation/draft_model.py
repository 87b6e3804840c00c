"""Drafts by a second, smaller model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._checks import described, whole_number
from jax_tkg._typing import Array, Bool, Float, Int, Key, Leaf
from jax_tkg.generation.drafts import Drafts
from jax_tkg.generation.loop import prefill
from jax_tkg.generation.model import (
    DecodeModel,
    as_pytree,
    is_nnx_module,
    truncate_caches,
    vocabulary_of,
)
from jax_tkg.generation.prompts import PaddedPrompts
from jax_tkg.generation.verification import DRAW, log_distribution
from jax_tkg.sampling import TokenSelector
from jax_tkg.sharding.processes import to_host


@partial(jax.tree_util.register_dataclass, data_fields=["caches", "held"], meta_fields=[])
@dataclass(frozen=True)
class DraftCaches:
    """Of a draft model between two drafts.

    Attributes:
        caches: the draft model's.
        held: int32 `[B]`, tokens of each row in them, the last drafts included.
    """

    caches: Any
    held: Leaf


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class DraftModel:
    """Drafts what a smaller model of the same vocabulary says, by the selector in use.

    It reads the prompts into caches of its own, which are rolled back together with the model's.
    When tokens are sampled, so are drafts, and the model is told from which distribution.

    Attributes:
        model: a `DecodeModel`, as in `generate`, of the `vocab_size` of the model whose tokens it
            drafts; tokens are taken back from its caches by `jax_tkg.generation.truncate_caches`.
        max_tokens: tokens drafted at a time; each is one step of the draft model.
        cache_options: keywords of its `init_caches`.

    Raises:
        TypeError: if the model cannot be generated from.
        ValueError: for `max_tokens` below 1.
    """

    model: Any
    max_tokens: int = 4
    cache_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validates the fields, and makes an nnx module a pytree."""
        whole_number("DraftModel: max_tokens", self.max_tokens, least=1)
        if is_nnx_module(self.model):  # JAX also puts other things than models in its place
            object.__setattr__(self, "model", as_pytree(self.model))

    @property
    def vocab_size(self) -> int | None:
        """The draft model's; None if it does not tell."""
        return vocabulary_of(self.model)

    def tree_flatten(self) -> tuple[tuple[Any], int]:
        """For JAX. The options of the caches are for the host, and need not be hashable."""
        return (self.model,), self.max_tokens

    @classmethod
    def tree_unflatten(cls, max_tokens: int, children: tuple[Any]) -> Self:
        """The inverse, within compiled code."""
        return cls(*children, max_tokens)

    def start(self, prompts: PaddedPrompts, capacity: int, chunk: int) -> DraftCaches:
        """See `Drafter.start`."""
        model: DecodeModel = as_pytree(self.model)
        # Drafts go beyond the last token that the row can get.
        capacity += self.max_tokens
        caches = model.init_caches(len(prompts.lengths), capacity, **self.cache_options)
        _, caches = prefill(model, caches, prompts.chunks(chunk))
        return DraftCaches(caches, jnp.array(prompts.lengths))  # a copy: it will be donated

    def draft(
        self,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        alive: Bool[Array, " B"],
        state: DraftCaches,
        *,
        key: Key[Array, ""] | None,
        selector: TokenSelector,
    ) -> tuple[Drafts, DraftCaches]:
        """See `Drafter.draft`."""
        if not isinstance(state, DraftCaches):
            raise TypeError(
                "the drafting state of a DraftModel must come from its method start; got "
                f"{described(state)}."
            )
        # What was accepted of the last drafts, up to the newest token, is in the caches already.
        held = jnp.minimum(state.held, lengths - 1)
        caches = truncate_caches(self.model, state.caches, held)
        # When all drafts were accepted, the last of them is missing too.
        index = held[:, None] + jnp.arange(2, dtype=jnp.int32)
        missing = jnp.take_along_axis(tokens, index, axis=1, mode="clip")
        counts = jnp.where(alive, lengths - held, 0)
        logits, caches = self.model.next_token_logits(missing, caches, counts)

        def choose(logits: Float[Array, "B V"], step: Any) -> tuple[Array, Array | None]:
            if key is None:
                return selector(logits), None
            log_probs = log_distribution(selector, logits)
            return DRAW(log_probs, jax.random.fold_in(key, step)), log_probs

        def step(carry: tuple[Any, Array], number: Array) -> tuple[Any, Any]:
            caches, newest = carry
            logits, caches = self.model.next_token_logits(
                newest[:, None], caches, alive.astype(jnp.int32)
            )
            chosen = choose(logits, number)
            return (caches, chosen[0]), chosen

        first = choose(logits, 0)
        numbers = jnp.arange(1, self.max_tokens, dtype=jnp.int32)
        (caches, _), rest = lax.scan(step, (caches, first[0]), numbers)
        drafted, log_probs = jax.tree.map(
            lambda one, more: jnp.swapaxes(jnp.concatenate([one[None], more]), 0, 1), first, rest
        )
        drafts = Drafts(drafted, jnp.full_like(lengths, self.max_tokens), log_probs)
        added = jnp.where(alive, lengths - held + self.max_tokens - 1, 0)
        return drafts, DraftCaches(caches, held + added)

    def follow(
        self,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        state: DraftCaches,
        *,
        chunk: int,
    ) -> DraftCaches:
        """See `PausableDrafter.follow`: takes in what is missing as it did the prompts."""
        model: DecodeModel = as_pytree(self.model)
        state = _without_rejected(model, state, lengths)
        for _ in range(0, int(to_host(lengths - 1 - state.held).max()), chunk):
            state = _take_in(model, state, tokens, lengths, chunk=chunk)
        return state


@partial(jax.jit, donate_argnames="state")
def _without_rejected(model: DecodeModel, state: DraftCaches, lengths: Array) -> DraftCaches:
    """Of what was drafted, the tokens that became text; the newest token is never held."""
    held = jnp.minimum(state.held, lengths - 1)
    return DraftCaches(truncate_caches(model, state.caches, held), held)


@partial(jax.jit, static_argnames="chunk", donate_argnames="state")
def _take_in(
    model: DecodeModel, state: DraftCaches, tokens: Array, lengths: Array, *, chunk: int
) -> DraftCaches:
    """The next `chunk` tokens of each row, as far as there are so many before the newest."""
    index = state.held[:, None] + jnp.arange(chunk, dtype=jnp.int32)
    block = jnp.take_along_axis(tokens, index, axis=1, mode="clip")
    counts = jnp.clip(lengths - 1 - state.held, 0, chunk)
    _, caches = model.next_token_logits(block, state.caches, counts)
    return DraftCaches(caches, state.held + counts)
