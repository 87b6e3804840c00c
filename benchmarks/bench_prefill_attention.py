"""Prefill attention side by side: attention_cte and jax.nn.dot_product_attention, causal, T = S.

Every row of the tables is one shape. The contenders of a shape run interleaved in one process, in
an order that changes every time. Figures are medians of CPU time (all threads) and of wall time, so
a contender gains nothing by occupying more cores; the ratios are what to read.

    python benchmarks/bench_prefill_attention.py               # everything, some minutes
    python benchmarks/bench_prefill_attention.py --quick       # fewer repetitions
    python benchmarks/bench_prefill_attention.py --only T512   # some of the shapes
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_tkg

Array = jax.Array


@dataclass(frozen=True)
class Shape:
    """Sizes of one row: batch, tokens, KV heads, group, head_dim."""

    batch: int
    tokens: int
    kv_heads: int
    group: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} K{self.kv_heads} G{self.group} H{self.head_dim}"

    def types(self, dtype: np.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Query, key and value."""
        heads = (self.kv_heads * self.group, self.kv_heads, self.kv_heads)
        return tuple(
            jax.ShapeDtypeStruct((self.batch, self.tokens, n, self.head_dim), dtype) for n in heads
        )


SHAPES = (
    Shape(1, 512, 2, 4, 64),
    Shape(4, 512, 8, 1, 128),
    Shape(1, 2048, 2, 4, 64),
    Shape(1, 2048, 4, 1, 128),
    Shape(1, 8192, 2, 2, 64),
    Shape(1, 8192, 1, 2, 128),
)

WINDOW = 1024
WINDOWED = tuple(Shape(1, t, 2, 2, 64) for t in (2048, 4096, 8192))

Attend = Callable[[Array, Array, Array], Array]

CONTENDERS: dict[str, Attend] = {
    "jax.nn": partial(jax.nn.dot_product_attention, is_causal=True),
    "attention_cte": jax_tkg.attention_cte,
}
WINDOW_CONTENDERS: dict[str, Attend] = {
    "jax.nn": partial(
        jax.nn.dot_product_attention, is_causal=True, local_window_size=(WINDOW - 1, 0)
    ),
    "attention_cte": partial(jax_tkg.attention_cte, local_window_size=(WINDOW - 1, 0)),
}


@dataclass(frozen=True)
class Measured:
    """Medians of one contender on one shape: seconds of CPU, seconds, bytes beside the arguments
    and the result."""

    cpu: float
    wall: float
    temp: int


def measure(
    shape: Shape, dtype: np.dtype, contenders: dict[str, Attend], repetitions: int
) -> dict[str, Measured]:
    """Compiles, compares the results, then lets the contenders take turns in a shuffled order."""
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal(x.shape, np.float32), dtype) for x in shape.types(dtype)
    ]
    runs = {name: jax.jit(f).lower(*arrays).compile() for name, f in contenders.items()}
    results = [np.asarray(run(*arrays), np.float32) for run in runs.values()]
    error = np.abs(results[1] - results[0]).max()
    assert error < (1e-4 if dtype == np.float32 else 3e-2), f"they differ by {error}"
    del results
    order, shuffle = list(runs), random.Random(0).shuffle
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            begin, begin_wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(runs[name](*arrays))
            cpu[name].append(time.process_time() - begin)
            wall[name].append(time.perf_counter() - begin_wall)
    return {
        name: Measured(
            statistics.median(cpu[name]),
            statistics.median(wall[name]),
            runs[name].memory_analysis().temp_size_in_bytes,
        )
        for name in runs
    }


def print_table(
    console: Console, title: str, rows: list[tuple[Shape, dict[str, Measured]]]
) -> None:
    """Milliseconds of CPU, ratios, and temporary memory."""
    table = Table(title=title)
    table.add_column("shape")
    names = list(rows[0][1])
    for name in names:
        table.add_column(f"{name}, CPU ms", justify="right")
    for what in ("CPU", "wall"):
        table.add_column(f"jax.nn / ours, {what}", justify="right")
    for name in names:
        table.add_column(f"{name}, temp MiB", justify="right")
    for shape, found in rows:
        theirs, ours = (found[name] for name in names)
        cells = [f"{1e3 * found[name].cpu:.1f}" for name in names]
        cells += [f"{theirs.cpu / ours.cpu:.2f}", f"{theirs.wall / ours.wall:.2f}"]
        cells += [f"{found[name].temp / 2**20:.1f}" for name in names]
        table.add_row(str(shape), *cells)
    console.print(table)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 repetitions instead of 15")
    parser.add_argument("--only", default="", help="substring of the shapes to run")
    args = parser.parse_args()
    repetitions = 3 if args.quick else 15
    console = Console(width=150)
    parts = (
        ("Causal", SHAPES, CONTENDERS),
        (f"Causal, window of {WINDOW} keys", WINDOWED, WINDOW_CONTENDERS),
    )
    for dtype in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
        for title, shapes, contenders in parts:
            rows = []
            for shape in shapes:
                if args.only in str(shape):
                    rows.append((shape, measure(shape, dtype, contenders, repetitions)))
                    gc.collect()
            if rows:
                print_table(console, f"{title}, {dtype.name}", rows)


if __name__ == "__main__":
    main()
