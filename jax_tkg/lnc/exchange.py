"""What two programs tell each other: `lax.ppermute` where the kernel has `sendrecv`."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Float
from jax_tkg.softmax import SoftmaxState

AXIS = "lnc"
"""The axis over a launch's programs, of size 2."""

WIDTH = 128
"""Channels of the values whose rows an exchange packs side by side: partitions of a core."""


def swap(mine: Array, axis: str, rows: int | None = None) -> Array:
    """The other program's array, of which the first axis is rows; it gets this one.

    In as many exchanges as the kernel makes of so many float32 columns, by default one a row.
    """
    from jax_tkg.nki.rows import BLOCK_ROWS

    pieces = -(-(mine.shape[0] if rows is None else rows) // BLOCK_ROWS)
    sent = [lax.ppermute(x, axis, ((0, 1), (1, 0))) for x in jnp.array_split(mine, pieces)]
    return jnp.concatenate(sent) if pieces > 1 else sent[0]


def in_order(mine: Array, theirs: Array, axis: str) -> tuple[Array, Array]:
    """Program 0's array and program 1's: what is computed of them has the same bits in both.

    Commutativity would not do: a compiler may fuse one of the two products of a weighted sum with
    the addition, and round the other.
    """
    is_first = lax.axis_index(axis) == 0
    return jnp.where(is_first, mine, theirs), jnp.where(is_first, theirs, mine)


def update_together(
    state: SoftmaxState,
    logits: Float[Array, "..."],
    weigh_values: Callable[[Array], Array],
    axis: str,
) -> SoftmaxState:
    """As `SoftmaxState.update`, maximum and sum over the keys of both programs; two exchanges.

    The output stays that of the own keys, relative to the common maximum.
    """

    def swapped(mine: Array) -> Array:
        return swap(mine.reshape(-1), axis).reshape(mine.shape)

    def agree(peak: Array) -> Array:
        return jnp.maximum(peak, swapped(peak))

    nothing = replace(state, sum=jnp.zeros_like(state.sum), output=jnp.zeros_like(state.output))
    tile = nothing.update(logits, weigh_values, agree)
    first, second = in_order(tile.sum, swapped(tile.sum), axis)
    decay = jnp.exp(state.max - tile.max)
    return replace(
        state,
        max=tile.max,
        sum=state.sum * decay + (first + second),
        output=state.output * decay[..., None] + tile.output,
    )


def merge_programs(state: SoftmaxState, axis: str, *, is_together: bool) -> SoftmaxState:
    """The state over the keys of both programs, the same bits in both.

    Args:
        state: of rows `[R]`.
        axis: name of the axis over programs.
        is_together: maximum and sum are common already (`update_together`): one exchange, of the
            output, is left of three.
    """
    wide = -(-state.output.shape[-1] // WIDTH) * state.max.shape[0]
    outputs = in_order(state.output, swap(state.output, axis, wide), axis)
    if is_together:
        return replace(state, output=outputs[0] + outputs[1])
    maxima = in_order(state.max, swap(state.max, axis), axis)
    sums = in_order(state.sum, swap(state.sum, axis), axis)
    first, second = (
        SoftmaxState(*parts, state.key_axis) for parts in zip(maxima, sums, outputs, strict=True)
    )
    return first.merge(second)
