"""How the online softmax walks a problem on a platform. Pure Python: make one, print it.

Two forms share the maths:

- ROWS: a loop over (sequence, KV head), inside it a loop over tiles of keys that ends at that row's
  own length. Made for XLA:CPU, where a tile that stays in the L2 cache decides the speed.
- BLOCKS: all rows at once, a loop over tiles of keys that ends at the longest live row; one block
  and no loop when the scores are small. Plain, fusable, partitionable XLA.
"""

import enum
from dataclasses import dataclass

import numpy as np

from jax_tkg.problem import AttentionProblem

CPU_TILE_BYTES = 128 * 1024
"""Largest float32 K tile on CPU. Measured: at 256 KiB the copy of the tile leaves the cache (glibc
switches to non-temporal stores) and the loop takes twice as long."""

CPU_ONE_DOT_BYTES = 768 * 1024
"""Scores up to this size may be computed in one dot on CPU: scores and weights stay under 2 MiB."""

BLOCK_TILE = 2048
"""Keys a step off the CPU. Not tuned: nothing was measured on GPU or TPU."""

BLOCK_SCORE_BYTES = 16 * 1024 * 1024
"""Off the CPU, scores up to this size are computed in one block."""


class Form(enum.Enum):
    """Which loop; see the module."""

    ROWS = "rows"
    BLOCKS = "blocks"


@dataclass(frozen=True)
class Target:
    """What the computation is compiled for.

    Attributes:
        platforms: as JAX names them; more than one for a multi-platform export, none while not yet
            known.
        auto_partitioned: the compiler may split arrays between devices.
    """

    platforms: tuple[str, ...]
    auto_partitioned: bool = False


@dataclass(frozen=True)
class OnlinePlan:
    """The choices for one problem on one target.

    Attributes:
        form: the loop.
        tile: keys in a tile; never more than S.
        num_tiles: tiles in S; the last one overlaps its neighbour when they do not divide S.
        dynamic_trips: the loop ends at the longest live length; otherwise it has a constant trip
            count, as Neuron needs.
        fold_heads: B and K become one batch dimension of the dots: XLA:CPU copies K for two.
        compute_dtype: dtype of the operands of the dots, which accumulate in float32.
        reason: why this form.
    """

    form: Form
    tile: int
    num_tiles: int
    dynamic_trips: bool
    fold_heads: bool
    compute_dtype: np.dtype
    reason: str

    def __str__(self) -> str:
        """One line for `explain`."""
        end = "stops at the live length" if self.dynamic_trips else "constant trip count"
        loop = (
            f"{self.num_tiles} tiles of {self.tile} keys, {end}"
            if self.num_tiles > 1
            else (f"one tile of {self.tile} keys")
        )
        return f"{self.form.value}: {loop}; dots in {self.compute_dtype.name}; {self.reason}"


def make_plan(problem: AttentionProblem, target: Target) -> OnlinePlan:
    """Chooses form, tile and dtype for a problem on a target."""
    cpu = target.platforms == ("cpu",) and not target.auto_partitioned
    return _plan_cpu(problem) if cpu else _plan_blocks(problem, target)


def _score_bytes(problem: AttentionProblem) -> int:
    return 4 * problem.batch * problem.num_heads * problem.num_tokens * problem.kv_len


def _tiles(problem: AttentionProblem, tile: int) -> tuple[int, int]:
    unit = problem.kv.slot_multiple
    tile = min(max(tile // unit, 1) * unit, problem.kv_len)
    return tile, -(-problem.kv_len // tile)


def _plan_cpu(problem: AttentionProblem) -> OnlinePlan:
    float32 = np.dtype(np.float32)
    in_one_dot = (
        problem.kv.heads_contiguous
        and problem.kv.stored_dtype == float32
        and not problem.is_padded
        and _score_bytes(problem) <= CPU_ONE_DOT_BYTES
    )
    if in_one_dot:
        return OnlinePlan(
            Form.BLOCKS, problem.kv_len, 1, False, True, float32, "every key is live, scores small"
        )
    widest = max(problem.head_dim, problem.value_head_dim)
    tile = CPU_TILE_BYTES // (4 * widest)
    tile, num_tiles = _tiles(problem, tile - tile % 16 if tile > 16 else tile)
    return OnlinePlan(
        Form.ROWS, tile, num_tiles, True, False, float32, "K tile in L2, each row to its own length"
    )


def _plan_blocks(problem: AttentionProblem, target: Target) -> OnlinePlan:
    small = _score_bytes(problem) <= BLOCK_SCORE_BYTES
    tile, num_tiles = _tiles(problem, problem.kv_len if small else BLOCK_TILE)
    dynamic = "neuron" not in target.platforms and num_tiles > 1
    where = "+".join(target.platforms) + (", partitioned" if target.auto_partitioned else "")
    return OnlinePlan(
        Form.BLOCKS, tile, num_tiles, dynamic, False, problem.compute_dtype, f"for {where}"
    )
