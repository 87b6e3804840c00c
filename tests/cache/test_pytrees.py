"""Caches and layouts of the same arrays are different pytrees: none runs the program of another."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_tkg import KVCache, RingKVCache
from jax_tkg.cache.layouts import DENSE_LAYOUTS


def test_classes_are_told_apart() -> None:
    """By JAX's own registry of dataclasses they were not, and now and then one got another's."""
    one = KVCache.create(2, 4, num_kv_heads=4, head_dim=4)
    ring = RingKVCache(one.kv, one.lengths, one.starts)
    layouts = [replace(one, kv=kind(one.kv.key, one.kv.value)) for kind in DENSE_LAYOUTS.values()]
    for a, b in itertools.combinations([ring, *layouts], 2):
        assert jax.tree.structure(a) != jax.tree.structure(b)
    again = KVCache.create(2, 4, num_kv_heads=4, head_dim=4)
    assert jax.tree.structure(again) == jax.tree.structure(one)


def test_a_program_for_each() -> None:
    one = KVCache.create(1, 2, num_kv_heads=1, head_dim=1)
    ring = RingKVCache(one.kv, one.lengths, one.starts)
    name = jax.jit(lambda cache: jnp.float32(isinstance(cache, RingKVCache)))
    assert [float(name(cache)) for cache in (one, ring, one, ring)] == [0, 1, 0, 1]


def test_names_of_leaves() -> None:
    cache = KVCache.create(1, 2, num_kv_heads=1, head_dim=1)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]
    assert paths == [".kv.key", ".kv.value", ".lengths", ".starts"]
