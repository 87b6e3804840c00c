"""What the kernel works on: arrays in HBM, tiles in SBUF and PSUM, in groups named by their use."""

from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.dialect import nl
from jax_tkg.nki.rows import PARTITIONS

LOWEST_MAX = -1.0e30
"""The running maximum before any key. A masked logit is far below, so that its weight is 0."""

MASKED = -3.0e38
"""A masked logit; finite, so that no difference of two is NaN."""

BITS, BOTH_BYTES = 8, 257
"""Of a byte; its first one in both bytes of a word."""

NOWHERE = 2.0**30
"""Added to the position of a slot that has no page: no row sees so far."""


@dataclass
class Inputs(nl.NKIObject):
    """The arrays of a launch, in HBM; None for what the problem does not have.

    Attributes:
        query: `[B, T, N, H]`; or in SBUF, `[H, B * N * T]` with H up to 128, in the order b, n, t.
        key, value: the cache in the plan's layout.
        constants: float32 `[programs, n]`: one after the other, what `KernelPlan.constants` names;
            for their meaning see `Constants`.
        positions: int32 `[B, S]`, position of each slot; None where slot s holds position s.
        page_rows: int32 `[B / b, S / n, b, K]`: of a paged cache, the row of every n slots, the
            plan's long run, in the pool seen as `[rows, n * H]`; -1 where there is no page. b are
            the sequences of every row group, or 1: what a partition reads is then one piece.
        short_rows: the same of the short runs, where the plan has others.
        new_key, new_value: `[B, T, K, H]` and `[B, T, K, Hv]` beside the cache; values that no
            token sees are finite.
        new_hidden: uint8 `[T, B, N|1, ceil(T / 8)]`, bit t % 8 of byte t // 8 is 1 where token t
            does not see a new key. Where those of all pairs are multiplied at once, uint8
            `[B, K, N / K|1, W]`: of the new key of a pair, which rows of its row group do not see
            it, a number for each pair there, as rows of other pairs do not; from 9 pairs on as
            bits, in words as in `hidden`.
        new_bias: float32 `[T, B * N * T]`, added to the logits of new keys; rows in the order b, n,
            t.
        rotary_table: of `jax_tkg.nki.rope_call.rotary_table`, where the kernel rotates.
        query_positions: int32 `[B, T]`, positions of the new tokens, likewise.
        sinks: float32 `[B|1, N]`.
        hidden: uint8 `[B|1 / b, S, b, N|1, 2 * ceil(T / 16)]`, or one byte for one token: a bit for
            each token, 1 where a dense mask hides a slot; bytes take turns, so that a word of two
            says of two tokens at once. b is 1, or the sequences of every row group: what a
            partition reads is then one run. With one token and b from 32 on, `[B / b, S, 1, N|1,
            2 * ceil(b / 16)]`, a bit for each sequence.
        bias: float32 `[B|1 / b, S, b, N|1, T|1]`, added to the logits.
        live_tiles: int32 `[programs, B, 3 + W]`: the round in which the full tiles of a sequence
            end, then its edge and its dirty ones; then where the tile of each round starts, in the
            plan's unit.
    """

    query: Any
    key: Any
    value: Any
    constants: Any
    positions: Any
    page_rows: Any
    short_rows: Any
    new_key: Any
    new_value: Any
    new_hidden: Any
    new_bias: Any
    rotary_table: Any
    query_positions: Any
    sinks: Any
    hidden: Any
    bias: Any
    live_tiles: Any


@dataclass
class KeySource(nl.NKIObject):
    """Where the cached keys and values of a pair lie.

    Attributes:
        keys: `[S, H]`, or `[H, S]` where they are transposed; or of a whole pool of pages.
        values: `[S, Hv]`, likewise.
        is_transposed: see `keys`.
        in_pairs: DMA transposes pairs of channels, see `turns_pairs`.
        rows: of a tile in a pool, int32 `[128, gathers]`: the row of each partition, in the pool as
            rows of the gather's run; else None.
    """

    keys: Any
    values: Any
    is_transposed: bool
    in_pairs: bool
    rows: Any


@dataclass
class Pages(nl.NKIObject):
    """Where a row group finds the cached keys of a tile in a pool of pages.

    Attributes:
        rows: int32 `[128, gathers, b, k]`: the row of each partition.
        holes: float32 `[128, gathers, b]`: `NOWHERE` where there is no page, else 0; None
            where that cannot be.
    """

    rows: Any
    holes: Any


@dataclass
class NewKeys(nl.NKIObject):
    """The new keys of a row group, one entry for each piece of them.

    Attributes:
        keys: lists of tiles `[h, pairs * keys]`, one for each of `channel_parts`.
        values: `[keys, pairs, Hv]`; or where all pairs are multiplied at once, lists of tiles
            `[hv, pairs]`, one for each chunk of 128 of Hv.
    """

    keys: Any
    values: Any


@dataclass
class RowBuffers(nl.NKIObject):
    """The queries of some rows and what was found so far.

    Attributes:
        query: one tile `[h, R]` for each of `jax_tkg.nki.steps.load.channel_parts`.
        query_pairs: `[128, 2, R]`, the queries of narrow heads for two keys, one below the other:
            for the first in the lower half of the partitions, for the second in the upper, 0 in
            the other one; or None.
        max: running maximum `[128, R]`, the same in every partition.
        sum: `[128, R]`, running sum of the keys that lie in each partition.
        output: one tile `[hv, R]` for each chunk of 128 of Hv, not yet divided by the sum.
        decay: what the last tile made of a weight 1 from before it, `[128, R]`.
        new_key: likewise `[h, pairs * keys]`, of the new keys that were transposed together with
            the queries; or None.
    """

    query: Any
    query_pairs: Any
    max: Any
    sum: Any
    output: Any
    decay: Any
    new_key: Any


@dataclass
class Waiting(nl.NKIObject):
    """Products of a tile that are not in the output of its rows yet.

    Whoever adds those of the last one later leaves the Vector engine to sums until the last values
    have arrived.

    Attributes:
        products: one tile `[hv, R]` for each chunk of 128 of Hv, in PSUM.
        bufs: the rows.
        is_first: their output holds nothing yet.
    """

    products: Any
    bufs: RowBuffers
    is_first: bool


@dataclass
class Logits(nl.NKIObject):
    """Logits of a tile in PSUM: keys on the partitions.

    Attributes:
        banks: tiles `[128, columns, R]`.
        per_bank: columns of each but the last.
    """

    banks: Any
    per_bank: int


@dataclass
class Place(nl.NKIObject):
    """Where the keys of a tile start.

    Attributes:
        start: in the cache: an int, or a register that counts in the plan's unit.
        first_slot: the same as a number, or as float32 in every partition `[128, 1]`.
        behind_counted: of a tile placed at run time, the first slot that does not count; else
            None.
    """

    start: Any
    first_slot: Any
    behind_counted: Any


@dataclass
class LiveTables(nl.NKIObject):
    """Where the live tiles of the sequences of a block are.

    Attributes:
        first_batch: the first sequence; the others follow.
        tiles: int32 `[1, sequences, 3 + W]`, as in `Inputs`.
        edges: float32 `[128, sequences, 2, W]`.
    """

    first_batch: int
    tiles: Any
    edges: Any


@dataclass
class Constants(nl.NKIObject):
    """Tiles that no step changes.

    Attributes:
        low, high: `[128, B, T]`: token t of row b sees positions low <= p < high of the cache;
            `[128, B, 1]` where all tokens see the same; or None.
        logit_scales: `[128, B * K]`, scale of the logits of each pair, with its keys' scale.
        value_scales: `[128, B * K]`, scale of the values of each pair; or None.
        live_edges: `[128, B, 2, W]`, of the tile of each round the first slot, and of those that
            are not full the first one that does not count; or None.
        bits: uint16 `[128, n]`, n up to 8, bit i of both bytes in column i, to pick from tables
            with a bit for each token or pair; None where there are none.
        ones: `[n, hv]`, 1 in the type of the queries, to add up n partitions in up to 128; or None.
        turns: of `load_turns`, or None.
        slots: float32 `[128, columns]`, the slot of each key of a tile of a loop that starts at 0;
            or None.
        live_tiles: int32 `[1, sequences of this program, 3 + W]`, as in `Inputs`; or None.
        first_pages: `Pages` of the first tile, if it is known and has any; or None.
    """

    low: Any
    high: Any
    logit_scales: Any
    value_scales: Any
    live_edges: Any
    bits: Any
    ones: Any
    turns: Any
    slots: Any
    live_tiles: Any
    first_pages: Any


def chunks(size: int) -> list[tuple[int, int]]:
    """(start, size) of the pieces of an axis that fit into the partitions."""
    pieces = []
    for start in range(0, size, PARTITIONS):
        pieces.append((start, min(PARTITIONS, size - start)))
    return pieces
