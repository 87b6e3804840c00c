"""Settings that are no settings are refused by name, before the model is asked for anything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_tkg import Greedy, RotaryEmbedding, Sample, generate, stream
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder
from jax_tkg.generation import Adaptive, DraftModel, PromptLookup, as_pytree
from jax_tkg.sampling import most_likely_tokens
from tests import odd

pytestmark = pytest.mark.usefixtures("no_shape_checks")

VOCAB = 7


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["vocab_size"])
@dataclass(frozen=True)
class Untouched:
    """A model that must not be asked for anything."""

    table: Any
    vocab_size: Any = VOCAB

    def init_caches(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked for caches")

    next_token_logits = __call__ = init_caches


MODEL = Untouched(np.zeros(1))
SETTINGS = {
    "max_new_tokens": odd.NO_SIZES,
    "prefill_chunk": odd.NO_SIZES,
    "steps_per_call": odd.NO_SIZES,
    "capacity": (*odd.NO_SIZES, 4),
    "pad_id": (*odd.NO_INTS, 2**31, -(2**40)),
    "eos_ids": (*odd.NO_IDS, [VOCAB], {1, 2**20}),
    "selector": (None, "greedy", 0.5, Greedy, Sample, object()),
    "key": (7, "key", True, np.zeros(2, np.uint32)),
    "cache_options": ("bfloat16", 3, [("dtype", "float32")]),
    "speculate": (4, "lookup", True, PromptLookup, object()),
    "prompt_lengths": ([1], [[1, 1]], [True, True], [1.0, 1.0], [None, 1], "11", 3),
    "prompt": (
        *(3, None, "text", object(), [3], ["text"], [None], [[]], [[1], None], [[1, [2]]]),
        *([[True]], [[1.0]], [[NAN := float("nan")]], [["1"]], [[[1]]], [[-1]], [[2**40]], [NAN]),
        *(np.zeros(3, int), np.zeros((1, 2)), np.zeros((0, 2), int), (x for x in [[1]]), {1: [1]}),
        *([[1], [2, VOCAB]], np.full((2, 3), VOCAB), jnp.full((2, 3), 2**30)),
    ),
}
NEEDED = {"prompts": np.ones((2, 3), int), "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases(SETTINGS, ("steps_per_call", "capacity", "key", "speculate", "cache_options")),
)
def test_generate_and_stream(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {**NEEDED, "prompts" if name == "prompt" else name: value}
    if name == "key":
        arguments["selector"] = Sample()
    odd.assert_refused(name, lambda: generate(MODEL, **arguments))
    if hasattr(value, "gi_frame"):
        return  # has been used up
    if name != "steps_per_call" or value is not None:
        odd.assert_refused(name, lambda: stream(MODEL, **arguments))


def test_yes_or_no() -> None:
    for value in (None, "no", 1, np.ones(1, bool)):
        odd.assert_refused(
            "return_log_probs",
            lambda value=value: generate(MODEL, **NEEDED, return_log_probs=value),
        )


def test_an_unhashable_selector() -> None:
    @dataclass
    class Mutable:
        needs_key = False

        def __call__(self, logits: Any, key: Any = None) -> Any:
            raise AssertionError

    with pytest.raises(TypeError, match=r"selector is static .* Mutable has no hash"):
        generate(MODEL, **NEEDED, selector=Mutable())


@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases(
        {
            "temperature": (*odd.NO_NUMBERS, 0.0),
            "top_k": odd.NO_SIZES,
            "top_p": (*odd.NO_NUMBERS, 0.0, 1.5),
            "min_p": (*odd.NO_NUMBERS, 1.0),
        },
        ("top_k", "top_p", "min_p"),
    ),
)
def test_sample(name: str, value: Any) -> None:
    odd.assert_refused(name, lambda: Sample(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"), odd.cases(dict.fromkeys(("max_tokens", "ngram", "min_ngram"), odd.NO_SIZES))
)
def test_drafters(name: str, value: Any) -> None:
    odd.assert_refused(name, lambda: PromptLookup(**{name: value}))
    if name == "max_tokens":
        odd.assert_refused(name, lambda: DraftModel(MODEL, max_tokens=value))


@pytest.mark.parametrize(
    ("name", "value"),
    odd.cases(
        {
            "drafter": (None, 4, "lookup", PromptLookup, object()),
            "break_even": (*odd.NO_NUMBERS, 0.9),
            "window": odd.NO_SIZES,
            "pause": odd.NO_SIZES,
            "longest_pause": odd.NO_SIZES,
        }
    ),
)
def test_adaptive(name: str, value: Any) -> None:
    odd.assert_refused(name, lambda: Adaptive(**{"drafter": PromptLookup(), name: value}))


def decoder() -> LlamaDecoder:
    layer = AttentionConfig(
        rope=RotaryEmbedding(), model_dim=8, num_heads=2, num_kv_heads=1, head_dim=4
    )
    config = DecoderConfig(vocab_size=VOCAB, num_layers=1, mlp_dim=8, attention=layer)
    return LlamaDecoder(config, rngs=nnx.Rngs(0))


def test_ids_of_another_vocabulary() -> None:
    """Before they were looked up as the nearest id, and the text was wrong without a word."""
    model = decoder()
    message = f"prompt 1 has token id {VOCAB}, but .* vocabulary has 7 ids, 0 to 6: encode with"
    for known in (model, as_pytree(model)):
        with pytest.raises(ValueError, match=message):
            generate(known, [[VOCAB - 1], [0, VOCAB]], max_new_tokens=1)
        with pytest.raises(ValueError, match=r"eos_ids has token id 99"):
            generate(known, [[VOCAB - 1]], max_new_tokens=1, eos_ids=[99])
    # What is beyond the length of a row is nobody's.
    padded = np.array([[1, 2, 3], [4, 2**40, -5]])
    assert generate(model, padded, prompt_lengths=[3, 1], max_new_tokens=1).tokens.shape == (2, 1)


def test_a_model_that_does_not_tell_its_vocabulary_is_not_asked() -> None:
    with pytest.raises(AssertionError, match="asked for caches"):
        generate(Untouched(np.zeros(1), None), [[2**31 - 1]], max_new_tokens=1)
    odd.assert_refused("vocab_size", lambda: generate(Untouched(np.zeros(1), 7.5), **NEEDED))


def test_no_more_tokens_than_logits() -> None:
    logits = jnp.zeros((2, 5))
    assert most_likely_tokens(logits, 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    for count in (6, -1, 2.0, True):
        odd.assert_refused("count", lambda count=count: most_likely_tokens(logits, count))
