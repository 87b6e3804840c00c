"""A plan of the decode kernel for people: what its programs share, and a diagram of them."""

from typing import TYPE_CHECKING

from jax_tkg.nki.differences import sharing_of
from jax_tkg.nki.rows import BLOCK_ROWS, PARTITIONS

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan, Share
    from jax_tkg.nki.rows import RowBlock

GAP = 4
"""Columns between two programs."""


def in_a_line(plan: "KernelPlan") -> str:
    """How a plan divides its problem."""
    share = plan.shares[0]
    groups = [g for block in share.blocks for g in block.groups]
    if plan.live is not None:
        kinds = [plan.live.full, plan.live.edge, plan.live.dirty]
        keys = f"a loop over live tiles of {plan.live.full.keys}"
    else:
        kinds = [tile for every in plan.shares for tile in every.tiles]
        largest = max((tile.keys for tile in share.tiles), default=0)
        keys = f"{len(share.tiles)} tile(s) of up to {largest}"
    together = {
        "keys": max((t.key_columns for t in kinds), default=1),
        "values": max((t.value_columns for t in kinds), default=1),
    }
    in_twos = " and ".join(what for what, columns in together.items() if columns > 1)
    return (
        f"{plan.programs} program(s), {plan.sharding} sharding ({plan.reason}), exchange "
        f"{plan.exchange}; rows: {len(groups)} group(s) of up to {max(g.rows for g in groups)}, "
        f"{len(share.blocks)} block(s); keys: {keys}"
        f"{f', 2 columns of {in_twos} in a matmul' if in_twos else ''}{_runs(plan)}"
    )


def _runs(plan: "KernelPlan") -> str:
    runs = plan.runs
    if not runs.long:
        return ""
    shorter = f", of {runs.short} for what is left" if runs.short < runs.long else ""
    at_once = ", two gathers of keys at once" if runs.together > 1 else ""
    return f"; pages: in runs of {runs.long}{shorter}{at_once}"


def describe(plan: "KernelPlan") -> str:
    """What the programs share and how, in lines indented to follow the plan's own."""
    lines = [sharing_of(plan).split] if plan.programs > 1 else []
    return "\n".join(f"  {line}" for line in (*lines, *diagram(plan)))


def diagram(plan: "KernelPlan") -> list[str]:
    """Programs side by side: rows, keys, tiles; between them what they exchange, and when."""
    columns = [_column(plan, program) for program in range(plan.programs)]
    if plan.programs == 1:
        return columns[0]
    width = max(len(line) for line in columns[0]) + GAP
    between = _exchanges(plan)
    width = max([width, *(len(line) + 3 for line in between)])
    lines = [f"{mine:{width}}{theirs}" for mine, theirs in zip(*columns, strict=True)]
    head, stores = lines[:-1], lines[-1]
    arrows = [f"|{f' {line} ':=^{width - 1}}|" for line in between]
    return [*head, *(arrows or [f"{'|':{width}}|"]), stores]


def _column(plan: "KernelPlan", program: int) -> list[str]:
    share = plan.shares[program]
    return [
        f"program {program}",
        f"rows: {_rows(share)}",
        f"keys: {_keys(plan, share)}",
        f"tiles: {_tiles(plan, share)}",
        f"stores: {_stored(plan, program)}",
    ]


def _rows(share: "Share") -> str:
    groups = [group for block in share.blocks for group in block.groups]
    count = sum(group.rows for group in groups)
    sequences = [(g.first_batch, g.first_batch + g.batches) for g in groups]
    heads = [(g.first_kv, g.first_kv + g.kv_heads) for g in groups]
    spans = (
        _span(what, min(first for first, _ in ranges), max(end for _, end in ranges))
        for what, ranges in (("sequence", sequences), ("KV head", heads))
    )
    return ", ".join((str(count), *spans))


def _keys(plan: "KernelPlan", share: "Share") -> str:
    slots = [tile for tile in share.tiles if tile.keys]
    parts = []
    if plan.live is not None:
        parts.append("live slots, in turns" if plan.live.sharers > 1 else "live slots")
    elif slots:
        parts.append(_span("slot", slots[0].start, slots[-1].start + slots[-1].keys))
    if any(tile.new for tile in share.tiles):
        parts.append("new keys")
    return ", ".join(parts) or "none"


def _tiles(plan: "KernelPlan", share: "Share") -> str:
    if plan.live is not None:
        return f"of {plan.live.full.keys}, a loop for each sequence"
    idle = f", {share.idle_tiles} idle" if share.idle_tiles else ""
    return f"{len(share.tiles)} of up to {max((t.keys for t in share.tiles), default=0)}{idle}"


def _stored(plan: "KernelPlan", program: int) -> str:
    if plan.sharding in ("none", "batch"):
        return "its rows"
    blocks = plan.shares[program].blocks
    mine = sum(_chunk_rows(block, program, plan.programs) for block in blocks)
    return f"{mine} of {sum(block.rows for block in blocks)} rows"


def _chunk_rows(block: "RowBlock", program: int, programs: int) -> int:
    """Rows of a block that a program stores: chunk 0, 1, ... goes to the programs in turn."""
    rows = [chunk.rows for group in block.groups for chunk in group.chunks]
    return sum(n for i, n in enumerate(rows) if i % programs == program)


def _span(what: str, first: int, end: int) -> str:
    return f"{what} {first}" if end - first == 1 else f"{what}s {first}-{end - 1}"


def _exchanges(plan: "KernelPlan") -> list[str]:
    sharing = sharing_of(plan)
    lines = []
    if sharing.on_tile:
        lines.append(f"every tile: {', '.join(sharing.on_tile)}")
    if sharing.at_end:
        lines.append(f"at the end: {', '.join(sharing.at_end)}")
    if lines:
        looped = ", and 2 a round" if plan.every_tile and plan.live is not None else ""
        lines.append(f"{exchanges_of(plan)} exchanges{looped}")
    return lines


def exchanges_of(plan: "KernelPlan") -> int:
    """How often two programs exchange something, but in rounds of loops over live tiles.

    The kernel's results are in HBM. One exchange takes 256 float32 columns.
    """
    if plan.sharding != "sequence":
        return 0
    on_tile, at_end = sharing_of(plan).on_tile, sharing_of(plan).at_end
    tiles = max(len(share.tiles) for share in plan.shares)
    total = 0
    for block in plan.shares[0].blocks:
        total += sum(_pieces(plan, part, block.rows) for part in at_end)
        for group in block.groups:
            total += tiles * sum(_pieces(plan, part, group.rows) for part in on_tile)
    return total


def _pieces(plan: "KernelPlan", part: str, rows: int) -> int:
    chunks = -(-plan.value_head_dim // PARTITIONS) if part == "output" else 1
    return -(-chunks * rows // BLOCK_ROWS)
