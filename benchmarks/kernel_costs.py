"""What the decode kernel costs beside the public one: cycles, bytes, descriptors, exchanges, SBUF.

No times are measured here: a launch runs in the interpreter, which counts what it does under the
documented estimates of each instruction, on trn2. The public kernel's counters, made under the same
estimates, are in tests/grid/public-kernel-counters.csv.

The same problem. A row's bucket of `s_prior` slots ends with the new tokens in the public kernel,
which loads all of the bucket. Here the cache has `s_prior` slots, every sequence has a length of
its own, which fills the bucket with the new tokens counted, and these come beside the cache.
Layout, pages, 8-bit keys (here with a scale, there without), sinks, window, dtype and number of
cores are the row's. Where the public kernel loads a dense mask (`mask_from_positions` 0), so does
this one. Rows with `fused_rope` (marked r) rotate queries and new keys inside the public kernel.
The op here rotates before the launch, which is not counted: these rows are that much in our favour.
`--rotate-inside` has our kernel do it, which it can, and store the rotated keys too.

The public kernel returns no log-sum-exp, nor does ours here, which has it left out of the launch
(`--lse` asks for it, as the op does: four bytes a row, a descriptor a row or less).

The public kernel gives NaN where values that no query sees are NaN; ours is told that they are
finite (`--unseen-values any` has it clear them).

What is compared, each of the core that has most of it:

- tensor: cycles of the Tensor engine.
- busy: time of the four engines added up, tensor / 2.4 + vector / 0.96 + scalar / 1.2 +
  gpsimd / 1.2 cycles, in ns. Not a latency: engines work beside each other.
- bytes, descriptors: of all DMAs but exchanges; a descriptor moves one contiguous piece.
- exchanges: `sendrecv`s.
- SBUF: peak bytes a partition; theirs as it was allocated, ours by liveness, which is a lower
  bound of what a compiler needs.
- roofline: for 8,192 slots and more, the time that the bytes of HBM that the launch touches take at
  full bandwidth, as a share of the time model's total (docs/time-model.md). Where a window leaves
  most of the bucket unread, it counts the bucket all the same: above 1 is faster than to read it.

A figure that is worse says by how much, and which instructions of which steps make that, beside
what any kernel has: products with the cache, bytes of operands and results. A roofline that is
missed says how long it takes until the cache begins to arrive, while it does and afterwards, and
what the critical path mostly consists of.

    python benchmarks/kernel_costs.py                        # every row, some minutes
    python benchmarks/kernel_costs.py --every 10
    python benchmarks/kernel_costs.py --rows 88:98 --csv costs.csv
"""

import argparse
import csv
import inspect
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_tkg
from jax_tkg.attention import Call, prepare
from jax_tkg.cache.layouts import DENSE_LAYOUTS, KVLayout
from jax_tkg.nki import interpreter
from jax_tkg.nki.arguments import Launch, Named, kernel_limits, make_launch
from jax_tkg.nki.interpreter.record import Instruction, Transfer
from jax_tkg.nki.interpreter.report import Timing, timing
from jax_tkg.nki.rope_call import rotary_table
from jax_tkg.problem import Op

PUBLIC = Path(__file__).parents[1] / "tests" / "grid" / "public-kernel-counters.csv"
GHZ = {"tensor": 2.4, "vector": 0.96, "scalar": 1.2, "gpsimd": 1.2}
LONG = 8192
GOALS = {"tensor": None, "busy": 0.7, "bytes": None, "descriptors": 0.7, "exchanges": None}
"""Limit of the geometric mean; None: no row above 1."""
ROOFLINE_GOAL = 0.85

CACHE_NAMES = {"key", "value"}
OPERANDS = CACHE_NAMES | {"query", "new_key", "new_value", "hidden", "sinks"}
"""Arrays that the public kernel loads too."""

ROPE = jax_tkg.RotaryEmbedding(base=10000.0)

Measure = Callable[[Instruction], float]
MEASURES: Mapping[str, Measure] = {
    "tensor": lambda step: step.cycles if step.engine.name == "tensor" else 0.0,
    "busy": lambda step: step.cycles / GHZ.get(step.engine.name, math.inf),
    "bytes": lambda step: sum(transfer.bytes for transfer in plain_dma(step)),
    "descriptors": lambda step: sum(transfer.descriptors for transfer in plain_dma(step)),
    "exchanges": lambda step: float(step.op == "sendrecv"),
}
"""What one instruction adds to a figure."""


@dataclass(frozen=True)
class Row:
    """A line of the public kernel's counters."""

    number: int
    n: Mapping[str, int]
    dtype: np.dtype
    is_transposed: bool

    @classmethod
    def read(cls, number: int, line: Mapping[str, str]) -> "Row":
        """From its texts."""
        sizes = {name: int(text) for name, text in line.items() if text.isdigit()}
        dtype = np.dtype(getattr(ml_dtypes, line["dtype"], line["dtype"]))
        return cls(number, sizes, dtype, line["k_layout"] == "d_s")

    def __str__(self) -> str:
        n = self.n
        parts = [f"B{n['batch']} N{n['q_heads']} T{n['s_active']} S{n['s_prior']} H{n['d_head']}"]
        parts.append(f"page {n['block_len']}" if n["block_len"] else "")
        parts.append("transposed" if self.is_transposed else "")
        parts += ["fp8" if n["fp8_kv"] else "f32" if self.dtype == np.float32 else ""]
        parts += ["sinks" if n["sink"] else "", "" if n["mask_from_positions"] else "mask"]
        parts += [f"w{n['sliding_window']}" if n["sliding_window"] else ""]
        parts += ["r" if n["fused_rope"] else "", f"x{n['cores']}"]
        return " ".join(part for part in parts if part)

    def cache_bytes(self) -> float:
        """Keys and values of the bucket, the share of one core."""
        n = self.n
        size = 1 if n["fp8_kv"] else self.dtype.itemsize
        return 2 * n["batch"] * n["s_prior"] * n["d_head"] * size / n["cores"]

    def costs(self) -> dict[str, float]:
        """Of the public kernel."""
        n = self.n
        return {
            "tensor": n["tensor_cycles"],
            "busy": sum(n[f"{engine}_cycles"] / ghz for engine, ghz in GHZ.items()),
            "bytes": n["dma_bytes"],
            "descriptors": n["dma_descriptors"],
            "exchanges": n["sendrecv"],
            "SBUF": n["sbuf_peak_bytes_per_partition"],
        }


@dataclass(frozen=True)
class Comparison:
    """One row, ours beside theirs.

    Attributes:
        row: which.
        ours, theirs: each figure, of the core that has most of it.
        roofline: share of the HBM roofline in the time model; None for short buckets.
        plan: how our kernel divided it.
        reasons: why ours is worse, by figure.
    """

    row: Row
    ours: Mapping[str, float]
    theirs: Mapping[str, float]
    roofline: float | None
    plan: str
    reasons: Mapping[str, str]

    def ratio(self, name: str) -> float:
        """Ours by theirs; nothing by nothing is 1."""
        mine, other = self.ours[name], self.theirs[name]
        return mine / other if other else math.inf if mine else 1.0


def plain_dma(step: Instruction) -> list[Transfer]:
    """What an instruction moves, if not to the other core."""
    return [] if step.transfer is None or step.exchange else [step.transfer]


def call_of(row: Row) -> Call:
    """The row as a call of our op, in canonical form. All numbers are 0: no counter reads them."""
    n = row.n
    batch, tokens, slots, width = n["batch"], n["s_active"], n["s_prior"], n["d_head"]
    new = jnp.zeros((batch, tokens, 1, width), row.dtype)
    window = n["sliding_window"]
    positions = np.arange(slots, slots + tokens)
    seen = np.concatenate(
        [
            np.broadcast_to(np.arange(slots) < slots - tokens, (tokens, slots)),
            positions[None] <= positions[:, None],
        ],
        axis=1,
    )
    if window:
        at = np.concatenate([np.arange(slots), slots - tokens + np.arange(tokens)])
        seen = seen & (at > at[slots:, None] - window)
    said: dict[str, Any] = (
        {"key_value_seq_lengths": jnp.full(batch, slots, jnp.int32)}
        if n["mask_from_positions"]
        else {"mask": jnp.asarray(np.broadcast_to(seen, (batch, 1, *seen.shape)))}
    )
    return prepare(
        op=Op.TKG,
        query=jnp.zeros((batch, tokens, n["q_heads"], width), row.dtype),
        key=cache_of(row),
        new_key=new,
        new_value=new,
        sinks=jnp.zeros(n["q_heads"]) if n["sink"] else None,
        local_window_size=(window - 1, 0) if window and n["mask_from_positions"] else None,
        **said,
    )


def rotating(launch: Launch, row: Row) -> Launch:
    """The launch with the rotary embedding inside the kernel, which the op does not ask it for."""
    first = row.n["s_prior"] - row.n["s_active"]
    positions = first + jnp.arange(row.n["s_active"], dtype=jnp.int32)
    more = {
        "rotary_table": jnp.asarray(rotary_table(ROPE, row.n["d_head"])),
        "query_positions": jnp.tile(positions, (row.n["batch"], 1)),
    }
    kernel = launch.kernel
    assert isinstance(kernel, Named)
    return replace(
        launch,
        kernel=replace(kernel, names=(*kernel.names, *more)),
        arrays=(*launch.arrays, *more.values()),
        plan=replace(launch.plan, features=replace(launch.plan.features, rotary="half")),
    )


def without_lse(launch: Launch) -> Launch:
    """The launch without the log-sum-exp, which the public kernel does not have either."""
    features = replace(launch.plan.features, returns_lse=False)
    return replace(launch, plan=replace(launch.plan, features=features))


def cache_of(row: Row) -> KVLayout:
    """The row's cache, pages in random order."""
    n = row.n
    batch, slots, width = n["batch"], n["s_prior"], n["d_head"]
    dtype = np.dtype(ml_dtypes.float8_e4m3) if n["fp8_kv"] else row.dtype
    scale = jnp.ones((1, 1)) if n["fp8_kv"] else None
    if not n["block_len"]:
        layout = DENSE_LAYOUTS["BKHS" if row.is_transposed else "BKSH"]
        sizes = {"B": batch, "K": 1, "S": slots, "H": width}
        key, value = (
            jnp.zeros([sizes[axis] for axis in axes], dtype)
            for axes in (layout.key_axes, layout.value_axes)
        )
        return layout(key=key, value=value, k_scale=scale, v_scale=scale, dtype=dtype)
    pages = -(-slots // n["block_len"])
    table = np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages)
    pool = jnp.zeros((batch * pages, 1, n["block_len"], width), dtype)
    indices = jnp.asarray(table, jnp.int32)
    return jax_tkg.Paged(
        pool, pool, k_scale=scale, v_scale=scale, dtype=dtype, page_indices=indices
    )


def compare(
    row: Row, exchange: str, unseen_values: str, *, rotates_inside: bool, returns_lse: bool
) -> Comparison | str:
    """Launches a row once and counts; or why it cannot be launched."""
    call, programs = call_of(row), row.n["cores"]
    refused = kernel_limits(call.problem)
    if refused is not None:
        return refused
    launch = make_launch(call.problem, call.operands, programs, exchange, unseen_values)
    if rotates_inside and row.n["fused_rope"]:
        launch = rotating(launch, row)
    elif not returns_lse:
        launch = without_lse(launch)
    run = interpreter.run(
        launch.kernel, *map(np.asarray, launch.arrays), programs=programs, plan=launch.plan
    )
    busiest = {name: max(run.programs, key=partial(total, of)) for name, of in MEASURES.items()}
    ours = {name: total(of, busiest[name]) for name, of in MEASURES.items()}
    sbuf = max((m for m in run.memory if m.region.value == "sbuf"), key=lambda m: m.peak_bytes)
    ours["SBUF"] = sbuf.peak_bytes
    theirs = row.costs()
    names = dict(zip(run.arguments, getattr(launch.kernel, "names", ()), strict=False))
    reasons = {
        name: why(name, busiest[name], names, theirs[name])
        for name in MEASURES
        if ours[name] > theirs[name]
    }
    if "exchanges" in reasons:
        reasons["exchanges"] = f"{launch.plan.sharding} sharding ({launch.plan.reason})"
    if ours["SBUF"] > theirs["SBUF"]:
        reasons["SBUF"] = f"at the peak {'; '.join(sbuf.largest[:2])}"
    share = None
    if row.n["s_prior"] >= LONG:
        times = timing(run)
        bucket = row.cache_bytes() / run.options.target.hbm_gbps
        share = max(times.roofline, bucket) / times.total
        if share < ROOFLINE_GOAL:
            reasons["roofline"] = why_late(times, names)
    return Comparison(row, ours, theirs, share, launch.plan.text, reasons)


def total(of: Measure, program: Iterable[Instruction]) -> float:
    """Sum over the instructions of a core."""
    return sum(map(of, program))


def hbm_names(step: Instruction, names: Mapping[str, str]) -> set[str]:
    """Tensors in HBM that an instruction touches."""
    touched = (access.storage for access in (*step.reads, *step.writes))
    found = {storage.name for storage in touched if not storage.region.is_on_chip}
    return {names.get(name, name) for name in found}


def is_essential(name: str, step: Instruction, names: Mapping[str, str]) -> bool:
    """Whether any kernel has it: products with the cache; bytes of operands and of results."""
    if name == "tensor":
        return step.source.function in ("compute_qk_matmul", "compute_pv_matmul")
    moves = step.transfer is not None and (
        bool(hbm_names(step, names) & OPERANDS) or step.transfer.route.endswith("hbm")
    )
    return name == "bytes" and moves


def why(name: str, program: Iterable[Instruction], names: Mapping[str, str], theirs: float) -> str:
    """By how much a figure is worse, and the largest steps beside essential ones that make as much.

    Where these do not make as much, also what the essential ones come to.
    """
    of, essential = MEASURES[name], 0.0
    parts: dict[str, float] = defaultdict(float)
    for step in program:
        tensors = "/".join(sorted(hbm_names(step, names)))
        what = f"{step.op} of {tensors}" if tensors else step.op
        if is_essential(name, step, names):
            essential += of(step)
        elif of(step):
            parts[f"{what} in {step.source.function}"] += of(step)
    excess = essential + sum(parts.values()) - theirs
    explained, said = 0.0, []
    for what, part in sorted(parts.items(), key=lambda item: -item[1])[:4]:
        if explained < excess:
            said.append(f"{what} {part:.0f}")
            explained += part
    if explained < excess and essential:
        said.append(f"what any kernel has {essential:.0f}")
    return f"{excess:.0f} more: {', '.join(said)}"


def why_late(times: Timing, names: Mapping[str, str]) -> str:
    """Where the modelled time goes: until the cache begins to arrive, while it does, afterwards."""
    first, last = math.inf, 0.0
    for timed in (t for program in times.programs for t in program):
        if timed.queues and hbm_names(timed.step, names) & CACHE_NAMES:
            first = min(first, *(busy.start for busy in timed.queues))
            last = max(last, timed.end)
    split = Counter(times.path_split).most_common(2)
    return (
        f"{first / 1e3:.1f} us to the first byte of the cache, {(last - first) / 1e3:.1f} to the "
        f"last (bandwidth alone {times.roofline / 1e3:.1f}), {(times.total - last) / 1e3:.1f} "
        f"after it; mostly {', '.join(f'{what} {part / 1e3:.1f}' for what, part in split)}"
    )


def geomean(ratios: Iterable[float]) -> float:
    """Geometric mean of what is finite and not 0."""
    usable = [math.log(r) for r in ratios if 0 < r < math.inf]
    return math.exp(statistics.fmean(usable)) if usable else math.nan


def print_table(console: Console, done: list[Comparison]) -> None:
    """Ours by theirs, row by row; below 1 is better."""
    names = [*MEASURES, "SBUF"]
    table = Table(title="our decode kernel / the public one", pad_edge=False)
    table.add_column("row", justify="right")
    table.add_column("problem")
    for name in (*names, "roofline"):
        table.add_column(name, justify="right")
    table.add_column("worse, because", ratio=1)
    for one in done:
        cells = [format_ratio(one, name) for name in names]
        roofline = "" if one.roofline is None else f"{one.roofline:.2f}"
        reasons = "; ".join(f"{name}: {text}" for name, text in one.reasons.items())
        table.add_row(str(one.row.number), str(one.row), *cells, roofline, reasons)
    means = [f"{geomean(one.ratio(name) for one in done):.2f}" for name in names]
    shares = [one.roofline for one in done if one.roofline is not None]
    table.add_row("", "geometric mean", *means, f"{geomean(shares):.2f}", style="bold")
    console.print(table)


def format_ratio(one: Comparison, name: str) -> str:
    """Exchanges as they are, all else as a ratio."""
    if name == "exchanges":
        return f"{one.ours[name]:.0f} / {one.theirs[name]:.0f}"
    return f"{one.ratio(name):.2f}"


def print_goals(console: Console, done: list[Comparison]) -> None:
    """Which goals are met."""
    for name, limit in GOALS.items():
        ratios = [one.ratio(name) for one in done]
        if limit is None:
            worse = [one.row.number for one, ratio in zip(done, ratios, strict=True) if ratio > 1]
            console.print(f"{name}: {len(worse)} of {len(done)} rows worse {spans(worse)}")
        else:
            console.print(f"{name}: geometric mean {geomean(ratios):.3f}, goal {limit}")
    long = {one.row.number: one.roofline for one in done if one.roofline is not None}
    short_of = [number for number, share in long.items() if share < ROOFLINE_GOAL]
    console.print(
        f"roofline: {len(short_of)} of {len(long)} long rows below {ROOFLINE_GOAL} "
        f"{spans(short_of)}"
    )


def spans(numbers: list[int]) -> str:
    """Such as `0-4, 7`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


def write_csv(path: Path, done: list[Comparison]) -> None:
    """All figures, absolute."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [*MEASURES, "SBUF"]
        heads = [f"{name} {whose}" for name in names for whose in ("ours", "theirs")]
        writer.writerow(["row", "problem", *heads, "roofline", "plan", "worse, because"])
        for one in done:
            figures = [figure for name in names for figure in (one.ours[name], one.theirs[name])]
            reasons = "; ".join(f"{name}: {text}" for name, text in one.reasons.items())
            writer.writerow([one.row.number, one.row, *figures, one.roofline, one.plan, reasons])


def chosen_rows(which: str) -> list[Row]:
    """Lines of the public kernel's counters: "first:end", or one number."""
    with PUBLIC.open(newline="") as file:
        rows = [Row.read(i, line) for i, line in enumerate(csv.DictReader(file))]
    first, colon, end = which.partition(":")
    start = int(first or 0)
    return rows[start : int(end or len(rows)) if colon else start + 1]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("--every", type=int, default=1, help="only every so many rows")
    parser.add_argument("--rows", default=":", help="first:end, or one row")
    parser.add_argument("--exchange", default="deferred", help="or 'every tile'")
    parser.add_argument("--unseen-values", default="finite", help="or 'any': NaN too")
    parser.add_argument("--rotate-inside", action="store_true", help="rotary inside the kernel")
    parser.add_argument("--lse", action="store_true", help="return the log-sum-exp too")
    parser.add_argument("--csv", type=Path, help="where to write all figures")
    given = parser.parse_args()
    console, done = Console(width=200), []
    for row in chosen_rows(given.rows)[:: given.every]:
        found = compare(
            row,
            given.exchange,
            given.unseen_values,
            rotates_inside=given.rotate_inside,
            returns_lse=given.lse,
        )
        if isinstance(found, str):
            console.print(f"row {row.number} ({row}) is left out: {found}")
        else:
            done.append(found)
    print_table(console, done)
    print_goals(console, done)
    if given.csv:
        write_csv(given.csv, done)


if __name__ == "__main__":
    main()
