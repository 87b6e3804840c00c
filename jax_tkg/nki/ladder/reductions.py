"""The lower rungs: reductions by themselves, after a matmul, and around an exponential."""

from typing import Any

from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.ladder.steps import (
    column,
    exp_and_sum,
    load,
    load_transposed,
    max_of_rows,
    multiply,
    my_row_tiles,
)


def row_max(scores: Any) -> Any:
    """The largest of each row: `[rows, columns]` to float32 `[rows, 1]`."""
    out = nl.ndarray((scores.shape[0], 1), nl.float32, buffer=nl.shared_hbm)
    for start, size in my_row_tiles(scores.shape[0]):
        rows = nl.ds(start, size)
        nisa.dma_copy(dst=out[rows, :], src=max_of_rows(load(scores[rows, :])))
    return out


def row_sum(scores: Any) -> Any:
    """The sum of each row: `[rows, columns]` to float32 `[rows, 1]`."""
    out = nl.ndarray((scores.shape[0], 1), nl.float32, buffer=nl.shared_hbm)
    for start, size in my_row_tiles(scores.shape[0]):
        rows = nl.ds(start, size)
        total = column(size)
        nisa.tensor_reduce(dst=total, op=nl.add, data=load(scores[rows, :]), axis=1)
        nisa.dma_copy(dst=out[rows, :], src=total)
    return out


def matmul_row_max(query: Any, key: Any) -> Any:
    """The largest logit of each query: `[M, H]` and `[S, H]`, S up to 512, to float32 `[M, 1]`."""
    out = nl.ndarray((query.shape[0], 1), nl.float32, buffer=nl.shared_hbm)
    key_t = load_transposed(key)
    for start, size in my_row_tiles(query.shape[0]):
        rows = nl.ds(start, size)
        logits = multiply(load_transposed(query[rows, :]), key_t)
        nisa.dma_copy(dst=out[rows, :], src=max_of_rows(logits))
    return out


def matmul_exp_row_sum(query: Any, key: Any, maxima: Any, scale: float) -> Any:
    """Weights and their row sums, with the maxima given.

    Args:
        query: `[M, H]`.
        key: `[S, H]`, S up to 512.
        maxima: float32 `[M, 1]`, subtracted from the scaled logits.
        scale: of the logits.

    Returns:
        exp(logits - maxima) `[M, S]` in the dtype of `key`, and float32 `[M, 1]`.
    """
    weights_out, sums_out = declare_weights(query, key)
    key_t = load_transposed(key)
    for start, size in my_row_tiles(query.shape[0]):
        rows = nl.ds(start, size)
        logits = multiply(load_transposed(query[rows, :]), key_t)
        weights, sums = exp_and_sum(logits, load(maxima[rows, :]), scale, key.dtype)
        nisa.dma_copy(dst=weights_out[rows, :], src=weights)
        nisa.dma_copy(dst=sums_out[rows, :], src=sums)
    return weights_out, sums_out


def matmul_softmax_parts(query: Any, key: Any, scale: float) -> Any:
    """As `matmul_exp_row_sum`, with maxima found in the same pass; returns these too."""
    weights_out, sums_out = declare_weights(query, key)
    maxima_out = nl.ndarray((query.shape[0], 1), nl.float32, buffer=nl.shared_hbm)
    key_t = load_transposed(key)
    for start, size in my_row_tiles(query.shape[0]):
        rows = nl.ds(start, size)
        logits = multiply(load_transposed(query[rows, :]), key_t)
        maxima = max_of_rows(logits)
        nisa.tensor_scalar(dst=maxima, data=maxima, op0=nl.multiply, operand0=scale)
        weights, sums = exp_and_sum(logits, maxima, scale, key.dtype)
        nisa.dma_copy(dst=weights_out[rows, :], src=weights)
        nisa.dma_copy(dst=maxima_out[rows, :], src=maxima)
        nisa.dma_copy(dst=sums_out[rows, :], src=sums)
    return weights_out, maxima_out, sums_out


def declare_weights(query: Any, key: Any) -> tuple[Any, Any]:
    """Outputs for weights and sums."""
    rows, keys = query.shape[0], key.shape[0]
    weights = nl.ndarray((rows, keys), key.dtype, buffer=nl.shared_hbm)
    sums = nl.ndarray((rows, 1), nl.float32, buffer=nl.shared_hbm)
    return weights, sums
