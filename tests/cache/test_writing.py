"""Who writes into a cache: chosen for the platform, named, refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import KVCache, PagedKVCache, RingKVCache
from jax_tkg.cache.writing import WriteProblem
from jax_tkg.nki.append_call import NkiWriter
from jax_tkg.nki.custom_call import Outline
from jax_tkg.nki.implementation import Interpreter
from jax_tkg.nki.self_test import SelfTestError, check_append
from jax_tkg.online.plan import Target
from tests.lowered import lower_for_neuron, operations
from tests.nki.golden.problems import native_calls

OUTLINE = NkiWriter(compiler=Outline())
B, S, K, H, T = 2, 12, 2, 8, 2
CACHES = {
    "contiguous": partial(KVCache.create, B, S, K, H, layout="BSKH"),
    "ring": partial(RingKVCache.create, B, S, K, H),
    "paged": partial(PagedKVCache.create, B, 9, 4, 3, K, H),
}
NEW = jnp.asarray(np.random.default_rng(0).standard_normal((2, B, T, K, H), np.float32))


@pytest.mark.parametrize(("kind", "launches"), [("contiguous", 1), ("ring", 2), ("paged", 1)])
def test_on_neuron_the_kernel_writes(kind: str, launches: int) -> None:
    """A ring is written twice: what runs over its end goes to the front."""
    cache = CACHES[kind](dtype=jnp.bfloat16, as_bits=False)

    def append(cache: Any, new: Any) -> Any:
        return cache.append(*new, implementation=OUTLINE)

    calls = native_calls(lower_for_neuron(append, cache, NEW))
    assert [call["func_name"] for call in calls] == ["append"] * launches
    assert all(len(call["aliases"]) == 2 for call in calls)
    on_cpu = jax.jit(lambda c, n: c.append(*n, implementation=(OUTLINE, "xla")))
    assert "AwsNeuron" not in on_cpu.lower(cache, NEW).as_text()


def test_without_a_compiler_xla_writes_on_neuron() -> None:
    lowered = lower_for_neuron(lambda c, n: c.append(*n), CACHES["contiguous"](), NEW)
    assert not native_calls(lowered)
    assert operations(lowered)["stablehlo.dynamic_update_slice"] > 0
    choice = CACHES["contiguous"]().explain_append(platform="neuron")
    assert choice.require().name == "xla"
    ((name, reason),) = choice.rejected
    assert name == "nki"
    assert "no NKI compiler" in reason


def test_what_cannot_write_is_refused_with_its_reason() -> None:
    cache = CACHES["contiguous"]()
    with pytest.raises(NotImplementedError, match="nki: no NKI compiler"):
        cache.append(*NEW, implementation="nki")
    with pytest.raises(ValueError, match="unknown implementation 'nkl'; there are 'nki', 'xla'"):
        cache.append(*NEW, implementation="nkl")
    with pytest.raises(NotImplementedError, match=r"compiled for neuron, not for cpu"):
        jax.jit(lambda c: c.append(*NEW, implementation=OUTLINE))(cache)


def test_a_compiler_that_splits_arrays_gets_no_kernel() -> None:
    kv = CACHES["contiguous"]().kv
    problem = WriteProblem(kv.traits, kv.shape, T, kv.key.shape)
    assert OUTLINE.why_not(problem, Target(("neuron",))) is None
    split = OUTLINE.why_not(problem, Target(("neuron",), auto_partitioned=True))
    assert split is not None
    assert "shard_map" in split


@pytest.mark.parametrize("kind", CACHES)
def test_gradients_and_vmap(kind: str) -> None:
    """As of the layout's own update, which JAX can see into."""
    cache = CACHES[kind]()

    def total(append: Any, new: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(append(cache, new).kv.key))

    def by_layout(cache: Any, new: jax.Array) -> Any:
        if isinstance(cache, PagedKVCache):
            cache = cache._with_pages_for(jnp.full(B, T), T)
        return replace(cache, kv=cache.kv.write(*new, cache.lengths, jnp.ones((B, T), bool)))

    def by_cache(cache: Any, new: jax.Array) -> Any:
        return cache.append(*new)

    found, want = (jax.jit(jax.grad(partial(total, f)))(NEW) for f in (by_cache, by_layout))
    np.testing.assert_array_equal(found, want)
    assert np.any(np.asarray(found))
    both = jnp.stack([NEW, 2 * NEW])
    mapped = jax.jit(jax.vmap(partial(by_cache, cache)))(both)
    for i in range(2):
        np.testing.assert_array_equal(mapped.kv.key[i], by_layout(cache, both[i]).kv.key)


class Broken(Interpreter):
    """Loses the last row of what the kernel wrote."""

    def call(self, launch: Any, programs: int) -> Any:
        key, value = super().call(launch, programs)
        return key.at[-1, -1].set(0), value


def test_the_known_answer() -> None:
    right = NkiWriter(compiler=Interpreter(), self_test=False)
    check_append(right, jax.devices()[0])
    with pytest.raises(SelfTestError, match="writes wrong bfloat16 keys"):
        check_append(replace(right, compiler=Broken()), jax.devices()[0])


def test_the_known_answer_is_asked_before_the_first_use() -> None:
    writer = NkiWriter(compiler=Broken())
    with pytest.raises(SelfTestError):
        CACHES["contiguous"]().append(*NEW, implementation=writer)
