"""What a request and a configuration may be, and what is said of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jax_tkg import Greedy, Sample
from jax_tkg.serving import Request, SamplingSettings, ServingConfig
from tests.serving.tiny import assert_no_leak, make_engine


def test_a_request_keeps_its_own_plain_ids() -> None:
    ids = [3, 1, 2]
    request = Request(ids, 4, eos_ids={5}, stop="\n")
    ids[0] = 0
    assert request.prompt == (3, 1, 2)
    assert (request.eos_ids, request.stop) == ((5,), ("\n",))
    assert request.most_tokens == 6


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt": []}, ValueError, "at least one token id"),
        ({"prompt": [1, -1]}, ValueError, "prompt must be token ids from 0 to .*; got -1"),
        ({"prompt": [2**40]}, ValueError, "prompt must be token ids"),
        ({"eos_ids": [2**31]}, ValueError, "eos_ids must be token ids"),
        ({"prompt": "text"}, TypeError, "Encode the text"),
        ({"prompt": [1.5]}, TypeError, "float"),
        ({"max_new_tokens": 0}, ValueError, "at least 1, got 0"),
        ({"stop": ["a", ""]}, ValueError, "at least one character"),
        ({"top_log_probs": -1}, ValueError, "negative, got -1"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_requests_that_make_no_sense(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Request(**{"prompt": [1], "max_new_tokens": 1, **fields})


def test_settings_are_selectors() -> None:
    assert SamplingSettings().selector == Greedy()
    assert SamplingSettings(top_k=3).selector == Greedy()
    expected = Sample(0.5, top_k=3, top_p=0.9, min_p=0.1)
    assert SamplingSettings(0.5, 3, 0.9, 0.1).selector == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**fields)


def test_random_states_are_far_apart() -> None:
    """No two words of neighbouring seeds and indices agree; large seeds are seeds too."""
    states = [
        SamplingSettings(seed=seed).random_words(index)
        for seed in (0, 1, 2, 2**64, 2**64 + 1)
        for index in range(50)
    ]
    assert all(state.dtype == np.uint32 for state in states)
    assert all(len({int(state[i]) for state in states}) == len(states) for i in range(4))
    again = SamplingSettings(seed=1).random_words(7)
    assert again.tolist() == states[57].tolist()


def test_sizes() -> None:
    config = ServingConfig(max_rows=3, page_len=4, pages_per_sequence=20)
    assert (config.pages, config.capacity) == (60, 80)
    assert [config.pages_for(n) for n in (1, 4, 5)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"top_log_probs": -1}, "top_log_probs must not be negative, got -1"),
        ({"out_of_pages": "panic"}, "'wait' or 'refuse', got 'panic'"),
        ({"prefill_chunk": 600}, "prefill_chunk of 600 tokens is more than the 512"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_sizes_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingConfig(**fields)


def test_a_page_that_is_kept_is_a_leak() -> None:
    engine = make_engine()
    assert_no_leak(engine)
    assert engine._places._parts[0].pool.take(1)
    with pytest.raises(AssertionError):
        assert_no_leak(engine)
