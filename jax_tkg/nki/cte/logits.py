"""Logits of a step: queries times keys, then scale, soft cap and biases where they are needed."""

from typing import Any

from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.state import Inputs, Work
from jax_tkg.nki.cte.tiles import BANK_KEYS
from jax_tkg.nki.dialect import nisa, nl

LEAST_FACTOR = 1.0e-6
"""From this factor on masked logits stay far below all others, and the maximum commutes with it."""


def multiply_queries(work: Work) -> None:
    """Queries are stationary, keys move: `[R, keys]` in PSUM, a bank at a time."""
    query, key, step = work.rows.query, work.keys.key, work.step
    work.logits = nl.ndarray((work.rows.block.rows, step.keys), nl.float32, buffer=nl.psum)
    for first in range(0, step.keys, BANK_KEYS):
        end = min(first + BANK_KEYS, step.keys)
        for c in range(len(key)):
            nisa.nc_matmul(
                dst=work.logits[:, first:end],
                stationary=query[c],
                moving=columns_of_keys(key[c], step.first + first, step.first + end),
                accumulate=c > 0,
            )


def columns_of_keys(key: Any, first: int, end: int) -> Any:
    """Keys of a tile, `[h, keys]` or `[h, runs, n]`: the ends are those of runs."""
    if len(key.shape) == 2:
        return key[:, first:end]
    return key[:, first // key.shape[2] : end // key.shape[2], :]


def finish_logits(work: Work, inputs: Inputs, plan: PrefillPlan) -> None:
    """What has to be done before the maximum; the scale alone is left to the exponentials."""
    scale_and_cap(work, plan)
    if plan.has_bias:
        add_bias(work, inputs, plan)
    if plan.has_alibi:
        add_alibi(work)


def scale_and_cap(work: Work, plan: PrefillPlan) -> None:
    """Scale and soft cap, as far as they cannot wait for the exponentials."""
    products, keys = work.logits, work.keys
    scale: Any = plan.scale
    if keys.source.has_scales:
        scale = keys.logit_scale[0 : products.shape[0]]
    elif plan.soft_cap != None:  # noqa: E711  (the kernel language has no `is`)
        scale = plan.scale / plan.soft_cap
    elif plan.scale >= LEAST_FACTOR:
        work.factor = plan.scale
        return
    work.logits = nl.ndarray(products.shape, nl.float32, buffer=nl.sbuf)
    if plan.soft_cap == None:  # noqa: E711
        nisa.activation(dst=work.logits, op=nl.copy, data=products, scale=scale)
    else:
        nisa.activation(dst=work.logits, op=nl.tanh, data=products, scale=scale)
        work.factor = plan.soft_cap


def load_dense(dense: Any, dtype: Any, work: Work, plan: PrefillPlan) -> Any:
    """A dense mask or bias `[B|1, N|1, T|1, S']` for a step: `[R, keys]`."""
    block, pair, step = work.rows.block, work.rows.pair, work.step
    first = work.keys.arrays.first_column + work.keys.tile.start + step.first
    batch = pair.batch if dense.shape[0] > 1 else 0
    head = pair.kv_head * plan.group + block.first_head
    heads = nl.ds(head, block.heads) if dense.shape[1] > 1 else nl.ds(0, 1)
    tokens = nl.ds(block.first_token, block.tokens) if dense.shape[2] > 1 else nl.ds(0, 1)
    mine = dense[batch, heads, tokens, nl.ds(first, step.keys)]
    if dense.shape[1] == 1:
        mine = mine.broadcast(0, block.heads)
    if dense.shape[2] == 1:
        mine = mine.broadcast(1, block.tokens)
    loaded = nl.ndarray((block.rows, step.keys), dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=loaded, src=mine)
    return loaded


def add_bias(work: Work, inputs: Inputs, plan: PrefillPlan) -> None:
    """Adds a dense bias."""
    bias = load_dense(inputs.bias, nl.float32, work, plan)
    nisa.scalar_tensor_tensor(
        dst=bias, data=work.logits, op0=nl.multiply, operand0=work.factor, op1=nl.add,
        operand1=bias,
    )  # fmt: skip
    work.logits, work.factor = bias, 1.0


def add_alibi(work: Work) -> None:
    """Subtracts slope * |query position - key position|; the distances are exact integers."""
    n, step = work.rows.block.rows, work.step
    distance = nl.ndarray((n, step.keys), nl.float32, buffer=nl.sbuf)
    position = work.keys.position[0:n, step.first : step.first + step.keys]
    at = work.rows.neg_query_at[work.keys.tile.source]
    nisa.activation(dst=distance, op=nl.abs, data=position, bias=at)
    slopes = nl.ndarray((n, 1), nl.float32, buffer=nl.sbuf)
    inverse = 1.0 / work.factor
    nisa.tensor_scalar(dst=slopes, data=work.rows.slopes, op0=nl.multiply, operand0=inverse)
    nisa.scalar_tensor_tensor(
        dst=distance, data=distance, op0=nl.multiply, operand0=slopes, op1=nl.add,
        operand1=work.logits,
    )  # fmt: skip
    work.logits = distance
