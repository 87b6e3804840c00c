"""How the decode kernel divides a problem: rows into groups, keys into tiles, programs.

Pure Python, made before the launch and printable. The kernel loops over what is written here and
decides nothing itself.

Letters: B batch, T new tokens, S cache slots, N query heads, K KV heads, G = N / K, H head_dim, Hv
value head_dim. A pair is one KV head of one sequence; its M = G * T logit rows share its keys.
"""

import math
from dataclasses import dataclass, replace

from jax_tkg.nki.describe import describe
from jax_tkg.nki.dialect import nl
from jax_tkg.nki.rows import BANK_ELEMENTS, PARTITIONS, RowBlock, blocks_of, row_groups
from jax_tkg.nki.tiles import PAGED_RUN, KeyTile, key_tile, key_tiles, paged_run

MAX_KEYS = 8192
"""Keys of a tile: with H = 128 in 16 bits, 16 KiB of keys and of values in each partition."""

NARROW_KEYS = 12288
"""The same where H and Hv are 64 or less: of values, half as many bytes lie in a partition."""

PAGED_KEYS = 10240
"""The same of pages: they arrive in gathers of a run, so that large tiles wait for nothing, and
longer runs fit."""

LOGIT_BANKS = 4
"""Banks of PSUM for the logits of cached keys in a tile: half of all. Each holds whole columns."""

ONE_TILE_KEYS = 2048
"""A program's part of a cache up to this size is one tile and not a loop over live ones."""

NEW_TOGETHER = 4
"""Pairs of a row group from which on their new keys are multiplied at once."""

WINDOW_FACTOR = 4
"""A cache of more windows than that is worth a loop, whatever its size."""

BATCH_RULE_ROWS = 128
SEQUENCE_RULE_SLOTS = 256
"""The public kernel's rule: see `choose_sharding`."""

EXCHANGES = ("deferred", "every tile")
LOOPS = (None, "static", "runtime")


@dataclass(frozen=True)
class LiveTiles(nl.NKIObject):
    """A loop at run time over the tiles that hold live keys, wherever they start.

    Attributes:
        full: tile in which every row sees every key.
        edge: tile in which every key is seen by some row.
        dirty: tile in which some keys may be seen by none.
        unit: slots that a start counts in: 1, or the run of a paged cache.
        width: rounds that a sequence takes at most, W of `Inputs.live_tiles`.
        sharers: programs that share the tiles of a sequence.
    """

    full: KeyTile
    edge: KeyTile
    dirty: KeyTile
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
        clears_values: slots that no row sees may hold anything, NaN too.
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
        run: slots that a gather reads at once from a paged cache; else 0.
        group: G.
        raw_unit: what a number of a tile is worth in logits after scales and soft cap.
        logit_unit: the same once a bias was added; see `shape_logits`.
        every_tile: programs agree on maximum and sum after every tile.
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
    run: int
    group: int
    raw_unit: float
    logit_unit: float
    every_tile: bool
    new_pairs: int
    live: LiveTiles | None
    constants: tuple[Numbers, ...]
    reason: str
    text: str
    diagram: str

    def __str__(self) -> str:
        """The line and the diagram."""
        return self.text + "\n" + self.diagram


def choose_sharding(
    programs: int, batch: int, pairs: int, rows: int, slots: int, is_loop: bool, most_live: int
) -> tuple[str, str]:
    """How two programs share the work, and why.

    The rule of the public kernel: by batch if it is even and there are more than 128 rows or fewer
    than 256 slots; else by sequence from 256 slots on. Beyond it: short caches with several pairs
    are shared by pairs also when the batch is odd. A loop over live tiles is shared by sequence:
    both programs then make equally many rounds, as they must, whatever the lengths. But where a
    window leaves each sequence a tile or so to read, sequences take equally long by themselves.
    """
    if programs == 1:
        return "none", "one program"
    if is_loop and batch % 2 == 0 and most_live <= min(ONE_TILE_KEYS, slots - 1):
        return "batch", f"a loop over at most {most_live} live keys of each, even batch"
    if is_loop:
        return "sequence", "a loop over live keys"
    if batch % 2 == 0 and (rows > BATCH_RULE_ROWS or slots < SEQUENCE_RULE_SLOTS):
        return "batch", f"even batch, {rows} rows, {slots} slots"
    if slots >= SEQUENCE_RULE_SLOTS:
        return "sequence", f"{slots} slots"
    if pairs > 1:
        return "batch", f"{pairs} pairs, only {slots} slots"
    return "same", f"one pair and only {slots} slots"


def choose_loop(features: Features, slots: int, programs: int, most_live: int) -> bool:
    """Whether tiles are chosen at run time: they follow the live keys and not the bucket.

    Dense masks and given positions say nothing cheap about what is live. A small cache is not
    worth a loop, unless a window leaves most of it dead.
    """
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
) -> KernelPlan:
    """Plans a problem; for the sizes see `KernelPlan`.

    Tiles hold up to `max_keys` keys, `MAX_KEYS` or `PAGED_KEYS` unless given; at most `most_live`
    of a sequence are live. `loop` says "static" or "runtime"; None chooses, see `choose_loop`.

    Raises:
        ValueError: if T is more than 512, or an option has no such value.
    """
    _check_options(exchange, loop, features)
    live_slots = slots if most_live is None else min(slots, most_live)
    is_loop = loop == "runtime"
    if loop is None and slots > PARTITIONS * programs * (PAGED_RUN if page_len else 1):
        is_loop = choose_loop(features, slots, programs, live_slots)
    sharding, reason = choose_sharding(
        programs, batch, batch * kv_heads, batch * heads * tokens, slots, is_loop, live_slots
    )
    sharers = programs if sharding == "sequence" else 1
    group, blocks = heads // kv_heads, []
    for program in range(programs):
        ranges = pairs_of(sharding, program, batch, kv_heads)
        blocks.append(blocks_of(row_groups(*ranges, group, tokens), group, value_head_dim))
    side_by_side = [b.sequences if is_loop else b.groups for mine in blocks for b in mine]
    widest = max(g.rows for groups in side_by_side for g in groups)
    max_keys = max_keys or _most_keys(max(head_dim, value_head_dim), page_len)
    most = max(1, min(max_keys // PARTITIONS, LOGIT_BANKS * (BANK_ELEMENTS // widest)))
    share = math.ceil(slots / sharers)
    if is_loop:  # whose tiles are equal
        share = math.ceil(share / math.ceil(share / (PARTITIONS * most)))
    run = paged_run(page_len, most, share) if page_len else 0
    tiles = _known_tiles(sharding, programs, 0 if is_loop else slots, tokens, most, run, features)
    live = None
    if is_loop:
        most = max(run, min(most, math.ceil(live_slots / (PARTITIONS * sharers))))
        live = _live_tiles(slots, live_slots, sharers, most, run)
    every_tile = sharding == "sequence" and exchange == "every tile"
    shares = _shares(blocks, tiles, every_tile)
    raw_unit = _raw_unit(features)
    sizes = {"batch": batch, "tokens": tokens, "slots": slots, "heads": heads}
    widths = {"kv_heads": kv_heads, "head_dim": head_dim, "value_head_dim": value_head_dim}
    plan = KernelPlan(
        **sizes,
        **widths,
        layout=layout,
        features=features,
        programs=programs,
        sharding=sharding,
        exchange=exchange,
        shares=shares,
        run=run,
        group=group,
        raw_unit=raw_unit,
        logit_unit=1.0 if features.has_bias or raw_unit <= 0 else raw_unit,
        every_tile=every_tile,
        new_pairs=_new_pairs(features, tokens, blocks),
        live=live,
        constants=_constants(features, batch, tokens, kv_heads, live),
        reason=reason,
        text=_text(programs, sharding, reason, exchange, shares[0], live),
        diagram="",
    )
    return replace(plan, diagram=describe(plan))


def _shares(
    blocks: list[tuple[RowBlock, ...]], tiles: list[tuple[KeyTile, ...]], every_tile: bool
) -> tuple[Share, ...]:
    steps = max(len(known) for known in tiles)
    return tuple(
        Share(mine, known, (steps - len(known)) * every_tile)
        for mine, known in zip(blocks, tiles, strict=True)
    )


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
    run: int,
    features: Features,
) -> list[tuple[KeyTile, ...]]:
    """The tiles of each program over so many slots; new keys go to the last that sees them."""
    every = []
    for program in range(programs):
        sees_new = features.has_new_keys and (sharding != "sequence" or program == programs - 1)
        first, end = slots_of(sharding, program, slots, run or 1)
        masks = {"is_masked": features.needs_mask, "is_dirty": features.clears_values}
        every.append(key_tiles(first, end, most, run, tokens if sees_new else 0, **masks))
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


def _text(
    programs: int, sharding: str, reason: str, exchange: str, share: Share, live: LiveTiles | None
) -> str:
    groups = [g for block in share.blocks for g in block.groups]
    text = (
        f"{programs} program(s), {sharding} sharding ({reason}), exchange {exchange}; rows: "
        f"{len(groups)} group(s) of up to {max(g.rows for g in groups)}, {len(share.blocks)} "
        "block(s)"
    )
    if live is not None:
        return f"{text}; keys: a loop over live tiles of {live.full.keys}"
    largest = max((t.keys for t in share.tiles), default=0)
    return f"{text}; keys: {len(share.tiles)} tile(s) of up to {largest}"


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


def _live_tiles(slots: int, live_slots: int, sharers: int, most: int, run: int) -> LiveTiles:
    """Tiles for a loop, as large as allowed; a program's part of a full cache is a whole number.

    A few rounds more than needed where they divide it evenly: no key is then read twice.
    """
    columns = run or 1
    units = slots // (PARTITIONS * columns * sharers)
    if units == 0:
        raise ValueError(
            f"{slots} slots are less than a tile for each of {sharers} program(s): use "
            "loop='static'."
        )
    needed = math.ceil(slots / (PARTITIONS * sharers * max(1, most // columns) * columns))
    even = [n for n in range(needed, needed + needed // 3 + 1) if units % n == 0]
    rounds = even[0] if even else needed
    keys = math.ceil(slots / (PARTITIONS * columns * sharers * rounds)) * columns * PARTITIONS
    keys = min(keys, units * columns * PARTITIONS)
    full = key_tile(0, keys, run, 0, is_masked=False, is_dirty=False)
    edge = key_tile(0, keys, run, 0, is_masked=True, is_dirty=False)
    dirty = key_tile(0, keys, run, 0, is_masked=True, is_dirty=True)
    most_read = min(slots, live_slots + 2 * (columns - 1))  # whole units
    return LiveTiles(full, edge, dirty, columns, math.ceil(most_read / (keys * sharers)), sharers)


def pairs_of(
    sharding: str, program: int, batch: int, kv_heads: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sequences and the KV heads of a program, each as (first, end)."""
    if sharding != "batch":
        return (0, batch), (0, kv_heads)
    if batch > 1:
        half = (batch + 1) // 2
        return ((0, half), (half, batch))[program], (0, kv_heads)
    half = (kv_heads + 1) // 2
    return (0, 1), ((0, half), (half, kv_heads))[program]


def slots_of(sharding: str, program: int, slots: int, unit: int) -> tuple[int, int]:
    """The slots of a program, (first, end); the halves meet at a whole subtile."""
    if sharding != "sequence":
        return 0, slots
    whole = unit if unit > 1 else PARTITIONS
    half = min(math.ceil(slots / 2 / whole) * whole, slots)
    return ((0, half), (half, slots))[program]
