"""How the prefill kernel divides a problem: rows into blocks and groups, keys into tiles, programs.

Pure Python, made before the launch and printable. Which keys a block of rows can see is known here
as far as it follows from causality and window; the kernel neither loads nor computes the rest.

Letters: B batch, T tokens, S slots of a key source, N query heads, K KV heads, G = N / K, H
head_dim, Hv value head_dim. A pair is one KV head of one sequence; its G * T rows share its keys.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.cte.tiles import (
    KeySource,
    RowBlock,
    Visit,
    key_tiles,
    ordered,
    seen_by,
    steps_of,
    whole_tile,
    with_last,
)
from jax_tkg.nki.dialect import nl
from jax_tkg.nki.rows import PARTITIONS

GROUP_BLOCKS = 16
"""Row blocks that share every key tile they load: 16 of 128 rows hide the loads behind matmuls."""

TILE_BYTES = 2048
"""Weights of a row in a key tile: turned they fill one PSUM bank."""


@dataclass(frozen=True)
class Share(nl.NKIObject):
    """What one program does: of each of its pairs the same groups of row blocks."""

    pairs: tuple[int, ...]
    groups: tuple[tuple[RowBlock, ...], ...]


@dataclass(frozen=True)
class PrefillPlan(nl.NKIObject):
    """Everything the kernel is built from but the arrays.

    Attributes:
        batch, tokens, heads, kv_heads, head_dim, value_head_dim: B T N K H Hv.
        group: G.
        sources: the cache, then the new keys if they are beside it.
        scale: factor of the logits.
        soft_cap: c of c * tanh(logit / c), or None.
        has_sinks: each head has a sink logit.
        has_mask, has_bias: dense ones.
        has_alibi: each head has a slope of a bias linear in the distance.
        normalize: the output is divided by the sum.
        tile_keys: most keys of a tile.
        live_tiles: whole tiles of the cache of which those that are seen are found out at run time.
        programs: of the launch.
        sharding: "none", "pairs" or "rows".
        shares: one for each program.
        reason: why this sharding.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    group: int
    sources: tuple[KeySource, ...]
    scale: float
    soft_cap: float | None
    has_sinks: bool
    has_mask: bool
    has_bias: bool
    has_alibi: bool
    normalize: bool
    tile_keys: int
    live_tiles: int
    programs: int
    sharding: str
    shares: tuple[Share, ...]
    reason: str

    def __str__(self) -> str:
        """One line; `count.work` says what it costs."""
        share = self.shares[0]
        live = f", {self.live_tiles} of them chosen at run time" if self.live_tiles else ""
        return (
            f"{self.programs} program(s), sharding: {self.sharding} ({self.reason}); "
            f"{len(share.pairs)} pair(s) of {len(share.groups)} group(s) of up to {GROUP_BLOCKS} "
            f"row blocks, key tiles of up to {self.tile_keys}{live}"
        )


def make_plan(
    *,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    sources: tuple[KeySource, ...],
    scale: float,
    itemsize: int,
    soft_cap: float | None = None,
    has_sinks: bool = False,
    has_mask: bool = False,
    has_bias: bool = False,
    has_alibi: bool = False,
    normalize: bool = True,
    programs: int = 1,
) -> PrefillPlan:
    """Plans a problem; `itemsize` is that of the dtype which is computed in.

    Raises:
        ValueError: if H or Hv is more than 256, there are not one or two sources, or a cache of
            transposed keys has holes.
    """
    if max(head_dim, value_head_dim) > 2 * PARTITIONS:
        raise ValueError(f"head_dim {head_dim} and {value_head_dim}: the kernel takes up to 256.")
    if len(sources) not in (1, 2):
        raise ValueError(f"{len(sources)} key sources: the cache, or the cache and new keys.")
    if sources[0].has_holes and sources[0].layout == "BKHS":
        raise ValueError("has_holes with layout BKHS: holes are cleared in keys [S, H] only.")
    pairs, blocks = batch * kv_heads, row_blocks(tokens, heads // kv_heads)
    sharding, reason = "none", "one program"
    shares: tuple[Share, ...] = (Share(tuple(range(pairs)), groups_of(blocks)),)
    if programs == 2 and pairs % 2 == 0:
        sharding, reason = "pairs", f"{pairs} pairs"
        parts = range(pairs // 2), range(pairs // 2, pairs)
        shares = tuple(Share(tuple(part), groups_of(blocks)) for part in parts)
    elif programs == 2:
        sharding, reason = "rows", f"{pairs} pair(s), an odd number, of {len(blocks)} row blocks"
        halves = balanced(blocks, sources)
        # As many groups for each: loops at run time have to go alike on both.
        count = -(-max(map(len, halves)) // GROUP_BLOCKS)
        shares = tuple(Share(tuple(range(pairs)), groups_of(half, count)) for half in halves)
    tile_keys = TILE_BYTES // itemsize
    live_tiles = 0
    if sources[0].is_live and not has_mask and not has_bias and all(s.groups for s in shares):
        live_tiles = sources[0].slots // whole_tile(sources[0], tile_keys).keys
    return PrefillPlan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        group=heads // kv_heads,
        sources=sources,
        scale=scale,
        soft_cap=soft_cap,
        has_sinks=has_sinks,
        has_mask=has_mask,
        has_bias=has_bias,
        has_alibi=has_alibi,
        normalize=normalize,
        tile_keys=tile_keys,
        live_tiles=live_tiles,
        programs=programs,
        sharding=sharding,
        shares=shares,
        reason=reason,
    )


def row_blocks(tokens: int, group: int) -> tuple[RowBlock, ...]:
    """All rows of a pair: 128 tokens of one head, or fewer tokens of several heads."""
    blocks = []
    for first in range(0, tokens, PARTITIONS):
        count = min(PARTITIONS, tokens - first)
        at_once = PARTITIONS // count
        for head in range(0, group, at_once):
            heads = min(at_once, group - head)
            blocks.append(RowBlock(first, count, head, heads, count * heads))
    return tuple(blocks)


def groups_of(
    blocks: tuple[RowBlock, ...], count: int | None = None
) -> tuple[tuple[RowBlock, ...], ...]:
    """Row blocks that follow each other and share the key tiles: `count` groups if so many can."""
    count = min(len(blocks), count or -(-len(blocks) // GROUP_BLOCKS))
    ends = [len(blocks) * i // max(count, 1) for i in range(count + 1)]
    return tuple(blocks[i:j] for i, j in itertools.pairwise(ends))


def balanced(
    blocks: tuple[RowBlock, ...], sources: tuple[KeySource, ...]
) -> tuple[tuple[RowBlock, ...], ...]:
    """Row blocks of two programs: those that see most first, each to the one with less to do."""
    squares = [0, 0]
    parts: tuple[list[RowBlock], list[RowBlock]] = ([], [])
    for block in reversed(blocks):
        seen = [seen_by(source, block) for source in sources]
        program = squares.index(min(squares))
        squares[program] += sum(-(-end // PARTITIONS) - first // PARTITIONS for first, end in seen)
        parts[program].append(block)
    return tuple(tuple(reversed(part)) for part in parts)


# In the kernel language: the kernel asks while it is built.


def visits_of(plan: PrefillPlan, blocks: Any) -> Any:
    """Which key tiles a group of row blocks loads, and what each block does with them."""
    visits = []
    for s in range(len(plan.sources)):
        source = plan.sources[s]
        first, end = seen_by(source, blocks[0])
        for block in blocks:
            low, high = seen_by(source, block)
            first, end = min(first, low), max(end, high)
        if s == 0 and plan.live_tiles > 0:
            first = max(first, plan.live_tiles * whole_tile(source, plan.tile_keys).keys)
        for tile in key_tiles(source, s, first, end, plan.tile_keys):
            steps = steps_of(source, tile, blocks)
            if len(steps) > 0:
                visits.append(Visit(ordered(tile, steps), steps))
    return with_last(visits, len(blocks))
