"""Continuous batching side by side with `generate`, and the cost of a decode call by live tokens.

First table: the same greedy requests, of prompts and answers of different lengths, served by an
`Engine`, by `generate` in batches of as many rows (a batch ends with its longest answer), and by
`generate` one by one. Every contender has compiled what it needs; they take turns. The tokens must
be the same, or nothing is printed.

Second table: one decode call of the same compiled program with more and more tokens in the pages of
its rows. It should grow with them, and not be what full page tables cost.

    python benchmarks/bench_serving.py             # some minutes, most of it compilation
    python benchmarks/bench_serving.py --quick     # fewer requests, one round
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jax_tkg import generate
from jax_tkg.flax_layers import LlamaDecoder, decoder_from_gguf
from jax_tkg.generation import as_pytree
from jax_tkg.models import read_gguf, smollm2_path
from jax_tkg.serving import Engine, Request, ServingConfig, programs
from jax_tkg.serving.rows import decode_arrays

CONFIG = ServingConfig(
    max_rows=8, page_len=16, pages_per_sequence=64, steps_per_call=8, prefill_chunk=32
)
LIVE = (0, 64, 128, 256, 512, 1008)
Contender = Callable[[], list[list[int]]]


def make_requests(count: int) -> list[Request]:
    """Prompts of 4 to 100 random ids, answers of 8 to 96 tokens: most short, some long."""
    rng = np.random.default_rng(0)
    return [
        Request(
            rng.integers(1000, 40000, int(rng.integers(4, 100))).tolist(),
            int(min(96, 8 + rng.exponential(24))),
        )
        for _ in range(count)
    ]


def served(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """By the engine; it must not find the prompts of the round before."""
    engine.forget_cached()
    return [list(completion.tokens) for completion in engine.run(requests)]


def batched(model: LlamaDecoder, rows: int, requests: Sequence[Request]) -> list[list[int]]:
    """By `generate`, that many at a time in the order they come."""
    tokens = []
    for begin in range(0, len(requests), rows):
        part = requests[begin : begin + rows]
        part = [*part, *[part[-1]] * (rows - len(part))]  # the same shape, nothing to compile
        result = generate(
            model,
            [list(request.prompt) for request in part],
            max_new_tokens=max(request.max_new_tokens for request in part),
            prefill_chunk=CONFIG.prefill_chunk,
            steps_per_call=CONFIG.steps_per_call,
            capacity=256,
        )
        tokens += [
            row[: request.max_new_tokens].tolist()
            for row, request in zip(result.tokens, part, strict=True)
        ]
    return tokens[: len(requests)]


def throughput(model: LlamaDecoder, requests: Sequence[Request], rounds: int) -> Table:
    """The first table."""
    engine = Engine(model, CONFIG)
    contenders: dict[str, Contender] = {
        "engine": partial(served, engine, requests),
        f"generate, batches of {CONFIG.max_rows}": partial(
            batched, model, CONFIG.max_rows, requests
        ),
        "generate, one by one": partial(batched, model, 1, requests),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    expected = None
    for turn in range(rounds + 1):  # the first compiles
        for name, contender in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = contender()
            took = time.perf_counter() - wall, time.process_time() - cpu
            expected = expected or tokens
            if tokens != expected:
                raise SystemExit(f"{name} gives other tokens than {next(iter(contenders))}.")
            if turn:
                times[name].append(took)
    made = sum(request.max_new_tokens for request in requests)
    table = Table("", "tokens/s", "CPU s", "times one by one")
    slowest = statistics.median(wall for wall, _ in times["generate, one by one"])
    for name, took in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*took, strict=True))
        table.add_row(name, f"{made / wall:.1f}", f"{cpu:.1f}", f"{slowest / wall:.2f}")
    return table


def by_live_tokens(model: LlamaDecoder, rounds: int) -> Table:
    """The second table."""
    pytree = as_pytree(model)
    pools = programs.make_pools(pytree, CONFIG, {})
    size, width = CONFIG.max_rows, CONFIG.pages_per_sequence
    table = np.arange(size * width, dtype=np.int32).reshape(size, width)
    idle = decode_arrays([], CONFIG)
    rows = {
        live: replace(
            idle,
            table=np.where(
                np.arange(width) * CONFIG.page_len < live + CONFIG.steps_per_call, table, -1
            ),
            lengths=np.full(size, live, np.int32),
            budget=np.full(size, CONFIG.steps_per_call, np.int32),
        )
        for live in LIVE
    }
    times: dict[int, list[float]] = {live: [] for live in LIVE}
    for turn in range(rounds + 1):
        for live, arrays in rows.items():
            begin = time.process_time()
            chosen, _, pools = programs.decode(
                pytree, pools, arrays, num_steps=CONFIG.steps_per_call, top=0
            )
            jax.block_until_ready((chosen, pools))
            if turn:
                times[live].append((time.process_time() - begin) / CONFIG.steps_per_call)
    result = Table("live tokens a row", "pages", "CPU ms a step", "more than with none")
    empty = statistics.median(times[LIVE[0]])
    for live, took in times.items():
        step = statistics.median(took)
        pages = int(np.sum(rows[live].table >= 0))
        result.add_row(str(live), str(pages), f"{step * 1e3:.1f}", f"{(step - empty) * 1e3:.1f}")
    return result


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="Throughput of continuous batching.")
    parser.add_argument("--quick", action="store_true", help="fewer requests, one round")
    options = parser.parse_args()
    console = Console()
    model = decoder_from_gguf(read_gguf(smollm2_path()))
    requests = make_requests(12 if options.quick else 50)
    rounds = 1 if options.quick else 3
    tokens = sum(request.max_new_tokens for request in requests)
    console.print(f"{len(requests)} requests for {tokens} tokens; {CONFIG}", style="dim")
    console.print(throughput(model, requests, rounds))
    console.print(by_live_tokens(model, 3 * rounds))


if __name__ == "__main__":
    main()
