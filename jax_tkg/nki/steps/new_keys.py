"""The new keys and values beside the cache."""

from typing import Any

from jax_tkg.nki.buffers import Constants, Inputs, NewKeys, RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import RowGroup
from jax_tkg.nki.steps.cached import channel_parts, whole_parts
from jax_tkg.nki.steps.load import global_rows, load_small, piece_view
from jax_tkg.nki.steps.queries import positions_of, rotate, transpose
from jax_tkg.nki.tiles import KeyTile, Piece

VALUE_LOADS, LATE_VALUE_LOADS = 2, 4
"""DMAs for new values: with so few partitions each takes but one of the queues. More where cached
keys do not wait for them."""


def load_new_keys(
    inputs: Inputs,
    rotated: Any,
    bufs: RowBuffers,
    consts: Constants,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """The new keys of a group, transposed, and its new values: see `NewKeys`.

    Where the kernel rotates them it also stores them in `rotated`, `[B, T, K, H]`.
    """
    loaded, dtype = NewKeys([], []), bufs.query[0].dtype
    for piece in tile.new:
        if plan.new_pairs > 0:
            loaded.values.append(load_turned_values(inputs, dtype, piece, group, plan))
        else:
            loaded.values.append(load_values(inputs, dtype, piece, group, plan))
        if bufs.new_key != None:  # noqa: E711  (the kernel language has no `is`)
            loaded.keys.append(bufs.new_key)
            continue
        rows = nl.ndarray((group.pairs * piece.keys, plan.head_dim), dtype, buffer=nl.sbuf)
        by_row = (0, 2, 1, 3)
        load_small(rows, piece_view(inputs.new_key, piece, group).permute(by_row), True, plan)
        batches = nl.ds(group.first_batch, group.batches)
        tokens = nl.ds(piece.start, piece.keys)
        rotate(rows, positions_of(inputs, batches, tokens, group.kv_heads), consts, plan)
        if rotated != None:  # noqa: E711
            nisa.dma_copy(dst=piece_view(rotated, piece, group).permute(by_row), src=rows)
        loaded.keys.append(keep_turned(rows, channel_parts(inputs, plan)))
    return loaded


def keep_turned(rows: Any, parts: list[tuple[int, int, int]]) -> Any:
    """Rows, transposed, in SBUF: a tile `[h, rows]` for each of `channel_parts`."""
    tiles = []
    for turned in transpose(rows, parts):
        tile = nl.ndarray(turned.shape, rows.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=tile, src=turned)
        tiles.append(tile)
    return tiles


def load_values(inputs: Inputs, dtype: Any, piece: Piece, group: RowGroup, plan: KernelPlan) -> Any:
    """The new values of a piece, `[keys, pairs, Hv]`."""
    values = piece_view(inputs.new_value, piece, group).permute((1, 0, 2, 3))
    loaded = nl.ndarray((piece.keys, group.pairs, plan.value_head_dim), dtype, buffer=nl.sbuf)
    by_pair = loaded.reshape_dim(1, (group.batches, group.kv_heads))
    is_paged, is_known = plan.layout == "paged", plan.live == None  # noqa: E711
    by_gpsimd = is_known or is_paged  # in other loops it has queries and masks to load
    is_late = plan.new_keys_follow or (is_known and not is_paged)
    step = -(-group.batches // (LATE_VALUE_LOADS if is_late else VALUE_LOADS))
    for first in range(0, group.batches, step):
        some = nl.ds(first, min(step, group.batches - first))
        load_small(by_pair[:, some], values[:, some], by_gpsimd, plan)
    return loaded


def load_turned_values(
    inputs: Inputs, dtype: Any, piece: Piece, group: RowGroup, plan: KernelPlan
) -> Any:
    """The new values of one token, `[hv, pairs]` for each chunk of 128 of Hv."""
    rows = nl.ndarray((group.pairs, plan.value_head_dim), dtype, buffer=nl.sbuf)
    values = piece_view(inputs.new_value, piece, group)
    load_small(rows, values, plan.live == None, plan)  # noqa: E711
    return keep_turned(rows, whole_parts(plan.value_head_dim))


def load_for_rows(tensor: Any, piece: Piece, group: RowGroup, plan: KernelPlan) -> Any:
    """`[keys, rows of the group]` of `[T, B * N * T]`."""
    loaded = nl.ndarray((piece.keys, group.rows), tensor.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=loaded, src=tensor[nl.ds(piece.start, piece.keys), global_rows(group, plan)])
    return loaded


def load_for_pairs(tensor: Any, group: RowGroup, plan: KernelPlan) -> Any:
    """Numbers of rows of one token, `[pairs, rows of a pair]` of `[1, B * N]`."""
    loaded = nl.ndarray((group.pairs, group.rows_per_pair), tensor.dtype, buffer=nl.sbuf)
    mine = tensor[:, global_rows(group, plan)].reshape_dim(1, loaded.shape)
    nisa.dma_copy(dst=loaded, src=mine[0])
    return loaded
