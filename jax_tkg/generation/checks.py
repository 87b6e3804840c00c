"""What the compiled parts of generation are given, checked before anything is computed with it.

`generate` and `stream` check their own arguments; this is for whoever calls the parts. Inside a
compiled function it runs while that is traced, and costs a call nothing: it looks at types, shapes
and settings. Only `prefill`, which is driven by the host, looks at values too.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg._checks import described
from jax_tkg.cache.checks import integer_per_row
from jax_tkg.cache.kv_cache import KVCache, RingKVCache
from jax_tkg.generation.model import vocabulary_of
from jax_tkg.generation.policy import TokenPolicy
from jax_tkg.generation.prompts import check_ids


def check_policy(policy: Any) -> None:
    """Raises a TypeError unless it is a `TokenPolicy`."""
    if not isinstance(policy, TokenPolicy):
        raise TypeError(
            "policy must be a TokenPolicy, such as TokenPolicy(Greedy(), eos_ids=(2,)); got "
            f"{described(policy)}."
        )


def check_state(state: Any, kind: type, rows: str) -> None:
    """Whether a state is of the kind that a loop takes, its arrays and caches of one batch.

    Args:
        state: what was given.
        kind: `DecodeState` or `SpeculativeState`.
        rows: names of its fields that have a number for each row.

    Raises:
        TypeError: for anything else, such as the state of another loop.
        ValueError: for arrays of other shapes.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be a {kind.__name__}, from {kind.__name__}.start or the last call; got "
            f"{described(state)}."
        )
    fields: Any = state
    batch = fields.finished.shape[0] if fields.finished.ndim else 0
    for name in rows.split():
        shape = getattr(fields, name).shape
        if shape != (batch,):
            raise ValueError(
                f"state.{name} must have a number for each of the {batch} rows of state.finished, "
                f"({batch},); got shape {shape}."
            )
    check_batch("the state", batch, fields.caches)


def check_batch(what: str, batch: int, caches: Any) -> None:
    """Raises a ValueError if caches are not of so many rows."""
    for cache in _plain_caches(caches):
        (rows,) = cache.lengths.shape
        if rows != batch:
            raise ValueError(
                f"{what} has {batch} rows and the caches have {rows}: give as many, or make caches "
                f"for them with init_caches({batch}, capacity)."
            )


def check_capacity(capacity: int, caches: Any) -> None:
    """Raises a ValueError if caches have fewer slots a row than they are said to have."""
    for cache in _plain_caches(caches):
        if cache.capacity < capacity and not isinstance(cache, RingKVCache):
            raise ValueError(
                f"capacity is {capacity}, but the caches have {cache.capacity} slots a row: give "
                "the capacity that they were made with."
            )


def check_block(tokens: Any, counts: Any, caches: Any) -> None:
    """Whether tokens `[B, T]`, of which `counts` `[B]` are real, fit caches of B rows.

    Raises:
        TypeError: for tokens that are no array.
        ValueError: for arrays of other shapes or types.
    """
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise TypeError(f"tokens must be an integer array [B, T], got {described(tokens)}.")
    if not isinstance(counts, jax.Array | np.ndarray | None):
        raise TypeError(f"counts must be an integer array [B], got {described(counts)}.")
    whole = jnp.issubdtype(tokens.dtype, jnp.integer)
    if tokens.ndim != 2 or not tokens.shape[1] or not whole:
        raise ValueError(
            "tokens must be integers [B, T] with T at least 1, the next ones of each row; got "
            f"{tokens.dtype} {tokens.shape}."
        )
    if counts is not None:
        integer_per_row(counts, tokens.shape[0], "counts", "the real tokens of each row")
    check_batch("tokens", tokens.shape[0], caches)


def checked_chunks(model: Any, caches: Any, chunks: Any) -> list[tuple[Any, Any]]:
    """The chunks of `prefill`, of which the caches can take all.

    Raises:
        TypeError: for what are no pairs of arrays.
        ValueError: for no chunk, shapes that do not fit, a row without a token in the first chunk,
            an id that the model does not know, or more tokens than there is room for.
    """
    if not isinstance(chunks, Iterable):
        raise TypeError(f"chunks must be pairs (tokens, counts), got {described(chunks)}.")
    pairs = []
    for chunk in chunks:
        if not isinstance(chunk, tuple | list) or len(chunk) != 2 or chunk[1] is None:
            raise TypeError(f"a chunk must be a pair (tokens, counts), got {described(chunk)}.")
        tokens, counts = chunk
        check_block(tokens, counts, caches)
        pairs.append((tokens, counts))
    if not pairs:
        raise ValueError("prefill was given no chunk: there is nothing to continue from.")
    batches = {len(tokens) for tokens, _ in pairs}
    if len(batches) > 1:
        raise ValueError(f"all chunks must have the same rows; got {sorted(batches)} of them.")
    if all(_is_known(array) for pair in pairs for array in pair):
        _check_values(vocabulary_of(model), caches, pairs)
    return pairs


def _check_values(vocab_size: int | None, caches: Any, pairs: list[tuple[Any, Any]]) -> None:
    total = np.zeros(len(pairs[0][0]), np.int64)
    for tokens, counts in pairs:
        real = np.clip(counts, 0, tokens.shape[1])
        check_ids(np.asarray(tokens), real, vocab_size)
        total += real
        if not total.all():
            raise ValueError(
                f"row {int(np.argmin(total))} has no token in the first chunk: what follows its "
                "prompt would not be known. Begin all prompts in the first chunk."
            )
    for cache in _plain_caches(caches):
        if isinstance(cache, RingKVCache) or not _is_known(cache.lengths):
            continue
        needed = np.asarray(cache.lengths) + total
        row = int(np.argmax(needed))
        if needed[row] > cache.capacity:
            raise ValueError(
                f"row {row} would have {needed[row]} tokens, {total[row]} of them new, and the "
                f"caches have room for {cache.capacity}: make them with a larger capacity."
            )
        return  # all layers hold the same tokens


def _plain_caches(caches: Any) -> list[KVCache]:
    """The jax_tkg caches in a pytree, without those that are stacks of several."""
    leaves = jax.tree.leaves(caches, is_leaf=lambda x: isinstance(x, KVCache))
    return [x for x in leaves if isinstance(x, KVCache) and x.lengths.ndim == 1]


def _is_known(array: Any) -> bool:
    """Whether the values of an array are there for this process to look at."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable
