"""SmolLM2-135M in the FlaxLlama of transformers: one change, and it decodes with jax_tkg.

    python examples/swap_llama.py

Needs the `clients` and `models` extras; the model file (93 MB) is fetched on first use.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_tkg
from jax_tkg.flax_layers.swap import HFDecoder, flax_llama_from_gguf, rope_of_config, swap_linen
from jax_tkg.models import Tokenizer, read_gguf, smollm2_path

PROMPTS = ["The capital of France is", "Water boils at"]
SLOTS = 256


def padded_on_the_left(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, P]` and the attention mask `[B, SLOTS]`, as FlaxLlama wants them."""
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + row for row in rows], np.int32)
    padding = np.array([longest - len(row) for row in rows])
    return ids, (np.arange(SLOTS) >= padding[:, None]).astype(np.int32)


def write(model, params, prompts: list[list[int]], count: int) -> tuple[list[list[int]], int]:
    """Decodes greedily, as users of FlaxLlama do; also the temporary bytes of a step.

    There is nothing of jax_tkg in this function.
    """

    @partial(jax.jit, donate_argnames="cache")
    def step(params, cache, ids, mask, positions):
        out = model(ids, mask, position_ids=positions, params=params, past_key_values=cache)
        return jnp.argmax(out.logits[:, -1], axis=-1)[:, None], out.past_key_values

    ids, mask = padded_on_the_left(prompts)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    empty = jax.eval_shape(lambda: model.init_cache(len(prompts), SLOTS))
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
    end = ids.shape[1]
    tokens, cache = step(params, cache, ids, mask, positions[:, :end])
    following = step.lower(params, cache, tokens, mask, positions[:, :1]).compile()
    new = [tokens]
    for at in range(end, end + count - 1):
        tokens, cache = following(params, cache, tokens, mask, positions[:, at : at + 1])
        new.append(tokens)
    temporary = following.memory_analysis().temp_size_in_bytes
    return np.concatenate(new, axis=1).tolist(), temporary


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the texts before and after the swap, and through `jax_tkg.generate`; 0 if equal."""
    parser = argparse.ArgumentParser(description="FlaxLlama before and after the swap.")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    count = parser.parse_args(arguments).max_new_tokens

    gguf = read_gguf(smollm2_path())
    tokenizer = Tokenizer(gguf.tokenizer_metadata)
    model, params = flax_llama_from_gguf(gguf)
    prompts = [tokenizer.encode(text) for text in PROMPTS]

    with rope_of_config():  # FlaxLlama ignores its config's rope_theta, swapped or not
        before, memory_before = write(model, params, prompts, count)
        with swap_linen(layers=gguf.config.num_layers) as report:  # the one change
            after, memory_after = write(model, params, prompts, count)
    print(report, end="\n\n")

    decoder = HFDecoder.create(model, params, around=rope_of_config)
    generated = jax_tkg.generate(decoder, prompts, max_new_tokens=count, prefill_chunk=16)

    texts = {"before": before, "after": after, "generate": generated.tokens.tolist()}
    for name, rows in texts.items():
        for prompt, row in zip(PROMPTS, rows, strict=True):
            print(f"{name:9}{prompt}|{tokenizer.decode(row)!r}")
    print(f"\ntemporary memory of a step: {memory_before} bytes before, {memory_after} after")
    same = before == after == texts["generate"]
    print("the same text" if same else "NOT the same text")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
