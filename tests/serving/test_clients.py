"""Swapped decoders of transformers and tunix through the engine: pages in place of flat caches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from flax import nnx

from jax_tkg import generate
from jax_tkg.flax_layers.swap import HFDecoder, SwapWarning, TunixDecoder, swap_nnx
from jax_tkg.generation import PromptLookup
from jax_tkg.serving import Engine, Request, ServingConfig
from tests.clients import hf_models as hf
from tests.clients import tunix_models as tunix
from tests.serving.tiny import assert_no_leak

pytestmark = pytest.mark.filterwarnings(tunix.DEPRECATED)

CONFIG = ServingConfig(
    max_rows=2,
    page_len=4,
    pages_per_sequence=8,
    num_pages=10,
    steps_per_call=2,
    prefill_chunk=8,
    speculate=PromptLookup(max_tokens=2),
)
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [9] * 12, [33, 4, 5], [7]]
NEW = 9


@pytest.fixture(autouse=True)
def like_clients() -> Iterator[None]:
    """They mix dtypes."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def swapped(model: nnx.Module) -> TunixDecoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SwapWarning)
        swap_nnx(model)
    return TunixDecoder.of(model)


MODELS = {
    "FlaxLlama": lambda: HFDecoder.create(hf.make_client("llama")),
    "tunix llama3": lambda: swapped(tunix.tiny_llama3()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_texts_of_generate(name: str) -> None:
    model: Any = MODELS[name]()
    engine = Engine(model, CONFIG)
    completions = engine.run(Request(prompt, NEW) for prompt in PROMPTS)
    if isinstance(model, HFDecoder):
        assert "cache PooledKVCache paged" in str(model.report)
    expected = generate(model, PROMPTS, max_new_tokens=NEW, capacity=32, prefill_chunk=8)
    assert [list(c.tokens) for c in completions] == expected.tokens.tolist()
    assert engine.speculation.accepted > 0
    assert_no_leak(engine)
