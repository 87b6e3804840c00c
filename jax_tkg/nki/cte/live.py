"""Which tiles of the cache each group of row blocks visits: from the bounds, on the device."""

import jax.numpy as jnp

from jax_tkg._typing import Array
from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.tiles import RowBlock, whole_tile


def live_ranges(low: Array, high: Array, plan: PrefillPlan) -> Array:
    """The first live tile that is visited and the one behind the last: see `Inputs.live`.

    Loops go alike on all programs: where one has less to see it visits more tiles than it needs,
    which are masked.

    Args:
        low: int `[B, T]`: token t of row b sees slots low <= s < high.
        high: see `low`.
        plan: with live tiles.
    """
    size, tiles = whole_tile(plan.sources[0], plan.tile_keys).keys, plan.live_tiles
    of_programs = []
    for share in plan.shares:
        row = jnp.array([pair // plan.kv_heads for pair in share.pairs])
        ranges = [_range(low, high, blocks, size, tiles)[row] for blocks in share.groups]
        of_programs.append(jnp.stack(ranges, axis=1))
    found = jnp.stack(of_programs)
    first, count = found[..., 0], jnp.max(found[..., 1] - found[..., 0], axis=0, keepdims=True)
    first = jnp.minimum(first, tiles - count)
    return jnp.stack([first, first + count], axis=-1).astype(jnp.int32)


def _range(low: Array, high: Array, blocks: tuple[RowBlock, ...], size: int, tiles: int) -> Array:
    """First and end `[B, 2]` of the tiles in which some token of a group sees something."""
    spans = sorted({(block.first_token, block.tokens) for block in blocks})
    tokens = [t for first, count in spans for t in range(first, first + count)]
    if len(tokens) < low.shape[1]:
        low, high = low[:, jnp.array(tokens)], high[:, jnp.array(tokens)]
    low, high = jnp.clip(low, 0, tiles * size), jnp.clip(high, 0, tiles * size)
    sees = low < high
    first = jnp.min(jnp.where(sees, low, tiles * size), axis=1) // size
    end = -(-jnp.max(jnp.where(sees, high, 0), axis=1) // size)
    first = jnp.minimum(first, end)
    return jnp.stack([first, end], axis=1)


def tile_starts(plan: PrefillPlan) -> Array:
    """The first slot of each live tile, float32."""
    size = whole_tile(plan.sources[0], plan.tile_keys).keys
    return jnp.arange(plan.live_tiles, dtype=jnp.float32) * size
