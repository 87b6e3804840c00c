"""Donated caches are updated in place: nothing of their size is copied, converted or allocated."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg import KVCache, PagedKVCache, RingKVCache
from tests.cache.model import DTYPES
from tests.compiling import AS_USERS
from tests.hlo import cache_copies

BATCH, CAPACITY, HEADS, WIDTH, PAGE_LEN = 2, 1 << 15, 2, 64, 64
CACHES = ("BKSH", "BSKH", "BKHS", "ring", "paged")


def abstract(kind: str, dtype: Any = np.float32, **options: Any) -> KVCache:
    """Shapes and dtypes of a cache: programs can be compiled without its memory."""
    options["dtype"] = dtype
    if kind == "paged":
        create, pages = PagedKVCache.create, CAPACITY // PAGE_LEN
        sizes: tuple[int, ...] = (BATCH, BATCH * pages, PAGE_LEN, pages)
    else:
        create, sizes = (RingKVCache if kind == "ring" else KVCache).create, (BATCH, CAPACITY)
        options["layout"] = "BKSH" if kind == "ring" else kind
    return jax.eval_shape(lambda: create(*sizes, HEADS, WIDTH, **options))


def new(count: int, heads: int = HEADS) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((BATCH, count, heads, WIDTH), jnp.float32)


def compiled(function: Any, cache: KVCache, *args: Any, donated: bool = True) -> Any:
    jitted = jax.jit(function, donate_argnums=0 if donated else ())
    return jitted.lower(cache, *args).compile(AS_USERS)


def append(cache: KVCache, key: jax.Array) -> KVCache:
    return cache.append(key, key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_append(kind: str, dtype: np.dtype) -> None:
    cache = abstract(kind, dtype)
    program = compiled(lambda cache, *new: reduce(append, new, cache), cache, new(4), new(1))
    assert cache_copies(program, cache) == []
    assert program.memory_analysis().temp_size_in_bytes < 1 << 17


@pytest.mark.parametrize("kind", CACHES)
def test_append_and_attend_in_a_loop(kind: str) -> None:
    def step(carry: tuple[KVCache, jax.Array], _: Any) -> tuple[Any, None]:
        cache, query = carry
        cache = append(cache, query[:, :, :HEADS])
        window = (99, 0) if kind == "ring" else None
        return (cache, jax_tkg.attention_tkg(query, cache, local_window_size=window)), None

    def loop(cache: KVCache, query: jax.Array) -> Any:
        return jax.lax.scan(step, (cache, query), length=3)[0]

    cache = abstract(kind, jnp.bfloat16)
    assert cache_copies(compiled(loop, cache, new(1, 2 * HEADS)), cache) == []


def test_pages_change_hands_in_place() -> None:
    cache, rows = abstract("paged", jnp.bfloat16), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    for function, count in (
        (PagedKVCache.fork, 2),
        (PagedKVCache.truncate, 1),
        (PagedKVCache.reset, 0),
    ):
        assert cache_copies(compiled(function, cache, *[rows] * count), cache) == []


@pytest.mark.parametrize("kind", CACHES)
def test_without_donation_it_copies(kind: str) -> None:
    """What the others would find."""
    cache = abstract(kind)
    assert "copy" in cache_copies(compiled(append, cache, new(1), donated=False), cache)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e5m2], ids=["bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("kind", ["BSKH", "BKHS", "paged"])
def test_attention_over_native_narrow_floats_makes_no_wide_copy(kind: str, dtype: Any) -> None:
    """Arrays of the users' own are not kept as bits; XLA:CPU likes to convert them as a whole."""
    cache = abstract(kind, dtype, as_bits=False)
    program = compiled(
        lambda cache, query: jax_tkg.attention_tkg(query, cache), cache, new(1), donated=False
    )
    assert program.memory_analysis().temp_size_in_bytes < 1 << 20
