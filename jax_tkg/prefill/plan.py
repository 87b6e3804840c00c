"""How the pure-JAX prefill walks a problem on a platform. Pure Python: make one, print it.

Two forms share the maths, as in decode:

- ROWS: a loop over (sequence, KV head, tile of queries), inside it a loop over the tiles of keys
  that those queries see. Made for XLA:CPU.
- BLOCKS: all sequences and heads at once, one loop of constant length over the pairs of tiles that
  may have something to see. Plain XLA that partitions, and that Neuron can run.
- PARTS: BLOCKS of each of m equal parts of the slots, where the compiler may split these. Where
  they are not split it costs what causality saves: whether a part is hidden is not known.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import AbstractMesh

from jax_tkg.online.grid import TileGrid, make_grid
from jax_tkg.online.plan import Form, Target
from jax_tkg.problem import AttentionProblem
from jax_tkg.sharding.division import Division, divide
from jax_tkg.sharding.spec import AttentionSharding

CPU_ROWS, CPU_KEYS = 256, 128
"""Rows (query heads of a KV head times queries) and keys of a tile on CPU: logits and weights of
128 KiB each stay in the L2 cache. Measured (H = 64 and 128, T = 512 to 8192): as fast as, or faster
than, half, twice and four times as much. Fewer rows have more keys, up to `MOST_KEYS`."""

BLOCK_SCORE_BYTES = 16 * 1024 * 1024
"""Scores of a pair of tiles off the CPU, over all sequences and heads. Not tuned."""

BLOCK_LARGEST, BLOCK_SMALLEST = 512, 128
"""Queries and keys of a tile off the CPU. Not tuned: nothing was measured on GPU or TPU."""

PARTS_AXIS = "parts of the slots"
"""Of the form PARTS, as if each part were a device's."""

MOST_KEYS = {Form.ROWS: 512, Form.BLOCKS: 2048, Form.PARTS: 2048}
"""Keys of a tile whose queries are few."""


@dataclass(frozen=True)
class PrefillPlan:
    """The choices for one problem on one target.

    Attributes:
        form: the loops.
        cached: tiles of queries by tiles of cached keys.
        beside: likewise for the new keys beside the cache; None if there are none.
        compute_dtype: dtype of the operands of the dots, which accumulate in float32.
        reason: why this form.
        parts: m, into which the slots are divided; the tiles are those of a part.
    """

    form: Form
    cached: TileGrid
    beside: TileGrid | None
    compute_dtype: np.dtype
    reason: str
    parts: int = 1

    @property
    def grids(self) -> tuple[TileGrid, ...]:
        """Those of the cached keys and of the new ones beside them."""
        return (self.cached,) if self.beside is None else (self.cached, self.beside)

    @property
    def tiles_total(self) -> int:
        """Pairs of tiles of one KV head of one sequence."""
        return sum(grid.total for grid in self.grids)

    @property
    def tiles_computed(self) -> int:
        """Those that are not left out whatever the arrays hold; in the form ROWS fewer may be."""
        return sum(grid.computed for grid in self.grids)

    def __str__(self) -> str:
        """One line for `explain`."""
        walks = f"{self.form.value}: {self.cached}"
        if self.beside is not None:
            walks += f" in the cache, {self.beside} beside it"
        if self.parts > 1:
            walks += f", of each of {self.parts} parts of the slots"
        if self.form is Form.ROWS:
            walks += ", fewer where lengths or bounds hide them"
        return f"{walks}; dots in {self.compute_dtype.name}; {self.reason}"


def make_prefill_plan(problem: AttentionProblem, target: Target) -> PrefillPlan:
    """Chooses form, tiles and dtype for a problem on a target."""
    if target.platforms == ("cpu",) and not target.auto_partitioned:
        query_tile = max(CPU_ROWS // problem.group, 1)
        return divided(
            problem,
            Form.ROWS,
            query_tile=query_tile,
            key_tile=_keys_for(problem, Form.ROWS, query_tile, CPU_KEYS),
            dtype=np.dtype(np.float32),
            reason="logits in L2",
        )
    side = BLOCK_LARGEST
    pairs = problem.batch * problem.num_heads
    while side > BLOCK_SMALLEST and 4 * pairs * side * side > BLOCK_SCORE_BYTES:
        side //= 2
    where = "+".join(target.platforms) + (", partitioned" if target.auto_partitioned else "")
    plan = divided(
        problem,
        Form.BLOCKS,
        query_tile=side,
        key_tile=_keys_for(problem, Form.BLOCKS, side, side),
        dtype=problem.compute_dtype,
        reason=f"for {where}",
    )
    # Of a dense layout: a pool of pages has no order that could be split as slots are.
    can_split = target.auto_partitioned and not problem.kv.has_holes
    parts = math.gcd(problem.kv_len, target.devices) if can_split else 1
    if parts == 1 or plan.cached.key_tile == problem.kv_len:
        return plan
    local = divided(
        divided_slots(problem, parts).local,
        Form.PARTS,
        query_tile=side,
        key_tile=max(plan.cached.key_tile // parts, min(BLOCK_SMALLEST, problem.kv_len // parts)),
        dtype=problem.compute_dtype,
        reason=plan.reason,
    )
    return replace(local, parts=parts)


def divided_slots(problem: AttentionProblem, parts: int) -> Division:
    """The problem in equal parts of its slots."""
    mesh = AbstractMesh((parts,), (PARTS_AXIS,))
    return divide(problem, AttentionSharding(mesh, keys=PARTS_AXIS))


def _keys_for(problem: AttentionProblem, form: Form, query_tile: int, keys: int) -> int:
    """More keys than a full tile of queries has, where there are fewer queries."""
    return min(keys * max(query_tile // problem.num_tokens, 1), MOST_KEYS[form])


def divided(
    problem: AttentionProblem,
    form: Form,
    *,
    query_tile: int,
    key_tile: int,
    dtype: np.dtype,
    reason: str,
) -> PrefillPlan:
    """The plan with tiles of the given sizes, or whole pages, where there are as many.

    Args:
        problem: what is computed.
        form: the loops.
        query_tile: queries of a tile.
        key_tile: keys of a tile.
        dtype: of the operands of the dots.
        reason: why this form.
    """
    query_tile = min(query_tile, problem.num_tokens)
    unit = problem.kv.slot_multiple
    in_cache = min(-(-key_tile // unit) * unit, problem.kv_len)
    beside = None
    if problem.has_new_kv:
        beside = make_grid(problem, query_tile, min(key_tile, problem.num_tokens), beside=True)
    return PrefillPlan(
        form=form,
        cached=make_grid(problem, query_tile, in_cache, beside=False),
        beside=beside,
        compute_dtype=dtype,
        reason=reason,
    )
