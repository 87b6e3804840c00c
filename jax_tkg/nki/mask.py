"""Visibility by position: steps for tiles of both orientations, and a kernel of its own.

Token t sees a slot whose position p is low_t <= p < high_t: causality, windows, lengths and padding
are all of this form. Positions and bounds are whole numbers, exact in float32 up to 2^24.
"""

from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS

TILE_ELEMENTS = 4096
"""Mask elements a partition that are made at once."""


@dataclass(frozen=True)
class MaskPlan(nl.NKIObject):
    """What the kernel is built from but the arrays.

    Attributes:
        batch, tokens, slots: B T S.
        by_key: slots lie on the partitions: the mask is `[B, S, T]`; else `[B, T, S]`.
        tiles: of each program: sequence, first of what lies on the partitions, how many partitions,
            first slot or token along the other axis, and how many slots a partition has (of
            `by_key`, slots that follow each other).
    """

    batch: int
    tokens: int
    slots: int
    by_key: bool
    tiles: tuple[tuple[tuple[int, int, int, int, int], ...], ...]


def make_mask_plan(
    batch: int, tokens: int, slots: int, by_key: bool, programs: int = 1
) -> MaskPlan:
    """Plans a mask: tiles go round the programs."""
    tiles = []
    for b in range(batch):
        if by_key:
            most = max(1, TILE_ELEMENTS // tokens)
            start = 0
            while start < slots:
                run = min(most, max(1, (slots - start) // PARTITIONS))
                partitions = min(PARTITIONS, (slots - start) // run)
                tiles.append((b, start, partitions, 0, run))
                start += partitions * run
        else:
            for first in range(0, tokens, PARTITIONS):
                rows = min(PARTITIONS, tokens - first)
                for start in range(0, slots, TILE_ELEMENTS):
                    tiles.append((b, first, rows, start, min(TILE_ELEMENTS, slots - start)))
    shares = tuple(tuple(tiles[program::programs]) for program in range(programs))
    return MaskPlan(batch, tokens, slots, by_key, shares)


def hidden_by_key(positions: Any, low: Any, high: Any) -> Any:
    """Which keys are hidden, keys on the partitions; all three are views of one shape.

    Args:
        positions: float32 or int32 `[partitions, ...]`, of the keys.
        low: float32, the first position that is seen; None where none is too early.
        high: float32, the first one that is not seen any more.

    Returns:
        uint8 `[partitions, ...]`, 1 where not low <= position < high.
    """
    hidden = nl.ndarray(positions.shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=hidden, data1=positions, data2=high, op=nl.greater_equal)
    if low != None:  # noqa: E711  (the kernel language has no `is`)
        early = nl.ndarray(positions.shape, nl.uint8, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=early, data1=positions, data2=low, op=nl.less)
        nisa.tensor_tensor(dst=hidden, data1=hidden, data2=early, op=nl.logical_or)
    return hidden


def hidden_by_row(positions: Any, low: Any, high: Any) -> Any:
    """Which keys are hidden from each row, rows on the partitions.

    Args:
        positions: float32 or int32 `[rows, n]`, the same in every partition.
        low: float32 `[rows, 1]`, of the row of each partition: see `hidden_by_key`.
        high: the same.

    Returns:
        uint8 `[rows, n]`, 1 where the row does not see the key.
    """
    hidden = nl.ndarray(positions.shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=hidden, data=positions, op0=nl.less, operand0=low)
    nisa.scalar_tensor_tensor(
        dst=hidden, data=positions, op0=nl.greater_equal, operand0=high,
        op1=nl.logical_or, operand1=hidden,
    )  # fmt: skip
    return hidden


def select_slots(logits: Any, low: Any, high: Any, first: int) -> tuple[Any, Any]:
    """The same of keys that follow each other, applied: one instruction, which counts the slots.

    Args:
        logits: `[rows, n]`, of slots `first` to `first + n`; what is hidden may be NaN.
        low: as in `hidden_by_row`.
        high: the same.
        first: see `logits`.

    Returns:
        The logits in SBUF, the hidden ones far below all others, and the largest of each row
        `[rows, 1]`.
    """
    selected = nl.ndarray(logits.shape, nl.float32, buffer=nl.sbuf)
    largest = nl.ndarray((logits.shape[0], 1), nl.float32, buffer=nl.sbuf)
    nisa.range_select(
        dst=selected, on_true_tile=logits, comp_op0=nl.greater_equal, comp_op1=nl.less,
        bound0=low, bound1=high, range_start=first, reduce_res=largest, reduce_op=nl.maximum,
    )  # fmt: skip
    return selected, largest


def shown(hidden: Any) -> Any:
    """1 where a mask has 0, and 0 elsewhere; the same tile."""
    nisa.tensor_scalar(dst=hidden, data=hidden, op0=nl.equal, operand0=0)
    return hidden


def mask(bounds: Any, positions: Any = None, plan: Any = None) -> Any:
    """Makes a mask in HBM.

    Args:
        bounds: float32 `[2, B, T]`: token t of row b sees bounds[0] <= position < bounds[1].
        positions: int32 `[B, S]`, the position of each slot; None where slot s holds position s.
        plan: a `MaskPlan`.

    Returns:
        uint8 `[B, S, T]` or `[B, T, S]`, 1 where a token sees a slot.
    """
    shape = (plan.batch, plan.tokens, plan.slots)
    if plan.by_key:
        shape = (plan.batch, plan.slots, plan.tokens)
    out = nl.ndarray(shape, nl.uint8, buffer=nl.shared_hbm)
    for tile in plan.tiles[nl.program_id(0)]:
        if plan.by_key:
            store_by_key(out, bounds, positions, tile, plan)
        else:
            store_by_row(out, bounds, positions, tile)
    return out


def store_by_key(out: Any, bounds: Any, positions: Any, tile: Any, plan: MaskPlan) -> None:
    """One tile with slots on the partitions: partition p has slots start + p * n + j."""
    b, start, partitions, _, n = tile
    at = nl.ndarray((partitions, n), nl.int32, buffer=nl.sbuf)
    mine = nl.ds(start, partitions * n)
    if positions == None:  # noqa: E711  (the kernel language has no `is`)
        nisa.iota(dst=at, pattern=[[1, n]], offset=start, channel_multiplier=n)
    else:
        nisa.dma_copy(dst=at, src=positions[b, mine].reshape((partitions, n)))
    low = nl.ndarray((partitions, plan.tokens), nl.float32, buffer=nl.sbuf)
    high = nl.ndarray((partitions, plan.tokens), nl.float32, buffer=nl.sbuf)
    for i, bound in ((0, low), (1, high)):
        row = bounds[i, b].reshape((1, plan.tokens))
        nisa.dma_copy(dst=bound, src=row.broadcast(0, partitions))
    hidden = hidden_by_key(
        at.expand_dim(2).broadcast(2, plan.tokens),
        low.expand_dim(1).broadcast(1, n),
        high.expand_dim(1).broadcast(1, n),
    )
    nisa.dma_copy(dst=out[b, mine, :].reshape_dim(0, (partitions, n)), src=shown(hidden))


def store_by_row(out: Any, bounds: Any, positions: Any, tile: Any) -> None:
    """One tile with tokens on the partitions."""
    b, first, rows, start, n = tile
    at = nl.ndarray((rows, n), nl.int32, buffer=nl.sbuf)
    tokens, mine = nl.ds(first, rows), nl.ds(start, n)
    if positions == None:  # noqa: E711
        nisa.iota(dst=at, pattern=[[1, n]], offset=start, channel_multiplier=0)
    else:
        nisa.dma_copy(dst=at, src=positions[b, mine].reshape((1, n)).broadcast(0, rows))
    low = nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)
    high = nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)
    for i, bound in ((0, low), (1, high)):
        nisa.dma_copy(dst=bound, src=bounds[i, b, tokens].reshape((rows, 1)))
    nisa.dma_copy(dst=out[b, tokens, mine], src=shown(hidden_by_row(at, low, high)))
