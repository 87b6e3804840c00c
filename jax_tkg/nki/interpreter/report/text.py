"""A run as text: what it did, and how long the model says it takes."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.report.counters import (
    CoreCounters,
    Counters,
    Traffic,
    counters,
    difference,
)
from jax_tkg.nki.interpreter.report.timing import DMA_QUEUES, LATENCY, Timing, timing

NUM_PATH_KINDS = 8


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need, the first to the left, the others to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def difference_table(before: Counters, after: Counters) -> str:
    """The counters that differ between two runs."""
    changed = difference(before, after)
    rows = [(name, old, new, new - old) for name, (old, new) in changed.items()]
    return table(("counter", before.name, after.name, "change"), rows) if rows else "no difference"


def summary(run: Run) -> str:
    """Counters, memory and modelled times of a run, in tables."""
    counted, timed = counters(run), timing(run)
    parts = [
        f"{run.name} on {run.options.target.name}, {len(run.programs)} program(s)",
        _engines(counted),
        _traffic(counted),
        _runs(counted),
        _memory(run),
        _uninitialized(run),
        _times(timed),
        _path(timed),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _engines(counted: Counters) -> str:
    """One row for each engine of each core; engines are named as in `nki.isa.engine`."""
    rows = [
        (f"core {core.core} {name}", e.instructions, e.elements, round(e.cycles), e.macs)
        for core in counted.cores
        for name, e in core.engines.items()
    ]
    return table(("engine", "instructions", "elements", "cycles", "MACs"), rows)


def _traffic(counted: Counters) -> str:
    rows = [
        (f"core {core.core} {name}", t.transfers, t.bytes, t.descriptors)
        for core in counted.cores
        for name, t in _kinds(core)
    ]
    return table(("transfers", "number", "bytes", "descriptors"), rows) if rows else ""


def _kinds(core: CoreCounters) -> list[tuple[str, Traffic]]:
    sendrecvs = [(f"sendrecv {kind}", t) for kind, t in core.exchanges.items()]
    barriers = [("core_barrier", Traffic(core.barriers))] if core.barriers else []
    return [*core.routes.items(), *sendrecvs, *barriers]


def _runs(counted: Counters) -> str:
    rows = [
        (f"core {core.core} {name}", size, f"{size / sum(core.runs.values()):.0%}")
        for core in counted.cores
        for name, size in core.runs.items()
    ]
    return table(("DMA bytes by contiguous run", "bytes", "share"), rows) if rows else ""


def _memory(run: Run) -> str:
    rows = [
        (
            f"core {use.core} {use.region.value}",
            use.peak_bytes,
            use.capacity_bytes,
            f"{use.peak_bytes / use.capacity_bytes:.0%}",
        )
        for use in run.memory
    ]
    return table(("memory, bytes a partition", "peak", "capacity", "share"), rows) if rows else ""


def _uninitialized(run: Run) -> str:
    rows = [(str(source), what) for source, what in run.uninitialized.items()]
    return table(("reads of what nobody had written", "tensor"), rows) if rows else ""


def _times(timed: Timing) -> str:
    head = (
        f"modelled time {timed.total / 1000:.2f} us (a model, not a measurement); HBM roofline "
        f"{timed.roofline / 1000:.2f} us for {timed.hbm_bytes:,} bytes: {timed.roofline_share:.0%}"
    )
    rows = [(f"core {core} {name}", f"{share:.0%}") for (core, name), share in timed.busy.items()]
    return head + "\n\n" + table(("busy", "share"), sorted(rows)) if rows else head


def _path(timed: Timing) -> str:
    """What the critical path is made of: by engine, and by operation."""
    if not timed.critical_path:
        return ""
    notes = {LATENCY: "semaphores, starts of DMAs", DMA_QUEUES: "moving data"}
    engines = [
        (f"{name} ({notes[name]})" if name in notes else name, time / 1000, _share(time, timed))
        for name, time in sorted(timed.path_split.items(), key=lambda item: -item[1])
    ]
    spent: dict[str, float] = defaultdict(float)
    for part in timed.critical_path:
        spent[f"{part.timed.step.op} at {part.timed.step.source}"] += part.latency + part.work
    slowest = sorted(spent.items(), key=lambda item: -item[1])
    steps = [(name, t / 1000, _share(t, timed)) for name, t in slowest[:NUM_PATH_KINDS]]
    return "\n\n".join(
        table((title, "us", "share"), rows)
        for title, rows in (("critical path", engines), ("its slowest lines", steps))
    )


def _share(time: float, timed: Timing) -> str:
    return f"{time / timed.total:.0%}" if timed.total else "0%"
