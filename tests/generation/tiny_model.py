"""A two-layer attention language model without Flax, and a float64 NumPy oracle of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg import KVCache, PagedKVCache, RotaryEmbedding, attention_tkg
from jax_tkg.generation import last_real

VOCAB, LAYERS = 50, 2
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
WIDTH = HEADS * HEAD_DIM
PAGE_LEN = 8
ROPE = RotaryEmbedding(base=1000.0)


@partial(
    jax.tree_util.register_dataclass, data_fields=["embed", "layers", "output"], meta_fields=[]
)
@dataclass(frozen=True)
class TinyModel:
    """Embedding, attention layers with residuals, output projection.

    `layers` are pairs of projections: to query, key and value, and back from the heads.
    """

    embed: jax.Array
    layers: tuple[tuple[jax.Array, jax.Array], ...]
    output: jax.Array

    @classmethod
    def random(cls, seed: int = 0) -> TinyModel:
        rng = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal((rows, columns)) * rows**-0.5, jnp.float32)

        qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        layers = tuple((matrix(WIDTH, qkv) * 2, matrix(WIDTH, WIDTH) * 2) for _ in range(LAYERS))
        return cls(embed=matrix(WIDTH, VOCAB).T, layers=layers, output=matrix(WIDTH, VOCAB) * 3)

    def init_caches(self, batch: int, capacity: int, **options: Any) -> tuple[KVCache, ...]:
        return tuple(
            KVCache.create(batch, capacity, KV_HEADS, HEAD_DIM, **options) for _ in self.layers
        )

    def next_token_logits(
        self, tokens: jax.Array, caches: tuple[KVCache, ...], counts: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        hidden, caches = self._hidden(tokens, caches, counts)
        return normalised(last_real(hidden, counts)) @ self.output, caches

    def __call__(
        self, tokens: jax.Array, caches: tuple[KVCache, ...], counts: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        hidden, caches = self._hidden(tokens, caches, counts)
        return normalised(hidden) @ self.output, caches

    def _hidden(
        self, tokens: jax.Array, caches: tuple[KVCache, ...], counts: jax.Array | None
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        batch, width = tokens.shape
        if counts is None:
            counts = jnp.full(batch, width, jnp.int32)
        offsets = jnp.arange(width, dtype=jnp.int32)
        x, new_caches = self.embed[tokens], []
        for (project, back), cache in zip(self.layers, caches, strict=True):
            positions = cache.lengths[:, None] + offsets
            heads = (normalised(x) @ project).reshape(batch, width, -1, HEAD_DIM)
            query, key, value = jnp.split(heads, [HEADS, HEADS + KV_HEADS], axis=2)
            cache = cache.append(ROPE(key, positions), value, counts)
            out = attention_tkg(ROPE(query, positions), cache, query_positions=positions)
            x = x + out.reshape(batch, width, WIDTH) @ back
            new_caches.append(cache)
        return x, tuple(new_caches)

    def oracle_logits(self, ids: list[int]) -> np.ndarray:
        """What follows a whole sequence, float64 `[VOCAB]`, without any cache."""
        embed = np.asarray(self.embed, np.float64)
        x, positions = embed[ids], np.arange(len(ids))
        for layer in self.layers:
            project, back = (np.asarray(w, np.float64) for w in layer)
            heads = (normalised(x) @ project).reshape(len(ids), -1, HEAD_DIM)
            query, key, value = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
            query, key = rotated(query, positions), rotated(key, positions)
            key, value = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (key, value))
            scores = np.einsum("tnh,snh->nts", query, key) * HEAD_DIM**-0.5
            scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum("nts,snh->tnh", weights, value).reshape(len(ids), WIDTH) @ back
        return normalised(x[-1]) @ np.asarray(self.output, np.float64)

    def oracle_tokens(self, prompt: list[int], count: int) -> list[int]:
        """Greedy continuation; fails if a choice was so close that rounding could decide it."""
        ids = list(prompt)
        for _ in range(count):
            logits = self.oracle_logits(ids)
            best, second = np.argsort(-logits)[:2]
            assert logits[best] - logits[second] > 1e-3, "a tie: use another seed"
            ids.append(int(best))
        return ids[len(prompt) :]


def pytree_of_its_own(kind: Any) -> Any:
    """Registers a variant of a model, whose fields are its weights.

    By `register_dataclass` JAX (0.10 and 0.12, not 0.7) may take it for the class that it varies:
    the two count as equal if their fields do, and what was compiled for one may run for the other.
    """
    names = [field.name for field in fields(kind)]
    jax.tree_util.register_pytree_node(
        kind,
        lambda model: ([getattr(model, name) for name in names], None),
        lambda _, leaves: kind(*leaves),
    )
    return kind


@pytree_of_its_own
class PagedModel(TinyModel):
    """Its caches are pages."""

    def init_caches(self, batch: int, capacity: int, **options: Any) -> tuple[KVCache, ...]:
        entries = -(-capacity // PAGE_LEN)
        sizes = (batch, batch * entries, PAGE_LEN, entries, KV_HEADS, HEAD_DIM)
        return tuple(PagedKVCache.create(*sizes, **options) for _ in self.layers)


def normalised(x: Any) -> Any:
    return x / ((x * x).mean(-1, keepdims=True) + 1e-6) ** 0.5


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Half-split rotation of `[T, heads, HEAD_DIM]`."""
    half = HEAD_DIM // 2
    angles = np.outer(positions, ROPE.base ** (-np.arange(half) / half))[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
