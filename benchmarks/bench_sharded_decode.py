"""Decode attention with the slots of the cache over two host devices, against one device.

Both run interleaved in one process, in an order that changes every time; before each timed call a
large array is read, so that keys and values are cold. Figures are medians of wall time, because
what is to be shown is that two devices work at the same time; the CPU time beside it, all threads,
tells how many cores each kept busy. A machine that does other work spoils wall times: look at the
load that is printed.

    python benchmarks/bench_sharded_decode.py            # a minute or two on two cores
    python benchmarks/bench_sharded_decode.py --quick    # fewer repetitions
"""

import argparse
import os
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
from jax_tkg.sharding import AttentionSharding

DEVICES = 2
EVICTING = np.ones(96 * 2**20 // 8)  # larger than the last-level cache of the machines this runs on

Run = Callable[[], jax.Array]


@dataclass(frozen=True)
class Shape:
    """KV heads, query heads of each, head_dim; one row of 32768 slots."""

    kv_heads: int
    group: int
    head_dim: int
    slots: int = 32768

    def __str__(self) -> str:
        return f"B1 K{self.kv_heads} G{self.group} H{self.head_dim} S{self.slots}"


SHAPES = (Shape(8, 1, 64), Shape(8, 1, 128), Shape(8, 4, 64), Shape(8, 4, 128))


def contender(shape: Shape, dtype: np.dtype, sharding: AttentionSharding | None) -> tuple[Run, int]:
    """Attention of one token to a full cache, and the bytes of the cache on each device."""
    rng = np.random.default_rng(0)
    cache = jax_tkg.KVCache.create(
        1, shape.slots, shape.kv_heads, shape.head_dim, dtype=dtype, sharding=sharding
    )
    fill = jax.jit(lambda cache, new: cache.append(new, new), donate_argnums=0)
    for _ in range(8):
        size = (1, shape.slots // 8, shape.kv_heads, shape.head_dim)
        cache = fill(cache, jnp.asarray(rng.standard_normal(size, np.float32)))
    heads = shape.kv_heads * shape.group
    query = jnp.asarray(rng.standard_normal((1, 1, heads, shape.head_dim), np.float32), dtype)
    if sharding is not None:
        query = jax.device_put(query, sharding.named("BTNH"))
    attend = jax.jit(jax_tkg.attention_tkg)
    on_first = cache.kv.key.addressable_shards[0].data.nbytes
    return partial(attend, query, cache), 2 * on_first


def timed(run: Run) -> tuple[float, float]:
    """Wall and CPU seconds of a call with cold caches."""
    EVICTING.sum()
    wall, cpu = time.perf_counter(), time.process_time()
    run().block_until_ready()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(shape: Shape, dtype: np.dtype, rounds: int) -> tuple[list[str], float]:
    """A row of the table, and the ratio of wall times."""
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("sequence",), axis_types=kinds)
    shardings = (None, AttentionSharding(mesh, keys="sequence"))
    runs, sizes = zip(*(contender(shape, dtype, s) for s in shardings), strict=True)
    outputs = [np.asarray(run(), np.float32) for run in runs]
    limit = 1e-5 if dtype == np.float32 else 1e-2
    assert np.abs(outputs[0] - outputs[1]).max() < limit * np.abs(outputs[0]).max() + limit
    times: list[list[tuple[float, float]]] = [[], []]
    for _ in range(rounds):
        for i in random.sample((0, 1), 2):
            times[i].append(timed(runs[i]))
    walls, cpus = ([statistics.median(t[i] for t in of) for of in times] for i in (0, 1))
    ratio = walls[0] / walls[1]
    row = [str(shape), dtype.name]
    row += [f"{size / 2**20:.0f}" for size in sizes]
    row += [f"{1e3 * wall:.2f} ({cpu / wall:.1f})" for wall, cpu in zip(walls, cpus, strict=True)]
    return [*row, f"{ratio:.2f}"], ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    rounds = 11 if parser.parse_args().quick else 41
    jax.config.update("jax_num_cpu_devices", DEVICES)
    columns = ("shape", "dtype", "MiB, 1 device", "MiB, each of 2", "ms of 1 (cores)")
    table = Table(*columns, "ms of 2 (cores)", "1 / 2", title="decode attention, slots split")
    ratios = []
    for dtype in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
        for shape in SHAPES:
            row, ratio = compare(shape, dtype, rounds)
            table.add_row(*row)
            ratios.append(ratio)
    console = Console(width=120)
    console.print(table)
    console.print(f"geometric mean {statistics.geometric_mean(ratios):.2f}; ", end="")
    console.print(f"load of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
