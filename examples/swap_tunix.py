"""A tunix Llama3 that works today, and one line that makes it decode with jax_tkg: the same text.

    python examples/swap_tunix.py [--tokens 20]

Needs google-tunix and the `models` extra; the model file (SmolLM2-135M, 93 MB) is fetched on first
use.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.llama3 import model as llama3

import jax_tkg
from jax_tkg.flax_layers.swap import TunixDecoder, swap_nnx, tunix_llama3_from_gguf
from jax_tkg.models import Tokenizer, read_gguf, smollm2_path

PROMPT = "The capital of France is"


@functools.partial(nnx.jit, donate_argnames="caches")
def step(model: nnx.Module, tokens: jax.Array, at: jax.Array, caches: Any) -> tuple[Any, Any]:
    """Tunix's own way to call its decoder: positions, its caches, a mask of their slots."""
    batch, count = tokens.shape
    slots = caches["layer_0"]["k"].shape[1]
    positions = jnp.broadcast_to(at + jnp.arange(count), (batch, count))
    logits, caches = model(tokens, positions, caches, jnp.arange(slots) <= positions[..., None])
    return jnp.argmax(logits[:, -1:], axis=-1), caches


def write(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation of a prompt, with tunix's caches."""
    config, slots = model.config, len(prompt) + count
    shape = (1, slots, config.num_kv_heads, config.head_dim)
    caches = {
        f"layer_{i}": {
            "k": jnp.zeros(shape),
            "v": jnp.zeros(shape),
            "end_index": jnp.zeros(1, jnp.int32),
        }
        for i in range(config.num_layers)
    }
    token, caches = step(model, jnp.asarray([prompt]), jnp.asarray(0), caches)
    ids = [int(token[0, 0])]
    while len(ids) < count:
        at = jnp.asarray(len(prompt) + len(ids) - 1)
        token, caches = step(model, token, at, caches)
        ids.append(int(token[0, 0]))
    return ids


def main() -> None:
    """Writes text before the swap, after it, and with caches of jax_tkg."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20, help="how many to write")
    count = parser.parse_args().tokens
    gguf = read_gguf(smollm2_path())
    tokenizer, model = Tokenizer(gguf.tokenizer_metadata), tunix_llama3_from_gguf(gguf)
    # tunix ignores config.rope_theta; without this both texts would be nonsense, and the same.
    base = model.config.rope_theta
    llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=base)
    prompt = tokenizer.encode(PROMPT)

    before = write(model, prompt, count)
    print(f"before: {PROMPT}{tokenizer.decode(before)!r}")

    swap = swap_nnx(model)  # the one line
    print(swap.report)
    after = write(model, prompt, count)
    print(f"after:  {PROMPT}{tokenizer.decode(after)!r}")

    # A swapped model also runs in jax_tkg's own loop: one program, any batch of prompts.
    made = jax_tkg.generate(TunixDecoder.of(model), [prompt], max_new_tokens=count)
    if not before == after == made.tokens[0].tolist():
        raise SystemExit("the texts differ")
    print("the same text three times")


if __name__ == "__main__":
    main()
