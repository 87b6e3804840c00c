"""Speculative decoding side by side: plain, and prompt lookup with 2, 4 and 8 drafts a step.

SmolLM2-135M on a text that repeats its prompt and on two that do not. All ways of a text run
interleaved in one process, in an order that changes every time; what is timed begins with the first
token, so prompts are not part of it. Figures are medians of CPU time (all threads); the ratios are
what to read. Every way must give the same tokens, or the row says where the first differs.

    python benchmarks/bench_speculative.py            # a few minutes
    python benchmarks/bench_speculative.py --quick    # fewer repetitions
"""

import argparse
import os
import random
import statistics
import time
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_tkg
from jax_tkg.flax_layers import LlamaDecoder, decoder_from_gguf
from jax_tkg.generation import PromptLookup
from jax_tkg.models import Tokenizer, read_gguf, smollm2_path

LETTER = """\
Dear Ms Lind,

thank you for your order of 12 March. The two oak chairs will leave our workshop in Visby on Monday
and should reach you by Thursday. Please check that both boxes are sealed before you sign for them.

Kind regards,
Anna Berg
"""
TEXTS = {
    "a letter, again": f"Original letter:\n\n{LETTER}\nThe same letter, again:\n\n{LETTER[:40]}",
    "a story": "Once upon a time in a village by the sea there lived an old clockmaker who",
    "an explanation": "The three most important causes of the French Revolution were",
}
STEPS = 4
WAYS = {"plain": None} | {f"{n} drafts": PromptLookup(max_tokens=n) for n in (2, 4, 8)}


@dataclass
class Runs:
    """One way on one text."""

    tokens: list[int]
    per_step: float
    seconds: list[float]


def cpu_seconds(
    model: LlamaDecoder, prompt: list[int], way: PromptLookup | None, count: int, dtype: str
) -> float:
    """From the first token to the last."""
    tokens = jax_tkg.stream(
        model,
        [prompt],
        max_new_tokens=count,
        capacity=256,
        steps_per_call=STEPS,
        speculate=way,
        cache_options={"dtype": dtype},
    )
    next(tokens)
    begin = time.process_time()
    for _ in tokens:
        pass
    return time.process_time() - begin


def measure(
    model: LlamaDecoder, prompt: list[int], count: int, dtype: str, repetitions: int
) -> dict[str, Runs]:
    """All ways, in turns."""
    runs: dict[str, Runs] = {}
    for name, way in WAYS.items():
        result = jax_tkg.generate(  # compiles what `stream` runs
            model,
            [prompt],
            max_new_tokens=count,
            capacity=256,
            steps_per_call=STEPS,
            speculate=way,
            cache_options={"dtype": dtype},
        )
        per_step = 1.0 if result.acceptance is None else result.acceptance.tokens_per_step
        runs[name] = Runs(result.tokens[0].tolist(), per_step, [])
    order, shuffle = list(WAYS), random.Random(0).shuffle
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            seconds = cpu_seconds(model, prompt, WAYS[name], count, dtype)
            runs[name].seconds.append(seconds)
    return runs


def row(runs: dict[str, Runs], count: int) -> list[str]:
    """Milliseconds a token of the first way; tokens a step and speed-up of the others."""
    medians = {name: statistics.median(r.seconds) for name, r in runs.items()}
    plain = runs["plain"]
    cells = [f"{1e3 * medians['plain'] / (count - 1):.1f}"]
    for name, other in list(runs.items())[1:]:
        same = np.array(plain.tokens) == np.array(other.tokens)
        note = "" if same.all() else f" (other from token {int(np.argmin(same))})"
        ratio = medians["plain"] / medians[name]
        cells.append(f"{other.per_step:.2f} a step, {ratio:.2f}x{note}")
    return cells


def main() -> None:
    """Prints a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 repetitions instead of 7")
    parser.add_argument("--tokens", type=int, default=65, help="new tokens (default: 65)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    args = parser.parse_args()
    repetitions = 2 if args.quick else 7
    console = Console(width=160)
    gguf = read_gguf(smollm2_path())
    tokenizer = Tokenizer(gguf.tokenizer_metadata)
    for dtype in args.dtype or ("float32", "bfloat16"):
        model = decoder_from_gguf(gguf, dtype=jnp.dtype(dtype))
        table = Table(title=f"Prompt lookup against plain decoding, {dtype}, batch 1")
        for column in ("text", "plain, CPU ms a token", *list(WAYS)[1:]):
            table.add_column(column)
        for name, text in TEXTS.items():
            runs = measure(model, tokenizer.encode(text), args.tokens, dtype, repetitions)
            table.add_row(name, *row(runs, args.tokens))
        console.print(table)
        load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
        console.print(f"load averages after it: {load} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
