"""Which tiles of the cache each group of row blocks visits: from the bounds, on the device."""

import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array
from jax_tkg.nki.cte.plan import PrefillPlan, loop_end
from jax_tkg.nki.cte.tiles import KeySource, RowBlock, whole_tile


def live_ranges(low: Array, high: Array, plan: PrefillPlan, source: KeySource) -> Array:
    """The first live tile that is visited and the one behind the last: see `SourceArrays.live`.

    Loops go alike on all programs: where one has less to see it visits more tiles than it needs,
    which are masked. Those of a diagonal source end with what all rows of a round see.

    Args:
        low: int `[B, T]`: token t of row b sees slots low <= s < high.
        high: see `low`.
        plan: whose groups see them.
        source: of the plan, with live tiles.
    """
    size, tiles = whole_tile(source, plan.tile_keys).keys, source.live_tiles
    if source.is_diagonal:
        return _of_diagonal(plan, source, size)
    low, high = jnp.clip(low, 0, tiles * size), jnp.clip(high, 0, tiles * size)
    of_programs = []
    for share in plan.shares:
        row = jnp.array([pair // plan.kv_heads for pair in share.pairs])
        rounds = [_of_rounds(low, high, blocks, plan.rounds) for blocks in share.looped]
        ranges = []
        if rounds:
            of_rounds = jnp.stack([_range(*x, size)[row] for x in rounds], axis=2)
            ranges.append(of_rounds.reshape(len(row), -1, 2))
        others = [_range(*_of(low, high, blocks), size)[row] for blocks in share.groups]
        ranges += [found[:, None] for found in others]
        of_programs.append(jnp.concatenate(ranges, axis=1))
    found = jnp.stack(of_programs)
    first, count = found[..., 0], jnp.max(found[..., 1] - found[..., 0], axis=0, keepdims=True)
    first = jnp.minimum(first, tiles - count)
    return jnp.stack([first, first + count], axis=-1).astype(jnp.int32)


def _of_diagonal(plan: PrefillPlan, source: KeySource, size: int) -> Array:
    """Likewise: it follows from the round alone."""
    of_programs = []
    for share in plan.shares:
        starts = np.arange(plan.rounds)[:, None] * plan.stride
        ends = starts + np.array([[loop_end(plan, source, blocks[0]) for blocks in share.looped]])
        others = [loop_end(plan, source, blocks[0]) for blocks in share.groups]
        behind = np.concatenate([ends.reshape(-1), np.array(others)]) // size
        ranges = np.stack([np.zeros_like(behind), behind], axis=-1).astype(np.int32)
        of_programs.append(np.broadcast_to(ranges, (len(share.pairs), *ranges.shape)))
    return jnp.array(np.stack(of_programs))


def _tokens(blocks: tuple[RowBlock, ...]) -> list[int]:
    spans = sorted({(block.first_token, block.tokens) for block in blocks})
    return [t for first, count in spans for t in range(first, first + count)]


def _of(low: Array, high: Array, blocks: tuple[RowBlock, ...]) -> tuple[Array, Array]:
    """Those of the tokens of a group, `[B, t]`."""
    tokens = _tokens(blocks)
    if len(tokens) == low.shape[1]:
        return low, high
    return low[:, jnp.array(tokens)], high[:, jnp.array(tokens)]


def _of_rounds(
    low: Array, high: Array, blocks: tuple[RowBlock, ...], rounds: int
) -> tuple[Array, Array]:
    """Those of the tokens of a looped group, `[B, rounds, t]`."""
    tokens, stride = jnp.array(_tokens(blocks)), blocks[0].stride
    shape = (low.shape[0], rounds, stride)
    low, high = (x[:, : rounds * stride].reshape(shape)[:, :, tokens] for x in (low, high))
    return low, high


def _range(low: Array, high: Array, size: int) -> Array:
    """First and end `[..., 2]` of the tiles in which some of the last axis sees something."""
    sees = low < high
    nowhere = jnp.iinfo(jnp.int32).max // 2
    end = -(-jnp.max(jnp.where(sees, high, 0), axis=-1) // size)
    first = jnp.min(jnp.where(sees, low, nowhere), axis=-1) // size
    return jnp.stack([jnp.minimum(first, end), end], axis=-1)


def tile_starts(plan: PrefillPlan, source: KeySource) -> Array:
    """The first slot of each live tile of a source, float32."""
    size = whole_tile(source, plan.tile_keys).keys
    return jnp.arange(source.live_tiles, dtype=jnp.float32) * size
