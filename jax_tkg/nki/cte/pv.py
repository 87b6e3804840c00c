"""Weights times values, added to what the rows hold."""

from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Work
from jax_tkg.nki.cte.tiles import columns_of, subtiles_of
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS


def transpose_weights(work: Work) -> None:
    """Turns weights so that keys lie on the partitions."""
    tile, step, rows = work.keys.tile, work.step, work.rows.block.rows
    first, end = subtiles_of(tile, step)
    shape, dtype = (PARTITIONS, end - first, rows), work.weights.dtype
    turned = nl.ndarray(shape, dtype, buffer=nl.psum)
    for j in range(first, end):
        start, stop, stride, count = columns_of(tile, j, step.first, step.keys)
        nisa.nc_transpose(
            dst=turned[0:count, j - first, :],
            data=work.weights[:, start:stop:stride],
            engine=nisa.engine.tensor,
        )
    copied = nl.ndarray(shape, dtype, buffer=nl.sbuf)
    _, _, _, last = columns_of(tile, end - 1, step.first, step.keys)
    whole = end - first if tile.in_runs or last == PARTITIONS else end - first - 1
    partitions = tile.partitions if tile.in_runs else PARTITIONS
    if whole > 0:
        nisa.tensor_copy(
            dst=copied[0:partitions, 0:whole, :], src=turned[0:partitions, 0:whole, :],
            engine=nisa.engine.scalar,
        )  # fmt: skip
    if whole < end - first:
        nisa.tensor_copy(
            dst=copied[0:last, whole, :], src=turned[0:last, whole, :], engine=nisa.engine.scalar
        )
    work.turned = copied


def multiply_values(work: Work, plan: PrefillPlan) -> None:
    """Turned weights are stationary, values move: into `work.products`, beside the sum."""
    keys, step, rows = work.keys, work.step, work.rows.block.rows
    first, end = subtiles_of(keys.tile, step)
    products = work.products[:, 0 : plan.value_head_dim]
    for j in range(first, end):
        _, _, _, count = columns_of(keys.tile, j, step.first, step.keys)
        nisa.nc_matmul(
            dst=products,
            stationary=work.turned[0:count, j - first, :],
            moving=keys.value[0:count, j, :],
            accumulate=j > first,
        )
    if keys.source.has_scales:
        scale = keys.value_scale[0:rows]
        nisa.tensor_scalar(dst=products, data=products, op0=nl.multiply, operand0=scale)


def accumulate(work: Work) -> None:
    """Output and sum, shrunk by how far the maximum moved, plus those of the step.

    GpSimd, which has little else to do, shrinks them.
    """
    rows = work.rows
    total, decay = rows.total, work.decay.broadcast(1, rows.total.shape[1])
    nisa.tensor_tensor(
        dst=total, data1=total, data2=decay, op=nl.multiply, engine=nisa.engine.gpsimd
    )
    nisa.tensor_tensor(dst=total, data1=total, data2=work.products, op=nl.add)
