"""The compiled parts of generation: take in a chunk of the prompts, decode a number of tokens.

    logits, caches = prefill(model, caches, chunks)
    state = DecodeState.start(caches, logits, key, policy=policy)
    tokens, state = decode(model, state, key, policy=policy, num_steps=32)

What is compiled runs on Neuron as well: the trip count is static, a row that has ended is masked
instead of branched around, and random numbers come from `unsafe_rbg` keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._checks import whole_number
from jax_tkg._typing import Array, Float, Int, Key, Leaf
from jax_tkg.generation.checks import (
    check_batch,
    check_block,
    check_policy,
    check_state,
    checked_chunks,
)
from jax_tkg.generation.model import DecodeModel, check_methods
from jax_tkg.generation.policy import TokenPolicy
from jax_tkg.sampling import log_probabilities


@partial(jax.jit, donate_argnames="caches")
def prefill_chunk(
    model: DecodeModel, caches: Any, tokens: Int[Array, "B T"], counts: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Any]:
    """The model's `next_token_logits`, compiled; one program whatever the policy.

    Args:
        model: as in `generate`, but a pytree (see `as_pytree`).
        caches: are donated: use the returned ones.
        tokens: int32 `[B, T]`, the next tokens of each prompt.
        counts: int32 `[B]`, real tokens of each row (the first ones); 0 leaves a row as it is.

    Returns:
        Logits `[B, V]` after the last real token of each row, and the caches.

    Raises:
        TypeError: for a model without the methods of `DecodeModel`, or tokens that are no array.
        ValueError: for tokens or counts of other types or shapes, or of another batch than the
            caches; for more tokens than the caches have slots.
    """
    check_methods(model)
    check_block(tokens, counts, caches)
    return model.next_token_logits(tokens, caches, counts)


def prefill(
    model: DecodeModel, caches: Any, chunks: Iterable[tuple[Any, Any]]
) -> tuple[Float[Array, "B V"], Any]:
    """Takes in prompts chunk by chunk.

    Args:
        model: as in `prefill_chunk`.
        caches: are donated: use the returned ones.
        chunks: pairs `(tokens, counts)` as in `prefill_chunk`, at least one, with a token of every
            row in the first.

    Returns:
        Logits `[B, V]` after the last token of each row, and the caches.

    Raises:
        TypeError: as `prefill_chunk`, or for chunks that are no pairs.
        ValueError: as `prefill_chunk`; for no chunk, or a row without a token in the first; for ids
            that are not in the model's vocabulary (where it has a `vocab_size`); for more tokens
            than there is room for after those that the caches hold.
    """
    logits = None
    for tokens, counts in checked_chunks(model, caches, chunks):
        latest, caches = prefill_chunk(model, caches, tokens, counts)
        # Also for the first chunk, so that a second one finds everything compiled.
        logits = _where_given(counts, latest, latest if logits is None else logits)
    assert logits is not None
    return logits, caches


@jax.jit
def _where_given(counts: Array, latest: Array, before: Array) -> Array:
    return jnp.where((counts > 0)[:, None], latest, before)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["caches", "tokens", "finished", "step"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """A generation between two steps.

    Attributes:
        caches: the model's; they hold every token but the newest.
        tokens: int32 `[B]`, the newest token of each row, not yet in the caches.
        finished: bool `[B]`, rows whose newest token, or one before it, ended them.
        step: int32 `[]`, tokens generated so far; it makes each step's random key.
    """

    caches: Any
    tokens: Leaf
    finished: Leaf
    step: Leaf

    @classmethod
    def start(
        cls,
        caches: Any,
        logits: Float[Array, "B V"],
        key: Key[Array, ""] | None = None,
        *,
        policy: TokenPolicy,
    ) -> Self:
        """The state after the prompts: with the first new token of each row.

        Args:
            caches: from `prefill`, or your own.
            logits: `[B, V]`, after the last token of each row; from the same.
            key: a random key, `unsafe_rbg` on Neuron (see `portable_key`); None without randomness.
            policy: chooses the tokens.

        Raises:
            TypeError: for a policy or a key of the wrong kind.
            ValueError: for logits of another shape, or of another batch than the caches; for no key
                where the policy needs one.
        """
        check_policy(policy)
        check_batch("logits", logits.shape[0] if logits.ndim else 0, caches)
        return cls(caches, *_first_tokens(logits, key, policy=policy))


@partial(jax.jit, static_argnames="policy")
def _first_tokens(
    logits: Array, key: Array | None, *, policy: TokenPolicy
) -> tuple[Array, Array, Array]:
    tokens = policy.select(logits, key, jnp.zeros((), jnp.int32))
    return tokens, policy.ends(tokens), jnp.ones((), jnp.int32)


@partial(jax.jit, static_argnames=("policy", "num_steps"), donate_argnames="state")
def decode(
    model: DecodeModel,
    state: DecodeState,
    key: Key[Array, ""] | None = None,
    *,
    policy: TokenPolicy,
    num_steps: int,
) -> tuple[Int[Array, "B num_steps"], DecodeState]:
    """Generates `num_steps` more tokens for each row, in one loop with that trip count.

    Args:
        model: as in `generate`, but a pytree (see `as_pytree`).
        state: from `DecodeState.start` or an earlier call; is donated: use the returned one.
        key: the same as for `DecodeState.start`, in every call.
        policy: static.
        num_steps: static; each value is compiled once.

    Returns:
        The new tokens, int32 `[B, num_steps]`, pads after the one that ended the row; the state.
        A row that runs past the capacity of its caches loses what is beyond it and goes on with the
        rest: how full they are only the device knows, and `KVCache.overflowed` tells.

    Raises:
        TypeError: for a model without the methods of `DecodeModel`; for a state, a policy, a key or
            a number of steps of the wrong kind.
        ValueError: for no step, no key where the policy needs one, or a state whose arrays and
            caches are not of one batch.
    """
    num_steps = whole_number("num_steps", num_steps, least=1)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        state = decode_step(model, state, key, policy=policy)
        return state, state.tokens

    state, tokens = lax.scan(step, state, length=num_steps)
    return tokens.T, state


@partial(jax.jit, static_argnames=("policy", "num_steps"), donate_argnames="state")
def decode_scored(
    model: DecodeModel,
    state: DecodeState,
    key: Key[Array, ""] | None = None,
    *,
    policy: TokenPolicy,
    num_steps: int,
) -> tuple[Int[Array, "B num_steps"], Float[Array, "B num_steps"], DecodeState]:
    """As `decode`, with the log-probability of each token.

    Args:
        model: as for `decode`, like all that follows.
        state: is donated.
        key: the same in every call.
        policy: static.
        num_steps: static.

    Returns:
        The tokens; float32 `[B, num_steps]`, see `token_log_probs`, 0 for pads; the state.

    Raises:
        TypeError: as `decode`.
        ValueError: as `decode`.
    """
    num_steps = whole_number("num_steps", num_steps, least=1)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Array, Array]]:
        after, logits = _advance(model, state, key, policy)
        scores = jnp.where(state.finished, 0.0, token_log_probs(logits, after.tokens))
        return after, (after.tokens, scores)

    state, (tokens, scores) = lax.scan(step, state, length=num_steps)
    return tokens.T, scores.T, state


@jax.jit
def token_log_probs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """How likely the model finds tokens: the natural logarithm of the softmax of its logits.

    Of the logits as they are: before any temperature, and before filters exclude anything.

    Raises:
        ValueError: for logits that are not float, or tokens that are not an integer for each of
            their rows.
    """
    if not logits.ndim or tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"tokens must be one for each row of logits [*batch, V] = {logits.shape}, of shape "
            f"{logits.shape[:-1]}; got {tokens.shape}."
        )
    flat = log_probabilities(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1, 1))
    return flat.reshape(tokens.shape)


def decode_step(
    model: DecodeModel, state: DecodeState, key: Key[Array, ""] | None, *, policy: TokenPolicy
) -> DecodeState:
    """One step of `decode`, for loops of your own. A finished row's caches stay as they are.

    Raises:
        TypeError: as `decode`.
        ValueError: as `decode`.
    """
    return _advance(model, state, key, policy)[0]


def _advance(
    model: DecodeModel, state: DecodeState, key: Array | None, policy: TokenPolicy
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """The state after one more token, and the logits that it was chosen from."""
    check_methods(model)
    check_policy(policy)
    check_state(state, DecodeState, "tokens")
    alive = ~state.finished
    logits, caches = model.next_token_logits(
        state.tokens[:, None], state.caches, alive.astype(jnp.int32)
    )
    chosen = policy.select(logits, key, state.step)
    tokens = jnp.where(alive, chosen, jnp.int32(policy.pad_id))
    state = replace(
        state,
        caches=caches,
        tokens=tokens,
        finished=state.finished | policy.ends(tokens),
        step=state.step + 1,
    )
    return state, logits
