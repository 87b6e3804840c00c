"""Key tiles of the decode kernel: which keys are processed at once, and where they lie."""

import math
from dataclasses import dataclass

from jax_tkg.nki.dialect import nl
from jax_tkg.nki.rows import PARTITIONS

PAGED_RUN = 16
"""Most slots that a gather reads at once: with Hv = 128 in 16 bits, 4 KiB saturate DMA."""

LEAST_RUN = 8
"""Fewest that are worth a descriptor, and a gather that transposes, where a page has as many."""


@dataclass(frozen=True)
class Piece(nl.NKIObject):
    """Keys that fill some columns of the logits of a tile.

    Partition p holds keys start + p * subtiles + j in column `column` + j, so that what it loads is
    contiguous.

    Attributes:
        start: first key, counted from the tile's first slot, or among the new keys.
        partitions: that hold keys.
        subtiles: keys in each.
        column: first one.
        keys: how many.
        is_new: these are new keys beside the cache.
    """

    start: int
    partitions: int
    subtiles: int
    column: int
    keys: int
    is_new: bool


@dataclass(frozen=True)
class KeyTile(nl.NKIObject):
    """Keys whose logits are in PSUM at once.

    Attributes:
        start: first slot; 0 where it is known at run time.
        cached: pieces of the cache.
        new: pieces of the new keys.
        keys: slots of the cache.
        cached_columns: columns of logits of the cache.
        columns: columns of logits.
        is_masked: some rows may not see some of its slots.
        is_dirty: slots that no row sees may hold anything, NaN too.
    """

    start: int
    cached: tuple[Piece, ...]
    new: tuple[Piece, ...]
    keys: int
    cached_columns: int
    columns: int
    is_masked: bool
    is_dirty: bool


def key_tile(
    start: int, keys: int, run: int, new: int, *, is_masked: bool, is_dirty: bool
) -> KeyTile:
    """A tile of so many slots and new keys; for `run` see `cache_pieces`."""
    cached = cache_pieces(keys, run)
    columns = sum(p.subtiles for p in cached)
    beside = new_pieces(new, columns)
    every = columns + len(beside)
    return KeyTile(start, cached, beside, keys, columns, every, is_masked, is_dirty)


def paged_run(page_len: int, most: int, slots: int) -> int:
    """Slots that a gather reads at once, of a page of so many.

    From `LEAST_RUN` to `PAGED_RUN` and a divisor of the page: so that a program's `slots` fill the
    fewest columns of 128 partitions, and of those the most.
    """
    runs = [n for n in range(1, min(PAGED_RUN, most) + 1) if page_len % n == 0]
    long = [n for n in runs if n >= LEAST_RUN] or runs[-1:]
    return min(long, key=lambda n: (math.ceil(slots / (PARTITIONS * n)) * n, -n))


def piece(
    start: int, partitions: int, subtiles: int, column: int, *, is_new: bool = False
) -> Piece:
    """A piece of partitions * subtiles keys."""
    return Piece(start, partitions, subtiles, column, partitions * subtiles, is_new)


def cache_pieces(keys: int, run: int) -> tuple[Piece, ...]:
    """Pieces of so many slots: as many for every partition as there are, then what is left.

    With a `run`, a partition holds whole runs of a page.
    """
    unit = run or 1
    subtiles = keys // (PARTITIONS * unit) * unit
    whole = PARTITIONS * subtiles
    pieces = [piece(0, PARTITIONS, subtiles, 0)] if subtiles else []
    if keys > whole:
        pieces.append(piece(whole, (keys - whole) // unit, unit, subtiles))
    return tuple(pieces)


def new_pieces(tokens: int, column: int) -> tuple[Piece, ...]:
    """Pieces of the new keys: partition p holds one."""
    return tuple(
        piece(start, min(PARTITIONS, tokens - start), 1, column + i, is_new=True)
        for i, start in enumerate(range(0, tokens, PARTITIONS))
    )


def key_tiles(
    first: int, end: int, most: int, run: int, new: int, *, is_masked: bool, is_dirty: bool
) -> tuple[KeyTile, ...]:
    """Tiles of equal size over slots `first` to `end`; the new keys join the last.

    Both are multiples of `run`, see `cache_pieces`; a tile has up to `most` subtiles.
    """
    unit = PARTITIONS * (run or 1)
    units = -(-(end - first) // unit)
    count = min(units, -(-units * (run or 1) // most))
    if count == 0:
        alone = key_tile(first, 0, run, new, is_masked=is_masked, is_dirty=is_dirty)
        return (alone,) if new else ()
    starts = [first + units * i // count * unit for i in range(count)]
    ends = [*starts[1:], end]
    return tuple(
        key_tile(a, b - a, run, new if b == end else 0, is_masked=is_masked, is_dirty=is_dirty)
        for a, b in zip(starts, ends, strict=True)
    )
