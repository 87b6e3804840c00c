"""Attention as two kernels that a pipeline can overlap: weights first, then values.

The weights between them are already safe to sum: what the first kernel subtracts is the true
maximum of a row over all keys, and it hands on the row sums that the second one divides by.
"""

from typing import Any

from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.ladder.reductions import declare_weights
from jax_tkg.nki.ladder.steps import (
    KEYS,
    apply_values,
    divide_rows,
    exp_and_sum,
    load,
    load_transposed,
    max_of_rows,
    multiply,
    my_row_tiles,
    tiles_of,
)


def score_kernel(query: Any, key: Any, scale: float) -> Any:
    """The first kernel. A row's logits of all keys stay in SBUF until its maximum is known.

    Args:
        query: `[M, H]`.
        key: `[S, H]`.
        scale: of the logits.

    Returns:
        exp(logits - maxima) `[M, S]` in the dtype of `key`; maxima of the scaled logits and row
        sums of the weights, float32 `[M, 1]` each.
    """
    weights_out, sums_out = declare_weights(query, key)
    maxima_out = nl.ndarray((query.shape[0], 1), nl.float32, buffer=nl.shared_hbm)
    for start, size in my_row_tiles(query.shape[0]):
        rows = nl.ds(start, size)
        query_t = load_transposed(query[rows, :])
        logits = nl.ndarray((size, key.shape[0]), nl.float32, buffer=nl.sbuf)
        for first, count in tiles_of(key.shape[0], KEYS):
            keys = nl.ds(first, count)
            nisa.activation(
                dst=logits[:, keys], op=nl.copy, scale=scale,
                data=multiply(query_t, load_transposed(key[keys, :])),
            )  # fmt: skip
        maxima = max_of_rows(logits)
        weights, sums = exp_and_sum(logits, maxima, 1.0, key.dtype)
        nisa.dma_copy(dst=weights_out[rows, :], src=weights)
        nisa.dma_copy(dst=maxima_out[rows, :], src=maxima)
        nisa.dma_copy(dst=sums_out[rows, :], src=sums)
    return weights_out, maxima_out, sums_out


def value_kernel(weights: Any, sums: Any, value: Any) -> Any:
    """The second kernel.

    Args:
        weights: `[M, S]` of the first.
        sums: float32 `[M, 1]` of the first.
        value: `[S, Hv]`.

    Returns:
        float32 `[M, Hv]`.
    """
    out = nl.ndarray((weights.shape[0], value.shape[1]), nl.float32, buffer=nl.shared_hbm)
    for start, size in my_row_tiles(weights.shape[0]):
        rows = nl.ds(start, size)
        products = apply_values(load(weights[rows, :]), value)
        result = nl.ndarray((size, value.shape[1]), nl.float32, buffer=nl.sbuf)
        divide_rows(result, products, load(sums[rows, :]))
        nisa.dma_copy(dst=out[rows, :], src=result)
    return out
