"""Decode attention side by side: attention_tkg, jax.nn.dot_product_attention, torch's SDPA.

Every row of the table is one shape. All contenders of a shape run interleaved in one process, in
an order that changes every time, each on its own layout. Before each timed call a large array is
read, so that keys and values are cold and nobody pays for writing back what the previous contender
left in the processor's cache. Figures are medians of CPU time (all threads), so a contender gains
nothing by occupying more cores; the ratios are what to read.

    python benchmarks/bench_decode_attention.py               # everything, about ten minutes
    python benchmarks/bench_decode_attention.py --quick       # fewer repetitions
"""

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_tkg

try:
    import torch
except ImportError:  # the [bench] extra
    torch = None

EVICTING = np.ones(96 * 2**20 // 8)  # larger than the last-level cache of the machines this runs on


@dataclass(frozen=True)
class Shape:
    """Sizes of one row: batch, KV heads, group, head_dim, cache slots."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    slots: int

    def __str__(self) -> str:
        return f"B{self.batch} K{self.kv_heads} G{self.group} H{self.head_dim} S{self.slots}"

    def bytes(self, dtype: np.dtype) -> int:
        """Keys and values."""
        size = np.dtype(dtype).itemsize
        return 2 * self.batch * self.kv_heads * self.head_dim * self.slots * size


SHAPES = (
    Shape(1, 8, 4, 128, 32768),
    Shape(1, 8, 4, 128, 8192),
    Shape(4, 8, 4, 128, 4096),
    Shape(8, 8, 4, 128, 1024),
    Shape(1, 32, 1, 64, 4096),
    Shape(4, 32, 1, 128, 1024),
    Shape(1, 1, 8, 128, 32768),
    Shape(1, 3, 3, 64, 8192),
    Shape(2, 4, 2, 256, 4096),
    Shape(2, 8, 5, 80, 4096),
)

Run = Callable[[], object]


class Inputs:
    """Queries, keys and values, and caches filled with them."""

    def __init__(self, shape: Shape, dtype: np.dtype, tokens: int) -> None:
        self.shape, self.dtype, self.tokens = shape, np.dtype(dtype), tokens
        rng = np.random.default_rng(0)
        heads = shape.kv_heads * shape.group
        query = rng.standard_normal((shape.batch, tokens, heads, shape.head_dim), np.float32)
        self.query = jnp.asarray(query, self.dtype)
        size = (shape.batch, shape.slots, shape.kv_heads, shape.head_dim)
        self.key, self.value = (
            jnp.asarray(rng.standard_normal(size, np.float32), self.dtype) for _ in range(2)
        )
        fill = jax.jit(lambda c, k, v: c.append(k, v), donate_argnums=0)
        empty = jax_tkg.KVCache.create(
            shape.batch, shape.slots, shape.kv_heads, shape.head_dim, dtype=self.dtype
        )
        self.cache = fill(empty, self.key, self.value)


def contenders(inputs: Inputs) -> dict[str, Run]:
    """Whole cache live; "cache" knows its lengths, "layout" is the same arrays without lengths."""
    query, key, value, cache = inputs.query, inputs.key, inputs.value, inputs.cache
    baseline = jax.jit(jax.nn.dot_product_attention)
    # The baseline is not causal: every token sees every slot.
    ours = jax.jit(partial(jax_tkg.attention_tkg, is_causal=False))
    runs: dict[str, Run] = {
        "jax.nn": lambda: baseline(query, key, value),
        "cache": lambda: ours(query, cache),
        "layout": lambda: ours(query, cache.kv),
        "plain": lambda: ours(query, key, value),
    }
    want = np.asarray(runs["jax.nn"](), np.float32)
    limit = 1e-4 if inputs.dtype == np.float32 else 2e-2
    for name in ("cache", "layout", "plain"):
        error = np.abs(np.asarray(runs[name](), np.float32) - want).max()
        assert error < limit, f"{name} is off by {error}"
    if torch is not None:
        runs["torch"] = torch_run(inputs)
    return runs


def torch_run(inputs: Inputs) -> Run:
    """SDPA of torch on its own layout [B, heads, S, H]."""
    dtype = torch.float32 if inputs.dtype == np.float32 else torch.bfloat16

    def give(array: jax.Array) -> "torch.Tensor":
        host = np.array(jnp.swapaxes(array, 1, 2).astype(jnp.float32))
        return torch.from_numpy(host).to(dtype)

    query, key, value = give(inputs.query), give(inputs.key), give(inputs.value)
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = inputs.shape.group > 1

    def run() -> object:
        with torch.no_grad():
            return attend(query, key, value, enable_gqa=grouped)

    return run


def quarter_contenders(inputs: Inputs) -> dict[str, Run]:
    """A quarter of the bucket is live."""
    query, key, value = inputs.query, inputs.key, inputs.value
    lengths = jnp.full(inputs.shape.batch, inputs.shape.slots // 4)
    cache = inputs.cache.truncate(lengths)
    baseline = jax.jit(jax.nn.dot_product_attention)
    ours = jax.jit(jax_tkg.attention_tkg)
    return {
        "jax.nn": lambda: baseline(query, key, value, key_value_seq_lengths=lengths),
        "cache": lambda: ours(query, cache),
        "plain": lambda: ours(query, key, value, key_value_seq_lengths=lengths),
    }


def cpu_medians(runs: dict[str, Run], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each contender; they take turns in a shuffled order."""
    order = list(runs)
    for name in order:
        jax.block_until_ready(runs[name]())
    times: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0).shuffle
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            EVICTING.sum()
            begin = time.process_time()
            jax.block_until_ready(runs[name]())
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def geomean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def print_table(
    console: Console,
    title: str,
    rows: list[tuple[Shape, dict[str, float], int]],
) -> None:
    """Milliseconds of each contender and the baseline's time as a multiple of it."""
    names = list(rows[0][1])
    table = Table(title=title)
    table.add_column("shape")
    for name in names:
        table.add_column(f"{name}, ms", justify="right")
    for name in names[1:]:
        table.add_column(f"jax.nn / {name}", justify="right")
    if "torch" in names:
        table.add_column("torch / layout", justify="right")
    table.add_column("cache, GB/s", justify="right")
    for shape, medians, size in rows:
        cells = [f"{1e3 * medians[n]:.2f}" for n in names]
        cells += [f"{medians['jax.nn'] / medians[n]:.2f}" for n in names[1:]]
        if "torch" in names:
            cells.append(f"{medians['torch'] / medians['layout']:.2f}")
        table.add_row(str(shape), *cells, f"{size / medians['cache'] / 1e9:.1f}")
    ratios = [f"{geomean([m['jax.nn'] / m[n] for _, m, _ in rows]):.2f}" for n in names[1:]]
    if "torch" in names:
        ratios.append(f"{geomean([m['torch'] / m['layout'] for _, m, _ in rows]):.2f}")
    table.add_row("geometric mean", *[""] * len(names), *ratios, "", style="bold")
    console.print(table)


def temp_bytes(shape: Shape, dtype: np.dtype) -> dict[str, int]:
    """Memory a call needs beside its arguments and result, as the compiler reports it."""
    heads = shape.kv_heads * shape.group
    query = jax.ShapeDtypeStruct((shape.batch, 1, heads, shape.head_dim), dtype)
    kv = jax.ShapeDtypeStruct((shape.batch, shape.slots, shape.kv_heads, shape.head_dim), dtype)
    cache = jax.eval_shape(
        lambda: jax_tkg.KVCache.create(
            shape.batch, shape.slots, shape.kv_heads, shape.head_dim, dtype=dtype
        )
    )
    compiled = {
        "jax.nn": jax.jit(jax.nn.dot_product_attention).lower(query, kv, kv).compile(),
        "cache": jax.jit(jax_tkg.attention_tkg).lower(query, cache).compile(),
        "layout": jax.jit(jax_tkg.attention_tkg).lower(query, cache.kv).compile(),
        "plain": jax.jit(jax_tkg.attention_tkg).lower(query, kv, kv).compile(),
    }
    return {n: c.memory_analysis().temp_size_in_bytes for n, c in compiled.items()}


def print_memory(console: Console) -> None:
    """Temporary memory at the longest shapes."""
    table = Table(title="Temporary memory of one call, KiB")
    table.add_column("shape")
    rows = [(s, d) for s in SHAPES if s.slots == 32768 for d in (jnp.float32, jnp.bfloat16)]
    for i, (shape, dtype) in enumerate(rows):
        sizes = temp_bytes(shape, np.dtype(dtype))
        if i == 0:
            for name in ("dtype", *sizes):
                table.add_column(name, justify="right")
        table.add_row(
            str(shape), np.dtype(dtype).name, *[f"{n / 1024:.0f}" for n in sizes.values()]
        )
    console.print(table)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 repetitions instead of 21")
    parser.add_argument("--only", default="", help="substring of the shapes to run")
    args = parser.parse_args()
    repetitions = 5 if args.quick else 21
    shapes = [s for s in SHAPES if args.only in str(s)]
    console = Console(width=180)
    parts = (
        ("T=1, every slot live", contenders, 1),
        ("T=4, every slot live", contenders, 4),
        ("T=1, a quarter of the bucket live", quarter_contenders, 1),
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        for title, make, tokens in parts:
            rows = []
            for shape in shapes:
                inputs = Inputs(shape, np.dtype(dtype), tokens)
                medians = cpu_medians(make(inputs), repetitions)
                rows.append((shape, medians, shape.bytes(np.dtype(dtype))))
                del inputs
                gc.collect()
            print_table(console, f"{title}, {np.dtype(dtype).name}", rows)
    print_memory(console)


if __name__ == "__main__":
    main()
