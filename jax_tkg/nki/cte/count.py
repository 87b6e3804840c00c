"""How much of the full work a plan leaves: squares multiplied, steps, keys loaded."""

from dataclasses import dataclass

from jax_tkg.nki.cte.plan import PrefillPlan, visits_of
from jax_tkg.nki.cte.tiles import whole_tile
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
    """

    squares: int
    steps: int
    masked_steps: int
    keys_loaded: int
    all_squares: int


def work(plan: PrefillPlan, program: int | None = None) -> Work:
    """What a program does, or all of them."""
    squares = steps = masked = loaded = every = 0
    slots = sum(-(-source.slots // PARTITIONS) for source in plan.sources)
    for share in plan.shares if program is None else (plan.shares[program],):
        pairs = len(share.pairs)
        for blocks in share.groups:
            every += pairs * slots * len(blocks)
            tile = whole_tile(plan.sources[0], plan.tile_keys)
            live = pairs * plan.live_tiles * len(blocks)
            squares += live * tile.subtiles
            steps += live
            masked += live
            loaded += pairs * plan.live_tiles * tile.keys
            for visit in visits_of(plan, blocks):
                loaded += pairs * visit.tile.keys
                steps += pairs * len(visit.steps)
                masked += pairs * sum(step.is_masked for step in visit.steps)
                squares += pairs * sum(-(-step.keys // PARTITIONS) for step in visit.steps)
    return Work(squares, steps, masked, loaded, every)
