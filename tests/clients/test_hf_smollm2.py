"""SmolLM2-135M in FlaxLlama before and after the swap. Needs the 93 MB package."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jax_tkg
from jax_tkg.flax_layers.swap import (
    HFDecoder,
    SwapWarning,
    flax_llama_from_gguf,
    rope_of_config,
    swap_linen,
)
from jax_tkg.models import read_gguf, smollm2_path
from tests.clients import hf_models as hf
from tests.clients.hf_models import clients_promote_dtypes  # noqa: F401

pytestmark = pytest.mark.model

PROMPT_IDS = [504, 3575, 282, 4649, 314]
GREEDY_IDS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]
GREEDY_IDS += [32, 33, 40, 29, 32, 33, 29, 34, 34, 216]
SHORT, SLOTS, LAYERS = PROMPT_IDS[:2], 64, 30


@pytest.fixture(scope="module")
def client_and_params() -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return flax_llama_from_gguf(read_gguf(smollm2_path()))


def test_the_same_text_before_and_after(client_and_params: Any) -> None:
    client, params = client_and_params
    padding = len(PROMPT_IDS) - len(SHORT)
    prompts = np.array([PROMPT_IDS, [0] * padding + SHORT])
    mask = hf.left_padded_mask(SLOTS, (0, padding))
    steps = len(GREEDY_IDS) - 1
    with rope_of_config():
        before = hf.decode(client, prompts, mask, steps, params)
        with swap_linen(layers=LAYERS) as report:
            after = hf.decode(client, prompts, mask, steps, params)
    assert before.ids[0] == GREEDY_IDS
    assert after.ids == before.ids
    np.testing.assert_allclose(after.logits, before.logits, rtol=0, atol=1e-4)
    assert {(x.num_heads, x.num_kv_heads, x.head_dim) for x in report} == {(9, 3, 64)}

    model = HFDecoder.create(client, params, around=rope_of_config)
    result = jax_tkg.generate(
        model, [PROMPT_IDS, SHORT], max_new_tokens=len(GREEDY_IDS), prefill_chunk=16
    )
    assert result.tokens.tolist() == before.ids
    assert len(model.report) == LAYERS


def test_its_rotation_is_not_that_of_its_config(client_and_params: Any) -> None:
    client, params = client_and_params
    prompts = np.array([PROMPT_IDS])
    with pytest.warns(SwapWarning, match="rope_theta=100000"), swap_linen(layers=LAYERS):
        jax.eval_shape(lambda: client(prompts, params=params).logits)
