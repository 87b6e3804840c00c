"""Settings, engines and requests that are none are refused by name, before anything is compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jax_tkg import Greedy, Sample
from jax_tkg.generation import PromptLookup
from jax_tkg.serving import Engine, Request, SamplingSettings, ServingConfig
from tests import odd
from tests.generation.test_compilations import Count
from tests.generation.tiny_model import VOCAB
from tests.serving.tiny import CONFIG, MODEL, Letters, make_engine

pytestmark = pytest.mark.usefixtures("no_shape_checks")

SIZES = (
    *("max_rows", "page_len", "pages_per_sequence", "num_pages", "steps_per_call"),
    *("prefill_chunk", "prefill_rows", "prefill_calls"),
)


@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases(
        {
            **dict.fromkeys(SIZES, odd.NO_SIZES),
            "max_eos_ids": odd.NO_COUNTS,
            "top_log_probs": odd.NO_COUNTS,
            "out_of_pages": (None, "panic", 1, True, ["wait"]),
            "speculate": (4, "lookup", True, PromptLookup, object()),
        },
        ("num_pages",),
    ),
)
def test_config(name: str, value: Any) -> None:
    odd.assert_refused(name, lambda: ServingConfig(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases(
        {
            "temperature": odd.NO_NUMBERS,
            "top_k": odd.NO_SIZES,
            "top_p": (*odd.NO_NUMBERS, 0.0, 1.5),
            "min_p": (*odd.NO_NUMBERS, 1.0),
            "seed": odd.NO_COUNTS,
        },
        ("top_k", "top_p", "min_p"),
    ),
)
def test_sampling_settings(name: str, value: Any) -> None:
    odd.assert_refused(name, lambda: SamplingSettings(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases(
        {
            "prompt": (*odd.NO_IDS, []),
            "max_new_tokens": odd.NO_SIZES,
            "sampling": (None, 0.7, {"temperature": 0.7}, Greedy(), Sample(), SamplingSettings),
            "eos_ids": odd.NO_IDS,
            "stop": (None, 3, b"x", [3], [None], [b"x"], [""], ""),
            "top_log_probs": odd.NO_COUNTS,
        }
    ),
)
def test_request(name: str, value: Any) -> None:
    fields = {"prompt": [1], "max_new_tokens": 1, name: value}
    odd.assert_refused(name, lambda: Request(**fields))


@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases(
        {
            "config": (None, {"max_rows": 2}, 3, ServingConfig),
            "decoder": (3, "tokenizer", Letters()),
            "cache_options": ("bfloat16", 3),
            "sharding": ("x", 2),
        }
    ),
)
def test_engine(name: str, value: Any) -> None:
    odd.assert_refused(name, lambda: Engine(MODEL, **{"config": CONFIG, name: value}))


def test_what_an_engine_is_given_later() -> None:
    engine = make_engine()
    for request in (None, [1, 2], "text", {"prompt": [1]}):
        odd.assert_refused("Request", lambda request=request: engine.submit(request))
        odd.assert_refused("Request", lambda request=request: engine.run([request]))
    for ticket in (None, 0, Request([1], 1)):
        odd.assert_refused("Ticket", lambda ticket=ticket: engine.cancel(ticket))
        odd.assert_refused("Ticket", lambda ticket=ticket: next(engine.stream(ticket)))
    assert engine.num_waiting == 0


def test_ids_of_another_vocabulary() -> None:
    """Also of a model that says nothing of it: there are as many ids as logits."""
    assert not hasattr(MODEL, "vocab_size")
    with Count() as compiled:
        engine = make_engine()
        for name in ("prompt", "eos_ids"):
            request = replace(Request([VOCAB - 1], 1, eos_ids=[0]), **{name: [1, VOCAB]})
            with pytest.raises(ValueError, match=rf"{name} has token id {VOCAB}, .* {VOCAB} ids"):
                engine.submit(request)
    assert engine.num_waiting == 0
    engine.submit(Request([VOCAB - 1], 1, eos_ids=[VOCAB - 1]))
    assert compiled.all == 0


def test_more_log_probs_than_tokens() -> None:
    with pytest.raises(ValueError, match=f"top_log_probs=51, but .* logits of {VOCAB} tokens"):
        make_engine(replace(CONFIG, top_log_probs=VOCAB + 1))
    make_engine(replace(CONFIG, top_log_probs=VOCAB))
