"""Which key a query sees, as arithmetic on token positions.

Every mask but a dense one is a comparison of positions, so one function of broadcastable arrays
serves all shapes: a tile of one KV head on the CPU, all rows at once elsewhere, the oracle, the
backward pass. Positions count tokens from the start of the row, also when slots of the cache do not
(a ring buffer, a left-padded batch).
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jax_tkg._typing import Array, Bool, Int

NO_POSITION = -1
"""The position of a cache slot that holds no token."""

UNBOUNDED = 2**30
"""A window this wide is as none: no row holds so many tokens, and sums of positions stay int32."""

_LAST = 2**31 - 1


@dataclass(frozen=True)
class Window:
    """Positions a query sees around its own, both ends inclusive; None is unbounded.

    A Mistral-style window of w keys (the query's own and the w - 1 before it) is `Window(w - 1,
    0)`. A side of 2^30 or more becomes None.
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for side, value in (("left", self.left), ("right", self.right)):
            if value is not None and value < 0:
                raise ValueError(f"local_window_size: {side} must be >= 0 or None, got {value}.")
            if value is not None and value >= UNBOUNDED:
                object.__setattr__(self, side, None)


@dataclass(frozen=True)
class PositionRule:
    """The static part of a mask: which comparisons of positions it makes."""

    causal: bool
    window: Window | None

    def interval(
        self,
        query_position: Int[Array, "..."],
        start: Int[Array, "..."],
        length: Int[Array, "..."],
    ) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
        """The positions that each query sees: the first, and the one behind the last.

        Where it sees none the second is not above the first. The arguments broadcast; a key is live
        at positions `start <= key < length`, and never at a negative one.
        """
        low, high = jnp.maximum(start, 0), length
        if self.causal:
            high = jnp.minimum(high, _behind(query_position, 0))
        if self.window is not None:
            if self.window.left is not None:
                low = jnp.maximum(low, query_position - self.window.left)
            if self.window.right is not None:
                high = jnp.minimum(high, _behind(query_position, self.window.right))
        return low, high

    def reach(self, num_tokens: int) -> int | None:
        """How many positions T queries that follow each other see at most; None is unbounded."""
        if self.window is None or self.window.left is None:
            return None
        right = 0 if self.causal else self.window.right
        return None if right is None else self.window.left + right + num_tokens

    def visible(
        self,
        query_position: Int[Array, "..."],
        key_position: Int[Array, "..."],
        start: Int[Array, "..."],
        length: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """Whether each query sees each key; all arguments broadcast, as in `interval`."""
        low, high = self.interval(query_position, start, length)
        return (key_position >= low) & (key_position < high)


def _behind(position: Int[Array, "..."], right: int) -> Int[Array, "..."]:
    """The position behind the last one that is at most `right` above; the last int32 if none is."""
    return jnp.minimum(position, _LAST - right - 1) + (right + 1)


def default_query_positions(length: Int[Array, " B"], num_tokens: int) -> Int[Array, "B T"]:
    """Bottom-right alignment: token t of a row of length L sits at position L - T + t."""
    return length[:, None] - num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)
