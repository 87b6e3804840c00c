"""Prompts of different lengths run the same compiled programs."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from jax_tkg import Sample, generate, stream
from jax_tkg.generation import decode, prefill_chunk
from tests.generation.tiny_model import VOCAB, TinyModel

_compilations: list[str] = []


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


class Count:
    """How many programs were compiled while it was open, and how many versions of ours came."""

    def __enter__(self) -> Count:
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.all, self.decode, self.prefill = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )

    @staticmethod
    def _now() -> tuple[int, int, int]:
        return len(_compilations), decode._cache_size(), prefill_chunk._cache_size()


@pytest.fixture(scope="module")
def model() -> TinyModel:
    model = TinyModel.random()
    generate(model, prompts(10), max_new_tokens=5)
    return model


def prompts(longest: int) -> list[list[int]]:
    return [[1, 2, 3], [i % VOCAB for i in range(longest)]]


@pytest.mark.parametrize("longest", [1, 40, 64, 65, 200, 252])
def test_no_prompt_length_compiles_anything(model: TinyModel, longest: int) -> None:
    with Count() as count:
        generate(model, prompts(longest), max_new_tokens=5)
    assert (count.all, count.decode, count.prefill) == (0, 0, 0)


def test_a_larger_bucket_compiles_each_program_once(model: TinyModel) -> None:
    with Count() as first:
        generate(model, prompts(253), max_new_tokens=5)
    assert (first.decode, first.prefill) == (1, 1)
    with Count() as second:
        generate(model, prompts(300), max_new_tokens=5)
    assert second.all == 0


def test_a_streams_length_compiles_nothing(model: TinyModel) -> None:
    with Count() as count:
        for length in (1, 3, 30):
            tokens = stream(model, prompts(20), max_new_tokens=length, steps_per_call=4)
            assert len(list(tokens)) == length
    assert count.all == 0


def test_new_weights_compile_nothing(model: TinyModel) -> None:
    other = TinyModel.random(seed=1)
    with Count() as count:
        tokens = generate(other, prompts(10), max_new_tokens=5).tokens
    assert count.all == 0
    assert (tokens != generate(model, prompts(10), max_new_tokens=5).tokens).any()


def test_another_policy_compiles_the_decode_loop_alone(model: TinyModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "selector": Sample()}
    with Count() as first:
        generate(model, prompts(10), eos_ids=[3, 99], key=jax.random.key(0), **options)
    assert (first.decode, first.prefill) == (1, 0)
    key = jax.random.key(8)
    with Count() as second:  # the same ids and another seed
        generate(model, prompts(10), eos_ids=(99, 3, 3), key=key, **options)
    assert second.all == 0


def test_a_key_that_is_not_needed_compiles_nothing(model: TinyModel) -> None:
    key = jax.random.key(8)
    with Count() as count:
        generate(model, prompts(10), max_new_tokens=5, key=key)
    assert count.all == 0


def test_the_count_counts(model: TinyModel) -> None:
    with Count() as count:
        generate(model, prompts(10), max_new_tokens=6)
    assert count.decode == 1
    assert count.all >= 1
