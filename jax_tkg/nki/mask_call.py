"""The mask kernel from JAX, interpreted on the CPU."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_tkg._typing import Array, Float, Int

if TYPE_CHECKING:
    from jax_tkg.nki.mask import MaskPlan


def visibility(
    bounds: Float[Array, "2 B T"],
    kv_len: int,
    positions: Int[Array, "B S"] | None = None,
    *,
    by_key: bool,
    programs: int = 2,
) -> Array:
    """Which slots each token sees, by the NKI kernel in the interpreter.

    Args:
        bounds: token t of row b sees positions bounds[0] <= p < bounds[1], whole numbers below
            2^24 in magnitude.
        kv_len: slots S.
        positions: the position of each slot; None where slot s holds position s.
        by_key: the orientation of the result, and what lies on the partitions: keys or tokens.
        programs: 1, or 2 as on a logical core of two.

    Returns:
        uint8 `[B, S, T]` if `by_key`, else `[B, T, S]`; 1 where a token sees a slot.

    Raises:
        ValueError: if shapes do not match.
    """
    from jax_tkg.nki.interpret import interpret
    from jax_tkg.nki.mask import mask

    arrays, plan = mask_arguments(bounds, kv_len, positions, by_key=by_key, programs=programs)
    _, batch, tokens = bounds.shape
    shape = (batch, kv_len, tokens) if by_key else (batch, tokens, kv_len)
    result = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return interpret(mask, *arrays, result=result, programs=programs, static={"plan": plan})


def mask_arguments(
    bounds: Float[Array, "2 B T"],
    kv_len: int,
    positions: Int[Array, "B S"] | None,
    *,
    by_key: bool,
    programs: int,
) -> tuple[tuple[Array, ...], "MaskPlan"]:
    """The arrays of a launch in the kernel's order, and its plan; see `visibility`."""
    from jax_tkg.nki.mask import make_mask_plan

    if bounds.ndim != 3 or bounds.shape[0] != 2:
        raise ValueError(f"bounds must be [2, B, T]; got {bounds.shape}.")
    _, batch, tokens = bounds.shape
    arrays = [bounds.astype(jnp.float32)]
    if positions is not None:
        if positions.shape != (batch, kv_len):
            raise ValueError(
                f"positions must be [B, S] = ({batch}, {kv_len}); got {positions.shape}."
            )
        arrays.append(positions.astype(jnp.int32))
    return tuple(arrays), make_mask_plan(batch, tokens, kv_len, by_key, programs)
