"""How much of the full work a plan leaves: squares multiplied, steps, keys loaded."""

from dataclasses import dataclass

from jax_tkg.nki.cte.plan import PrefillPlan, loop_end, visits_of
from jax_tkg.nki.cte.tiles import KeySource, RowBlock, has_bounds, whole_tile
from jax_tkg.nki.rows import PARTITIONS


@dataclass(frozen=True)
class Work:
    """What a program, or all, does; of live tiles, if all of them are visited.

    Attributes:
        squares: 128 rows by 128 keys that are multiplied.
        steps: row blocks by key tiles.
        masked_steps: those of them that need a mask.
        keys_loaded: keys that are loaded, counted each time.
        all_squares: without skipping.
        emitted_steps: those in the text of the kernel: what a loop at run time repeats counts once.
    """

    squares: int
    steps: int
    masked_steps: int
    keys_loaded: int
    all_squares: int
    emitted_steps: int


def work(plan: PrefillPlan, program: int | None = None) -> Work:
    """What a program does, or all of them."""
    squares = steps = masked = loaded = every = emitted = 0
    slots = sum(-(-source.slots // PARTITIONS) for source in plan.sources)
    for share in plan.shares if program is None else (plan.shares[program],):
        pairs = len(share.pairs)
        groups = [(pairs, blocks) for blocks in share.groups]
        groups += [(pairs * plan.rounds, blocks) for blocks in share.looped]
        for times, blocks in groups:
            every += times * slots * len(blocks)
            for source in plan.sources:
                tile = whole_tile(source, plan.tile_keys)
                tiles = pairs * _live_tiles(plan, source, blocks[0], tile.keys)
                live = tiles * len(blocks)
                squares += live * tile.subtiles
                steps += live
                masked += live if has_bounds(source) and not source.is_diagonal else 0
                emitted += pairs * len(blocks) if source.live_tiles else 0
                loaded += tiles * tile.keys
            for visit in visits_of(plan, blocks):
                loaded += times * visit.tile.keys
                steps += times * len(visit.steps)
                emitted += pairs * len(visit.steps)
                masked += times * sum(step.is_masked for step in visit.steps)
                squares += times * sum(-(-step.keys // PARTITIONS) for step in visit.steps)
    return Work(squares, steps, masked, loaded, every, emitted)


def _live_tiles(plan: PrefillPlan, source: KeySource, block: RowBlock, size: int) -> int:
    """Tiles that loops at run time visit for a group with this block, in all its rounds."""
    rounds = range(plan.rounds) if block.stride else range(1)
    if not source.is_diagonal:
        return source.live_tiles * len(rounds)
    end = loop_end(plan, source, block)
    return sum((i * block.stride + end) // size for i in rounds)
