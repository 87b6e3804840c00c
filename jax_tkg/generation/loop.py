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

from jax_tkg._typing import Array, Bool, Float, Int, Key, Leaf
from jax_tkg.generation.model import DecodeModel
from jax_tkg.sampling import TokenSelector, log_probabilities


@dataclass(frozen=True)
class TokenPolicy:
    """How the next token is chosen and which tokens end a row; static under jit.

    Attributes:
        selector: picks a token from logits.
        eos_ids: tokens after which a row has ended.
        pad_id: what a row that has ended gives from then on.
    """

    selector: TokenSelector
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def ends(self, tokens: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Which of these tokens end their row."""
        ended = jnp.zeros(tokens.shape, bool)
        for eos in self.eos_ids:
            ended |= tokens == eos
        return ended

    def select(
        self, logits: Float[Array, "B V"], key: Key[Array, ""] | None, step: Int[Array, ""]
    ) -> Int[Array, " B"]:
        """The tokens of step `step` of a generation, int32 `[B]`."""
        if not self.selector.needs_key:
            return self.selector(logits)
        if key is None:
            raise ValueError(f"{self.selector} needs a random key; give key=jax.random.key(0).")
        return self.selector(logits, jax.random.fold_in(key, step))


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
    """
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
    """
    logits = None
    for tokens, counts in chunks:
        latest, caches = prefill_chunk(model, caches, tokens, counts)
        # Also for the first chunk, so that a second one finds everything compiled.
        logits = _where_given(counts, latest, latest if logits is None else logits)
    if logits is None:
        raise ValueError("prefill was given no chunk: there is nothing to continue from.")
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
        """
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
    """

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
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Array, Array]]:
        alive = ~state.finished
        state, logits = _advance(model, state, key, policy)
        scores = jnp.where(alive, token_log_probs(logits, state.tokens), 0.0)
        return state, (state.tokens, scores)

    state, (tokens, scores) = lax.scan(step, state, length=num_steps)
    return tokens.T, scores.T, state


@jax.jit
def token_log_probs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """How likely the model finds tokens: the natural logarithm of the softmax of its logits.

    Of the logits as they are: before any temperature, and before filters exclude anything.
    """
    flat = log_probabilities(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1, 1))
    return flat.reshape(tokens.shape)


def decode_step(
    model: DecodeModel, state: DecodeState, key: Key[Array, ""] | None, *, policy: TokenPolicy
) -> DecodeState:
    """One step of `decode`, for loops of your own. A finished row's caches stay as they are."""
    return _advance(model, state, key, policy)[0]


def _advance(
    model: DecodeModel, state: DecodeState, key: Array | None, policy: TokenPolicy
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """The state after one more token, and the logits that it was chosen from."""
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


def portable_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """An `unsafe_rbg` key with the seed of any other, the same one every time.

    Neuron runs `unsafe_rbg` only: deriving one key from another takes threefry under JAX's default
    implementation, and also under `rbg`. A key made by `jax.random.key(seed, impl="unsafe_rbg")`
    is returned as it is, and equals what `jax.random.key(seed)` becomes.

    Raises:
        TypeError: if it is not one typed key.
    """
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must come from jax.random.key(seed); got {type(key).__name__}.")
    if key.shape:
        raise TypeError(f"key must be a single key; got an array of keys of shape {key.shape}.")
    words = jax.random.key_data(key)
    safe: Array = jax.random.wrap_key_data(jnp.tile(words, 4 // words.size), impl="unsafe_rbg")
    return safe
