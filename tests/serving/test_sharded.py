"""An engine on a mesh: the same texts, and each device has its heads of its part of the pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from jax_tkg import KVCache, RotaryEmbedding, attention_tkg, generate
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder
from jax_tkg.flax_layers.partition import shard_decoder
from jax_tkg.generation import PromptLookup, last_real
from jax_tkg.serving import Engine, Request, SamplingSettings, ServingConfig, programs
from jax_tkg.serving.rows import decode_arrays
from jax_tkg.sharding import AttentionSharding
from tests.generation.test_compilations import Count
from tests.serving.tiny import MODEL, assert_no_leak

CONFIG = ServingConfig(
    max_rows=2,
    page_len=4,
    pages_per_sequence=8,
    num_pages=9,
    steps_per_call=2,
    prefill_chunk=8,
    speculate=PromptLookup(max_tokens=2),
)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def on_mesh(size: int = 2, **roles: Any) -> AttentionSharding:
    return AttentionSharding(jax.make_mesh((size,), ("x",), axis_types=(AxisType.Auto,)), **roles)


@pytest.fixture(scope="module")
def model() -> LlamaDecoder:
    layer = AttentionConfig(
        rope=RotaryEmbedding(), model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8
    )
    config = DecoderConfig(vocab_size=32, num_layers=1, mlp_dim=16, attention=layer)
    return LlamaDecoder(config, rngs=nnx.Rngs(0))


def requests() -> list[Request]:
    """With drafts that are accepted; together they need more pages than there are."""
    ids = np.random.default_rng(0).integers(0, 32, 5).tolist()
    return [Request([7, 3, 9, 7, 3, last] * 2, 12) for last in ids]


@pytest.mark.slow(reason="compiles every program twice")
def test_the_texts_are_the_same(model: LlamaDecoder) -> None:
    expected = Engine(model, replace(CONFIG, speculate=None)).run(requests())
    sharding = on_mesh(heads="x")
    engine = Engine(shard_decoder(model, sharding), CONFIG, sharding=sharding)
    completions = engine.run(requests())
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    assert sum(c.preemptions for c in completions) > 0
    assert engine.speculation.accepted > 0
    with Count() as compiled:
        assert [c.tokens for c in engine.run(requests())] == [c.tokens for c in expected]
    assert compiled.all == 0
    assert_no_leak(engine)
    assert shares(engine) == [[(9, 1, 4, 8)] * 2] * 2


# Rows and pages in parts

PARTS = replace(CONFIG, max_rows=4, num_pages=18, prefill_rows=2)


def mixed(count: int) -> list[Request]:
    """Greedy and sampled, short and long; many begin alike."""
    rng = np.random.default_rng(0)
    return [
        Request(
            [7, 3, 9, 7, 3, int(rng.integers(32))] * int(rng.integers(1, 4)),
            int(rng.integers(1, 13)),
            sampling=SamplingSettings(temperature=0.8 * (i % 2), seed=i),
        )
        for i in range(count)
    ]


def moved(program: Any) -> set[str]:
    """Shapes of what a compiled program sends from device to device."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf"= (\S+?)\{{\S+ (?:{kinds})[\w-]*\(", program.as_text()))


@pytest.mark.slow(reason="compiles every program three times")
@pytest.mark.parametrize("axes", [("x",), ("x", "y")], ids=["rows", "rows and heads"])
def test_the_texts_of_rows_in_parts(model: LlamaDecoder, axes: tuple[str, ...]) -> None:
    expected = [c.tokens for c in Engine(model, replace(CONFIG, speculate=None)).run(mixed(12))]
    mesh = jax.make_mesh((2,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes))
    sharding = AttentionSharding(mesh, **dict(zip(("batch", "heads"), axes, strict=False)))
    engine = Engine(shard_decoder(model, sharding), PARTS, sharding=sharding)
    engine.warm_up()
    with Count() as compiled:
        for _ in range(2):
            completions = engine.run(mixed(12))
            assert [c.tokens for c in completions] == expected
            assert sum(c.preemptions for c in completions) > 0
            assert sum(c.shared_tokens for c in completions) > 0
    assert compiled.all == 0
    assert engine.speculation.accepted > 0
    assert_no_leak(engine)
    heads = 2 // len(axes)
    assert shares(engine) == [[(9, heads, 4, 8)] * 2 ** len(axes)] * 2


@partial(jax.tree_util.register_dataclass, data_fields=["embed", "qkv"], meta_fields=[])
@dataclass(frozen=True)
class OneHead:
    """Attention and nothing else: quick to compile."""

    embed: Any
    qkv: Any

    def init_caches(self, batch: int, capacity: int, **options: Any) -> KVCache:
        return KVCache.create(batch, capacity, 1, 8, **options)

    def next_token_logits(self, tokens: Any, cache: KVCache, counts: Any = None) -> Any:
        x = jnp.take(self.embed, tokens, axis=0, mode="clip")
        query, key, value = jnp.split((x @ self.qkv)[:, :, None], 3, axis=-1)
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        cache = cache.append(key, value, counts)
        seen = attention_tkg(query, cache, query_positions=positions)[:, :, 0]
        return last_real(x + seen, counts) @ self.embed.T, cache


@pytest.fixture(scope="module")
def one_head() -> OneHead:
    rng = np.random.default_rng(0)
    return OneHead(*(jnp.asarray(rng.standard_normal(s), "float32") for s in ((32, 8), (8, 24))))


@pytest.fixture(scope="module")
def parts(one_head: OneHead) -> Engine:
    """A quick model, without drafts, in four parts."""
    config = replace(PARTS, prefill_rows=4, num_pages=32, speculate=None)
    engine = Engine(one_head, config, sharding=on_mesh(4, batch="x"))
    engine.warm_up()
    return engine


def test_rows_in_four_parts(parts: Engine, one_head: OneHead) -> None:
    """Of one row and eight pages each."""
    requests = [replace(r, sampling=SamplingSettings()) for r in mixed(9)]
    expected = [
        generate(one_head, [r.prompt], max_new_tokens=r.max_new_tokens, steps_per_call=4)
        for r in requests
    ]
    with Count() as compiled:
        completions = parts.run(requests)
    assert compiled.all == 0
    assert [list(c.tokens) for c in completions] == [e.tokens[0].tolist() for e in expected]
    assert_no_leak(parts)
    assert shares(parts) == [[(8, 1, 4, 8)] * 4] * 2


def test_no_page_is_moved(parts: Engine) -> None:
    """Nothing at all is, of greedy rows; a program that moves pages is found to."""
    arguments = programs.by_rows(decode_arrays([], parts.config), parts._sharding)
    static = {"num_steps": 2, "top": 0}
    lowered = programs.decode.lower(parts._model, parts._pools, arguments, **static)
    assert moved(lowered.compile()) == set()

    def gathered(model: Any, pools: Any, rows: Any) -> Any:
        whole = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), pools)
        return programs.decode(model, whole, rows, **static)

    lowered = jax.jit(gathered).lower(parts._model, parts._pools, arguments)
    assert any("4,8" in shape for shape in moved(lowered.compile()))


def shares(engine: Engine) -> list[list[tuple[int, ...]]]:
    """What each device has of each pool."""
    pools = jax.tree.leaves(engine._pools)
    return [
        [shard.data.shape for shard in sorted(pool.addressable_shards, key=lambda s: s.device.id)]
        for pool in pools
    ]


def test_where_the_pages_are(model: LlamaDecoder) -> None:
    found = Engine(model, CONFIG, sharding=on_mesh(heads="x"))
    assert shares(found) == [[(9, 1, 4, 8)] * 2] * 2
    # Fewer KV heads than devices: each has all of them.
    assert shares(Engine(model, CONFIG, sharding=on_mesh(4, heads="x"))) == [[(9, 2, 4, 8)] * 4] * 2
    assert shares(Engine(model, CONFIG)) == [[(9, 2, 4, 8)]] * 2


def test_slots_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"by heads and rows, and .* keys over 'x' \(2\)"):
        Engine(MODEL, CONFIG, sharding=on_mesh(2, keys="x"))


@pytest.mark.parametrize(("name", "size"), [("max_rows", 3), ("num_pages", 9), ("prefill_rows", 1)])
def test_parts_must_be_equal(name: str, size: int) -> None:
    config = replace(PARTS, **{name: size})
    with pytest.raises(ValueError, match=rf"{name} is {size}, .* batch over 'x' .* multiple of 2"):
        Engine(MODEL, config, sharding=on_mesh(2, batch="x"))


def test_a_request_must_fit_into_a_part() -> None:
    engine = Engine(MODEL, replace(PARTS, num_pages=6), sharding=on_mesh(2, batch="x"))
    engine.submit(Request([1] * 9, 4))
    with pytest.raises(
        ValueError, match=r"need 4 pages .* can have 8, and .* 3 pages in each part"
    ):
        engine.submit(Request([1] * 9, 5))


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="give it as Engine"):
        Engine(MODEL, CONFIG, cache_options={"sharding": on_mesh(heads="x")})
    with pytest.raises(ValueError, match="K = 2 KV heads cannot be split into 3 parts"):
        Engine(MODEL, CONFIG, sharding=on_mesh(3, heads="x"))
