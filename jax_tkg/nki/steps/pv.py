"""Weights times values, accumulated."""

from typing import Any

from jax_tkg.nki.buffers import Constants, NewKeys, RowBuffers, chunks
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowGroup
from jax_tkg.nki.steps.qk import pair_rows
from jax_tkg.nki.tiles import KeyTile, Piece


def allocate_products(together: int, group: RowGroup, plan: KernelPlan) -> Any:
    """PSUM for weights times values of a tile: `[n * hv, n, R]` for each chunk of Hv.

    With n columns together, the products of the i-th are partitions i * hv to (i + 1) * hv in i of
    n; what else is there is values times the weights of another column.
    """
    tiles = []
    for _, size in chunks(plan.value_head_dim):
        shape = (together * size, together, group.rows)
        tiles.append(nl.ndarray(shape, nl.float32, buffer=nl.psum))
    return tiles


def wanted(products: Any) -> Any:
    """The parts of a tile of products that count, `[hv, R]` each: see `allocate_products`."""
    parts, together = [], products.shape[1]
    size = products.shape[0] // together
    for i in range(together):
        parts.append(products[nl.ds(i * size, size), i, :])
    return parts


def compute_pv_matmul(
    products: Any,
    weights: Any,
    values: Any,
    piece: Piece,
    is_first: bool,
    i: int,
    group: RowGroup,
) -> None:
    """The products of a piece of pair i: values `[partitions, columns, Hv]` are stationary.

    Values lie half after half, while columns take turns.
    """
    rows = pair_rows(group, i)
    each = piece.subtiles // piece.halves
    step = each if piece.halves > 1 else 1
    for c in range(len(products)):
        together = products[c].shape[1]
        size = products[c].shape[0] // together
        part = nl.ds(c * PARTITIONS, size)
        for j in range(0, piece.subtiles, together):
            count = min(together, piece.subtiles - j)
            first = j // piece.halves + j % piece.halves * each
            nisa.nc_matmul(
                dst=products[c][0 : count * size, 0:count, rows],
                stationary=values[:, first : first + (count - 1) * step + 1 : step, part],
                moving=weights[0 : piece.partitions, nl.ds(piece.column + j, count), rows],
                accumulate=j > 0 or not is_first,
            )


def compute_new_pv_matmul(
    products: Any, weights: Any, new: NewKeys, starts: bool, tile: KeyTile, group: RowGroup
) -> None:
    """The products of the new values of each pair; `starts` where no cached ones came before."""
    for i in range(group.pairs):
        for k in range(len(tile.new)):
            values = new.values[k][:, nl.ds(i, 1), :]
            compute_pv_matmul(products, weights, values, tile.new[k], starts and k == 0, i, group)


def add_new_values(
    weights: Any,
    new: NewKeys,
    bufs: RowBuffers,
    consts: Constants,
    is_first: bool,
    tile: KeyTile,
    group: RowGroup,
) -> None:
    """Running output = running output + weight times new value, one a row: of all pairs at once.

    A matmul with ones brings the weight of a row to all partitions, as it has one that is not 0.
    Values do not take part in it: so NaN among those of a pair stays there.
    """
    piece, pairs = tile.new[0], group.pairs
    spread = nl.ndarray((consts.ones.shape[1], group.rows), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(
        dst=spread,
        stationary=consts.ones[0:pairs],
        moving=weights[0:pairs, piece.column, :],
        accumulate=False,
    )
    for c in range(len(bufs.output)):
        running, values = bufs.output[c], new.values[0][c]
        size = running.shape[0]
        mine = running if is_first else nl.ndarray(running.shape, nl.float32, buffer=nl.sbuf)
        by_pair = spread[0:size].reshape_dim(1, (pairs, group.rows_per_pair))
        nisa.tensor_tensor(
            dst=mine.reshape_dim(1, (pairs, group.rows_per_pair)),
            data1=by_pair,
            data2=values.expand_dim(2).broadcast(2, group.rows_per_pair),
            op=nl.multiply,
        )
        if not is_first:
            nisa.tensor_tensor(dst=running, data1=running, data2=mine, op=nl.add)


def clear_unseen_values(values: Any, unseen: Any) -> None:
    """Zeroes values that no row sees: they may be NaN, and 0 * NaN is NaN.

    In words of four bytes where the values fit: half the work for 16-bit ones.
    """
    words = values
    if values.dtype != nl.float32 and values.shape[2] % 4 == 0:
        words = values.view(nl.uint32)
    predicate = unseen.expand_dim(2).broadcast(2, words.shape[2])
    nisa.tensor_copy_predicated(dst=words, src=0, predicate=predicate)


def scale_values(products: Any, consts: Constants, group: RowGroup, plan: KernelPlan) -> None:
    """Products of cached values times the scale of their pair."""
    first = group.first_batch * plan.kv_heads + group.first_kv
    for tile in products:
        scales = consts.value_scales[0 : tile.shape[0], nl.ds(first, group.pairs)]
        by_pair = tile.reshape_dim(2, (group.pairs, group.rows_per_pair))
        every = scales.expand_dim(1).expand_dim(3).broadcast(1, tile.shape[1])
        every = every.broadcast(3, group.rows_per_pair)
        nisa.tensor_tensor(dst=by_pair, data1=by_pair, data2=every, op=nl.multiply)


def fa_add_products(left: Any) -> None:
    """Running output = running output + products that are left to add, `Waiting` or None."""
    if left == None:  # noqa: E711  (the kernel language has no `is`)
        return
    for c in range(len(left.products)):
        running, parts = left.bufs.output[c], wanted(left.products[c])
        for i in range(len(parts)):
            if left.is_first and i == 0:
                nisa.tensor_copy(dst=running, src=parts[0])
            else:
                nisa.tensor_tensor(dst=running, data1=running, data2=parts[i], op=nl.add)
