"""Dense masks and biases, and who sees which new keys, as the decode kernel takes them."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan
    from jax_tkg.nki.rows import RowGroup

BITS = 8

SEQUENCE_BITS = 32
"""Sequences of a row group from which on a bit for each is worth unpacking."""


def by_key(dense: Array, plan: "KernelPlan") -> Array:
    """A dense mask or bias of the cached keys, `[B|1, N|1, T|1, S']`: see `Inputs.hidden`."""
    cached = dense[..., : plan.slots]
    together = 1 if cached.shape[0] == 1 else sequences_together(plan)
    by_group = cached.reshape(-1, together, *cached.shape[1:])
    return by_group.transpose(0, 4, 1, 2, 3)


def by_run(rows: Array, plan: "KernelPlan") -> Array:
    """Numbers of the runs of a paged cache, `[B, K, S / n]`: see `Inputs.page_rows`."""
    together = 1 if plan.live is not None else sequences_together(plan)
    return rows.reshape(-1, together, *rows.shape[1:]).transpose(0, 3, 1, 2)


def hidden_cached(hidden: Array, plan: "KernelPlan") -> Array:
    """Which slots a dense mask hides, bool `[B|1, N|1, T, S']`: see `Inputs.hidden`."""
    sorted_by_key = by_key(hidden, plan)
    if plan.tokens == 1 and sorted_by_key.shape[2] >= SEQUENCE_BITS:
        return token_bits(sorted_by_key.swapaxes(2, 4), 2)
    return token_bits(sorted_by_key, min(2, plan.tokens))


def sequences_together(plan: "KernelPlan") -> int:
    """The sequences of every row group, if they are as many in all of them, else 1."""
    groups = _groups(plan)
    together = groups[0].batches
    alike = all(g.batches == together and g.first_batch % together == 0 for g in groups)
    return together if alike else 1


def hidden_new(hidden: Array, plan: "KernelPlan") -> Array:
    """Which new keys are hidden, bool `[B, N|1, key, token]`: see `Inputs.new_hidden`."""
    if not plan.new_pairs:
        return token_bits(jnp.moveaxis(hidden, 2, 0))
    heads = (plan.kv_heads, plan.group) if hidden.shape[1] > 1 else (1, 1)
    mine = hidden.reshape(plan.batch, *heads, 1)
    place = np.zeros((plan.batch, plan.kv_heads), int)
    for some in _groups(plan):
        rows = slice(some.first_batch, some.first_batch + some.batches)
        heads_here = slice(some.first_kv, some.first_kv + some.kv_heads)
        place[rows, heads_here] = np.arange(some.pairs).reshape(some.batches, some.kv_heads)
    other = place[:, :, None, None] != np.arange(plan.new_pairs)
    every = mine | jnp.asarray(other)
    return token_bits(every, 2) if plan.new_pairs > BITS else every.astype(jnp.uint8)


def token_bits(hidden: Array, width: int = 1) -> Array:
    """`[..., T]`, bool, as bits of words of `width` bytes, uint8 `[..., width * words]`.

    Token t of a word's 8 * width is bit t // width of byte t % width: a word and a bit of each of
    its bytes give what so many tokens that follow each other see.
    """
    words = -(-hidden.shape[-1] // (BITS * width))
    beyond = BITS * width * words - hidden.shape[-1]
    padded = jnp.pad(hidden, [(0, 0)] * (hidden.ndim - 1) + [(0, beyond)])
    by_bit = padded.reshape(*hidden.shape[:-1], words, BITS, width)
    worth = np.float32(2) ** np.arange(BITS)[:, None]
    total = jnp.where(by_bit, worth, np.float32(0)).sum(axis=-2)
    return total.reshape(*hidden.shape[:-1], words * width).astype(jnp.uint8)


def _groups(plan: "KernelPlan") -> "list[RowGroup]":
    return [g for share in plan.shares for block in share.blocks for g in block.groups]
