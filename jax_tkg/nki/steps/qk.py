"""Logits: query times key, scaled, capped, masked."""

from typing import Any

from jax_tkg.nki.buffers import MASKED, Inputs, KeySource, RowBuffers
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan, KeyTile
from jax_tkg.nki.steps.load import load_dense, load_keys

BANK_ELEMENTS = 512


def compute_qk_matmul(
    qk: Any, source: KeySource, bufs: RowBuffers, i: int, tile: KeyTile, plan: KernelPlan
) -> None:
    """Logits of pair i of a group: `qk[:, :, rows of i]`, `[partitions, subtiles, M]`.

    The queries are the moving operand: it is the short one. Subtile j takes every subtiles-th
    column of the keys, those of slots p * subtiles + j.
    """
    keys = load_keys(source, bufs.query[0].dtype, tile, plan)
    m = plan.rows_per_pair
    rows = nl.ds(i * m, m)
    per_bank = BANK_ELEMENTS // m
    for first in range(0, tile.subtiles, per_bank):
        count = min(per_bank, tile.subtiles - first)
        products = nl.ndarray((tile.partitions, count, m), nl.float32, buffer=nl.psum)
        for j in range(count):
            for c in range(len(keys)):
                nisa.nc_matmul(
                    dst=products[:, j, :],
                    stationary=keys[c][:, first + j : tile.keys : tile.subtiles],
                    moving=bufs.query[c][:, rows],
                    accumulate=c > 0,
                )
        scale_logits(qk[:, first : first + count, rows], products, source, plan)


def scale_logits(logits: Any, products: Any, source: KeySource, plan: KernelPlan) -> None:
    """From PSUM to SBUF, scaled and capped."""
    scale = source.logit_scale
    if plan.has_scales and source.value_scale != None:  # noqa: E711  (the language has no `is`)
        scale = scale[0 : products.shape[0]]
    if plan.soft_cap == None:  # noqa: E711
        nisa.activation(dst=logits, op=nl.copy, data=products, scale=scale)
        return
    nisa.activation(dst=logits, op=nl.copy, data=products, scale=scale)
    nisa.activation(dst=logits, op=nl.tanh, data=logits, scale=1.0 / plan.soft_cap)
    nisa.tensor_scalar(dst=logits, data=logits, op0=nl.multiply, operand0=plan.soft_cap)


def load_positions(source: KeySource, tile: KeyTile) -> Any:
    """Positions of the slots of a tile, float32 `[partitions, subtiles]`."""
    p, n = tile.partitions, tile.subtiles
    positions = nl.ndarray((p, n), nl.float32, buffer=nl.sbuf)
    if source.positions == None:  # noqa: E711
        nisa.iota(dst=positions, pattern=[[1, n]], offset=tile.start, channel_multiplier=n)
    else:
        mine = source.positions[nl.ds(tile.start, tile.keys)]
        nisa.dma_copy(dst=positions, src=mine.reshape_dim(0, (p, n)))
    return positions


def find_invisible(source: KeySource, tile: KeyTile, plan: KernelPlan) -> Any:
    """Which slots the new tokens do not see by position: uint8 `[partitions, subtiles, T]`."""
    p, n, tokens = tile.partitions, tile.subtiles, plan.tokens
    every = load_positions(source, tile).expand_dim(2).broadcast(2, tokens)
    before = nl.ndarray((p, n, tokens), nl.uint8, buffer=nl.sbuf)
    bound = source.low[0:p].expand_dim(1).broadcast(1, n)
    nisa.tensor_tensor(dst=before, data1=every, data2=bound, op=nl.less)
    behind = nl.ndarray((p, n, tokens), nl.uint8, buffer=nl.sbuf)
    bound = source.high[0:p].expand_dim(1).broadcast(1, n)
    nisa.tensor_tensor(dst=behind, data1=every, data2=bound, op=nl.greater_equal)
    invisible = nl.ndarray((p, n, tokens), nl.uint8, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=invisible, data1=before, data2=behind, op=nl.logical_or)
    return invisible


def mask_logits(
    qk: Any, source: KeySource, i: int, inputs: Inputs, tile: KeyTile, plan: KernelPlan
) -> Any:
    """Adds the bias to the logits of pair i and sets those that no token may see, also NaN ones.

    Returns:
        uint8 `[partitions, subtiles]`, 1 where no token of any query head sees the slot.
    """
    by_position = find_invisible(source, tile, plan)
    unseen = nl.ndarray((tile.partitions, tile.subtiles), nl.uint8, buffer=nl.sbuf)
    for g in range(plan.group):
        rows = nl.ds(i * plan.rows_per_pair + g * plan.tokens, plan.tokens)
        if plan.has_bias:
            bias = load_dense(inputs.bias, nl.float32, source, g, tile, plan)
            nisa.tensor_tensor(dst=qk[:, :, rows], data1=qk[:, :, rows], data2=bias, op=nl.add)
        invisible = by_position
        if plan.has_mask:
            hidden = load_dense(inputs.hidden, nl.uint8, source, g, tile, plan)
            nisa.tensor_tensor(dst=hidden, data1=hidden, data2=by_position, op=nl.logical_or)
            invisible = hidden
        nisa.tensor_copy_predicated(dst=qk[:, :, rows], src=MASKED, predicate=invisible)
        if g == 0:
            nisa.tensor_reduce(dst=unseen, op=nl.minimum, data=invisible, axis=2)
        elif plan.has_mask:
            also = nl.ndarray(unseen.shape, nl.uint8, buffer=nl.sbuf)
            nisa.tensor_reduce(dst=also, op=nl.minimum, data=invisible, axis=2)
            nisa.tensor_tensor(dst=unseen, data1=unseen, data2=also, op=nl.minimum)
    return unseen


def clear_unseen_values(values: Any, unseen: Any) -> None:
    """Zeroes values that no token sees: padding may hold NaN, and 0 * NaN is NaN."""
    predicate = unseen.expand_dim(2).broadcast(2, values.shape[2])
    nisa.tensor_copy_predicated(dst=values, src=0.0, predicate=predicate)
