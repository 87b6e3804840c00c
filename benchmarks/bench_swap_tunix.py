"""A tunix Llama3 (SmolLM2-135M) before and after the swap: time per token, memory, side by side.

    python benchmarks/bench_swap_tunix.py [--contexts 512 2048 8192] [--batch 1] [--rounds 10]

Three ways take turns, step by step, in one process: tunix as it is; swapped, with tunix's own
caches; swapped, with caches of jax_tkg (`TunixDecoder`). All decode one token a step at a full
context. `cpu` is the processor time of the process: on a busy machine it says more than the clock.
"""

import argparse
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama3

from jax_tkg.flax_layers.swap import TunixDecoder, swap_nnx, tunix_llama3_from_gguf
from jax_tkg.models import read_gguf, smollm2_path

Step = tuple[functools.partial[Any], Any]
"""A jitted step with its weights bound, and without: to be lowered."""


@dataclass(frozen=True)
class Row:
    """One way at one context; times are medians over the rounds.

    Attributes:
        context: tokens in the cache.
        way: "tunix", "swapped", or "swapped, own caches".
        seconds: by the clock, a token.
        cpu_seconds: of the processor.
        temporary_bytes: that the compiled step needs beside weights and caches.
    """

    context: int
    way: str
    seconds: float
    cpu_seconds: float
    temporary_bytes: int


def load() -> Any:
    """The model, rotated with its own base."""
    model = tunix_llama3_from_gguf(read_gguf(smollm2_path()))
    base = model.config.rope_theta
    if not isinstance(llama3.apply_rope, functools.partial):
        llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=base)
    return model


def tunix_step(model: nnx.Module) -> Step:
    """A decode step over tunix's caches; each model has a jit of its own."""
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(state: Any, caches: Any, tokens: jax.Array) -> Any:
        layer = caches["layer_0"]
        at = layer["end_index"][:, None]
        mask = jnp.arange(layer["k"].shape[1]) <= at[..., None]
        logits, caches = nnx.merge(graphdef, state)(tokens, at, caches, mask)
        return logits[:, -1], caches

    return functools.partial(step, state), step


def own_step(model: nnx.Module) -> Step:
    """A decode step over caches of jax_tkg."""
    decoder = TunixDecoder.of(model)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(decoder: Any, caches: Any, tokens: jax.Array) -> Any:
        return decoder.next_token_logits(tokens, caches)

    return functools.partial(step, decoder), step


def tunix_caches(config: Any, batch: int, context: int, rounds: int) -> Any:
    """Caches of `context` slots, filled but for what the rounds add."""
    shape = (batch, context, config.num_kv_heads, config.head_dim)
    return {
        f"layer_{i}": {
            "k": jnp.full(shape, 0.1),
            "v": jnp.full(shape, 0.1),
            "end_index": jnp.full(batch, context - rounds, jnp.int32),
        }
        for i in range(config.num_layers)
    }


def own_caches(decoder: TunixDecoder, batch: int, context: int, rounds: int) -> Any:
    """The same in the layout that is fastest on a CPU."""
    caches = decoder.init_caches(batch, context)
    filled = {}
    for name, cache in caches.items():
        heads, width = cache.kv.shape.num_kv_heads, cache.kv.shape.head_dim
        new = jnp.full((batch, context - rounds, heads, width), 0.1)
        filled[name] = cache.append(new, new)
    return filled


def rows(
    contexts: Sequence[int] = (512, 2048, 8192), *, batch: int = 1, rounds: int = 10
) -> Iterator[Row]:
    """Measures; the first round of each way, which compiles, is not counted."""
    model = load()
    swapped = nnx.clone(model)
    swap_nnx(swapped, layers=model.config.num_layers)
    decoder = TunixDecoder.of(swapped)
    ways = {
        "tunix": tunix_step(model),
        "swapped": tunix_step(swapped),
        "swapped, own caches": own_step(swapped),
    }
    tokens = jnp.ones((batch, 1), jnp.int32)
    for context in contexts:
        caches = {
            name: tunix_caches(model.config, batch, context, rounds + 1)
            for name in ("tunix", "swapped")
        }
        caches["swapped, own caches"] = own_caches(decoder, batch, context, rounds + 1)
        temporary = {}
        for name, (bound, step) in ways.items():
            compiled = step.lower(*bound.args, caches[name], tokens).compile()
            temporary[name] = compiled.memory_analysis().temp_size_in_bytes
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, (bound, _) in ways.items():
                clock, cpu = time.perf_counter(), time.process_time()
                logits, caches[name] = bound(caches[name], tokens)
                jax.block_until_ready((logits, caches[name]))
                took = (time.perf_counter() - clock, time.process_time() - cpu)
                times[name].append(took)
        for name, took in times.items():
            seconds, cpu_seconds = np.median(took[1:], axis=0).tolist()
            yield Row(context, name, seconds, cpu_seconds, temporary[name])
        del caches


def main() -> None:
    """Prints a table, and the load of the machine before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(f"load {os.getloadavg()}, jax {jax.__version__}, batch {options.batch}")
    print(
        f"{'context':>8} {'way':<20} {'ms/token':>9} {'cpu ms':>7} {'temp MiB':>9}  against tunix"
    )
    first: Row | None = None
    for row in rows(options.contexts, batch=options.batch, rounds=options.rounds):
        first = row if first is None or row.context != first.context else first
        ratios = (
            f"{first.seconds / row.seconds:.2f}x, cpu {first.cpu_seconds / row.cpu_seconds:.2f}x"
        )
        print(
            f"{row.context:8} {row.way:<20} {1e3 * row.seconds:9.1f} {1e3 * row.cpu_seconds:7.1f} "
            f"{row.temporary_bytes / 2**20:9.1f}  {ratios}",
            flush=True,
        )
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
