"""How the prefill kernel divides a problem: rows into blocks and groups, keys into tiles, programs.

Pure Python, made before the launch and printable. Which keys a block of rows can see is known here
as far as it follows from causality and window; the kernel neither loads nor computes the rest.

Letters: B batch, T tokens, S slots of a key source, N query heads, K KV heads, G = N / K, H
head_dim, Hv value head_dim. A pair is one KV head of one sequence; its G * T rows share its keys.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from jax_tkg.nki.cte.tiles import (
    KeySource,
    RowBlock,
    Visit,
    following,
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

UNROLLED_STEPS = 4096
"""Steps of a program, some 30 instructions each, up to which none is in a loop at run time."""


@dataclass(frozen=True)
class Share(nl.NKIObject):
    """What one program does: of each of its pairs the same groups of row blocks.

    Attributes:
        pairs: which.
        groups: one after the other.
        looped: before them, in each round of a loop: each block stands for one in every round.
    """

    pairs: tuple[int, ...]
    groups: tuple[tuple[RowBlock, ...], ...]
    looped: tuple[tuple[RowBlock, ...], ...] = ()


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
        rotary: the kernel rotates queries and new keys: "half" (channel i with i + pairs),
            "interleaved" (2i with 2i + 1) or None.
        normalize: the output is divided by the sum.
        tile_keys: most keys of a tile.
        rounds: of a loop at run time over row blocks; 0 without one.
        stride: tokens of a round.
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
    rotary: str | None
    normalize: bool
    tile_keys: int
    rounds: int
    stride: int
    programs: int
    sharding: str
    shares: tuple[Share, ...]
    reason: str

    def __str__(self) -> str:
        """One line; `count.work` says what it costs."""
        share = self.shares[0]
        live = self.sources[0].live_tiles
        chosen = f", {live} of the cache's chosen at run time" if live else ""
        rounds = f"{self.rounds} round(s) of {len(share.looped)} and " if self.rounds else ""
        return (
            f"{self.programs} program(s), sharding: {self.sharding} ({self.reason}); "
            f"{len(share.pairs)} pair(s) of {rounds}{len(share.groups)} group(s) of up to "
            f"{GROUP_BLOCKS} row blocks, key tiles of up to {self.tile_keys}{chosen}"
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
    rotary: str | None = None,
    normalize: bool = True,
    programs: int = 1,
    unrolled_steps: int = UNROLLED_STEPS,
) -> PrefillPlan:
    """Plans a problem; `itemsize` is that of the dtype which is computed in.

    More than `unrolled_steps` of a program are made by loops at run time, over row blocks and over
    key tiles, but with a dense mask or bias: how many instructions a launch has follows neither the
    tokens nor the slots.

    Raises:
        ValueError: if H or Hv is more than 256, there are not one or two sources, a cache of
            transposed keys has holes, or there are no new keys beside the cache to be rotated.
    """
    if max(head_dim, value_head_dim) > 2 * PARTITIONS:
        raise ValueError(f"head_dim {head_dim} and {value_head_dim}: the kernel takes up to 256.")
    if len(sources) not in (1, 2):
        raise ValueError(f"{len(sources)} key sources: the cache, or the cache and new keys.")
    if sources[0].has_holes and sources[0].layout == "BKHS":
        raise ValueError("has_holes with layout BKHS: holes are cleared in keys [S, H] only.")
    if rotary not in (None, "half", "interleaved"):
        raise ValueError(f"rotary {rotary!r}: must be 'half', 'interleaved' or None.")
    if rotary is not None and len(sources) == 1:
        raise ValueError("rotary needs the new keys beside the cache: it rotates them too.")
    pairs, group, tile_keys = batch * kv_heads, heads // kv_heads, TILE_BYTES // itemsize
    blocks = row_blocks(0, tokens, group)
    sharding, reason = "none", "one program"
    if programs == 2 and pairs % 2 == 0:
        sharding, reason = "pairs", f"{pairs} pairs"
    elif programs == 2:
        sharding, reason = "rows", f"{pairs} pair(s), an odd number, of {len(blocks)} row blocks"
    shares, rounds, stride = shares_of(pairs, blocks, sources, sharding), 0, 0
    can_loop = not has_mask and not has_bias
    is_long = can_loop and max(steps_in(s, sources, tile_keys) for s in shares) > unrolled_steps
    looped = tuple(with_live_tiles(s, is_long, tile_keys) for s in sources)
    if is_long:
        stride = stride_of(group, looped, sharding, tile_keys)
        rounds = rounds_of(tokens, stride, looped, tile_keys)
        shares, rounds = in_rounds(pairs, tokens, group, looped, sharding, stride, rounds)
    if can_loop and all(s.groups or rounds for s in shares):
        sources = looped
    return PrefillPlan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        group=group,
        sources=sources,
        scale=scale,
        soft_cap=soft_cap,
        has_sinks=has_sinks,
        has_mask=has_mask,
        has_bias=has_bias,
        has_alibi=has_alibi,
        rotary=rotary,
        normalize=normalize,
        tile_keys=tile_keys,
        rounds=rounds,
        stride=stride if rounds else 0,
        programs=programs,
        sharding=sharding,
        shares=shares,
        reason=reason,
    )


def row_blocks(first_token: int, tokens: int, group: int, stride: int = 0) -> tuple[RowBlock, ...]:
    """All rows of a pair of some tokens: 128 tokens of one head, or fewer of several heads."""
    blocks = []
    for first in range(first_token, first_token + tokens, PARTITIONS):
        count = min(PARTITIONS, first_token + tokens - first)
        at_once = PARTITIONS // count
        for head in range(0, group, at_once):
            heads = min(at_once, group - head)
            blocks.append(RowBlock(first, count, head, heads, count * heads, stride))
    return tuple(blocks)


def shares_of(
    pairs: int, blocks: tuple[RowBlock, ...], sources: tuple[KeySource, ...], sharding: str
) -> tuple[Share, ...]:
    """What each program does of the row blocks of all pairs."""
    if sharding == "none":
        return (Share(tuple(range(pairs)), groups_of(blocks)),)
    if sharding == "pairs":
        parts = range(pairs // 2), range(pairs // 2, pairs)
        return tuple(Share(tuple(part), groups_of(blocks)) for part in parts)
    halves = balanced(blocks, sources)
    # As many groups for each: loops at run time have to go alike on both.
    count = -(-max(map(len, halves)) // GROUP_BLOCKS)
    return tuple(Share(tuple(range(pairs)), groups_of(half, count)) for half in halves)


def steps_in(share: Share, sources: tuple[KeySource, ...], tile_keys: int) -> int:
    """About how many steps a program makes, all of them known before the launch."""
    steps = 0
    for block in itertools.chain(*share.groups):
        for source in sources:
            first, end = seen_by(source, block)
            steps += -(-(end - first) // tile_keys)
    return steps * len(share.pairs)


def with_live_tiles(source: KeySource, is_long: bool, tile_keys: int) -> KeySource:
    """Says how many whole tiles of a source a loop at run time can visit, and how it goes."""
    if not (source.is_live or is_long):
        return source
    is_causal = source.is_exact and source.before is None and source.after is not None
    return replace(
        source,
        live_tiles=source.slots // whole_tile(source, tile_keys).keys,
        is_diagonal=is_long and is_causal and (source.after or 0) >= -1,
    )


def stride_of(group: int, sources: tuple[KeySource, ...], sharding: str, tile_keys: int) -> int:
    """Tokens of a round: those of a group of row blocks for each program that shares rows.

    Around a diagonal keys are loaded in tiles, which a round has to be a multiple of.
    """
    stride = PARTITIONS * max(1, GROUP_BLOCKS // group) * (2 if sharding == "rows" else 1)
    for source in sources:
        if source.is_diagonal:
            size = whole_tile(source, tile_keys).keys
            stride = -(-stride // size) * size
    return stride


def rounds_of(tokens: int, stride: int, sources: tuple[KeySource, ...], tile_keys: int) -> int:
    """Most rounds in a loop: what moves on with them has to be in whole strides of a source."""
    rounds = tokens // stride
    for source in sources:
        if source.is_diagonal and source.after is not None:
            size = whole_tile(source, tile_keys).keys
            last_tile = (stride - 1 + source.after) // size * size
            rounds = min(rounds, source.slots // stride - last_tile // stride)
    return max(rounds, 0)


def in_rounds(
    pairs: int,
    tokens: int,
    group: int,
    sources: tuple[KeySource, ...],
    sharding: str,
    stride: int,
    rounds: int,
) -> tuple[tuple[Share, ...], int]:
    """Shares whose row blocks are in a loop at run time, and how many rounds it makes, if it can.

    The tokens behind the last round are in no loop.
    """
    while True:
        last = row_blocks(rounds * stride, tokens - rounds * stride, group)
        shares = shares_of(pairs, last, sources, sharding)
        if rounds == 0 or not last or all(share.groups for share in shares):
            break
        rounds -= 1  # a program without a group could not take part in its loops
    if rounds == 0:
        return shares, 0
    looped = shares_of(pairs, row_blocks(0, stride, group, stride), sources, sharding)
    return tuple(
        Share(share.pairs, share.groups, every.groups)
        for share, every in zip(shares, looped, strict=True)
    ), rounds


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
        if source.live_tiles > 0:
            first = max(first, loop_end(plan, source, blocks[0]))
        for tile in key_tiles(source, s, first, end, plan.tile_keys):
            steps = steps_of(source, tile, blocks)
            if len(steps) > 0:
                mine = ordered(tile, steps)
                if source.is_diagonal:
                    mine = following(mine, blocks[0])
                visits.append(Visit(mine, steps))
    return with_last(visits, len(blocks))


def loop_end(plan: PrefillPlan, source: KeySource, block: RowBlock) -> int:
    """The slot behind the last that loops at run time visit, for a group with this block.

    Of a diagonal source and a block that stands for many: counted from the first row of its round.
    """
    size = whole_tile(source, plan.tile_keys).keys
    if not source.is_diagonal or source.after == None:  # noqa: E711
        return source.live_tiles * size
    origin = plan.rounds * plan.stride if block.stride == 0 else 0
    return origin + (source.after + 1) // size * size
