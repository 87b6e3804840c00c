"""A real model served: known ids, text, and fifty requests against `generate`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jax_tkg import generate
from jax_tkg.flax_layers import LlamaDecoder, decoder_from_gguf
from jax_tkg.models import GGUFModel, Tokenizer, read_gguf, smollm2_path
from jax_tkg.serving import (
    Engine,
    FinishReason,
    Request,
    SamplingSettings,
    ServingConfig,
)
from tests.models.test_smollm2 import GREEDY_IDS, PROMPT_IDS
from tests.serving.tiny import assert_no_leak

pytestmark = [pytest.mark.example, pytest.mark.model]

CONFIG = ServingConfig(
    max_rows=4, page_len=16, pages_per_sequence=10, num_pages=12, steps_per_call=8, prefill_chunk=32
)
BEGIN = "You are a helpful assistant who knows a great deal. Answer in one sentence.\n\n"
QUESTIONS = [
    "What is the capital of Italy?",
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "def is_prime(n):",
    "Once upon a time, in a village by the sea,",
    "The chemical symbol of gold is",
    "List three fruits:",
    "2 + 2 =",
    "The opposite of hot is",
    "A short story about a robot who learns to paint:",
]

_compilations: list[str] = []


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture(scope="module")
def gguf() -> GGUFModel:
    return read_gguf(smollm2_path())


@pytest.fixture(scope="module")
def tokenizer(gguf: GGUFModel) -> Tokenizer:
    return Tokenizer(gguf.tokenizer_metadata)


@pytest.fixture(scope="module")
def model(gguf: GGUFModel) -> LlamaDecoder:
    return decoder_from_gguf(gguf)


def test_known_ids_and_text_beside_other_requests(
    model: LlamaDecoder, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, CONFIG, decoder=tokenizer.stream)
    known = Request(PROMPT_IDS, len(GREEDY_IDS))
    requests = [
        known,
        Request(tokenizer.encode(BEGIN + QUESTIONS[0]), 6),
        replace(known, stop=["\n\nThe"]),
        replace(known, eos_ids=[GREEDY_IDS[4]]),
        Request(tokenizer.encode(BEGIN + QUESTIONS[1]), 9),
    ]
    whole, first, stopped, ended, second = engine.run(requests)
    assert list(whole.tokens) == GREEDY_IDS
    assert whole.text == " Paris.\n\nThe answer is: 2018-01-22 "
    assert (stopped.text, stopped.reason) == (" Paris.", FinishReason.STOP)
    assert (ended.text, ended.reason) == (" Paris.\n\n", FinishReason.EOS)
    assert first.shared_tokens == 0
    assert second.shared_tokens == 16  # whole pages of BEGIN
    assert_no_leak(engine)


@pytest.mark.slow  # Seven large programs are compiled, fifty requests served twice.
def test_50_requests(model: LlamaDecoder, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    requests = []
    for i in range(50):
        text = (BEGIN if i % 2 else "") + QUESTIONS[i % 10] + " " * (i // 10)
        sampled = SamplingSettings(0.8, top_k=50, top_p=0.95, seed=i)
        requests.append(
            Request(
                tokenizer.encode(text),
                int(rng.integers(8, 60)),
                sampling=sampled if i % 5 == 4 else SamplingSettings(),
                eos_ids=tokenizer.eos_ids,
            )
        )
    engine = Engine(model, CONFIG, decoder=tokenizer.stream)
    engine.warm_up()
    compiled = len(_compilations)
    completions = engine.run(requests)
    assert len(_compilations) == compiled
    assert_no_leak(engine)
    assert sum(c.preemptions for c in completions) > 0
    assert sum(c.shared_tokens for c in completions) > 16 * 10

    options: dict[str, Any] = {"prefill_chunk": 32, "steps_per_call": 8, "capacity": 256}
    for request, completion in zip(requests, completions, strict=True):
        if not request.sampling.temperature:
            options |= {"max_new_tokens": request.max_new_tokens, "eos_ids": request.eos_ids}
            alone = generate(model, [request.prompt], **options)
            assert list(completion.tokens) == alone.tokens[0, : alone.lengths[0]].tolist()
            assert completion.text == tokenizer.decode(alone.rows()[0])

    # In another order, in another company: the same tokens, the sampled ones too.
    sampled_again = engine.run(requests[4::5][::-1])[::-1]
    assert [c.tokens for c in sampled_again] == [c.tokens for c in completions[4::5]]
