"""An engine whose pages are on two devices: the same texts, and half of the heads on each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from jax_tkg import RotaryEmbedding
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder
from jax_tkg.flax_layers.partition import shard_decoder
from jax_tkg.generation import PromptLookup
from jax_tkg.serving import Engine, Request, ServingConfig
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


@pytest.mark.parametrize("role", ["keys", "batch"])
def test_only_heads_can_be_split(role: str) -> None:
    with pytest.raises(ValueError, match=rf"by heads, and .* {role} over 'x' \(2\)"):
        Engine(MODEL, CONFIG, sharding=on_mesh(2, **{role: "x"}))


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="give it as Engine"):
        Engine(MODEL, CONFIG, cache_options={"sharding": on_mesh(heads="x")})
    with pytest.raises(ValueError, match="K = 2 KV heads cannot be split into 3 parts"):
        Engine(MODEL, CONFIG, sharding=on_mesh(3, heads="x"))
