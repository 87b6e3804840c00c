"""The upper rungs: everything in one kernel, for one tile of keys and for many."""

from typing import Any

from jax_tkg.nki.buffers import LOWEST_MAX
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.ladder.steps import (
    KEYS,
    apply_values,
    column,
    divide_rows,
    exp_and_sum,
    load_transposed,
    max_of_rows,
    multiply,
    my_row_tiles,
    tiles_of,
)


def fused_tile(query: Any, key: Any, value: Any, scale: float) -> Any:
    """Attention to one tile of keys, without a running state.

    Args:
        query: `[M, H]`.
        key: `[S, H]`, S up to 512.
        value: `[S, Hv]`.
        scale: of the logits.

    Returns:
        float32 `[M, Hv]`.
    """
    out = nl.ndarray((query.shape[0], value.shape[1]), nl.float32, buffer=nl.shared_hbm)
    key_t = load_transposed(key)
    for start, size in my_row_tiles(query.shape[0]):
        rows = nl.ds(start, size)
        logits = multiply(load_transposed(query[rows, :]), key_t)
        maxima = max_of_rows(logits)
        nisa.tensor_scalar(dst=maxima, data=maxima, op0=nl.multiply, operand0=scale)
        weights, sums = exp_and_sum(logits, maxima, scale, value.dtype)
        result = nl.ndarray((size, value.shape[1]), nl.float32, buffer=nl.sbuf)
        divide_rows(result, apply_values(weights, value), sums)
        nisa.dma_copy(dst=out[rows, :], src=result)
    return out


def flash_attention(query: Any, key: Any, value: Any, scale: float) -> Any:
    """Attention to any number of keys, 512 at a time, with a running maximum, sum and output.

    Args:
        query: `[M, H]`.
        key: `[S, H]`.
        value: `[S, Hv]`.
        scale: of the logits.

    Returns:
        float32 `[M, Hv]`.
    """
    out = nl.ndarray((query.shape[0], value.shape[1]), nl.float32, buffer=nl.shared_hbm)
    for start, size in my_row_tiles(query.shape[0]):
        rows = nl.ds(start, size)
        query_t = load_transposed(query[rows, :])
        maxima, sums = column(size), column(size)
        result = nl.ndarray((size, value.shape[1]), nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=maxima, value=LOWEST_MAX)
        nisa.memset(dst=sums, value=0.0)
        nisa.memset(dst=result, value=0.0)
        for first, count in tiles_of(key.shape[0], KEYS):
            keys = nl.ds(first, count)
            logits = multiply(query_t, load_transposed(key[keys, :]))
            decay = raise_maxima(maxima, logits, scale)
            weights, tile_sums = exp_and_sum(logits, maxima, scale, value.dtype)
            add_decayed(sums, decay, tile_sums)
            add_decayed(result, decay, apply_values(weights, value[keys, :]))
        divide_rows(result, result, sums)
        nisa.dma_copy(dst=out[rows, :], src=result)
    return out


def raise_maxima(maxima: Any, logits: Any, scale: float) -> Any:
    """Takes the logits of a tile into the running maxima; returns exp(old - new)."""
    rows = maxima.shape[0]
    largest = max_of_rows(logits)
    raised = column(rows)
    nisa.scalar_tensor_tensor(
        dst=raised, data=largest, op0=nl.multiply, operand0=scale, op1=nl.maximum, operand1=maxima
    )
    decay = column(rows)
    nisa.tensor_tensor(dst=decay, data1=maxima, data2=raised, op=nl.subtract)
    nisa.activation(dst=decay, op=nl.exp, data=decay)
    nisa.tensor_copy(dst=maxima, src=raised)
    return decay


def add_decayed(running: Any, decay: Any, summand: Any) -> None:
    """Sets running = running * decay + summand."""
    nisa.scalar_tensor_tensor(
        dst=running, data=running, op0=nl.multiply, operand0=decay, op1=nl.add, operand1=summand
    )
