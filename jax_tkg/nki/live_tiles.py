"""Where a loop over live tiles goes: computed from lengths and windows, on the device, in JAX."""

import jax.numpy as jnp

from jax_tkg._typing import Array
from jax_tkg.nki.plan import LiveTiles

NEVER = 1 << 23
"""A slot behind all others; exact in float32."""


def place_live_tiles(
    low: Array,
    high: Array,
    usable: Array | None,
    slots: int,
    live: LiveTiles,
    programs: int,
    *,
    apart: bool = False,
) -> tuple[Array, Array]:
    """Tiles over the slots that some token of a sequence sees.

    They follow each other from the last live slot downwards; what is left is covered by one from
    the first live slot on, which counts only what is in no other. So a tile holds no dead slot
    unless fewer are live than it has (or pages do not let it start anywhere): then it is a dirty
    tile, and its dead values are cleared. Tiles in which every token sees every slot are full, all
    others edge tiles.

    Programs make equally many rounds. Those that share a sequence take turns: an odd full tile is
    treated as an edge tile, an odd edge tile leaves one program a round in which nothing counts.
    Where each has half of the sequences, the first of one goes along with the first of the other:
    they have the fewer full tiles of the two, and the more rounds.

    Token t of row b sees slots low[b, t] <= s < high[b, t] of S. The first slot of row b that has
    no page is usable[b]: only where there are live ones behind it do dead slots lie among them.
    `apart` says that tokens may see slots with dead ones between them, as given positions can.

    Returns:
        tiles and edges as in `Inputs`.
    """
    keys, unit = live.full.keys, live.unit
    low, high = low.astype(jnp.int32), jnp.minimum(high.astype(jnp.int32), slots)
    (first, end), (all_from, all_to) = _seen(low, high, slots)
    usable = jnp.full_like(end, slots) if usable is None else usable
    all_to = jnp.minimum(all_to, usable)
    bottom, top = first // unit * unit, -(-end // unit) * unit

    whole = (top - bottom) // keys
    tiles = -(-(top - bottom) // keys)
    behind = jnp.clip(-(-(top - all_to) // keys), 0, whole)
    full = jnp.clip((top - all_from) // keys - behind, 0, whole - behind)
    if live.sharers < programs:
        full = jnp.minimum(full, _other_programs(full))
    full_rounds = full // live.sharers
    taken = full_rounds * live.sharers
    others = tiles - taken
    rounds = -(-others // live.sharers)
    is_dirty = (whole == 0) | (bottom < first) | (top > end) | (usable < end)
    if apart:
        is_dirty |= _have_gaps(low, high, end)
    if live.sharers < programs:
        rounds = jnp.maximum(rounds, _other_programs(rounds))
        is_dirty |= _other_programs(is_dirty)
    every = full_rounds + rounds
    ends = jnp.stack([full_rounds, jnp.where(is_dirty, full_rounds, every), every], axis=-1)

    def per_row(x: Array) -> Array:
        return x[None, :, None]

    turn = jnp.arange(live.width, dtype=jnp.int32) * live.sharers
    turn = turn[None, None] + jnp.arange(live.sharers, dtype=jnp.int32)[:, None, None]
    beside = turn - per_row(taken)  # among those that are not full
    counts_at_all = beside < per_row(others)
    number = jnp.clip(beside, 0, per_row(jnp.maximum(others - 1, 0)))
    number += jnp.where(number < per_row(behind), 0, per_row(taken))
    is_last = number >= per_row(whole)
    covered = per_row(top - whole * keys)
    start = jnp.where(is_last, per_row(bottom), per_row(top) - (number + 1) * keys)
    start = jnp.clip(start, 0, slots - keys)
    behind_counted = jnp.where(is_last, covered, NEVER)
    behind_counted = jnp.where(counts_at_all, behind_counted, 0)
    full_start = jnp.clip(per_row(top) - (per_row(behind) + turn + 1) * keys, 0, slots - keys)
    start = jnp.where(beside < 0, full_start, start)
    ends = jnp.broadcast_to(ends, (live.sharers, *ends.shape))
    tiles = jnp.concatenate([ends, start // unit], axis=2).astype(jnp.int32)
    edges = jnp.stack([start, behind_counted], axis=2).astype(jnp.float32)
    every_program = (programs, *tiles.shape[1:]), (programs, *edges.shape[1:])
    return jnp.broadcast_to(tiles, every_program[0]), jnp.broadcast_to(edges, every_program[1])


def _seen(low: Array, high: Array, slots: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(first, end) of the slots that some token of a row sees, and of those that every one sees."""
    sees = low < high
    end = jnp.max(jnp.where(sees, high, 0), axis=1)
    first = jnp.minimum(jnp.min(jnp.where(sees, low, slots), axis=1), end)
    all_from = jnp.max(jnp.where(sees, low, slots), axis=1)
    return (first, end), (all_from, jnp.min(jnp.where(sees, high, 0), axis=1))


def _other_programs(of_rows: Array) -> Array:
    """`[B]`, of each row that of the row which the other of two programs has at the same time."""
    return jnp.roll(of_rows, of_rows.shape[0] // 2)


def _have_gaps(low: Array, high: Array, end: Array) -> Array:
    """Rows, bool `[B]`, in which slots that no token sees lie between slots that some do.

    Then one of them is where some token has just stopped seeing.
    """
    behind = high[:, :, None]
    seen = jnp.any((low[:, None] <= behind) & (behind < high[:, None]), axis=2)
    return jnp.any((low < high) & (high < end[:, None]) & ~seen, axis=1)
