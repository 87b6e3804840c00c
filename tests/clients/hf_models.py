"""Tiny Flax decoders of transformers, and greedy decoding as their users write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.calls import QUICKLY

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers 4.57: `make test-clients` installs it"
)
if not hasattr(transformers, "FlaxLlamaForCausalLM"):
    pytest.skip(
        f"transformers {transformers.__version__} has no Flax models; 4.57 is the last with them",
        allow_module_level=True,
    )

VOCAB, LAYERS, SLOTS, PROMPT, STEPS, WINDOW = 61, 2, 48, 20, 3, 5
PADDING = (0, 16)
CLIENTS = ("llama", "mistral", "gpt2")

_COMMON = {"vocab_size": VOCAB, "initializer_range": 0.3}
_GROUPED = _COMMON | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_client(name: str, dtype: Any = jnp.float32, **changes: Any) -> Any:
    """A tiny model with random weights."""
    if name == "llama":
        config = transformers.LlamaConfig(**_GROUPED | changes)
        return transformers.FlaxLlamaForCausalLM(config, dtype=dtype)
    if name == "mistral":
        config = transformers.MistralConfig(**_GROUPED | {"sliding_window": WINDOW} | changes)
        return transformers.FlaxMistralForCausalLM(config, dtype=dtype)
    sizes = {"n_embd": 48, "n_layer": LAYERS, "n_head": 6, "n_positions": 64}
    config = transformers.GPT2Config(**_COMMON | sizes | changes)
    return transformers.FlaxGPT2LMHeadModel(config, dtype=dtype)


class Decoded(NamedTuple):
    """Logits `[steps, B, V]` after the last tokens, the ids chosen, the cache at the end."""

    logits: np.ndarray
    ids: list[list[int]]
    cache: Any


def empty_cache(client: Any, batch: int, slots: int) -> Any:
    """As `client.init_cache`, which would compute a whole forward pass for it."""
    shapes = jax.eval_shape(lambda: client.init_cache(batch, slots))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def make_step(client: Any) -> Any:
    """A jitted step: `(params, cache, ids, mask, positions) -> (logits [B, V], cache)`."""

    def step(params: Any, cache: Any, ids: Any, mask: Any, positions: Any) -> Any:
        outputs = client(
            ids,
            attention_mask=mask,
            position_ids=positions,
            params=params,
            past_key_values=cache,
        )
        return outputs.logits[:, -1], outputs.past_key_values

    return jax.jit(step, donate_argnums=1)


def left_padded_mask(slots: int = SLOTS, padding: tuple[int, ...] = PADDING) -> np.ndarray:
    """int `[B, slots]`: 0 for the padding before each row."""
    return (np.arange(slots) >= np.array(padding)[:, None]).astype(np.int32)


def decode(
    client: Any,
    prompts: np.ndarray,
    mask: np.ndarray,
    steps: int = STEPS,
    params: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Decoded:
    """Greedy tokens after prompts `[B, P]` padded on the left, with a jitted step."""
    params = client.params if params is None else params
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    cache, step, logits = empty_cache(client, len(prompts), mask.shape[1]), make_step(client), []
    compiled: dict[int, Any] = {}
    options = QUICKLY if options is None else options
    ids = prompts.astype(np.int32)
    begin, tokens = 0, []
    for _ in range(steps + 1):
        end = begin + ids.shape[1]
        arguments = (params, cache, ids, mask, positions[:, begin:end])
        if ids.shape[1] not in compiled:
            compiled[ids.shape[1]] = step.lower(*arguments).compile(dict(options))
        last, cache = compiled[ids.shape[1]](*arguments)
        logits.append(np.asarray(last, np.float32))
        ids, begin = logits[-1].argmax(-1).astype(np.int32)[:, None], end
        tokens.append(ids[:, 0])
    return Decoded(np.stack(logits), np.stack(tokens, 1).tolist(), cache)


def random_prompts() -> np.ndarray:
    """Token ids `[2, PROMPT]`."""
    return np.random.default_rng(3).integers(1, VOCAB, (2, PROMPT))


@pytest.fixture(autouse=True)
def clients_promote_dtypes() -> Any:
    """The clients mix dtypes, which the tests of this library do not."""
    with jax.numpy_dtype_promotion("standard"):
        yield
