"""Logits: query times key, scaled and capped."""

from typing import Any

from jax_tkg.nki.buffers import MASKED, Constants, Logits, NewKeys, RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import BANK_ELEMENTS, PARTITIONS, RowGroup
from jax_tkg.nki.steps.cached import key_column
from jax_tkg.nki.tiles import KeyTile, Piece


def allocate_qk_buffers(tile: KeyTile, group: RowGroup, plan: KernelPlan) -> Logits:
    """Banks of PSUM for the logits of a tile; what no key will fill is masked.

    A matmul must not straddle banks, so a bank holds whole columns.
    """
    per_bank = BANK_ELEMENTS // group.rows
    per_bank -= per_bank % tile.key_columns
    logits = Logits([], per_bank)
    for first in range(0, tile.columns, per_bank):
        count = min(per_bank, tile.columns - first)
        bank = nl.ndarray((PARTITIONS, count, group.rows), nl.float32, buffer=nl.psum)
        logits.banks.append(bank)
    for piece in tile.cached + tile.new:
        if partitions_of(piece, group, plan) < PARTITIONS:
            for span in spans_of(piece, logits):
                nisa.memset(dst=logits.banks[span[0]][:, nl.ds(span[1], span[2]), :], value=MASKED)
    return logits


def spans_of(piece: Piece, logits: Logits) -> Any:
    """Where the columns of a piece lie: (bank, first column in it, columns, first column of it)."""
    spans = []
    column, end = piece.column, piece.column + piece.subtiles
    for _ in range(piece.subtiles):
        if column < end:
            inside = column % logits.per_bank
            count = min(logits.per_bank - inside, end - column)
            spans.append((column // logits.per_bank, inside, count, column - piece.column))
            column += count
    return spans


def partitions_of(piece: Piece, group: RowGroup, plan: KernelPlan) -> int:
    """Partitions that hold logits of a piece.

    New keys that are multiplied at once lie one below the other, those of a pair after another's.
    """
    return group.pairs if piece.is_new and plan.new_pairs > 0 else piece.partitions


def pair_rows(group: RowGroup, i: int) -> Any:
    """The rows of pair i of a group."""
    return nl.ds(i * group.rows_per_pair, group.rows_per_pair)


def compute_qk_matmul(
    logits: Logits,
    keys: Any,
    by_column: bool,
    bufs: RowBuffers,
    i: int,
    tile: KeyTile,
    group: RowGroup,
) -> None:
    """Logits of pair i for the cached keys of a tile.

    The queries are the moving operand: it is the short one.
    """
    rows, together = pair_rows(group, i), tile.key_columns
    for piece in tile.cached:
        for j in range(0, piece.subtiles, together):
            column = piece.column + j
            bank = logits.banks[column // logits.per_bank]
            places = nl.ds(column % logits.per_bank, together)
            for c in range(len(keys)):
                moving = bufs.query[c][:, rows]
                if together > 1:
                    moving = bufs.query_pairs[:, :, rows]
                nisa.nc_matmul(
                    dst=bank[0 : piece.partitions, places, rows],
                    stationary=key_column(keys[c], piece, j, by_column, together),
                    moving=moving,
                    accumulate=c > 0,
                )


def compute_new_qk_matmul(
    logits: Logits, new: NewKeys, bufs: RowBuffers, tile: KeyTile, group: RowGroup, plan: KernelPlan
) -> None:
    """Logits for the new keys: of each pair, or of all pairs and all rows at once."""
    together = group.pairs if plan.new_pairs > 0 else 1
    for k in range(len(tile.new)):
        piece = tile.new[k]
        keys = together * piece.keys
        bank = logits.banks[piece.column // logits.per_bank]
        for i in range(0, group.pairs, together):
            rows = nl.ds(i * group.rows_per_pair, together * group.rows_per_pair)
            for c in range(len(bufs.query)):
                nisa.nc_matmul(
                    dst=bank[0:keys, piece.column % logits.per_bank, rows],
                    stationary=new.keys[k][c][:, nl.ds(i * piece.keys, keys)],
                    moving=bufs.query[c][:, rows],
                    accumulate=c > 0,
                )


def shape_logits(
    logits: Logits, consts: Constants, tile: KeyTile, group: RowGroup, plan: KernelPlan
) -> None:
    """Scales and caps where that cannot wait for the exponential.

    What is left to multiply by is `plan.raw_unit`, and `plan.logit_unit` behind it.
    """
    features = plan.features
    for piece in tile.cached + tile.new:
        for span in spans_of(piece, logits):
            live = partitions_of(piece, group, plan)
            part = logits.banks[span[0]][0:live, nl.ds(span[1], span[2]), :]
            if features.has_scales:
                scale_by_pair(part, piece, consts, group, plan)
            if features.soft_cap != None:  # noqa: E711  (the kernel language has no `is`)
                scale = 1.0 if features.has_scales else features.scale
                nisa.activation(dst=part, op=nl.tanh, data=part, scale=scale / features.soft_cap)
            if plan.logit_unit != plan.raw_unit:
                nisa.activation(dst=part, op=nl.copy, data=part, scale=plan.raw_unit)


def scale_by_pair(
    part: Any, piece: Piece, consts: Constants, group: RowGroup, plan: KernelPlan
) -> None:
    """Logits of cached keys times the scale of their pair; those of new keys have only one."""
    if piece.is_new:
        nisa.tensor_scalar(dst=part, data=part, op0=nl.multiply, operand0=plan.features.scale)
        return
    first = group.first_batch * plan.kv_heads + group.first_kv
    scales = consts.logit_scales[0 : piece.partitions, nl.ds(first, group.pairs)]
    by_pair = part.reshape_dim(2, (group.pairs, group.rows_per_pair))
    shape = by_pair.shape
    every = scales.expand_dim(1).expand_dim(3).broadcast(1, shape[1]).broadcast(3, shape[3])
    nisa.tensor_tensor(dst=by_pair, data1=by_pair, data2=every, op=nl.multiply)
