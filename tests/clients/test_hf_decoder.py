"""`jax_tkg.generate` drives the Flax decoders of transformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg import neuron
from jax_tkg.flax_layers.swap import HFDecoder
from jax_tkg.generation import DecodeModel, PromptLookup, ScoringModel, decode
from tests.calls import quickly
from tests.clients import hf_models as hf
from tests.clients.hf_models import clients_promote_dtypes  # noqa: F401
from tests.hlo import cache_copies

PROMPTS = [list(range(1, 20)), [7], [33, 4, 5]]
NEW, CAPACITY = 4, 40


def alone(client: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Each prompt continued greedily by the client without a cache, whole texts at every step."""
    width = max(map(len, prompts)) + count
    full = quickly(lambda params, ids: client(ids, params=params).logits)
    rows = [list(prompt) for prompt in prompts]
    for _ in range(count):
        ids = np.array([row + [0] * (width - len(row)) for row in rows])
        logits = np.asarray(full(client.params, ids))
        for row, of_row in zip(rows, logits, strict=True):
            row.append(int(of_row[len(row) - 1].argmax()))
    return [row[-count:] for row in rows]


@pytest.mark.parametrize("name", hf.CLIENTS)
def test_prompts_of_different_lengths(name: str) -> None:
    client = hf.make_client(name)
    model = HFDecoder.create(client)
    result = jax_tkg.generate(
        model, PROMPTS, max_new_tokens=NEW, capacity=CAPACITY, prefill_chunk=20
    )
    assert result.tokens.tolist() == alone(client, PROMPTS, NEW)
    assert len(model.report) == hf.LAYERS
    assert "cache KVCache BKHS [3, " in str(model.report)


def test_speculation_takes_tokens_back() -> None:
    model = HFDecoder.create(hf.make_client("llama"))
    assert isinstance(model, DecodeModel)
    assert isinstance(model, ScoringModel)
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], [9, 9, 9]]
    plain, drafted = (
        jax_tkg.generate(model, prompts, max_new_tokens=NEW, capacity=CAPACITY, **how)
        for how in ({}, {"speculate": PromptLookup()})
    )
    assert drafted.tokens.tolist() == plain.tokens.tolist()


def test_one_program_for_equal_sizes() -> None:
    model = HFDecoder.create(hf.make_client("gpt2"))
    sizes: list[int] = []
    for prompts in ([[1, 2]], [[3, 4, 5, 6]]):
        jax_tkg.generate(model, prompts, max_new_tokens=3, capacity=CAPACITY)
        sizes.append(decode._cache_size())
    assert sizes[0] == sizes[1] > 0


def test_a_row_without_a_token_stays_as_it_is() -> None:
    model = HFDecoder.create(hf.make_client("llama"))
    caches = model.init_caches(2, 8)
    _, after = quickly(model.next_token_logits)(
        jnp.array([[3], [4]]), caches, jnp.array([1, 0], jnp.int32)
    )
    for layer in after["model"]["layers"].values():
        cache = layer["self_attn"]["kv_cache"]
        assert cache.lengths.tolist() == [1, 0]
        assert np.any(cache.kv.key[0])
        assert not np.any(cache.kv.key[1])


@pytest.mark.parametrize("name", hf.CLIENTS)
def test_a_step_can_run_on_neuron(name: str) -> None:
    model = HFDecoder.create(hf.make_client(name))
    caches, counts = model.init_caches(2, 32), jnp.ones(2, jnp.int32)

    def step(params: Any, tokens: Any, caches: Any) -> Any:
        return HFDecoder(params, model.program).next_token_logits(tokens, caches, counts)

    found = neuron.check(step, model.params, jnp.ones((2, 1), jnp.int32), caches)
    assert [x for x in found if x.severity == "error"] == []


def test_caches_of_another_dtype_and_layout_are_updated_in_place() -> None:
    client = hf.make_client("llama", max_position_embeddings=4096, hidden_size=384)
    model = HFDecoder.create(client)
    caches = model.init_caches(2, 4096, dtype="bfloat16", layout="BSKH")

    def step(model: HFDecoder, tokens: Any, caches: Any) -> Any:
        return model.next_token_logits(tokens, caches)

    lowered = jax.jit(step, donate_argnums=2).lower(model, jnp.ones((2, 1), jnp.int32), caches)
    assert cache_copies(lowered.compile(), caches) == []


def test_more_tokens_than_the_model_has_positions_for() -> None:
    model = HFDecoder.create(hf.make_client("gpt2"))
    with pytest.raises(ValueError, match="65 tokens, but the model has positions for 64"):
        model.init_caches(1, 65)


def test_not_a_client() -> None:
    with pytest.raises(TypeError, match="such as FlaxLlamaForCausalLM; got int"):
        HFDecoder.create(3)


def test_ids_of_another_vocabulary() -> None:
    """The client looks such an id up as its last one."""
    client = hf.make_client("gpt2")
    model, size = HFDecoder.create(client), client.config.vocab_size
    assert model.vocab_size == size
    for arguments in ({"prompts": [[1], [size]]}, {"prompts": [[1]], "eos_ids": [size]}):
        with pytest.raises(ValueError, match=rf"has token id {size}, but .* has {size} ids"):
            jax_tkg.generate(model, max_new_tokens=1, **arguments)
