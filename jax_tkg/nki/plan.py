"""How the decode kernel divides a problem: rows into groups, keys into tiles, programs.

Pure Python, made before the launch and printable. The kernel loops over what is written here and
decides nothing itself.

Letters: B batch, T new tokens, S cache slots, N query heads, K KV heads, G = N / K, H head_dim, Hv
value head_dim. A pair is one KV head of one sequence; its M = G * T logit rows share its keys.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from jax_tkg.nki.choices import ONE_TILE_KEYS, choose_group_rows, loads_decide
from jax_tkg.nki.describe import describe, in_a_line
from jax_tkg.nki.dialect import nl
from jax_tkg.nki.packing import Packing, choose_packing
from jax_tkg.nki.programs import choose_sharding, pairs_of, slots_of
from jax_tkg.nki.rows import (
    GROUP_ROWS,
    PARTITIONS,
    RowBlock,
    RowGroup,
    blocks_of,
    row_groups,
)
from jax_tkg.nki.tiles import (
    NO_RUNS,
    KeyTile,
    Runs,
    choose_runs,
    columns_of,
    ending,
    key_tile,
    key_tiles,
    whole_runs,
)

MAX_KEYS = 8192
"""Keys of a tile: with H = 128 in 16 bits, 16 KiB of keys and of values in each partition."""

NARROW_KEYS = 12288
"""The same where H and Hv are 64 or less: of values, half as many bytes lie in a partition."""

PAGED_KEYS = 12288
"""The same of pages: they arrive in gathers of a run, so that large tiles wait for nothing."""

LOOP_COLUMNS = 16
"""Columns that a program's part of a paged cache must have for a loop."""

NEW_TOGETHER = 4
"""Pairs of a row group from which on their new keys are multiplied at once."""

WINDOW_FACTOR = 4
"""A cache of more windows than that is worth a loop, whatever its size."""

EXCHANGES = ("deferred", "every tile")
LOOPS = (None, "static", "runtime")


@dataclass(frozen=True)
class LiveTiles(nl.NKIObject):
    """A loop at run time over the tiles that hold live keys, wherever they start.

    Attributes:
        full: tile in which every row sees every key.
        edge: tile in which every key is seen by some row.
        dirty: tile in which some keys may be seen by none.
        last: these three for the last sequence of a block, see `ending`.
        unit: slots that a start counts in: 1, or the long run of a paged cache.
        width: rounds that a sequence takes at most, W of `Inputs.live_tiles`.
        sharers: programs that share the tiles of a sequence.
    """

    full: KeyTile
    edge: KeyTile
    dirty: KeyTile
    last: tuple[KeyTile, ...]
    unit: int
    width: int
    sharers: int


@dataclass(frozen=True)
class Share(nl.NKIObject):
    """What one program does.

    Attributes:
        blocks: of rows, one after the other.
        tiles: known before the launch.
        idle_tiles: how often it only takes part in the exchanges of the other program's tiles.
    """

    blocks: tuple[RowBlock, ...]
    tiles: tuple[KeyTile, ...]
    idle_tiles: int


@dataclass(frozen=True)
class Features(nl.NKIObject):
    """What the maths of a problem has, beside its sizes.

    Attributes:
        scale: factor of the logits.
        soft_cap: c of c * tanh(logit / c), or None.
        has_new_keys: the new keys come beside the cache.
        has_sinks: each head has a sink logit.
        has_positions: slots hold tokens at given positions.
        has_holes: a paged cache may lack pages, where no slot is seen.
        has_mask, has_bias: dense ones.
        has_scales: keys and values of each KV head have a scale.
        needs_mask: some row may not see some slot, by position.
        has_low: by position, a slot may also be too early.
        sees_alike: by position, all new tokens of a row see the same cached slots.
        rotary: the kernel rotates queries and new keys: "half" (channel i with i + pairs),
            "interleaved" (2i with 2i + 1) or None.
        is_ragged: which slots are live is known at run time only.
        clears_values: slots that no row sees may hold anything, NaN too, in keys and values.
        returns_lse: the kernel returns the log-sum-exp too; without it, it cannot rotate.
    """

    scale: float
    soft_cap: float | None = None
    has_new_keys: bool = False
    has_sinks: bool = False
    has_positions: bool = False
    has_holes: bool = False
    has_mask: bool = False
    has_bias: bool = False
    has_scales: bool = False
    needs_mask: bool = True
    has_low: bool = True
    sees_alike: bool = False
    rotary: str | None = None
    is_ragged: bool = False
    clears_values: bool = True
    returns_lse: bool = True


@dataclass(frozen=True)
class Numbers(nl.NKIObject):
    """Float32 numbers that every partition needs.

    Attributes:
        name: of a field of `jax_tkg.nki.buffers.Constants`, which says what they are.
        shape: there, behind the partitions.
        size: how many.
    """

    name: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class KernelPlan(nl.NKIObject):
    """Everything the kernel is built from but the arrays.

    Attributes:
        batch, tokens, slots, heads, kv_heads, head_dim, value_head_dim: B T S N K H Hv.
        layout: of the cache: BSKH, BKSH, BKHS (keys transposed) or paged.
        features: of the maths.
        programs: of the launch.
        sharding: "none", "batch" (sequences or pairs), "sequence" (keys) or "same" (both do all).
        exchange: "deferred" (three at the end) or "every tile" (two a tile and one).
        shares: one for each program.
        runs: slots that a gather reads at once from a paged cache.
        group: G.
        raw_unit: what a number of a tile is worth in logits after scales and soft cap.
        logit_unit: the same once a bias was added; see `shape_logits`.
        packing: from how many columns on tiles have two of them in a matmul, as narrow heads can.
        has_query_pairs: some tile has two columns of keys in a matmul: see `RowBuffers`.
        every_tile: programs agree on maximum and sum after every tile.
        new_keys_follow: in a loop, the new keys come after the first of several sequences.
        new_pairs: of the largest row group, if the new keys of all its pairs are multiplied at
            once, as those of one token are from `NEW_TOGETHER` pairs on; else 0.
        live: the loop over live tiles, or None where all tiles are known.
        constants: what is in `Inputs.constants`, in this order.
        reason: why this sharding.
        text: all this in a line.
        diagram: and for each program, with what they exchange: see `jax_tkg.nki.describe`.
    """

    batch: int
    tokens: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    layout: str
    features: Features
    programs: int
    sharding: str
    exchange: str
    shares: tuple[Share, ...]
    runs: Runs
    group: int
    raw_unit: float
    logit_unit: float
    packing: Packing
    has_query_pairs: bool
    every_tile: bool
    new_keys_follow: bool
    new_pairs: int
    live: LiveTiles | None
    constants: tuple[Numbers, ...]
    reason: str
    text: str
    diagram: str

    def __str__(self) -> str:
        """The line and the diagram."""
        return self.text + "\n" + self.diagram


def choose_loop(
    loop: str | None, features: Features, slots: int, programs: int, most_live: int, page_len: int
) -> bool:
    """Whether tiles are chosen at run time: they follow the live keys and not the bucket.

    `loop` says so unless it is None. Dense masks and given positions say nothing cheap about what
    is live. A small cache is not worth a loop, unless a window leaves most of it dead.
    """
    if loop is not None:
        return loop == "runtime"
    if slots <= PARTITIONS * programs * (LOOP_COLUMNS if page_len else 1):
        return False
    if not features.is_ragged or features.has_mask or features.has_bias or features.has_positions:
        return False
    return slots > ONE_TILE_KEYS * programs or slots > WINDOW_FACTOR * most_live


def make_plan(
    *,
    batch: int,
    tokens: int,
    slots: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    layout: str,
    features: Features,
    programs: int = 1,
    exchange: str = "deferred",
    loop: str | None = None,
    max_keys: int | None = None,
    most_live: int | None = None,
    page_len: int = 0,
    key_bytes: int = 2,
) -> KernelPlan:
    """Plans a problem; for the sizes see `KernelPlan`.

    Tiles hold up to `max_keys` keys, `MAX_KEYS` or `PAGED_KEYS` unless given, twice as many where
    `key_bytes`, of a number of a key that waits for its matmul, are 1; at most `most_live` of a
    sequence are live. `loop` says "static" or "runtime"; None chooses, see `choose_loop`.

    Raises:
        ValueError: if T is more than 512, or an option has no such value.
    """
    _check_options(exchange, loop, features)
    live_slots = slots if most_live is None else min(slots, most_live)
    is_loop = choose_loop(loop, features, slots, programs, live_slots, page_len)
    sharding, reason = choose_sharding(
        programs, batch, batch * kv_heads, batch * heads * tokens, slots, is_loop, live_slots
    )
    sharers, group = programs if sharding == "sequence" else 1, heads // kv_heads
    max_keys = max_keys or _most_keys(max(head_dim, value_head_dim), page_len) * 2 // key_bytes
    share, widths = math.ceil(slots / sharers), (head_dim, value_head_dim)
    ranges = [pairs_of(sharding, program, batch, kv_heads) for program in range(programs)]
    group_rows = GROUP_ROWS
    if not (is_loop or page_len):
        group_rows = choose_group_rows(ranges[0], group, tokens, share, max_keys, *widths)
    together = is_loop or sharding == "sequence"
    every = [row_groups(*mine, group, tokens, group_rows) for mine in ranges]
    blocks = [blocks_of(mine, group, value_head_dim, together=together) for mine in every]
    groups = [g for mine in blocks for b in mine for g in (b.sequences if is_loop else b.groups)]
    most = columns_of(max(g.rows for g in groups), head_dim, max_keys)
    if is_loop:  # whose tiles are equal
        share = math.ceil(share / math.ceil(share / (PARTITIONS * most)))
    runs = NO_RUNS
    if page_len:
        live_share = math.ceil(live_slots / sharers) if is_loop else None
        runs = choose_runs(page_len, most, share, live_share, head_dim, key_bytes)
    columns = math.ceil(min(share, live_slots) / PARTITIONS)
    packing = _packing(features, widths, layout, key_bytes, columns, groups)
    live = None
    if is_loop:
        live = _live_tiles(slots, live_slots, sharers, most, runs, packing, value_head_dim)
    known, by = 0 if is_loop else slots, (sharding, programs)
    tiles = _known_tiles(*by, known, tokens, most, runs, packing, value_head_dim, features)
    return _finished(
        features,
        live,
        blocks,
        tiles,
        batch=batch,
        tokens=tokens,
        slots=slots,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        layout=layout,
        programs=programs,
        sharding=sharding,
        exchange=exchange,
        reason=reason,
        runs=runs,
        packing=packing,
    )


def _finished(
    features: Features,
    live: LiveTiles | None,
    blocks: list[tuple[RowBlock, ...]],
    tiles: list[tuple[KeyTile, ...]],
    **given: Any,
) -> KernelPlan:
    """The plan of these blocks and tiles, with all that follows from what is `given`."""
    every_tile = given["sharding"] == "sequence" and given["exchange"] == "every tile"
    shares, raw_unit = _shares(blocks, tiles, every_tile), _raw_unit(features)
    group = given["heads"] // given["kv_heads"]
    rows, widths = group * given["tokens"], (given["head_dim"], given["value_head_dim"])
    is_long = live is not None and live.full.keys >= ONE_TILE_KEYS
    is_slow = loads_decide(rows, *widths, is_small=features.has_scales)
    plan = KernelPlan(
        **given,
        features=features,
        live=live,
        shares=shares,
        group=group,
        raw_unit=raw_unit,
        logit_unit=1.0 if features.has_bias or raw_unit <= 0 else raw_unit,
        has_query_pairs=any(t.key_columns > 1 for t in every_tile_of(shares, live)),
        every_tile=every_tile,
        new_keys_follow=given["layout"] != "paged" and is_long and is_slow,
        new_pairs=_new_pairs(features, given["tokens"], blocks),
        constants=_constants(features, given["batch"], given["tokens"], given["kv_heads"], live),
        text="",
        diagram="",
    )
    return replace(plan, text=in_a_line(plan), diagram=describe(plan))


def _packing(
    features: Features,
    widths: tuple[int, int],
    layout: str,
    key_bytes: int,
    columns: int,
    groups: list[RowGroup],
) -> Packing:
    return choose_packing(
        *widths,
        layout,
        key_bytes,
        columns,
        groups,
        by_slot=features.has_mask or features.has_bias or features.has_positions,
        sees_alike=features.sees_alike,
        has_mask=features.has_mask,
    )


def _shares(
    blocks: list[tuple[RowBlock, ...]], tiles: list[tuple[KeyTile, ...]], every_tile: bool
) -> tuple[Share, ...]:
    steps = max(len(known) for known in tiles)
    return tuple(
        Share(mine, known, (steps - len(known)) * every_tile)
        for mine, known in zip(blocks, tiles, strict=True)
    )


def every_tile_of(shares: tuple[Share, ...], live: LiveTiles | None) -> list[KeyTile]:
    """All kinds of tiles that a plan has."""
    known = [tile for share in shares for tile in share.tiles]
    return known if live is None else [*known, live.full, live.edge, live.dirty]


def _new_pairs(features: Features, tokens: int, blocks: list[tuple[RowBlock, ...]]) -> int:
    """See `KernelPlan.new_pairs`."""
    most = max(g.pairs for mine in blocks for b in mine for g in b.groups)
    return most if features.has_new_keys and tokens == 1 and most >= NEW_TOGETHER else 0


def _most_keys(width: int, page_len: int) -> int:
    """Of a tile, for heads of so many channels."""
    if page_len:
        return PAGED_KEYS
    return NARROW_KEYS if 2 * width <= PARTITIONS else MAX_KEYS


def _raw_unit(features: Features) -> float:
    if features.soft_cap is not None:
        return features.soft_cap
    return 1.0 if features.has_scales else features.scale


def _known_tiles(
    sharding: str,
    programs: int,
    slots: int,
    tokens: int,
    most: int,
    runs: Runs,
    packing: Packing,
    value_head_dim: int,
    features: Features,
) -> list[tuple[KeyTile, ...]]:
    """The tiles of each program over so many slots; new keys go to the last that sees them."""
    every = []
    for program in range(programs):
        sees_new = features.has_new_keys and (sharding != "sequence" or program == programs - 1)
        first, end = slots_of(sharding, program, slots, runs.long or 1)
        masks = {"is_masked": features.needs_mask, "is_dirty": features.clears_values}
        new = tokens if sees_new else 0
        known = key_tiles(first, end, most, runs, new, packing, **masks)
        every.append((*known[:-1], *(ending(last, value_head_dim) for last in known[-1:])))
    return every


def _constants(
    features: Features, batch: int, tokens: int, kv_heads: int, live: LiveTiles | None
) -> tuple[Numbers, ...]:
    shapes: dict[str, tuple[int, ...]] = {}
    if features.needs_mask:
        shapes["high"] = (batch, 1 if features.sees_alike else tokens)
        if features.has_low:
            shapes["low"] = shapes["high"]
    if features.has_scales:
        shapes |= dict.fromkeys(("logit_scales", "value_scales"), (batch * kv_heads,))
    if live is not None:
        shapes["live_edges"] = (batch, 2, live.width)
    return tuple(Numbers(name, shape, math.prod(shape)) for name, shape in shapes.items())


def _check_options(exchange: str, loop: str | None, features: Features) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange {exchange!r}: must be 'deferred' or 'every tile'.")
    if features.rotary not in (None, "half", "interleaved"):
        raise ValueError(f"rotary {features.rotary!r}: must be 'half', 'interleaved' or None.")
    if features.rotary is not None and not features.has_new_keys:
        raise ValueError("rotary needs the new keys beside the cache: it rotates them too.")
    if features.rotary is not None and not features.returns_lse:
        raise ValueError("rotary needs returns_lse: the rotated keys come behind the log-sum-exp.")
    if loop not in LOOPS:
        raise ValueError(f"loop {loop!r}: must be 'static', 'runtime' or None.")
    if loop == "runtime" and (features.has_mask or features.has_bias or features.has_positions):
        raise ValueError(
            "loop 'runtime': which slots are live must follow from lengths, starts and a window; a "
            "dense mask, a bias or given positions need 'static'."
        )


def _live_tiles(
    slots: int,
    live_slots: int,
    sharers: int,
    most: int,
    runs: Runs,
    packing: Packing,
    value_head_dim: int,
) -> LiveTiles:
    """Tiles for a loop, as large as allowed; a program's part of a full cache is a whole number.

    A few rounds more than needed where they divide it evenly: no key is then read twice.
    """
    unit, columns = runs.long or 1, runs.short or 1
    column = PARTITIONS * columns * sharers
    units, most_read = slots // column, min(slots, whole_runs(live_slots, unit))
    if units == 0:
        raise ValueError(
            f"{slots} slots are less than a tile for each of {sharers} program(s): use "
            "loop='static'."
        )
    together = max(1, min(most // columns, math.ceil(most_read / column)))
    needed = math.ceil(slots / (column * together))
    even = [n for n in range(needed, needed + needed // 3 + 1) if units % n == 0]
    rounds = even[0] if even else needed
    keys = min(math.ceil(slots / (column * rounds)), units) * PARTITIONS * columns
    full = key_tile(0, keys, runs, 0, packing, is_masked=False, is_dirty=False)
    edge = key_tile(0, keys, runs, 0, packing, is_masked=True, is_dirty=False)
    dirty = key_tile(0, keys, runs, 0, packing, is_masked=True, is_dirty=True)
    last = tuple(ending(tile, value_head_dim) for tile in (full, edge, dirty))
    width = math.ceil(most_read / (keys * sharers))
    return LiveTiles(full, edge, dirty, last, unit, width, sharers)
