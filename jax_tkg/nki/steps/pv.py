"""Weights times values, accumulated."""

from typing import Any

from jax_tkg.nki.buffers import KeySource, RowBuffers, RowGroup, chunks
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import PARTITIONS, KernelPlan, KeyTile
from jax_tkg.nki.steps.load import load_rows
from jax_tkg.nki.steps.qk import clear_unseen_values


def allocate_products(group: RowGroup, plan: KernelPlan) -> Any:
    """PSUM for weights times values of a tile: `[hv, R]` for each chunk of Hv."""
    tiles = []
    for _, size in chunks(plan.value_head_dim):
        tiles.append(nl.ndarray((size, group.rows), nl.float32, buffer=nl.psum))
    return tiles


def compute_pv_matmul(
    products: Any,
    weights: Any,
    source: KeySource,
    unseen: Any,
    i: int,
    tile: KeyTile,
    plan: KernelPlan,
) -> None:
    """The products of pair i: the values are stationary, its few weights move."""
    values = load_rows(source.values, source, plan.value_head_dim, weights.dtype, tile)
    if plan.is_padded:
        clear_unseen_values(values, unseen)
    m = plan.rows_per_pair
    rows = nl.ds(i * m, m)
    for c in range(len(products)):
        start, size = c * PARTITIONS, products[c].shape[0]
        for j in range(tile.subtiles):
            nisa.nc_matmul(
                dst=products[c][:, rows],
                stationary=values[:, j, start : start + size],
                moving=weights[:, j, rows],
                accumulate=j > 0,
            )
        if plan.has_scales and source.value_scale != None:  # noqa: E711
            mine = products[c][:, rows]
            scale = source.value_scale[0:size]
            nisa.tensor_scalar(dst=mine, data=mine, op0=nl.multiply, operand0=scale)


def accumulate_output(products: Any, bufs: RowBuffers) -> None:
    """Running output = running output * decay + products."""
    for c in range(len(products)):
        running, decay = bufs.output[c], bufs.decay[0 : products[c].shape[0]]
        nisa.tensor_tensor(dst=running, data1=running, data2=decay, op=nl.multiply)
        nisa.tensor_tensor(dst=running, data1=running, data2=products[c], op=nl.add)
