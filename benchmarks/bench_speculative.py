"""Speculative decoding side by side: plain, prompt lookup always on, and on while it pays.

SmolLM2-135M on a text that repeats its prompt and on two that do not. All ways of a text run
interleaved in one process, in an order that changes every time; what is timed begins with the first
token, so prompts are not part of it. Figures are medians of CPU time (all threads); the ratios are
what to read. Every way must give the same tokens, or the row says where the first differs.

A way that always drafts also tells where it breaks even: its tokens a step divided by its speed-up,
the time of a step with drafts in steps without. That is what `Adaptive(break_even=)` asks for.

    python benchmarks/bench_speculative.py                          # a few minutes
    python benchmarks/bench_speculative.py --quick --drafts 4       # fewer ways and repetitions
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
from jax_tkg.generation import Adaptive, PromptLookup
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
Way = PromptLookup | Adaptive | None


@dataclass
class Runs:
    """One way on one text."""

    way: Way
    tokens: list[int]
    per_step: float
    undrafted: int
    seconds: list[float]


def ways(drafts: list[int], break_even: float) -> dict[str, Way]:
    """By the heads of their columns, the first to compare with."""
    found: dict[str, Way] = {"plain": None}
    for n in drafts:
        found[f"{n} drafts"] = PromptLookup(max_tokens=n)
        found[f"{n}, adaptive"] = Adaptive(PromptLookup(max_tokens=n), break_even=break_even)
    return found


def cpu_seconds(model: LlamaDecoder, prompt: list[int], way: Way, count: int, dtype: str) -> float:
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
    model: LlamaDecoder,
    prompt: list[int],
    count: int,
    dtype: str,
    repetitions: int,
    found: dict[str, Way],
) -> dict[str, Runs]:
    """All ways, in turns."""
    runs: dict[str, Runs] = {}
    for name, way in found.items():
        result = jax_tkg.generate(  # compiles what `stream` runs
            model,
            [prompt],
            max_new_tokens=count,
            capacity=256,
            steps_per_call=STEPS,
            speculate=way,
            cache_options={"dtype": dtype},
        )
        accepted = result.acceptance
        per_step = 1.0 if accepted is None else accepted.tokens_per_step
        undrafted = 0 if accepted is None else int(accepted.undrafted.sum())
        runs[name] = Runs(way, result.tokens[0].tolist(), per_step, undrafted, [])
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            seconds = cpu_seconds(model, prompt, runs[name].way, count, dtype)
            runs[name].seconds.append(seconds)
    return runs


def row(runs: dict[str, Runs], count: int) -> list[str]:
    """Milliseconds a token of the first way; tokens a step and speed-up of the others."""
    medians = {name: statistics.median(r.seconds) for name, r in runs.items()}
    plain = runs["plain"]
    cells = [f"{1e3 * medians['plain'] / (count - 1):.1f}"]
    for name, other in list(runs.items())[1:]:
        same = np.array(plain.tokens) == np.array(other.tokens)
        wrong = "" if same.all() else f" (other from token {int(np.argmin(same))})"
        ratio = medians["plain"] / medians[name]
        if isinstance(other.way, Adaptive):
            note = f"{other.undrafted} steps without"
        else:
            note = f"breaks even at {other.per_step / ratio:.2f}"
        cells.append(f"{other.per_step:.2f} a step, {ratio:.2f}x; {note}{wrong}")
    return cells


def main() -> None:
    """Prints a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 repetitions instead of 7")
    parser.add_argument("--tokens", type=int, default=65, help="new tokens (default: 65)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--drafts", type=int, action="append", help="a step (default: 2, 4, 8)")
    parser.add_argument("--break-even", type=float, default=1.5, help="tokens a step")
    args = parser.parse_args()
    repetitions = 2 if args.quick else 7
    found = ways(args.drafts or [2, 4, 8], args.break_even)
    console = Console(width=220)
    gguf = read_gguf(smollm2_path())
    tokenizer = Tokenizer(gguf.tokenizer_metadata)
    for dtype in args.dtype or ("float32", "bfloat16"):
        model = decoder_from_gguf(gguf, dtype=jnp.dtype(dtype))
        table = Table(title=f"Prompt lookup against plain decoding, {dtype}, batch 1")
        for column in ("text", "plain, CPU ms a token", *list(found)[1:]):
            table.add_column(column)
        for name, text in TEXTS.items():
            prompt = tokenizer.encode(text)
            runs = measure(model, prompt, args.tokens, dtype, repetitions, found)
            table.add_row(name, *row(runs, args.tokens))
        console.print(table)
        load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
        console.print(f"load averages after it: {load} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
