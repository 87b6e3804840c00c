"""Key tiles, row blocks, and which of them meet: kernel language, asked while it is built."""

from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.dialect import nl
from jax_tkg.nki.rows import PARTITIONS

BANK_KEYS = 512
"""Float32 logits of a row that one PSUM bank holds: what one matmul makes."""


@dataclass(frozen=True)
class KeySource(nl.NKIObject):
    """Keys in one place: the cache, or the new ones beside it.

    Query t sees no slot below t + `before` and none above t + `after`, whatever the arrays say.

    Attributes:
        slots: S.
        layout: BSKH, BKSH, BKHS (keys transposed) or paged.
        before, after: see above; None where there is no such bound.
        is_exact: the query sees all slots between: the bounds in the arrays say the same.
        has_positions: slots hold tokens at given positions; else slot s holds position s.
        has_holes: some slots hold nothing, and no query sees them; not if keys are transposed.
        is_padded: slots that no query sees may hold anything.
        has_scales: keys and values of each KV head have a scale.
        page_len: slots of a page, or 0.
        is_live: which tiles hold what a group of row blocks sees is found out at run time.
        live_tiles: so many whole tiles, from slot 0 on, can be visited by a loop at run time; the
            plan says how many.
        is_diagonal: of these, a loop visits what all rows of a round see; the keys that follow,
            around the diagonal, lie as far from the round's first row in every round.
    """

    slots: int
    layout: str = "BSKH"
    before: int | None = None
    after: int | None = None
    is_exact: bool = True
    has_positions: bool = False
    has_holes: bool = False
    is_padded: bool = False
    has_scales: bool = False
    page_len: int = 0
    is_live: bool = False
    live_tiles: int = 0
    is_diagonal: bool = False


@dataclass(frozen=True)
class RowBlock(nl.NKIObject):
    """Up to 128 rows of a pair, one a partition: row h * tokens + t of some heads and tokens.

    With a `stride` it stands for all blocks that lie multiples of it further on. With an `index`,
    the register of a loop at run time, it is that one of them.
    """

    first_token: int
    tokens: int
    first_head: int
    heads: int
    rows: int
    stride: int = 0
    index: Any = None


def tokens_of(memory: Any, axis: int, block: RowBlock) -> Any:
    """The tokens of a block along an axis of all."""
    if block.stride == 0:
        return memory.slice(axis, block.first_token, block.first_token + block.tokens)
    count = memory.shape[axis] // block.stride
    by_round = memory.slice(axis, 0, count * block.stride)
    mine = by_round.reshape_dim(axis, (count, block.stride)).select(axis, block.index)
    return mine.slice(axis, block.first_token, block.first_token + block.tokens)


@dataclass(frozen=True)
class KeyTile(nl.NKIObject):
    """Keys that are loaded at once.

    Subtile j holds key j of each of the `partitions` runs of `subtiles` keys where keys lie in
    runs, else the j-th 128 keys; of the last subtile there may be fewer. With a `stride` it stands
    for all tiles that lie multiples of it further on. With an `index`, the register of a loop at
    run time, it is that one of them.
    """

    source: int
    start: int
    keys: int
    subtiles: int
    partitions: int
    in_runs: bool
    stride: int = 0
    index: Any = None


@dataclass(frozen=True)
class Step(nl.NKIObject):
    """One row block against some keys of a tile: columns `first` to `first + keys` of it.

    After its last step the block is finished.
    """

    block: int
    first: int
    keys: int
    is_masked: bool
    is_last: bool = False


@dataclass(frozen=True)
class Visit(nl.NKIObject):
    """A key tile and what the row blocks of a group do with it."""

    tile: KeyTile
    steps: Any


def with_last(visits: Any, blocks: int) -> Any:
    """The same visits; the last step of each block says so."""
    last = []
    for _ in range(blocks):
        last.append(-1)
    for v in range(len(visits)):
        for step in visits[v].steps:
            last[step.block] = v
    marked = []
    for v in range(len(visits)):
        steps = []
        for step in visits[v].steps:
            is_last = last[step.block] == v
            steps.append(Step(step.block, step.first, step.keys, step.is_masked, is_last))
        marked.append(Visit(visits[v].tile, steps))
    return marked


def takes_part(visits: Any, block: int) -> bool:
    """Whether a row block has a step."""
    for visit in visits:
        for step in visit.steps:
            if step.block == block:
                return True
    return False


def whole_tile(source: KeySource, most: int) -> KeyTile:
    """The first of equal tiles of a source."""
    run = paged_run(source.page_len, most)
    subtiles = run if run > 0 else most // PARTITIONS
    return KeyTile(0, 0, subtiles * PARTITIONS, subtiles, PARTITIONS, True)


def has_bounds(source: KeySource) -> bool:
    """Whether some query may not see some slot."""
    return not source.is_exact or source.before != None or source.after != None  # noqa: E711


def seen_by(source: KeySource, block: RowBlock) -> tuple[int, int]:
    """The first slot that some row of a block may see, and the one behind the last.

    Of a diagonal source and a block that stands for many: counted from the first row of its round.
    """
    first, end = 0, source.slots
    if block.stride > 0 and not source.is_diagonal:
        return first, end
    if source.before != None:  # noqa: E711  (the kernel language has no `is`)
        first = max(first, block.first_token + source.before)
    if source.after != None:  # noqa: E711
        end = min(end, block.first_token + block.tokens + source.after)
    return first, max(first, end)


def seen_by_all(source: KeySource, block: RowBlock) -> tuple[int, int]:
    """The first slot that every row of a block sees, and the one behind the last; likewise."""
    first, end = 0, source.slots
    if block.stride > 0 and not source.is_diagonal:
        return first, first if has_bounds(source) else end
    if source.before != None:  # noqa: E711
        first = max(first, block.first_token + block.tokens - 1 + source.before)
    if source.after != None:  # noqa: E711
        end = min(end, block.first_token + source.after + 1)
    if not source.is_exact:
        end = first
    return first, end


def key_tiles(source: KeySource, index: int, first: int, end: int, most: int) -> Any:
    """Tiles over slots `first` to `end`, from a multiple of what is loaded together."""
    run = paged_run(source.page_len, most)
    unit = run if run > 0 else PARTITIONS
    size = run * PARTITIONS if run > 0 else most
    tiles = []
    for start in range(first // unit * unit, end, size):
        keys = min(size, source.slots - start, -(-(end - start) // unit) * unit)
        subtiles = run if run > 0 else -(-keys // PARTITIONS)
        partitions = keys // run if run > 0 else min(keys, PARTITIONS)
        tiles.append(KeyTile(index, start, keys, subtiles, partitions, run > 0))
    return tiles


def paged_run(page_len: int, most: int) -> int:
    """Slots that a gather reads at once: the most that divide a page; 0 without pages."""
    run = 0
    for n in range(1, min(page_len, most // PARTITIONS) + 1):
        if page_len % n == 0:
            run = n
    return run


def steps_of(source: KeySource, tile: KeyTile, blocks: Any) -> Any:
    """The blocks that see something of a tile, with the columns they may see, in whole subtiles."""
    steps = []
    for i in range(len(blocks)):
        low, high = seen_by(source, blocks[i])
        first, end = max(low, tile.start), min(high, tile.start + tile.keys)
        if first < end:
            start, stop = 0, tile.keys
            if not tile.in_runs:
                start = (first - tile.start) // PARTITIONS * PARTITIONS
                stop = min(tile.keys, -(-(end - tile.start) // PARTITIONS) * PARTITIONS)
            all_low, all_high = seen_by_all(source, blocks[i])
            is_masked = tile.start + start < all_low or tile.start + stop > all_high
            steps.append(Step(i, start, stop - start, is_masked))
    return steps


def ordered(tile: KeyTile, steps: Any) -> KeyTile:
    """The tile with its keys in runs, which load faster, if all that use it use all of it."""
    for step in steps:
        if step.keys < tile.keys:
            return tile
    return in_runs(tile)


def in_runs(tile: KeyTile) -> KeyTile:
    """The same keys in runs, one in each of 128 partitions, if that divides them."""
    if tile.in_runs or tile.keys % PARTITIONS != 0:
        return tile
    return KeyTile(
        tile.source, tile.start, tile.keys, tile.subtiles, PARTITIONS, True, tile.stride, tile.index
    )


def following(tile: KeyTile, block: RowBlock) -> KeyTile:
    """The tile that moves on with the round of a block."""
    return KeyTile(
        tile.source, tile.start, tile.keys, tile.subtiles, tile.partitions, tile.in_runs,
        block.stride, block.index,
    )  # fmt: skip


def columns_of(tile: KeyTile, j: int, first: int, keys: int) -> tuple[int, int, int, int]:
    """Subtile j among the columns `first` to `first + keys`: start, end, step, count."""
    if tile.in_runs:
        return j, tile.keys, tile.subtiles, tile.partitions
    start = j * PARTITIONS - first
    count = min(PARTITIONS, keys - start)
    return start, start + count, 1, count


def subtiles_of(tile: KeyTile, step: Step) -> tuple[int, int]:
    """The subtiles that a step uses: the first, and the one behind the last."""
    if tile.in_runs:
        return 0, tile.subtiles
    return step.first // PARTITIONS, -(-(step.first + step.keys) // PARTITIONS)
