"""The compiled part of speculative decoding: draft, verify all drafts at once, take back the rest.

    state = SpeculativeState.start(first, drafting, prompts, capacity=..., max_new_tokens=...)
    emitted, state = decode_speculatively(model, drafter, state, key, policy=policy, num_steps=8)

A step costs one pass of the model over `max_tokens + 1` tokens a row, and gives each row between
one and that many. Rows advance each at its own speed. As in `jax_tkg.generation.loop` the trip
count is static, a row that has ended is masked, and everything runs on Neuron.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._checks import described, whole_number
from jax_tkg._typing import Array, Bool, Int, Key, Leaf
from jax_tkg.generation.checks import check_batch, check_capacity, check_policy, check_state
from jax_tkg.generation.drafts import Drafter, Drafts, check_drafter, check_drafts
from jax_tkg.generation.loop import DecodeState, token_log_probs
from jax_tkg.generation.model import DecodeModel, ScoringModel, check_methods, truncate_caches
from jax_tkg.generation.policy import TokenPolicy
from jax_tkg.generation.prompts import PaddedPrompts, check_room
from jax_tkg.generation.verification import check_selector, verify


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["caches", "tokens", "lengths", "limits", "finished", "step", "drafting"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SpeculativeState:
    """A speculative generation between two steps.

    Attributes:
        caches: the model's; they hold every token but the newest.
        tokens: int32 `[B, W]`, the prompt of each row and what was generated after it.
        lengths: int32 `[B]`, tokens of each row.
        limits: int32 `[B]`, where a row ends in any case.
        finished: bool `[B]`, rows that have ended.
        step: int32 `[]`, steps so far; it makes each step's random key.
        drafting: the state of the drafter.
    """

    caches: Any
    tokens: Leaf
    lengths: Leaf
    limits: Leaf
    finished: Leaf
    step: Leaf
    drafting: Any

    @classmethod
    def start(
        cls,
        first: DecodeState,
        drafting: Any,
        prompts: PaddedPrompts,
        *,
        capacity: int,
        max_new_tokens: int,
    ) -> Self:
        """The state with the first new token of each row.

        Args:
            first: from `DecodeState.start`; its caches are taken over.
            drafting: from `Drafter.start`.
            prompts: all that the caches hold.
            capacity: of the caches; every row has place for one token more than it.
            max_new_tokens: of each row, the first included.

        Raises:
            TypeError: for a state or prompts of the wrong kind, sizes that are no integers.
            ValueError: for another batch in `prompts` than in `first`; for more tokens than there
                is room for; for a capacity that the caches do not have.
        """
        check_state(first, DecodeState, "tokens")
        if not isinstance(prompts, PaddedPrompts):
            raise TypeError(
                f"prompts must be PaddedPrompts, from pad_prompts; got {described(prompts)}."
            )
        check_batch("prompts", len(prompts.lengths), first.caches)
        capacity = whole_number("capacity", capacity, least=1)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        check_room(prompts.longest, max_new_tokens, capacity)
        check_capacity(capacity, first.caches)
        longest = min(prompts.tokens.shape[1], capacity + 1)
        tokens = np.zeros((len(prompts.lengths), capacity + 1), np.int32)
        tokens[:, :longest] = prompts.tokens[:, :longest]
        # Copied to the device, for they will be donated.
        lengths = jnp.array(prompts.lengths)
        limits = jnp.array(prompts.lengths + np.int32(max_new_tokens))
        tokens, lengths, finished = _with_first(
            jnp.array(tokens), lengths, limits, first.tokens, first.finished
        )
        return cls(first.caches, tokens, lengths, limits, finished, first.step, drafting)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "counts", "drafted", "log_probs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Emitted:
    """What one step gives, or several, with a first axis of steps; T is `max_tokens + 1`.

    Attributes:
        tokens: int32 `[B, T]`, new tokens of each row, the first `counts`.
        counts: int32 `[B]`, how many; 0 only in a row that had ended.
        drafted: int32 `[B]`, drafts that were verified.
        log_probs: float32 `[B, T]`, as `token_log_probs`, of the same tokens; None if not asked.
    """

    tokens: Leaf
    counts: Leaf
    drafted: Leaf
    log_probs: Leaf | None


@partial(
    jax.jit, static_argnames=("policy", "num_steps", "with_log_probs"), donate_argnames="state"
)
def decode_speculatively(
    model: ScoringModel,
    drafter: Drafter,
    state: SpeculativeState,
    key: Key[Array, ""] | None = None,
    *,
    policy: TokenPolicy,
    num_steps: int,
    with_log_probs: bool = False,
) -> tuple[Emitted, SpeculativeState]:
    """Takes `num_steps` steps, in one loop with that trip count.

    Args:
        model: as in `generate`, but a pytree (see `scoring_pytree`).
        drafter: makes the drafts.
        state: from `SpeculativeState.start` or an earlier call; is donated: use the returned one.
        key: as for `decode`, the same in every call.
        policy: static.
        num_steps: static; each value is compiled once.
        with_log_probs: static; whether to compute log-probabilities.

    Returns:
        What each step gave, its arrays with a first axis of `num_steps`; the state.

    Raises:
        TypeError: for a model that is no `ScoringModel`; for a drafter, a state, a policy, a key or
            a number of steps of the wrong kind; for a selector whose drafts cannot be verified.
        ValueError: for no step, no key where the policy needs one, a state whose arrays and caches
            are not of one batch, a drafter of another vocabulary than the model, drafts of other
            shapes than it promises; for more of them than the caches have slots.
    """
    num_steps = whole_number("num_steps", num_steps, least=1)

    def step(state: SpeculativeState, _: None) -> tuple[SpeculativeState, Emitted]:
        emitted, state = speculative_step(
            model, drafter, state, key, policy=policy, with_log_probs=with_log_probs
        )
        return state, emitted

    state, emitted = lax.scan(step, state, length=num_steps)
    return emitted, state


def speculative_step(
    model: ScoringModel,
    drafter: Drafter,
    state: SpeculativeState,
    key: Key[Array, ""] | None,
    *,
    policy: TokenPolicy,
    with_log_probs: bool = False,
) -> tuple[Emitted, SpeculativeState]:
    """One step of `decode_speculatively`, for loops of your own.

    Raises:
        TypeError: as there.
        ValueError: as there.
    """
    check_methods(model, scores=True)
    check_drafter("drafter", drafter, model)
    _check(state, policy)
    check_selector(policy.selector)
    alive = ~state.finished
    draft_key, verify_key = _step_keys(policy, key, state.step)
    drafts, drafting = drafter.draft(
        state.tokens,
        state.lengths,
        alive,
        state.drafting,
        key=draft_key,
        selector=policy.selector,
    )
    check_drafts(drafts, alive.shape[0], drafter.max_tokens)
    # A row never gets, nor its caches, more than its limit.
    drafts = within(drafts, state.limits - state.lengths, alive)
    newest = newest_tokens(state.tokens, state.lengths)
    block = jnp.concatenate([newest, drafts.tokens], axis=1)
    logits, caches = model(block, state.caches, jnp.where(alive, drafts.counts + 1, 0))
    accepted, after = verify(policy.selector, logits, drafts, verify_key)

    continued = jnp.concatenate([drafts.tokens, after[:, None]], axis=1)
    tokens = jnp.where(are_new(continued, accepted), continued, after[:, None])
    counts = emitted_counts(accepted, policy.ends(tokens), alive)
    caches = truncate_caches(model, caches, state.lengths + counts - 1)
    emitted = _emitted(tokens, counts, drafts.counts, logits if with_log_probs else None)
    return emitted, replace(_advanced(state, caches, tokens, counts, policy), drafting=drafting)


@partial(
    jax.jit, static_argnames=("policy", "num_steps", "with_log_probs"), donate_argnames="state"
)
def decode_undrafted(
    model: DecodeModel,
    state: SpeculativeState,
    key: Key[Array, ""] | None = None,
    *,
    policy: TokenPolicy,
    num_steps: int,
    with_log_probs: bool = False,
) -> tuple[Emitted, SpeculativeState]:
    """As `decode_speculatively`, a token a step: for a time in which drafts do not pay.

    The state of the drafter stays behind; see `jax_tkg.generation.PausableDrafter`.

    Args:
        model: as there, like all that follows.
        state: is donated.
        key: the same in every call.
        policy: static.
        num_steps: static.
        with_log_probs: static.

    Returns:
        As there, with T = 1.

    Raises:
        TypeError: as there, but any `DecodeModel` will do.
        ValueError: as there.
    """
    num_steps = whole_number("num_steps", num_steps, least=1)
    check_methods(model)
    _check(state, policy)

    def step(state: SpeculativeState, _: None) -> tuple[SpeculativeState, Emitted]:
        alive = ~state.finished
        counts = alive.astype(jnp.int32)
        newest = newest_tokens(state.tokens, state.lengths)
        logits, caches = model.next_token_logits(newest, state.caches, counts)
        tokens = policy.select(logits, key, state.step)[:, None]
        scored = logits[:, None] if with_log_probs else None
        emitted = _emitted(tokens, counts, jnp.zeros_like(counts), scored)
        return _advanced(state, caches, tokens, counts, policy), emitted

    state, emitted = lax.scan(step, state, length=num_steps)
    return emitted, state


def _check(state: Any, policy: Any) -> None:
    """What both loops are given."""
    check_policy(policy)
    check_state(state, SpeculativeState, "lengths limits")


def _advanced(
    state: SpeculativeState, caches: Any, tokens: Array, counts: Array, policy: TokenPolicy
) -> SpeculativeState:
    """The state with the first `counts` of tokens `[B, T]`, of which the last may end the row."""
    lengths = state.lengths + counts
    ended = jnp.any(are_new(tokens, counts) & policy.ends(tokens), axis=1)
    return replace(
        state,
        caches=caches,
        tokens=write_tokens(state.tokens, state.lengths, tokens, counts),
        lengths=lengths,
        finished=state.finished | ended | (lengths >= state.limits),
        step=state.step + 1,
    )


def _emitted(tokens: Array, counts: Array, drafted: Array, logits: Array | None) -> Emitted:
    scores = None
    if logits is not None:
        scores = jnp.where(are_new(tokens, counts), token_log_probs(logits, tokens), 0.0)
    return Emitted(tokens, counts, drafted, scores)


def _step_keys(
    policy: TokenPolicy, key: Array | None, step: Array
) -> tuple[Array | None, Array | None]:
    """For the drafts and for their verification."""
    key = policy.step_key(key, step)
    if key is None:
        return None, None
    draft_key, verify_key = jax.random.split(key)
    return draft_key, verify_key


@partial(jax.jit, donate_argnames="tokens")
def _with_first(
    tokens: Array, lengths: Array, limits: Array, first: Array, finished: Array
) -> tuple[Array, Array, Array]:
    tokens = write_tokens(tokens, lengths, first[:, None], jnp.ones_like(lengths))
    return tokens, lengths + 1, finished | (lengths + 1 >= limits)


# What the step of a batch that requests join and leave has in common with this one


def newest_tokens(tokens: Int[Array, "B W"], lengths: Int[Array, " B"]) -> Int[Array, "B 1"]:
    """The last token of each row."""
    return jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1, mode="clip")


def within(drafts: Drafts, room: Int[Array, " B"], alive: Bool[Array, " B"]) -> Drafts:
    """The drafts of rows that go on, so few that with the token after them they fit into `room`."""
    fitting = jnp.minimum(drafts.counts, jnp.maximum(room - 1, 0))
    return replace(drafts, counts=jnp.where(alive, fitting, 0))


def emitted_counts(
    accepted: Int[Array, " B"], ends: Bool[Array, "B T"], alive: Bool[Array, " B"]
) -> Int[Array, " B"]:
    """How many tokens a step gives: the accepted drafts and the one after them.

    A row stops at the first token that ends it, be it an accepted draft.
    """
    place = lax.broadcasted_iota(jnp.int32, ends.shape, 1)
    is_last = (place == accepted[:, None]) | ends
    count = jnp.min(jnp.where(is_last, place, ends.shape[1] - 1), axis=1) + 1
    return jnp.where(alive, count, 0)


def are_new(tokens: Int[Array, "B T"], counts: Int[Array, " B"]) -> Bool[Array, "B T"]:
    """The first `counts` places of each row."""
    return lax.broadcasted_iota(jnp.int32, tokens.shape, 1) < counts[:, None]


def write_tokens(tokens: Array, lengths: Array, new: Array, counts: Array) -> Array:
    """Puts the first `counts` new tokens after those of each row: selections, no scatter."""
    place = lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    for i in range(new.shape[1]):
        is_here = (place == lengths[:, None] + i) & (i < counts[:, None])
        tokens = jnp.where(is_here, new[:, i : i + 1], tokens)
    return tokens
