"""The new keys and values beside the cache."""

from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, NewKeys
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import RowGroup
from jax_tkg.nki.steps.load import (
    global_rows,
    load_small,
    positions_of,
    rotate,
    transpose,
)
from jax_tkg.nki.tiles import KeyTile, Piece

VALUE_LOADS = 2
"""DMAs for new values: with so few partitions each takes but one of the queues."""


def load_new_keys(
    inputs: Inputs,
    rotated: Any,
    dtype: Any,
    consts: Constants,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """The new keys of a group, transposed, and its new values: see `NewKeys`.

    Where the kernel rotates them it also stores them in `rotated`, `[B, T, K, H]`.
    """
    loaded = NewKeys([], [])
    for piece in tile.new:
        rows = nl.ndarray((group.pairs * piece.keys, plan.head_dim), dtype, buffer=nl.sbuf)
        by_row = (0, 2, 1, 3)
        load_small(rows, piece_view(inputs.new_key, piece, group).permute(by_row), True, plan)
        batches = nl.ds(group.first_batch, group.batches)
        tokens = nl.ds(piece.start, piece.keys)
        rotate(rows, positions_of(inputs, batches, tokens, group.kv_heads), consts, plan)
        if rotated != None:  # noqa: E711  (the kernel language has no `is`)
            nisa.dma_copy(dst=piece_view(rotated, piece, group).permute(by_row), src=rows)
        tiles = []
        for turned in transpose(rows):
            tile_keys = nl.ndarray(turned.shape, dtype, buffer=nl.sbuf)
            nisa.tensor_copy(dst=tile_keys, src=turned)
            tiles.append(tile_keys)
        loaded.keys.append(tiles)
        values = piece_view(inputs.new_value, piece, group).permute((1, 0, 2, 3))
        shape = (piece.keys, group.pairs, plan.value_head_dim)
        tile_values = nl.ndarray(shape, dtype, buffer=nl.sbuf)
        by_pair = tile_values.reshape_dim(1, (group.batches, group.kv_heads))
        step = -(-group.batches // VALUE_LOADS)
        for first in range(0, group.batches, step):
            some = nl.ds(first, min(step, group.batches - first))
            by_gpsimd = plan.live == None  # noqa: E711  (which in a loop has queries and masks)
            load_small(by_pair[:, some], values[:, some], by_gpsimd, plan)
        loaded.values.append(tile_values)
    return loaded


def piece_view(tensor: Any, piece: Piece, group: RowGroup) -> Any:
    """The part of `[B, T, K, ...]` that a piece and a group are about."""
    return tensor[
        nl.ds(group.first_batch, group.batches),
        nl.ds(piece.start, piece.keys),
        nl.ds(group.first_kv, group.kv_heads),
    ]


def load_for_rows(tensor: Any, piece: Piece, group: RowGroup, plan: KernelPlan) -> Any:
    """`[keys, rows of the group]` of `[T, B * N * T]`."""
    loaded = nl.ndarray((piece.keys, group.rows), tensor.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=loaded, src=tensor[nl.ds(piece.start, piece.keys), global_rows(group, plan)])
    return loaded
