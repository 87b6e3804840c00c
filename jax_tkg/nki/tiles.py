"""Key tiles of the decode kernel: which keys are processed at once, and where they lie."""

from dataclasses import dataclass, replace

from jax_tkg.nki.dialect import nl
from jax_tkg.nki.packing import Packing, columns_of_bank
from jax_tkg.nki.rows import PARTITIONS

PAGED_RUN = 32
"""Most slots that a gather reads at once: with Hv = 128, 4 KiB of 8-bit values saturate DMA."""

LEAST_RUN = 8
"""Fewest that are worth a descriptor where a page has as many and there is more to read."""

BUSY_BYTES = 3072
"""Of a run of keys: with fewer, GpSimd is well behind DMA, which moves 4 KiB runs as fast."""

GATHER_ROWS = 16
"""A gather that transposes takes a multiple of so many partitions: some may be of no use."""


@dataclass(frozen=True)
class Runs(nl.NKIObject):
    """Slots of a page that a gather reads at once; 0 where there are no pages.

    Attributes:
        long: of most gathers; tiles start at a multiple.
        short: of the last ones of a tile, for what fills no 128 long runs: a divisor.
        together: gathers of transposed keys that are made at once; of values a gather fills each
            partition once.
    """

    long: int
    short: int
    together: int


NO_RUNS = Runs(0, 0, 1)


LOGIT_BANKS = 4
"""Banks of PSUM for the logits of cached keys in a tile: half of all. Each holds whole columns."""

END_ELEMENTS = 2048
"""Values that a partition reads last, by themselves: 16-bit ones saturate DMA."""


@dataclass(frozen=True)
class Piece(nl.NKIObject):
    """Keys that fill some columns of the logits of a tile.

    Partition p holds keys start + p * subtiles + j in column `column` + j, so that what it loads is
    contiguous. In two halves, it holds of half h keys start + h * keys / 2 + p * subtiles / 2 + j
    in column `column` + 2 * j + h.

    Attributes:
        start: first key, counted from the tile's first slot, or among the new keys.
        partitions: that hold keys.
        subtiles: keys in each.
        column: first one.
        keys: how many.
        is_new: these are new keys beside the cache.
        run: of these subtiles, how many a gather from pages reads at once; 0: there are none.
        gathers: how many fill it.
        gather: number of the first one in the tile.
        stride: from a column of transposed keys to the next; see `GATHER_ROWS`.
        together: gathers of transposed keys that are made at once.
        halves: 1 or 2.
    """

    start: int
    partitions: int
    subtiles: int
    column: int
    keys: int
    is_new: bool
    run: int
    gathers: int
    gather: int
    stride: int
    together: int
    halves: int = 1


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
        key_columns: cached columns whose logits a matmul makes at once, 1 or 2. Not 2 where a key
            may be NaN that some row does not see: 0 * NaN is NaN, in the other column.
        value_columns: cached columns whose values a matmul takes at once, 1 or 2; the last one of a
            piece may be alone, but not of the first.
        apart: columns of the first piece, its last ones, whose values come in a DMA of their own
            for the last pair; 0 where all come in one.
    """

    start: int
    cached: tuple[Piece, ...]
    new: tuple[Piece, ...]
    keys: int
    cached_columns: int
    columns: int
    is_masked: bool
    is_dirty: bool
    key_columns: int
    value_columns: int
    apart: int = 0


def key_tile(
    start: int,
    keys: int,
    runs: Runs,
    new: int,
    packing: Packing,
    *,
    is_masked: bool,
    is_dirty: bool,
) -> KeyTile:
    """A tile of so many slots and new keys; for `runs` see `cache_pieces`."""
    cached = cache_pieces(keys, runs)
    columns = sum(p.subtiles for p in cached)
    beside = new_pieces(new, columns)
    every = columns + len(beside)
    in_twos = columns >= packing.keys_from and all(p.subtiles % 2 == 0 for p in cached)
    mixes = not is_dirty and (packing.keys_where_masked or not is_masked)
    in_twos = in_twos and mixes
    if in_twos and packing.in_halves:
        cached = (replace(cached[0], halves=2),)
    return KeyTile(
        start, cached, beside, keys, columns, every, is_masked, is_dirty,
        key_columns=2 if in_twos else 1,
        value_columns=2 if columns > 0 and cached[0].subtiles >= packing.values_from else 1,
    )  # fmt: skip


def ending(tile: KeyTile, value_head_dim: int) -> KeyTile:
    """The same tile where no other follows: most products need not wait for the last values.

    These are as few as still load at full speed. Pages come in gathers, and halves by themselves.
    """
    columns = -(-END_ELEMENTS // value_head_dim)
    first = tile.cached[0] if tile.cached else None
    if first is None or first.run or first.halves > 1 or first.subtiles < 2 * columns:
        return tile
    return replace(tile, apart=columns)


def columns_of(rows: int, head_dim: int, max_keys: int) -> int:
    """Most columns of cached keys in a tile whose logits have so many rows."""
    return max(1, min(max_keys // PARTITIONS, LOGIT_BANKS * columns_of_bank(head_dim, rows)))


def choose_runs(
    page_len: int, most: int, slots: int, live: int | None, head_dim: int, key_bytes: int
) -> Runs:
    """The runs that pages of so many slots are read in; `live` slots of a loop, None without one.

    Keys wider than the partitions are gathered chunk by chunk, each gather by itself.
    """
    if live is None:
        runs = paged_runs(page_len, most, slots)
    else:
        runs = live_runs(page_len, most, slots, live)
    return runs if head_dim > PARTITIONS else with_time(runs, slots, head_dim * key_bytes)


def paged_runs(page_len: int, most: int, slots: int) -> Runs:
    """The runs that pages of so many slots are read in, in tiles of up to `most` columns.

    So that the `slots` of a program fill the fewest columns of 128 partitions, as each costs the
    Tensor engine the same however few it holds, and of these by the fewest gathers, as GpSimd makes
    the descriptors of each.
    """
    divisors = [n for n in range(1, min(PAGED_RUN, most) + 1) if page_len % n == 0]
    return min(_pairs(divisors), key=lambda runs: _columns_and_gathers(slots, runs))


def live_runs(page_len: int, most: int, slots: int, live: int) -> Runs:
    """The same for tiles placed at run time, which fill all partitions: over `live` of `slots`.

    Where a gather of shorter runs than `LEAST_RUN` has all that is live, wherever it starts, they
    are as good as longer ones: fewer slots are read in vain.
    """
    divisors = [n for n in range(1, min(PAGED_RUN, most) + 1) if page_len % n == 0]
    every = [Runs(n, n, 1) for n in divisors if PARTITIONS * n >= whole_runs(live, n)]
    every += _pairs(divisors)
    fit = [runs for runs in every if PARTITIONS * runs.short <= slots] or every[-1:]
    return min(fit, key=lambda r: _columns_and_gathers(min(slots, whole_runs(live, r.long)), r))


def _pairs(divisors: list[int]) -> list[Runs]:
    long = [n for n in divisors if n >= LEAST_RUN] or divisors[-1:]
    return [Runs(a, b, 1) for a in long for b in long if a % b == PARTITIONS * b % a == 0]


def with_time(runs: Runs, slots: int, slot_bytes: int) -> Runs:
    """The same runs, two gathers of keys at once where GpSimd would be behind DMA otherwise.

    Two fifths of its time for a gather of 128 runs do not depend on these, and come once for two.
    But the first keys then arrive later.
    """
    pieces = cache_pieces(-(-slots // runs.long) * runs.long, runs)
    runs_read = PARTITIONS * sum(p.gathers for p in pieces)
    return replace(runs, together=2) if slots * slot_bytes < BUSY_BYTES * runs_read else runs


def whole_runs(live: int, run: int) -> int:
    """At most so many slots are read for `live` ones in whole runs, wherever they start."""
    return live + 2 * (run - 1)


def _columns_and_gathers(slots: int, runs: Runs) -> tuple[int, int, int]:
    """What a choice of runs is judged by; among equals the longest short runs."""
    pieces = cache_pieces(-(-slots // runs.long) * runs.long, runs)
    return sum(p.subtiles for p in pieces), sum(p.gathers for p in pieces), -runs.short


def piece(
    start: int,
    partitions: int,
    subtiles: int,
    column: int,
    *,
    run: int = 0,
    gather: int = 0,
    together: int = 1,
) -> Piece:
    """A piece of partitions * subtiles cached keys."""
    return Piece(
        start,
        partitions,
        subtiles,
        column,
        keys=partitions * subtiles,
        is_new=False,
        run=run,
        gathers=subtiles // run if run else 0,
        gather=gather,
        stride=-(-partitions // GATHER_ROWS) * GATHER_ROWS if run else partitions,
        together=together,
    )


def column_of(some: Piece, j: int) -> int:
    """Where the keys of column j of a piece lie among its transposed keys, which gathers wrote.

    Those of gathers made at once take turns.
    """
    block = max(1, some.run) * some.together
    first = j // block * block
    gathers = min(some.together, (some.subtiles - first) // max(1, some.run))
    return first + (j - first) % max(1, some.run) * gathers + (j - first) // max(1, some.run)


def cache_pieces(keys: int, runs: Runs) -> tuple[Piece, ...]:
    """Pieces of so many slots: as many for every partition as there are, then what is left.

    From pages a partition reads whole runs: long ones, then short ones. Without pages and with
    equal runs there is nothing between.
    """
    pieces: list[Piece] = []
    start = column = gather = 0
    for run in (runs.long, runs.short):
        unit = run or 1
        subtiles = (keys - start) // (PARTITIONS * unit) * unit
        if subtiles:
            gathered = {"run": run, "gather": gather, "together": runs.together}
            pieces.append(piece(start, PARTITIONS, subtiles, column, **gathered))
            start, column = start + PARTITIONS * subtiles, column + subtiles
            gather += subtiles // unit
    unit = runs.short or 1
    if keys > start:
        left = (keys - start) // unit
        pieces.append(piece(start, left, unit, column, run=runs.short, gather=gather))
    return tuple(pieces)


def new_pieces(tokens: int, column: int) -> tuple[Piece, ...]:
    """Pieces of the new keys: partition p holds one."""
    pieces = []
    for i, start in enumerate(range(0, tokens, PARTITIONS)):
        count = min(PARTITIONS, tokens - start)
        pieces.append(Piece(start, count, 1, column + i, count, True, 0, 0, 0, count, 1))
    return tuple(pieces)


def key_tiles(
    first: int,
    end: int,
    most: int,
    runs: Runs,
    new: int,
    packing: Packing,
    *,
    is_masked: bool,
    is_dirty: bool,
) -> tuple[KeyTile, ...]:
    """Tiles of nearly equal size over slots `first` to `end`; the new keys join the last.

    Both are multiples of the long run, see `cache_pieces`; a tile has up to `most` subtiles.
    """
    masks = {"is_masked": is_masked, "is_dirty": is_dirty}
    unit = PARTITIONS * (runs.long or 1)
    units, column = -(-(end - first) // unit), PARTITIONS * (runs.short or 1)
    if units == 0:
        alone = key_tile(first, 0, runs, new, packing, **masks)
        return (alone,) if new else ()
    for count in range(1, units + 1):
        starts = [first + units * i // count * unit for i in range(count)]
        ends = [*starts[1:], end]
        largest = max(b - a for a, b in zip(starts, ends, strict=True))
        if -(-largest // column) * (runs.short or 1) <= most:
            break
    return tuple(
        key_tile(a, b - a, runs, new if b == end else 0, packing, **masks)
        for a, b in zip(starts, ends, strict=True)
    )
