"""The compiled steps: take in a chunk of some prompts, choose first tokens, decode a few tokens.

They are functions of the pages and of small arrays that the host makes for each call; nothing else
lives on the device. Shapes never change, whoever joins and leaves, so each is compiled once. What
is compiled runs on Neuron as well, as in `jax_tkg.generation.loop`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array, Float, Int, Leaf
from jax_tkg.cache.kv_cache import KVCache, RingKVCache, register_cache
from jax_tkg.cache.layouts import DenseLayout
from jax_tkg.cache.paged import Paged
from jax_tkg.cache.paged_cache import PagedKVCache
from jax_tkg.cache.sharded import Maker
from jax_tkg.cache.writing import Writer
from jax_tkg.generation.model import DecodeModel
from jax_tkg.sampling import (
    RowSelection,
    argmax_tokens,
    log_probabilities,
    most_likely_tokens,
)
from jax_tkg.serving.config import ServingConfig
from jax_tkg.sharding.spec import AttentionSharding

ChosenToken = tuple[int, float, list[tuple[int, float]]]
"""An id, its log-probability, and the most likely ids with theirs."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "log_probs", "top_tokens", "top_log_probs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Chosen:
    """Tokens and their log-probabilities, before temperature and filters.

    Attributes:
        tokens: int32 `[B]`, of several steps `[steps, B]`; likewise below.
        log_probs: float32 `[B]`.
        top_tokens: int32 `[B, n]`, the n most likely.
        top_log_probs: float32 `[B, n]`.
    """

    tokens: Leaf
    log_probs: Leaf
    top_tokens: Leaf
    top_log_probs: Leaf

    def at(self, *index: int) -> ChosenToken:
        """One token, of arrays on the host."""
        top = zip(self.top_tokens[index].tolist(), self.top_log_probs[index].tolist(), strict=True)
        return int(self.tokens[index]), float(self.log_probs[index]), list(top)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "lengths", "tokens", "budget", "eos_ids", "selection", "words"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeRows:
    """The rows of one call of `decode`.

    Attributes:
        table: int32 `[B, pages_per_sequence]`, the pages of each row, -1 for none.
        lengths: int32 `[B]`, tokens of each row that are in its pages.
        tokens: int32 `[B]`, the newest token of each row, not yet there.
        budget: int32 `[B]`, tokens that a row may get in this call; 0 for an idle row. There must
            be pages for as many.
        eos_ids: int32 `[B, E]`, tokens that end the row, padded with -1.
        selection: the rule of each row, or None when all are greedy: that is a program of its own,
            which does not pay for filters and random numbers.
        words: uint32 `[B, n, 4]`, the random states of the next n tokens, as many as a call can
            give a row; None with `selection`.
    """

    table: Any
    lengths: Any
    tokens: Any
    budget: Any
    eos_ids: Any
    selection: RowSelection | None
    words: Any


@register_cache
@dataclass(frozen=True)
class PooledKVCache(PagedKVCache):
    """Pages that the host hands out: what is appended lies in pages that the table names already.

    To take tokens back is to count fewer.
    """

    def _append(self, key: Array, value: Array, counts: Array, tried: tuple[Writer, ...]) -> Self:
        return KVCache._append(self, key, value, counts, tried)

    def _truncate(self, lengths: Array) -> Self:
        return KVCache._truncate(self, lengths)


def make_pools(
    model: DecodeModel,
    config: ServingConfig,
    options: Mapping[str, Any],
    sharding: AttentionSharding | None = None,
) -> Any:
    """The model's caches with pages in place of rows: one pool for each, one table for all.

    Args:
        model: its `init_caches` says what a cache is like, of one row of the most tokens.
        config: sizes.
        options: keywords of `init_caches`.
        sharding: how KV heads, rows and pages are split on a mesh.

    Returns:
        The pytree that `init_caches` makes, its `KVCache`s paged and without table and lengths.

    Raises:
        TypeError: if there is anything else in it than `KVCache`s of a dense layout.
        ValueError: as `init_caches`, such as for more tokens than the model has positions; for a
            sharding of slots, or of heads, rows or pages that it does not divide.
    """
    _check_sharding(config, options, sharding)
    row = model.init_caches(1, config.capacity, **options)
    return _map_caches(partial(_pool_like, config=config, sharding=sharding), row)


def _check_sharding(
    config: ServingConfig, options: Mapping[str, Any], sharding: AttentionSharding | None
) -> None:
    if options.get("sharding") is not None:
        raise ValueError(
            "cache_options has a sharding, but the pages belong to the engine: give it as "
            "Engine(..., sharding=)."
        )
    if sharding is None:
        return
    if sharding.names("keys"):
        raise ValueError(
            f"the pages of an engine can be split by heads and rows, and this sharding has "
            f"{sharding}: the slots of a row are in any of the pages of its part. Name these axes "
            "as heads= or batch=."
        )
    parts = sharding.size("batch")
    sizes = {
        "max_rows": config.max_rows,
        "num_pages": config.pages,
        "prefill_rows": config.prefill_rows,
    }
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(
                f"ServingConfig: {name} is {size}, and this sharding has {sharding}: each of the "
                f"{parts} parts has rows and pages of its own, so make it a multiple of {parts}."
            )


def _pool_like(cache: Any, config: ServingConfig, sharding: AttentionSharding | None) -> KVCache:
    plain = isinstance(cache, KVCache) and not isinstance(cache, RingKVCache)
    if not plain or not isinstance(cache.kv, DenseLayout):
        kind = type(cache.kv if plain else cache).__name__
        raise TypeError(
            f"init_caches of this model makes a {kind}; paging needs a pytree of jax_tkg.KVCache, "
            "without rings: leave layout and ring_chunk out of cache_options."
        )
    kv, shape = cache.kv, cache.kv.shape
    new = Maker(sharding, batch=config.max_rows, num_kv_heads=shape.num_kv_heads)
    sizes = {"P": config.pages, "K": shape.num_kv_heads, "L": config.page_len}
    pages = Paged(
        key=new.full("PKLH", sizes | {"H": shape.head_dim}, 0, kv.key.dtype),
        value=new.full("PKLH", sizes | {"H": shape.value_head_dim}, 0, kv.value.dtype),
        k_scale=new.placed("1K", kv.k_scale),
        v_scale=new.placed("1K", kv.v_scale),
        dtype=kv.dtype,
        page_indices=None,  # type: ignore[arg-type]
    )
    return _unbound(PooledKVCache(pages, cache.lengths, cache.starts, sharding))


def by_rows(arrays: Any, sharding: AttentionSharding | None) -> Any:
    """The arrays of a call where they are needed: on a mesh that splits rows, each device its own.

    Args:
        arrays: a pytree of arrays on the host, their first axis that of rows.
        sharding: of the pools.
    """
    if sharding is None or not sharding.names("batch"):
        return arrays
    return jax.device_put(arrays, sharding.named("B"))


def bound(pools: Any, table: Array, lengths: Array) -> Any:
    """The pools as caches of the rows of this table."""
    starts = jnp.zeros_like(lengths)

    def bind(cache: KVCache) -> KVCache:
        kv = replace(cache.kv, page_indices=table)  # type: ignore[call-arg]
        return replace(cache, kv=kv, lengths=lengths, starts=starts)

    return _map_caches(bind, pools)


def without_rows(caches: Any) -> Any:
    """The inverse of `bound`."""
    return _map_caches(_unbound, caches)


def _unbound(cache: KVCache) -> KVCache:
    kv = replace(cache.kv, page_indices=None)  # type: ignore[call-arg]
    return replace(cache, kv=kv, lengths=None, starts=None)  # type: ignore[arg-type]


def _map_caches(function: Callable[[Any], KVCache], tree: Any) -> Any:
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, KVCache))


@partial(jax.jit, donate_argnames="pools")
def prefill(
    model: DecodeModel,
    pools: Any,
    table: Int[Array, "R pages_per_sequence"],
    lengths: Int[Array, " R"],
    tokens: Int[Array, "R T"],
    counts: Int[Array, " R"],
) -> tuple[Float[Array, "R V"], Any]:
    """Takes in the next tokens of R prompts.

    Args:
        model: a pytree.
        pools: from `make_pools`; are donated: use the returned ones.
        table: int32 `[R, pages_per_sequence]`, pages of each row, -1 for none.
        lengths: int32 `[R]`, tokens of each row that are in its pages.
        tokens: int32 `[R, T]`.
        counts: int32 `[R]`, real tokens of each row, the first ones.

    Returns:
        Logits `[R, V]` after the last real token of each row, and the pools.
    """
    logits, caches = model.next_token_logits(tokens, bound(pools, table, lengths), counts)
    return logits, without_rows(caches)


@partial(jax.jit, static_argnames="top")
def first_tokens(
    logits: Float[Array, "R V"], selection: RowSelection, words: Any, *, top: int
) -> Chosen:
    """The tokens that follow the prompts; `words` is uint32 `[R, 4]`, the rest as in `decode`."""
    return choose(logits, selection, words, top)


@partial(jax.jit, static_argnames=("num_steps", "top"), donate_argnames="pools")
def decode(
    model: DecodeModel, pools: Any, rows: DecodeRows, *, num_steps: int, top: int
) -> tuple[Chosen, Int[Array, " B"], Any]:
    """Decodes up to `num_steps` tokens of each row.

    Args:
        model: a pytree.
        pools: from `make_pools`; are donated: use the returned ones.
        rows: what is decoded.
        num_steps: static, the trip count of the loop.
        top: static, how many of the most likely tokens to tell.

    Returns:
        What was chosen in each step; how many of these tokens of each row, the first ones, mean
        something; and the pools.
    """

    def step(
        carry: tuple[Any, Array, Array], now: tuple[Array, Any]
    ) -> tuple[tuple[Any, Array, Array], Chosen]:
        caches, newest, made = carry
        index, words = now
        # A row that has ended has made fewer tokens than steps have gone by.
        alive = (made == index) & (index < rows.budget)
        alive &= ~jnp.any(newest[:, None] == rows.eos_ids, axis=1)
        logits, caches = model.next_token_logits(newest[:, None], caches, alive.astype(jnp.int32))
        chosen = choose(logits, rows.selection, words, top)
        newest = jnp.where(alive, chosen.tokens, newest)
        return (caches, newest, made + alive.astype(jnp.int32)), chosen

    caches = bound(pools, rows.table, rows.lengths)
    start = (caches, rows.tokens, jnp.zeros_like(rows.lengths))
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    words = None if rows.words is None else jnp.swapaxes(rows.words, 0, 1)
    (caches, _, made), chosen = lax.scan(step, start, (steps, words), length=num_steps)
    return chosen, made, without_rows(caches)


def choose(
    logits: Float[Array, "B V"], selection: RowSelection | None, words: Any, top: int
) -> Chosen:
    """A token for each row of logits, and what was asked for about it; arguments as above."""
    tokens = argmax_tokens(logits) if selection is None else selection(logits, words)
    top_tokens = most_likely_tokens(logits, top)
    asked = jnp.concatenate([tokens[:, None], top_tokens], axis=1)
    log_probs = log_probabilities(logits, asked)
    return Chosen(tokens, log_probs[:, 0], top_tokens, log_probs[:, 1:])
