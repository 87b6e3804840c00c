"""Kernels as people write them for the real package: nothing here knows of the interpreter."""

import math

import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def tiled_matmul(lhs_t, rhs):
    """lhs_t [K, M], rhs [K, N]: lhs_t.T @ rhs in float32, M tiled by 128, N by 512, K by 128."""
    k, m = lhs_t.shape
    n = rhs.shape[1]
    result = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.shared_hbm)
    tile_k, tile_m, tile_n = nl.tile_size.pmax, nl.tile_size.gemm_stationary_fmax, 512
    for i in nl.affine_range(math.ceil(m / tile_m)):
        for j in nl.affine_range(math.ceil(n / tile_n)):
            rows, columns = min(tile_m, m - i * tile_m), min(tile_n, n - j * tile_n)
            sums = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.psum)
            for c in nl.sequential_range(k // tile_k):
                left = nl.ndarray((tile_k, rows), dtype=lhs_t.dtype, buffer=nl.sbuf)
                right = nl.ndarray((tile_k, columns), dtype=rhs.dtype, buffer=nl.sbuf)
                nisa.dma_copy(
                    dst=left, src=lhs_t[nl.ds(c * tile_k, tile_k), nl.ds(i * tile_m, rows)]
                )
                nisa.dma_copy(
                    dst=right, src=rhs[nl.ds(c * tile_k, tile_k), nl.ds(j * tile_n, columns)]
                )
                nisa.nc_matmul(dst=sums, stationary=left, moving=right, accumulate=(c > 0))
            out = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=out, src=sums)
            nisa.dma_copy(dst=result[nl.ds(i * tile_m, rows), nl.ds(j * tile_n, columns)], src=out)
    return result


@nki.jit
def softmax_rows(x):
    """Softmax along the last axis of [rows, columns], 128 rows at a time."""
    rows, columns = x.shape
    result = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    for start in range(0, rows, 128):
        size = min(128, rows - start)
        tile = nl.ndarray((size, columns), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[start : start + size, :])
        negative_max = nl.ndarray((size, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=negative_max, op=nl.maximum, data=tile, axis=1, negate=True)
        total = nl.ndarray((size, 1), dtype=nl.float32, buffer=nl.sbuf)
        weights = nl.ndarray((size, columns), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation_reduce(
            dst=weights, op=nl.exp, data=tile, reduce_op=nl.add, reduce_res=total, bias=negative_max
        )
        inverse = nl.ndarray((size, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.reciprocal(dst=inverse, data=total)
        scaled = nl.ndarray((size, columns), dtype=x.dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=scaled, data=weights, op0=nl.multiply, operand0=inverse)
        nisa.dma_copy(dst=result[start : start + size, :], src=scaled)
    return result


@nki.jit
def transpose_free_axes(x, rows, columns):
    """x [P, rows * columns]: a matrix in every partition, transposed by the copy's pattern."""
    result = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    turned = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    size = rows * columns
    nisa.tensor_copy(
        dst=turned, src=tile.ap(pattern=[[size, x.shape[0]], [1, columns], [columns, rows]])
    )
    nisa.dma_copy(dst=result, src=turned)
    return result


@nki.jit
def rmsnorm(x, weight, eps=1e-6):
    """x [rows, columns] / sqrt(mean of squares + eps) * weight [1, columns]."""
    rows, columns = x.shape
    result = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    scale = nl.load(weight)
    for i in nl.affine_range(math.ceil(rows / 128)):
        size = min(128, rows - i * 128)
        tile = nl.load(x[nl.ds(i * 128, size), 0:columns])
        mean = nl.multiply(nl.sum(nl.square(tile), axis=1), 1.0 / columns)
        normed = nl.multiply(tile, nl.rsqrt(nl.add(mean, eps)))
        broadcast = nl.broadcast_to(scale, (size, columns))
        nl.store(result[nl.ds(i * 128, size), 0:columns], nl.multiply(normed, broadcast))
    return result


@nki.jit
def sum_of_halves(x):
    """x [2, 128, n], two programs: each loads a half, they swap, both add, each stores its half."""
    me = nl.program_id(axis=0)
    other = 1 - me
    half = x.shape[2] // 2
    result = nl.ndarray((128, x.shape[2]), dtype=nl.float32, buffer=nl.shared_hbm)
    mine = nl.ndarray((128, x.shape[2]), dtype=nl.float32, buffer=nl.sbuf, name="mine")
    theirs = nl.ndarray((128, x.shape[2]), dtype=nl.float32, buffer=nl.sbuf)
    total = nl.ndarray((128, half), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=mine, src=x[me])
    nisa.sendrecv(src=mine, dst=theirs, send_to_rank=other, recv_from_rank=other, pipe_id=0)
    part = nl.ds(me * half, half)
    nisa.tensor_tensor(dst=total, data1=mine[:, part], data2=theirs[:, part], op=nl.add)
    nisa.dma_copy(dst=result[:, part], src=total)
    return result
