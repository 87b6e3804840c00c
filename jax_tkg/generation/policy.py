"""How tokens are chosen and which of them end a row, and the random keys for it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_tkg._checks import LAST_ID, described, token_ids, whole_number
from jax_tkg._typing import Array, Bool, Float, Int, Key
from jax_tkg.sampling import TokenSelector


@dataclass(frozen=True)
class TokenPolicy:
    """How the next token is chosen and which tokens end a row; static under jit.

    Attributes:
        selector: picks a token from logits.
        eos_ids: tokens after which a row has ended; kept sorted, each once, so that equal sets are
            one static argument.
        pad_id: what a row that has ended gives from then on.

    Raises:
        TypeError: for a selector that is none, or has no hash; for ids that are not integers.
        ValueError: for an id that is out of range.
    """

    selector: TokenSelector
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        """Validates the fields."""
        _check_selector(self.selector)
        ids = tuple(sorted(set(token_ids("eos_ids", self.eos_ids))))
        object.__setattr__(self, "eos_ids", ids)
        pad = whole_number("pad_id", self.pad_id, least=-LAST_ID, most=LAST_ID)
        object.__setattr__(self, "pad_id", pad)

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
        key = self.step_key(key, step)
        return self.selector(logits) if key is None else self.selector(logits, key)

    def step_key(self, key: Key[Array, ""] | None, step: Int[Array, ""]) -> Key[Array, ""] | None:
        """The random key of step `step` of a generation; None if the selector needs none.

        Raises:
            ValueError: if it needs one and there is none.
            TypeError: if `key` is not one typed key.
        """
        if not self.selector.needs_key:
            return None
        if key is None:
            raise ValueError(f"{self.selector} needs a random key; give key=jax.random.key(0).")
        return jax.random.fold_in(_one_key(key), step)


def _check_selector(selector: object) -> None:
    if isinstance(selector, type) or not isinstance(selector, TokenSelector):
        raise TypeError(
            "selector must be Greedy(), Sample(...) or another TokenSelector of jax_tkg, got "
            f"{described(selector)}."
        )
    try:
        hash(selector)
    except TypeError:
        raise TypeError(
            f"selector is static in compiled programs, and {type(selector).__name__} has no hash: "
            "make it a frozen dataclass of hashable fields."
        ) from None


def _one_key(key: object) -> Array:
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        kind = key.dtype if isinstance(key, jax.Array) else type(key).__name__
        raise TypeError(f"key must come from jax.random.key(seed); got {kind}.")
    if key.shape:
        raise TypeError(f"key must be a single key; got an array of keys of shape {key.shape}.")
    return key


def portable_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """An `unsafe_rbg` key with the seed of any other, the same one every time.

    Neuron runs `unsafe_rbg` only: deriving one key from another takes threefry under JAX's default
    implementation, and also under `rbg`. A key made by `jax.random.key(seed, impl="unsafe_rbg")`
    is returned as it is, and equals what `jax.random.key(seed)` becomes.

    Raises:
        TypeError: if it is not one typed key.
    """
    words = jax.random.key_data(_one_key(key))
    safe: Array = jax.random.wrap_key_data(jnp.tile(words, 4 // words.size), impl="unsafe_rbg")
    return safe
