"""Choosing the next token from logits, with operations that every accelerator can run.

A decode step on Neuron has no sort, no argmax (a reduction over pairs), no `lax.top_k` and no
threefry. Everything here is elementwise work, single-operand reductions and loops with a constant
trip count. The largest logits are found by bisection, random choice is a Gumbel-max race.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._checks import real_number, whole_number
from jax_tkg._typing import Array, Bool, Float, Int, Key, Leaf, Shaped

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@runtime_checkable
class TokenSelector(Protocol):
    """Picks one token for each row of logits: what `generate` asks of a selection rule.

    Implementations are frozen, hashable dataclasses: static configuration under `jax.jit`.
    """

    @property
    def needs_key(self) -> bool:
        """Whether `__call__` needs a fresh random key every step."""
        ...

    def __call__(
        self, logits: Float[Array, "B V"], key: Key[Array, ""] | None = None
    ) -> Int[Array, " B"]:
        """Returns int32 `[B]` token ids for float logits `[B, V]`."""
        ...


def argmax_tokens(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Index of the largest logit in each row; the lowest index wins ties.

    Unlike `jnp.argmax` it is two single-operand reductions (a maximum, then the minimum of the
    indices that attain it), and NaN counts as -inf instead of winning.

    Args:
        logits: Float `[B, V]`.

    Returns:
        int32 `[B]`; 0 for a row of nothing but -inf and NaN.

    Raises:
        ValueError: `logits` is not a float `[B, V]` array with V >= 1.
    """
    _check_logits(logits)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == largest, index, logits.shape[-1]), axis=-1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Greedy:
    """Always the most likely token, see `argmax_tokens`."""

    needs_key: ClassVar[bool] = False

    def __call__(
        self, logits: Float[Array, "B V"], key: Key[Array, ""] | None = None
    ) -> Int[Array, " B"]:
        """Returns int32 `[B]` token ids; `key` is ignored."""
        del key
        return argmax_tokens(logits)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws from the softmax of the logits, restricted to a set of likely tokens.

    Filters apply in the order of the fields, each to what the one before left (Hugging Face's
    order): temperature, top-k, top-p (Holtzman et al., arXiv:1904.09751), min-p (Nguyen et al.,
    arXiv:2407.01082). Tokens are ranked by logit, ties by lower index first, so that `top_k=1`
    equals `Greedy()` and equal logits (common in bfloat16) never enlarge the set. The most likely
    token is always kept; NaN and -inf logits never are; +inf counts as the largest finite float32.

    Attributes:
        temperature: Divides the logits; positive.
        top_k: Keep this many tokens (all, if the vocabulary is smaller). None keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities sum to at least this, in
            (0, 1]. Sums are float32. None and 1 keep all.
        min_p: Keep tokens at least this many times as likely as the most likely one, in [0, 1).
            None and 0 keep all.

    Raises:
        TypeError: A value is no number.
        ValueError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None or name == "temperature":
                real_number(f"Sample: {name}", value)
        if self.top_k is not None:
            whole_number("Sample: top_k", self.top_k, least=1, hint="None keeps all.")
        # A subnormal temperature would be flushed to zero on the device.
        if not (_SMALLEST_NORMAL <= self.temperature <= _LARGEST):
            raise ValueError(
                f"Sample: temperature must be a positive finite number, got {self.temperature}; "
                "use Greedy() for temperature 0."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sample: top_p must be in (0, 1] or None, got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            raise ValueError(f"Sample: min_p must be in [0, 1) or None, got {self.min_p}.")

    def __call__(
        self, logits: Float[Array, "B V"], key: Key[Array, ""] | None = None
    ) -> Int[Array, " B"]:
        """Draws one token for each row.

        Args:
            logits: Float `[B, V]`.
            key: A random key, used whole; any implementation (`"rbg"` or `"unsafe_rbg"` on
                Neuron). Rows draw independently.

        Returns:
            int32 `[B]`; 0 for a row of nothing but -inf and NaN.

        Raises:
            ValueError: `key` is None, or `logits` is not a float `[B, V]` array with V >= 1.
        """
        if key is None:
            raise ValueError("Sample: needs a random key, got None; pass key=jax.random.key(0).")
        ranked, scaled, live = _scale(logits, self.temperature)
        kept = self._filter(ranked, scaled, live)
        return _race(scaled, kept, _exponential(key, logits.shape))

    def kept(self, logits: Float[Array, "B V"]) -> Bool[Array, "B V"]:
        """The tokens that can be drawn.

        Args:
            logits: Float `[B, V]`.

        Returns:
            Boolean `[B, V]`; all False for a row of nothing but -inf and NaN.

        Raises:
            ValueError: `logits` is not a float `[B, V]` array with V >= 1.
        """
        return self._filter(*_scale(logits, self.temperature))

    def _filter(
        self, ranked: Float[Array, "B V"], scaled: Float[Array, "B V"], live: Bool[Array, "B V"]
    ) -> Bool[Array, "B V"]:
        kept = live
        # Ranks come from the unscaled logits: scaling keeps their order but may round two together.
        if self.top_k is not None and self.top_k < ranked.shape[-1]:
            kept &= _most_likely(ranked, jnp.full(ranked.shape[:1], self.top_k, jnp.float32))
        if self.top_p is not None and self.top_p < 1:
            kept &= _nucleus(ranked, scaled, kept, max(self.top_p, _SMALLEST_NORMAL))
        if self.min_p is not None and self.min_p > 0:
            kept &= scaled >= math.log(self.min_p)
        return kept


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "log_min_p"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class RowSelection:
    """A `Greedy` or `Sample` for each row, as arrays: one compiled program for any mixture.

    Row b gets the token that its own selector chooses for it alone. All filters are computed for
    every row, also where they keep everything.

    Attributes:
        temperature: float32 `[B]`; 0 for a greedy row.
        top_k: float32 `[B]`, infinite to keep all.
        top_p: float32 `[B]`, above 1 to keep all.
        log_min_p: float32 `[B]`, -inf to keep all.
    """

    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    log_min_p: Leaf

    @classmethod
    def of(cls, selectors: Sequence["Greedy | Sample"]) -> Self:
        """NumPy arrays of the settings of B selectors."""
        rows = [_as_numbers(selector) for selector in selectors]
        return cls(*np.array(rows, np.float32).reshape(len(rows), 4).T)

    def __call__(
        self, logits: Float[Array, "B V"], words: Shaped[Array, "B 4"]
    ) -> Int[Array, " B"]:
        """Chooses one token for each row.

        Args:
            logits: Float `[B, V]`.
            words: uint32 `[B, 4]`, the state of an `unsafe_rbg` key for each row
                (`jax.random.wrap_key_data(words[b], impl="unsafe_rbg")`): the random numbers of a
                row depend on nothing else, so not on the rows beside it.

        Returns:
            int32 `[B]`; 0 for a row of nothing but -inf and NaN.

        Raises:
            ValueError: `logits` is not a float `[B, V]` array with V >= 1.
        """
        ranked, scaled, live = _scale(logits, self._positive_temperature())
        kept = self._filter(ranked, scaled, live)

        def noise(words: Shaped[Array, " 4"]) -> Float[Array, " V"]:
            # vmap would make one stream of bits for all rows: each row gets its own, in a loop.
            key = jax.random.wrap_key_data(words, impl="unsafe_rbg")
            return _exponential(key, logits.shape[1:])

        sampled = _race(scaled, kept, lax.map(noise, words))
        return jnp.where(self.temperature > 0, sampled, argmax_tokens(logits))

    def kept(self, logits: Float[Array, "B V"]) -> Bool[Array, "B V"]:
        """The tokens that can be drawn, boolean `[B, V]`; of a greedy row, as at temperature 1."""
        return self._filter(*_scale(logits, self._positive_temperature()))

    def _positive_temperature(self) -> Float[Array, "B 1"]:
        return jnp.where(self.temperature > 0, self.temperature, 1.0)[:, None]

    def _filter(
        self, ranked: Float[Array, "B V"], scaled: Float[Array, "B V"], live: Bool[Array, "B V"]
    ) -> Bool[Array, "B V"]:
        every = jnp.float32(ranked.shape[-1])
        kept = live & _most_likely(ranked, jnp.minimum(self.top_k, every))
        top_p = jnp.asarray(self.top_p)
        kept &= _nucleus(ranked, scaled, kept, top_p) | (top_p > 1)[:, None]
        return kept & (scaled >= self.log_min_p[:, None])


def _as_numbers(selector: Greedy | Sample) -> tuple[float, float, float, float]:
    if isinstance(selector, Greedy):
        return 0.0, math.inf, 2.0, -math.inf
    top_k = math.inf if selector.top_k is None else selector.top_k
    top_p = 1.0 if selector.top_p is None else max(selector.top_p, _SMALLEST_NORMAL)
    log_min_p = math.log(selector.min_p) if selector.min_p else -math.inf
    return selector.temperature, top_k, top_p if top_p < 1 else 2.0, log_min_p


def log_probabilities(
    logits: Float[Array, "B V"], tokens: Int[Array, "B n"]
) -> Float[Array, "B n"]:
    """Log softmax of each row at the given tokens, float32 `[B, n]`; of the logits as given.

    Args:
        logits: Float `[B, V]`.
        tokens: int32 `[B, n]`.

    Raises:
        ValueError: `logits` is not a float `[B, V]` array with V >= 1.
    """
    _check_logits(logits)
    wide = logits.astype(jnp.float32)
    largest = jnp.max(wide, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(wide - largest), axis=-1, keepdims=True))
    return jnp.take_along_axis(wide, tokens, axis=-1, mode="clip") - largest - log_sum


def most_likely_tokens(logits: Float[Array, "B V"], count: int) -> Int[Array, "B count"]:
    """The `count` largest logits of each row, largest first, ties by lower index: int32 ids.

    For a few: it is `count` times `argmax_tokens`.

    Args:
        logits: Float `[B, V]`.
        count: static, 0 to V.

    Raises:
        ValueError: `logits` is not a float `[B, V]` array with V >= 1; `count` is above V.
    """
    _check_logits(logits)
    whole_number("count", count, most=logits.shape[1], hint="No more tokens have logits.")
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)

    def take(left: Array, _: None) -> tuple[Array, Array]:
        token = argmax_tokens(left)
        return jnp.where(index == token[:, None], -jnp.inf, left), token

    _, tokens = lax.scan(take, logits, length=count)
    return tokens.T


def _scale(
    logits: Float[Array, "B V"], temperature: float | Float[Array, "B 1"]
) -> tuple[Float[Array, "B V"], Float[Array, "B V"], Bool[Array, "B V"]]:
    """Finite float32 logits, the same scaled with maximum 0, and where they are not -inf."""
    _check_logits(logits)
    logits = logits.astype(jnp.float32)
    live = logits > -jnp.inf  # False for NaN.
    ranked = jnp.where(live, jnp.minimum(logits, _LARGEST), -_LARGEST)
    scaled = (ranked - jnp.max(ranked, axis=-1, keepdims=True)) / temperature
    return ranked, scaled, live


def _race(
    scaled: Float[Array, "B V"], kept: Bool[Array, "B V"], times: Float[Array, "B V"]
) -> Int[Array, " B"]:
    """The kept token whose exponential waiting time, at a rate equal to its weight, ends first."""
    return argmax_tokens(jnp.where(kept, scaled - jnp.log(times), -jnp.inf))


def _most_likely(ranked: Float[Array, "B V"], count: Float[Array, " B"]) -> Bool[Array, "B V"]:
    return _fewest(ranked, jnp.ones_like(ranked), count)


def _nucleus(
    ranked: Float[Array, "B V"],
    scaled: Float[Array, "B V"],
    kept: Bool[Array, "B V"],
    fraction: float | Float[Array, " B"],
) -> Bool[Array, "B V"]:
    """The fewest tokens that have this fraction of the probability of the kept ones."""
    weights = jnp.where(kept, jnp.exp(scaled), 0.0)
    return _fewest(ranked, weights, fraction * jnp.sum(weights, axis=-1))


def _fewest(
    ranked: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, " B"]
) -> Bool[Array, "B V"]:
    """The fewest tokens, highest `ranked` first, then lowest index, whose weights reach `target`.

    Bisects the rank of the last token, one bit of its float32 pattern at a time, then its index
    among the tokens of that rank. Exact up to the float32 sums, which are exact for weights of 1
    and never decrease when a token joins; if rounding keeps the whole row under `target`, the
    whole row is kept.

    Args:
        ranked: float32 `[B, V]`, finite.
        weights: float32 `[B, V]`, not negative.
        target: float32 `[B]`, positive.
    """
    index = lax.broadcasted_iota(jnp.int32, ranked.shape, 1)
    index_bits = (ranked.shape[-1] - 1).bit_length()
    highest = jnp.int32((1 << index_bits) >> 1)

    def reached(kept: Bool[Array, "B V"]) -> Bool[Array, "B 1"]:
        return (jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) >= target)[:, None]

    def refine_rank(step: Int[Array, ""], code: Shaped[Array, "B 1"]) -> Shaped[Array, "B 1"]:
        candidate = code | lax.shift_right_logical(jnp.uint32(1 << 31), step.astype(jnp.uint32))
        return jnp.where(reached(ranked >= _float_of_code(candidate)), candidate, code)

    code = lax.fori_loop(0, 32, refine_rank, jnp.zeros_like(ranked[:, :1], jnp.uint32))
    # The code of an unreached row is 0, a NaN; "not below" is then true of the whole row.
    last_rank = jnp.min(
        jnp.where(ranked < _float_of_code(code), jnp.inf, ranked), axis=-1, keepdims=True
    )
    above, tied = ranked > last_rank, ranked == last_rank

    def refine_index(step: Int[Array, ""], last: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        candidate = last | lax.shift_right_logical(highest, step.astype(jnp.int32))
        return jnp.where(reached(above | (tied & (index < candidate))), last, candidate)

    start = jnp.zeros_like(code, jnp.int32)
    last: Int[Array, "B 1"] = lax.fori_loop(0, index_bits, refine_index, start)
    return above | (tied & (index <= last))


def _float_of_code(code: Shaped[Array, "B 1"]) -> Float[Array, "B 1"]:
    """Maps uint32 to float32 so that codes and floats have the same order, NaN at both ends.

    Bisection then runs on codes with bitwise operations only, and compares as float32: a machine
    that carries integer arithmetic in float32 could not compare 32-bit integers.
    """
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(code & sign != 0, code ^ sign, ~code)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _exponential(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*S"]:
    """Positive, finite float32 draws of the unit exponential distribution.

    The smallest of V draws wins the race, so the resolution is spent near zero: `-log1p(-u)` of a
    uniform u in steps of 2^-31, offset by half a step so that u is neither 0 nor, clipped, 1.
    """
    bits = jax.random.bits(key, shape, jnp.uint32) >> 1
    uniform = (bits.astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def _check_logits(logits: Float[Array, "B V"]) -> None:
    if logits.ndim != 2 or logits.shape[-1] < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            "Token selection needs float logits [B, V] with V >= 1, got "
            f"{logits.dtype} {logits.shape}; pass the logits of the last position only."
        )
