"""The tiny model in small pages, and what it must give: `generate`, one request at a time."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import numpy as np

from jax_tkg import generate
from jax_tkg.serving import Completion, Engine, Request, SamplingSettings, ServingConfig
from tests.generation.tiny_model import VOCAB, TinyModel

MODEL = TinyModel.random()
# A character for each token.
ALPHABET = string.ascii_letters[:VOCAB]
# Three rows often need more than 16 pages. Programs are compiled once for all tests of these sizes.
CONFIG = ServingConfig(
    max_rows=3,
    page_len=4,
    pages_per_sequence=12,
    num_pages=16,
    steps_per_call=4,
    prefill_chunk=16,
    top_log_probs=2,
)
SAMPLED = SamplingSettings(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01, seed=7)


class Letters:
    """Text of tokens: a letter each."""

    def push(self, token_id: Any) -> str:
        return ALPHABET[token_id]

    def flush(self) -> str:
        return ""


def make_engine(config: ServingConfig = CONFIG) -> Engine:
    return Engine(MODEL, config, decoder=Letters)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@cache
def _alone(ids: tuple[int, ...], count: int) -> list[int]:
    result = generate(MODEL, [ids], max_new_tokens=count, prefill_chunk=16, steps_per_call=4)
    return result.tokens[0].tolist()


def alone(request: Request) -> list[int]:
    """The greedy tokens of a request by `generate`, one row, a contiguous cache."""
    tokens = _alone(tuple(request.prompt), request.max_new_tokens)
    ends = [i for i, token in enumerate(tokens) if token in request.eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def letters(tokens: Any) -> str:
    return "".join(ALPHABET[token] for token in tokens)


def assert_no_leak(engine: Engine) -> None:
    """Every page can be handed out again."""
    usage = engine.usage
    assert (engine.num_running, engine.num_waiting, usage.used, usage.shared) == (0, 0, 0, 0)
    assert usage.cached + usage.free == engine.config.pages


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [list(c.tokens) for c in completions]
