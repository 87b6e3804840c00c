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


def visible_by_key(positions: Any, low: Any, high: Any) -> Any:
    """Which slots each token sees, slots on the partitions.

    Args:
        positions: float32 or int32 `[partitions, n]`, the position of each slot.
        low: float32 `[partitions, T]`, the same in every partition.
        high: the same.

    Returns:
        uint8 `[partitions, n, T]`, 1 where token t sees the slot.
    """
    partitions, n = positions.shape
    tokens = low.shape[1]
    shape = (partitions, n, tokens)
    every = positions.expand_dim(2).broadcast(2, tokens)
    visible = nl.ndarray(shape, nl.uint8, buffer=nl.sbuf)
    first = low.expand_dim(1).broadcast(1, n)
    nisa.tensor_tensor(dst=visible, data1=every, data2=first, op=nl.greater_equal)
    before = nl.ndarray(shape, nl.uint8, buffer=nl.sbuf)
    end = high.expand_dim(1).broadcast(1, n)
    nisa.tensor_tensor(dst=before, data1=every, data2=end, op=nl.less)
    nisa.tensor_tensor(dst=visible, data1=visible, data2=before, op=nl.logical_and)
    return visible


def visible_by_row(positions: Any, low: Any, high: Any) -> Any:
    """Which slots each token sees, tokens on the partitions.

    Args:
        positions: float32 or int32 `[rows, n]`, the same in every partition.
        low: float32 `[rows, 1]`, of the token of each partition.
        high: the same.

    Returns:
        uint8 `[rows, n]`, 1 where the row's token sees the slot.
    """
    visible = nl.ndarray(positions.shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=visible, data=positions, op0=nl.greater_equal, operand0=low)
    nisa.scalar_tensor_tensor(
        dst=visible, data=positions, op0=nl.less, operand0=high,
        op1=nl.logical_and, operand1=visible,
    )  # fmt: skip
    return visible


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
    visible = visible_by_key(at, low, high)
    nisa.dma_copy(dst=out[b, mine, :].reshape_dim(0, (partitions, n)), src=visible)


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
    nisa.dma_copy(dst=out[b, tokens, mine], src=visible_by_row(at, low, high))
