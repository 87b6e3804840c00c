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


@dataclass(frozen=True)
class Window:
    """Positions a query sees around its own, both ends inclusive; None is unbounded.

    A Mistral-style window of w keys (the query's own and the w - 1 before it) is `Window(w - 1,
    0)`.
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for side, value in (("left", self.left), ("right", self.right)):
            if value is not None and value < 0:
                raise ValueError(f"local_window_size: {side} must be >= 0 or None, got {value}.")


@dataclass(frozen=True)
class PositionRule:
    """The static part of a mask: which comparisons of positions it makes."""

    causal: bool
    window: Window | None

    def visible(
        self,
        query_position: Int[Array, "..."],
        key_position: Int[Array, "..."],
        start: Int[Array, "..."],
        length: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """Whether each query sees each key; all arguments broadcast.

        A key is live at positions `start <= key < length`, and never at a negative one.
        """
        seen = (key_position >= jnp.maximum(start, 0)) & (key_position < length)
        if self.causal:
            seen &= key_position <= query_position
        if self.window is not None:
            if self.window.left is not None:
                seen &= key_position >= query_position - self.window.left
            if self.window.right is not None:
                seen &= key_position <= query_position + self.window.right
        return seen

    def seen_by_all(
        self,
        query_position: Int[Array, "B T"],
        start: Int[Array, " B"],
        length: Int[Array, " B"],
    ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """The range of positions, end exclusive, that every query of the row sees."""
        first, end = jnp.maximum(start, 0), length
        earliest, latest = jnp.min(query_position, axis=1), jnp.max(query_position, axis=1)
        if self.causal:
            end = jnp.minimum(end, earliest + 1)
        if self.window is not None:
            if self.window.left is not None:
                first = jnp.maximum(first, latest - self.window.left)
            if self.window.right is not None:
                end = jnp.minimum(end, earliest + self.window.right + 1)
        return first, jnp.maximum(first, end)

    def first_visible(
        self, query_position: Int[Array, "B T"], start: Int[Array, " B"]
    ) -> Int[Array, " B"]:
        """The lowest position that any query of the row can see: where a loop may begin."""
        first = jnp.maximum(start, 0)
        if self.window is None or self.window.left is None:
            return first
        earliest = jnp.min(jnp.maximum(query_position, 0), axis=1) - self.window.left
        return jnp.maximum(first, earliest)


def default_query_positions(length: Int[Array, " B"], num_tokens: int) -> Int[Array, "B T"]:
    """Bottom-right alignment: token t of a row of length L sits at position L - T + t."""
    return length[:, None] - num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)
