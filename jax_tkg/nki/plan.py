"""How the decode kernel divides a problem: rows into groups, keys into tiles, programs.

Pure Python, made before the launch and printable. The kernel loops over what is written here and
decides nothing itself.

Letters: B batch, T new tokens, S cache slots, N query heads, K KV heads, G = N / K, H head_dim, Hv
value head_dim. A pair is one KV head of one sequence; its M = G * T logit rows share its keys.
"""

import math
from dataclasses import dataclass, replace

from jax_tkg.nki.dialect import nl

PARTITIONS = 128
TILE_SUBTILES = 32
"""Keys a partition holds of a tile: with H = 64 in 16 bits its V run of 4 KiB saturates DMA."""

BATCH_RULE_ROWS = 128
SEQUENCE_RULE_SLOTS = 256
"""The public kernel's rule: see `choose_sharding`."""


@dataclass(frozen=True)
class KeyTile(nl.NKIObject):
    """Keys that are processed at once: `subtiles` in each of `partitions` partitions.

    Partition p holds slots start + p * subtiles + j, so that what it loads is contiguous.
    """

    start: int
    partitions: int
    subtiles: int
    keys: int


def key_tile(start: int, partitions: int, subtiles: int) -> KeyTile:
    """The tile of partitions * subtiles keys."""
    return KeyTile(start, partitions, subtiles, partitions * subtiles)


@dataclass(frozen=True)
class Share(nl.NKIObject):
    """What one program does.

    Attributes:
        tiles: of the cache.
        groups: pairs that are processed side by side.
        sees_new_keys: it folds in the new keys beside the cache.
        idle_tiles: how often it only takes part in the exchanges of the other program's tiles.
    """

    tiles: tuple[KeyTile, ...]
    groups: tuple[tuple[int, ...], ...]
    sees_new_keys: bool
    idle_tiles: int


@dataclass(frozen=True)
class KernelPlan(nl.NKIObject):
    """Everything the kernel is built from but the arrays.

    Attributes:
        batch, tokens, slots, heads, kv_heads, head_dim, value_head_dim: B T S N K H Hv.
        layout: of the cache: BSKH, BKSH, BKHS (keys transposed) or paged.
        scale: factor of the logits.
        soft_cap: c of c * tanh(logit / c), or None.
        is_padded: slots may hold anything where no query sees them.
        has_new_keys: the new keys come beside the cache.
        has_sinks: each head has a sink logit.
        has_positions: slots hold tokens at given positions.
        has_mask, has_bias: dense ones.
        has_scales: keys and values of each KV head have a scale.
        group: G.
        rows_per_pair: M = G * T.
        programs: of the launch.
        sharding: "none", "batch" (pairs), "sequence" (keys) or "same" (both programs do all).
        exchange: "deferred" (three at the end) or "every tile" (two a tile and one).
        shares: one for each program.
        reason: why this sharding.
    """

    batch: int
    tokens: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    layout: str
    scale: float
    soft_cap: float | None
    is_padded: bool
    has_new_keys: bool
    has_sinks: bool
    has_positions: bool
    has_mask: bool
    has_bias: bool
    has_scales: bool
    group: int
    rows_per_pair: int
    programs: int
    sharding: str
    exchange: str
    shares: tuple[Share, ...]
    reason: str

    def __str__(self) -> str:
        """Two lines."""
        share = self.shares[0]
        return (
            f"{self.programs} program(s), {self.sharding} sharding ({self.reason}), exchange "
            f"{self.exchange}; {len(share.groups)} group(s) of up to {len(share.groups[0])} pairs, "
            f"{len(share.tiles)} key tile(s) of up to {share.tiles[0].keys}"
        )


def paged_run(page_len: int) -> int:
    """Slots that a gather reads at once: the most that divide a page, up to `TILE_SUBTILES`."""
    return max(n for n in range(1, TILE_SUBTILES + 1) if page_len % n == 0)


def key_tiles(first: int, end: int, subtiles: int, run: int) -> tuple[KeyTile, ...]:
    """Tiles over slots `first` to `end`: large ones, one of what is left, one below 128 keys.

    Args:
        first: slot; a multiple of `run`.
        end: slot behind the last; a multiple of `run`.
        subtiles: most keys of a partition.
        run: of a paged cache, the keys of every partition; else 0.
    """
    tiles = []
    while run and first < end:
        partitions = min(PARTITIONS, (end - first) // run)
        tiles.append(key_tile(first, partitions, run))
        first += partitions * run
    while end - first >= PARTITIONS:
        count = min(subtiles, (end - first) // PARTITIONS)
        tiles.append(key_tile(first, PARTITIONS, count))
        first += count * PARTITIONS
    if first < end:
        tiles.append(key_tile(first, end - first, 1))
    return tuple(tiles)


def pair_groups(first: int, end: int, rows_per_pair: int) -> tuple[tuple[int, ...], ...]:
    """Pairs in groups whose rows fit into the partitions."""
    size = PARTITIONS // rows_per_pair
    return tuple(tuple(range(p, min(p + size, end))) for p in range(first, end, size))


def choose_sharding(
    programs: int, batch: int, pairs: int, rows: int, slots: int
) -> tuple[str, str]:
    """How two programs share the work, and why.

    The rule of the public kernel: by batch if it is even and there are more than 128 rows or fewer
    than 256 slots; else by sequence from 256 slots on. Beyond it: short caches with several pairs
    are shared by pairs also when the batch is odd.
    """
    if programs == 1:
        return "none", "one program"
    if batch % 2 == 0 and (rows > BATCH_RULE_ROWS or slots < SEQUENCE_RULE_SLOTS):
        return "batch", f"even batch, {rows} rows, {slots} slots"
    if slots >= SEQUENCE_RULE_SLOTS:
        return "sequence", f"{slots} slots"
    if pairs > 1:
        return "batch", f"{pairs} pairs, only {slots} slots"
    return "same", f"one pair and only {slots} slots"


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
    scale: float,
    soft_cap: float | None = None,
    is_padded: bool = True,
    has_new_keys: bool = False,
    has_sinks: bool = False,
    has_positions: bool = False,
    has_mask: bool = False,
    has_bias: bool = False,
    has_scales: bool = False,
    programs: int = 1,
    exchange: str = "deferred",
    subtiles: int = TILE_SUBTILES,
    page_len: int = 0,
) -> KernelPlan:
    """Plans a problem.

    Raises:
        ValueError: if G * T is more than 128 rows, or an option has no such value.
    """
    rows = heads // kv_heads * tokens
    if rows > PARTITIONS:
        raise ValueError(f"G * T = {rows} rows share a KV head; the kernel takes at most 128.")
    if exchange not in ("deferred", "every tile"):
        raise ValueError(f"exchange {exchange!r}: must be 'deferred' or 'every tile'.")
    pairs = batch * kv_heads
    sharding, reason = choose_sharding(programs, batch, pairs, batch * heads * tokens, slots)
    half_pairs = (batch + 1) // 2 * kv_heads if batch > 1 else (pairs + 1) // 2
    run = paged_run(page_len) if page_len else 0
    unit = run or PARTITIONS
    half_slots = math.ceil(slots / 2 / unit) * unit
    shares = []
    for program in range(programs):
        first_pair, last_pair, first_slot, last_slot = 0, pairs, 0, slots
        if sharding == "batch":
            first_pair, last_pair = ((0, half_pairs), (half_pairs, pairs))[program]
        if sharding == "sequence":
            first_slot, last_slot = ((0, half_slots), (half_slots, slots))[program]
        shares.append(
            Share(
                key_tiles(first_slot, last_slot, subtiles, run),
                pair_groups(first_pair, last_pair, rows),
                has_new_keys and (sharding != "sequence" or program == programs - 1),
                0,
            )
        )
    if sharding == "sequence" and exchange == "every tile":
        steps = [len(share.tiles) + share.sees_new_keys for share in shares]
        shares = [
            replace(share, idle_tiles=max(steps) - count)
            for share, count in zip(shares, steps, strict=True)
        ]
    return KernelPlan(
        batch=batch,
        tokens=tokens,
        slots=slots,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        layout=layout,
        scale=scale,
        soft_cap=soft_cap,
        is_padded=is_padded,
        has_new_keys=has_new_keys,
        has_sinks=has_sinks,
        has_positions=has_positions,
        has_mask=has_mask,
        has_bias=has_bias,
        has_scales=has_scales,
        group=heads // kv_heads,
        rows_per_pair=rows,
        programs=programs,
        sharding=sharding,
        exchange=exchange,
        shares=tuple(shares),
        reason=reason,
    )
