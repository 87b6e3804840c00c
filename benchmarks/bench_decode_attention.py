"""Decode attention side by side: attention_tkg, jax.nn.dot_product_attention, torch's SDPA.

Every row of the table is one shape. All contenders of a shape run interleaved in one process, on
keys and values that were not touched since they left the cache (several copies are used in turn),
each on its own layout. Figures are medians of CPU time (all threads), so a contender gains nothing
by occupying more cores; the ratios are what to read.

    python benchmarks/bench_decode_attention.py               # everything, about ten minutes
    python benchmarks/bench_decode_attention.py --quick       # fewer repetitions
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

COLD_BYTES = 160e6  # several times the last-level cache of the machines this runs on


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

Run = Callable[[int], object]


class Inputs:
    """Queries and enough copies of keys and values that each use finds them cold."""

    def __init__(self, shape: Shape, dtype: np.dtype, tokens: int) -> None:
        self.shape, self.dtype, self.tokens = shape, np.dtype(dtype), tokens
        self.copies = max(2, math.ceil(COLD_BYTES / shape.bytes(self.dtype)))
        rng = np.random.default_rng(0)
        heads = shape.kv_heads * shape.group
        query = rng.standard_normal((shape.batch, tokens, heads, shape.head_dim), np.float32)
        self.query = jnp.asarray(query, self.dtype)
        size = (shape.batch, shape.slots, shape.kv_heads, shape.head_dim)
        one = [rng.standard_normal(size, np.float32) for _ in range(2)]
        arrays = [jnp.asarray(x, self.dtype) for x in one]
        self.bskh = [tuple(jnp.copy(x) for x in arrays) for _ in range(self.copies)]

    def caches(self, length: int | None = None) -> list[jax_tkg.KVCache]:
        """Our cache type, filled."""
        shape = self.shape
        fill = jax.jit(lambda c, k, v: c.append(k, v), donate_argnums=0)
        out = []
        for key, value in self.bskh:
            cache = jax_tkg.KVCache.create(
                shape.batch, shape.slots, shape.kv_heads, shape.head_dim, dtype=self.dtype
            )
            cache = fill(cache, key, value)
            if length is not None:
                cache = cache.truncate(jnp.full(shape.batch, length))
            out.append(cache)
        return out

    def head_major(self) -> list[jax_tkg.BKSH]:
        """Every slot live, no lengths: the layout alone."""
        return [cache.kv for cache in self.caches()]


def contenders(inputs: Inputs) -> dict[str, Run]:
    """Whole cache live."""
    query, copies = inputs.query, inputs.copies
    baseline = jax.jit(jax.nn.dot_product_attention)
    # Every slot is live and seen by the last token: the meaning of the baseline, which is not
    # causal, is is_causal=False here.
    ours = jax.jit(lambda q, kv: jax_tkg.attention_tkg(q, kv, is_causal=False))
    plain = jax.jit(lambda q, k, v: jax_tkg.attention_tkg(q, k, v, is_causal=False))
    caches, layouts = inputs.caches(), inputs.head_major()
    runs: dict[str, Run] = {
        "jax.nn": lambda i: baseline(query, *inputs.bskh[i % copies]),
        "cache": lambda i: ours(query, caches[i % copies]),
        "layout": lambda i: ours(query, layouts[i % copies]),
        "plain": lambda i: plain(query, *inputs.bskh[i % copies]),
    }
    if torch is not None:
        runs["torch"] = torch_run(inputs)
    want = np.asarray(runs["jax.nn"](0), np.float32)
    limit = 1e-4 if inputs.dtype == np.float32 else 2e-2
    for name in ("cache", "layout", "plain"):
        error = np.abs(np.asarray(runs[name](0), np.float32) - want).max()
        assert error < limit, f"{name} is off by {error}"
    return runs


def torch_run(inputs: Inputs) -> Run:
    """torch's SDPA on its own layout [B, heads, S, H]."""
    dtype = torch.float32 if inputs.dtype == np.float32 else torch.bfloat16

    def give(array: jax.Array) -> "torch.Tensor":
        host = np.array(jnp.swapaxes(array, 1, 2).astype(jnp.float32))
        return torch.from_numpy(host).to(dtype)

    query, kv = give(inputs.query), [tuple(give(x) for x in pair) for pair in inputs.bskh]
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = inputs.shape.group > 1

    def run(i: int) -> object:
        with torch.no_grad():
            return attend(query, *kv[i % inputs.copies], enable_gqa=grouped)

    return run


def quarter_contenders(inputs: Inputs) -> dict[str, Run]:
    """A quarter of the bucket is live."""
    query, copies, length = inputs.query, inputs.copies, inputs.shape.slots // 4
    lengths = jnp.full(inputs.shape.batch, length)
    baseline = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
    )
    ours = jax.jit(jax_tkg.attention_tkg)
    caches = inputs.caches(length)
    return {
        "jax.nn": lambda i: baseline(query, *inputs.bskh[i % copies]),
        "cache": lambda i: ours(query, caches[i % copies]),
    }


def cpu_medians(runs: dict[str, Run], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each contender; they take turns."""
    for run in runs.values():
        jax.block_until_ready(run(0))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repetitions):
        for name, run in runs.items():
            begin = time.process_time()
            jax.block_until_ready(run(i))
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
