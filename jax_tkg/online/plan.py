"""How the online softmax walks a problem on a platform. Pure Python: make one, print it.

Three forms share the maths:

- ROWS: a loop over (sequence, KV head), inside it a loop over tiles of keys that ends at that row's
  own length. Made for XLA:CPU, where a tile that stays in the L2 cache decides the speed.
  Where most keys turn out to be live, one dot over all of them may be tried first.
- BLOCKS: all rows at once, a loop over tiles of keys that ends at the longest live row; one block
  and no loop when the scores are small. Plain, fusable XLA that partitions by rows and heads.
- PARTS: BLOCKS where the compiler may split the slots too, and would gather every tile of
  consecutive ones: a tile is a piece of each of m equal parts of the slots, which meet after the
  loop. It costs most of the stop at the live length: parts that a row does not reach are computed
  along with the first, so that the loop is shorter only for rows that live within S / m slots.
"""

import enum
import math
from dataclasses import dataclass

import numpy as np

from jax_tkg.cache.storage import cpu_needs_bits
from jax_tkg.problem import AttentionProblem

CPU_TILE_BYTES = 128 * 1024
"""Largest float32 K tile on CPU. Measured: at 256 KiB the copy of the tile leaves the cache (glibc
switches to non-temporal stores) and the loop takes twice as long."""

CPU_BITS_TILE_BYTES = 256 * 1024
"""Of a tile decoded from the raw bits of a cache, which nothing copies. Measured: 4 to 16 % less
time than with half of it, which the edges of a row keep; from 288 KiB on twice as much, as XLA:CPU
then divides the decoding of a tile between its threads."""

CPU_BITS_TILES = 4
"""Such tiles in a cache, at least: of fewer, a row that is short fills none, and is all edge."""

CPU_ONE_DOT_BYTES = 768 * 1024
"""Scores up to this size may be computed in one dot on CPU: scores and weights stay under 2 MiB."""

CPU_WHOLE_BYTES = 512 * 1024
"""Smaller keys and values are not worth compiling a second way."""

CPU_WHOLE_WIDTH, CPU_WHOLE_ROWS = 64, 4
"""Widest heads and most queries of a KV head for which one dot over all keys was measured to take
no more processor time than the loop; of heads of 128 it takes 1.2 to 1.6 times as much."""

CPU_SMALL_BYTES = (256 * 1024, 1024 * 1024)
"""Keys and values of heads beside each other that are so small that copying them into order costs
less than a loop. Not measured below."""

CPU_PRODUCT_BYTES = 1024 * 1024
"""Products of every query with the keys of every head, for heads that lie beside each other."""

BLOCK_TILE = 2048
"""Keys a step off the CPU. Not tuned: nothing was measured on GPU or TPU."""

BLOCK_SCORE_BYTES = 16 * 1024 * 1024
"""Off the CPU, scores up to this size are computed in one block."""


class Form(enum.Enum):
    """Which loop; see the module."""

    ROWS = "rows"
    BLOCKS = "blocks"
    PARTS = "parts"


@dataclass(frozen=True)
class Target:
    """What the computation is compiled for.

    Attributes:
        platforms: as JAX names them; more than one for a multi-platform export, none while not yet
            known.
        auto_partitioned: the compiler may split arrays between devices.
        devices: between how many at most.
    """

    platforms: tuple[str, ...]
    auto_partitioned: bool = False
    devices: int = 1


@dataclass(frozen=True)
class OnlinePlan:
    """The choices for one problem on one target.

    Attributes:
        form: the loop.
        tile: keys in a tile, of each part; never more than S.
        edge_tile: keys in a tile that needs a mask, in ROWS; divides `tile`.
        num_tiles: tiles in S, or in a part of it; the last one overlaps its neighbour when they do
            not divide it.
        dynamic_trips: the loop ends at the longest live length; otherwise it has a constant trip
            count, as Neuron needs.
        fold_heads: B and K become one batch dimension of the dots: XLA:CPU copies K for two.
        compute_dtype: dtype of the operands of the dots, which accumulate in float32.
        reason: why this form.
        exchange: mapped axes with which the running maximum is exchanged on every tile.
        parts: m, into which the slots are divided.
        buffered: tiles are decoded into memory that the loop carries; see `rows.TileBuffers`.
        whole_first: where most keys are live, one dot over all of them goes first; see `whole`.
    """

    form: Form
    tile: int
    num_tiles: int
    dynamic_trips: bool
    fold_heads: bool
    compute_dtype: np.dtype
    reason: str
    exchange: tuple[str, ...] = ()
    parts: int = 1
    buffered: bool = False
    whole_first: bool = False
    edge_tile: int = 0

    def __str__(self) -> str:
        """One line for `explain`."""
        end = "stops at the live length" if self.dynamic_trips else "constant trip count"
        loop = (
            f"{self.num_tiles} tiles of {self.tile} keys, {end}"
            if self.num_tiles > 1
            else (f"one tile of {self.tile} keys")
        )
        if 0 < self.edge_tile < self.tile:
            loop += f", of {self.edge_tile} at the edges"
        if self.parts > 1:
            loop += f" of each of {self.parts} parts"
        if self.exchange:
            loop += f", maximum exchanged over {' x '.join(self.exchange)} on each"
        if self.whole_first:
            loop = f"one dot if most keys are live, else {loop}"
        if self.buffered:
            loop += ", each decoded into one buffer"
        return f"{self.form.value}: {loop}; dots in {self.compute_dtype.name}; {self.reason}"


def make_plan(problem: AttentionProblem, target: Target) -> OnlinePlan:
    """Chooses form, tile and dtype for a problem on a target."""
    cpu = target.platforms == ("cpu",) and not target.auto_partitioned and not problem.exchange
    return _plan_cpu(problem) if cpu else _plan_blocks(problem, target)


def _score_bytes(problem: AttentionProblem) -> int:
    return 4 * problem.batch * problem.num_heads * problem.num_tokens * problem.kv_len


def _tiles(problem: AttentionProblem, tile: int, parts: int = 1) -> tuple[int, int]:
    unit, slots = problem.kv.slot_multiple, problem.kv_len // parts
    tile = min(max(tile // unit, 1) * unit, slots)
    return tile, -(-slots // tile)


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
    if _small_on_cpu(problem):
        return OnlinePlan(
            Form.BLOCKS, problem.kv_len, 1, False, True, float32, "small keys and values"
        )
    widest = max(problem.head_dim, problem.value_head_dim)
    edge = CPU_TILE_BYTES // (4 * widest)
    edge, _ = _tiles(problem, edge - edge % 16 if edge > 16 else edge)
    in_bits = problem.kv.stored_dtype.kind == "u"
    wide = CPU_BITS_TILE_BYTES // CPU_TILE_BYTES * edge
    tile = wide if in_bits and CPU_BITS_TILES * wide <= problem.kv_len else edge
    return OnlinePlan(
        Form.ROWS,
        tile,
        -(-problem.kv_len // tile),
        True,
        False,
        float32,
        "K tile in L2, each row to its own length",
        buffered=cpu_needs_bits(problem.kv.stored_dtype),
        whole_first=_whole_on_cpu(problem),
        edge_tile=edge,
    )


def _few_on_cpu(problem: AttentionProblem) -> bool:
    """Whether the keys are float32 and so narrow, for so few queries, that loops are slow."""
    width = max(problem.head_dim, problem.value_head_dim)
    return (
        # Symbolic sizes, as of an export, are not known to be small.
        isinstance(problem.batch * problem.kv_len * problem.num_tokens, int)
        and problem.kv.stored_dtype == np.float32
        and not problem.kv.has_holes
        and width <= CPU_WHOLE_WIDTH
        and problem.rows_per_head <= CPU_WHOLE_ROWS
    )


def _kv_bytes(problem: AttentionProblem) -> int:
    widths = problem.head_dim + problem.value_head_dim
    return 4 * problem.batch * problem.num_kv_heads * problem.kv_len * widths


def _small_on_cpu(problem: AttentionProblem) -> bool:
    if not _few_on_cpu(problem) or problem.kv.heads_contiguous:
        return False
    least, most = CPU_SMALL_BYTES
    return least <= _kv_bytes(problem) <= most


def _whole_on_cpu(problem: AttentionProblem) -> bool:
    """Whether one dot over keys as they lie is fast, and its scores small."""
    if not _few_on_cpu(problem) or _kv_bytes(problem) < CPU_WHOLE_BYTES:
        return False
    if problem.kv.heads_contiguous:
        return _score_bytes(problem) <= CPU_ONE_DOT_BYTES
    return _score_bytes(problem) * problem.num_kv_heads <= CPU_PRODUCT_BYTES


def _plan_blocks(problem: AttentionProblem, target: Target) -> OnlinePlan:
    small = _score_bytes(problem) <= BLOCK_SCORE_BYTES and not problem.exchange
    # Of a dense layout: a pool of pages has no order that could be split as slots are.
    can_split = target.auto_partitioned and not small and not problem.kv.has_holes
    parts = math.gcd(problem.kv_len, target.devices) if can_split else 1
    tile, num_tiles = _tiles(problem, problem.kv_len if small else BLOCK_TILE, parts)
    # Devices that exchange something on a tile must all come to it.
    dynamic = "neuron" not in target.platforms and num_tiles > 1 and not problem.exchange
    where = "+".join(target.platforms) + (", partitioned" if target.auto_partitioned else "")
    return OnlinePlan(
        form=Form.BLOCKS if parts == 1 else Form.PARTS,
        tile=tile,
        num_tiles=num_tiles,
        dynamic_trips=dynamic,
        fold_heads=False,
        compute_dtype=problem.compute_dtype,
        reason=f"for {where}",
        exchange=problem.exchange,
        parts=parts,
    )
