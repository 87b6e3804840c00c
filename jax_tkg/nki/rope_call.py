"""The rotary kernel from JAX: its table, and `rotate`, interpreted on the CPU."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jax_tkg._typing import Array, Float, Int
from jax_tkg.rope import RotaryEmbedding

if TYPE_CHECKING:
    from jax_tkg.nki.rope import RopePlan


def rotary_table(rotary: RotaryEmbedding, head_dim: int) -> npt.NDArray[np.float32]:
    """What `jax_tkg.nki.rope` needs to know of the frequencies.

    Args:
        rotary: whose frequencies.
        head_dim: H.

    Returns:
        float32 `[2, 3, pairs]`: of the turns per token and of the turns per 2^11 tokens the
        fraction, as two integer digits of 11 bits and the rest in units of the second digit.
    """
    from jax_tkg.nki.rope import DIGIT

    turns = rotary.frequencies(head_dim) / (2 * np.pi)
    rows = []
    for fraction in (turns % 1.0, turns * DIGIT % 1.0):
        first = np.floor(fraction * DIGIT)
        below = fraction * DIGIT - first
        second = np.floor(below * DIGIT)
        rows.append([first, second, below * DIGIT - second])
    return np.array(rows, np.float32)


def rotate(
    rotary: RotaryEmbedding,
    x: Float[Array, "B T heads H"],
    positions: Int[Array, "B T"],
    *,
    programs: int = 2,
) -> Float[Array, "B T heads H"]:
    """`rotary(x, positions)` by the NKI kernel in the interpreter, on the CPU.

    Args:
        rotary: frequencies and order of channels.
        x: queries or keys.
        positions: integers in [-2^20, 2^20].
        programs: 1, or 2 as on a logical core of two.

    Returns:
        Shape and dtype of `x`, computed in float32 and rounded once.

    Raises:
        ValueError: if shapes do not match, or `rotary_dim` does not fit the head.
        TypeError: if `positions` is not an integer array, or `x` not a float array.
    """
    from jax_tkg.nki.interpret import interpret
    from jax_tkg.nki.rope import rope

    arrays, plan = rope_arguments(rotary, x, positions)
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return interpret(rope, *arrays, result=result, programs=programs, static={"plan": plan})


def rope_arguments(
    rotary: RotaryEmbedding, x: Float[Array, "B T heads H"], positions: Int[Array, "B T"]
) -> tuple[tuple[Array, ...], "RopePlan"]:
    """The arrays of a launch in the kernel's order, and its plan; see `rotate`."""
    from jax_tkg.nki.rope import RopePlan

    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(
            f"positions must be integers, got {positions.dtype}: pass positions.astype(jnp.int32)."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a float array, got {x.dtype}.")
    if x.ndim != 4 or positions.shape != x.shape[:2]:
        raise ValueError(
            "x must be [B, T, heads, H] with positions [B, T] of the same B and T; got x "
            f"{x.shape} and positions {positions.shape}."
        )
    table = jnp.asarray(rotary_table(rotary, x.shape[3]))
    return (x, positions.astype(jnp.int32), table), RopePlan(rotary.interleaved)
