"""Devices that attended to different keys of the same rows merge what they found."""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array
from jax_tkg.sharding.division import Division
from jax_tkg.softmax import LOWEST, SoftmaxState


def merge_parts(
    division: Division, results: tuple[Array, ...], sinks: Array | None
) -> tuple[Array, ...]:
    """The results of whole rows, the same on all devices that share them.

    Args:
        division: how the call is divided; called inside its mapped axes.
        results: those of a device's local problem.
        sinks: `[B|1, N]` of the device, or None.
    """
    state = _over_devices(_state(division, results), division.key_parts)
    if sinks is not None:
        state = state.add_sink(sinks[:, None])
    whole = division.whole
    found = state.finalize() if whole.normalize else (state.output, state.max, state.sum)
    return found[0].astype(whole.out_dtype), *found[1:]


def _state(division: Division, results: tuple[Array, ...]) -> SoftmaxState:
    if not division.whole.normalize:
        output, peak, total = results
        return SoftmaxState(max=peak, sum=total, output=output)
    # What is divided by its sum has the sum 1, relative to its log-sum-exp.
    out, lse = results
    seen = (lse > -jnp.inf).astype(jnp.float32)
    return SoftmaxState(max=jnp.maximum(lse, LOWEST), sum=seen, output=out)


def _over_devices(state: SoftmaxState, axes: tuple[str, ...]) -> SoftmaxState:
    """Two exchanges: of the maximum, and of all that is summed."""
    top = lax.pmax(state.max, axes)
    packed = jnp.concatenate([state.output, state.sum[..., None]], axis=-1)
    total = lax.psum(packed * jnp.exp(state.max - top)[..., None], axes)
    return replace(state, max=top, sum=total[..., -1], output=total[..., :-1])
