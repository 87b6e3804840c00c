"""A decode step of SmolLM2 in FlaxLlama before and after the swap: time and memory, side by side.

Both steps of a context run interleaved in one process, in an order that changes every time, each
with its own donated cache, nearly full. CPU time counts all threads, so that nobody gains by
occupying more cores; on a machine with other work its ratio is the one to read. Peak memory is what
XLA plans beside weights and caches.

    python benchmarks/bench_swap.py                   # about three minutes
    python benchmarks/bench_swap.py --contexts 512 --repetitions 5

Needs the `clients` and `models` extras.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jax_tkg.flax_layers.swap import flax_llama_from_gguf, rope_of_config, swap_linen
from jax_tkg.models import read_gguf, smollm2_path

MEBI = 2**20


@dataclass
class Contender:
    """A compiled step, its cache, and how long its calls took: seconds of CPU and of wall clock."""

    name: str
    step: Any
    cache: Any
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def temporary(self) -> int:
        """Bytes beside arguments and results."""
        return int(self.step.memory_analysis().temp_size_in_bytes)

    def run(self, params: Any, inputs: tuple[Any, ...]) -> np.ndarray:
        """One timed call; logits `[1, V]`."""
        cpu, wall = time.process_time(), time.perf_counter()
        logits, self.cache = self.step(params, self.cache, *inputs)
        logits.block_until_ready()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return np.asarray(logits)


def filled_cache(model: Any, context: int, index: int) -> Any:
    """A cache of `context` slots, `index` of them written, with random keys and values."""
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.ndim != 4:
            return jnp.full(x.shape, index, x.dtype)
        live = (np.arange(context) < index)[:, None, None]
        return jnp.asarray(rng.standard_normal((1, context, *x.shape[2:]), np.float32) * live)

    return jax.tree.map(fill, jax.eval_shape(lambda: model.init_cache(1, 1)))


def compiled(model: Any) -> Callable[..., Any]:
    """A new jitted step with a donated cache."""

    def step(params: Any, cache: Any, ids: Any, mask: Any, positions: Any) -> Any:
        out = model(ids, mask, position_ids=positions, params=params, past_key_values=cache)
        return out.logits[:, -1], out.past_key_values

    return jax.jit(step, donate_argnums=1)


def measure(model: Any, params: Any, context: int, repetitions: int) -> dict[str, Contender]:
    """Both steps at one context."""
    index = context - 2 * repetitions - 2
    inputs = (
        np.array([[504]], np.int32),
        np.ones((1, context), np.int32),
        np.array([[index]], np.int32),
    )
    contenders = {}
    for name in ("before", "after"):
        cache = filled_cache(model, context, index)
        if name == "after":
            with swap_linen(layers=model.config.num_hidden_layers):
                step = compiled(model).lower(params, cache, *inputs).compile()
        else:
            step = compiled(model).lower(params, cache, *inputs).compile()
        contenders[name] = Contender(name, step, cache)
    logits = {name: c.run(params, inputs) for name, c in contenders.items()}
    error = np.abs(logits["after"] - logits["before"]).max()
    assert error < 1e-3 * np.abs(logits["before"]).max(), f"the logits differ by {error}"
    for c in contenders.values():
        c.cpu.clear()
        c.wall.clear()
    rng = random.Random(0)
    for _ in range(repetitions):
        for c in rng.sample(list(contenders.values()), k=len(contenders)):
            c.run(params, inputs)
    return contenders


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description="FlaxLlama before and after the swap.")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args(arguments)

    console = Console()
    with console.status("Reading the model"):
        gguf = read_gguf(smollm2_path())
        model, params = flax_llama_from_gguf(gguf)
    table = Table(title="SmolLM2-135M in FlaxLlama, float32, B=1: a decode step")
    for title in ("context", "step", "CPU ms", "wall ms", "least wall ms", "temporary MiB"):
        table.add_column(title, justify="right")
    for context in options.contexts:
        with rope_of_config(), console.status(f"Context {context}"):
            contenders = measure(model, params, context, options.repetitions)
        figures = {
            name: (
                statistics.median(c.cpu) * 1e3,
                statistics.median(c.wall) * 1e3,
                min(c.wall) * 1e3,
                c.temporary / MEBI,
            )
            for name, c in contenders.items()
        }
        figures["ratio"] = tuple(
            b / a for b, a in zip(figures["before"], figures["after"], strict=True)
        )
        for name, numbers in figures.items():
            table.add_row(str(context), name, *(f"{x:.2f}" for x in numbers))
        table.add_section()
    console.print(table)
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    console.print(f"jax {jax.__version__}, {os.cpu_count()} cores, load {load}")


if __name__ == "__main__":
    main()
