"""A picture of the modelled times of a run; needs matplotlib, which is imported when drawing."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.report.costs import QUEUES, Lane
from jax_tkg.nki.interpreter.report.simulation import GPSIMD_DMA, Timed
from jax_tkg.nki.interpreter.report.timing import Timing, timing

Axes = Any  # matplotlib's, which is not there to be named before it is imported
Figure = Any
QUEUES_ROW = "DMA queues"
GPSIMD_DMA_ROW = "GpSimd DMA"
ROWS = [
    Lane.tensor.value, Lane.vector.value, Lane.scalar.value, Lane.gpsimd.value, GPSIMD_DMA_ROW,
    Lane.sync.value, Lane.dma_in.value, Lane.dma_out.value, QUEUES_ROW,
]  # fmt: skip
HEIGHT = 0.8
NUM_COLOURS = 9  # operations with a colour of their own; the others share grey
Row = tuple[int, str]  # core and name


def draw_timeline(run: Run, path: str | Path) -> Path:
    """Draws the modelled times of a run: a lane for each engine of each core, arrows for sendrecv.

    Args:
        run: a finished run.
        path: of the picture; its ending, such as .png or .svg, says which kind.

    Returns:
        The path.

    Raises:
        ImportError: without matplotlib; `pip install jax_tkg[docs]` brings it.
    """
    import matplotlib as mpl

    file = Path(path)
    with mpl.rc_context({"svg.hashsalt": "jax_tkg"}):  # the same run gives the same file
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        timeline_figure(run).savefig(file, dpi=150, metadata=metadata)
    return file


def timeline_figure(run: Run) -> Figure:
    """The picture of `draw_timeline` as a matplotlib figure with one pair of axes."""
    from matplotlib.figure import Figure

    times = timing(run)
    bars = _bars(times)
    rows = [(c, name) for c in range(len(times.programs)) for name in ROWS if (c, name) in bars]
    places = {row: -i - 0.6 * row[0] for i, row in enumerate(rows)}
    figure = Figure(figsize=(12, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    legend = _draw_bars(axes, times, bars, places)
    _draw_arrows(axes, times, places)
    axes.set_yticks(
        [y + HEIGHT / 2 for y in places.values()],
        [f"core {core}  {name}" for core, name in rows],
    )
    axes.set_ylim(min(places.values(), default=0) - 0.3, 1.1)
    axes.set_xlim(0, max(times.total / 1000, 1e-3))
    axes.set_xlabel("modelled time, µs (a model, not a measurement)")
    axes.set_title(_title(run, times), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if legend:
        figure.legend(
            handles=legend, loc="outside lower center", ncols=5, fontsize=8, frameon=False
        )
    return figure


def _title(run: Run, times: Timing) -> str:
    return (
        f"{run.name} on {run.options.target.name}, {len(times.programs)} program(s): "
        f"{times.total / 1000:.1f} µs, {times.roofline_share:.0%} of the HBM roofline; "
        "black edges: critical path"
    )


def _label(timed: Timed) -> str:
    transfer = timed.step.transfer
    if transfer is None or timed.step.exchange:
        return timed.step.op
    return f"{timed.step.op} {transfer.route}"


Bar = tuple[float, float, float, float]  # start and length in microseconds, bottom, height


def _bars(times: Timing) -> dict[Row, list[tuple[Timed, Bar]]]:
    """What is to be drawn in each row."""
    bars: dict[Row, list[tuple[Timed, Bar]]] = defaultdict(list)

    def add(timed: Timed, row: str, start: float, end: float, low: float, height: float) -> None:
        bar = (start / 1000, (end - start) / 1000, low, height)
        bars[timed.step.core, row].append((timed, bar))

    for timed in (t for program in times.programs for t in program):
        add(timed, timed.cost.lane.value, timed.start, timed.released, 0, HEIGHT)
        for busy in timed.queues:
            if busy.queue == GPSIMD_DMA:
                add(timed, GPSIMD_DMA_ROW, busy.start, busy.end, 0, HEIGHT)
            else:
                low, height = HEIGHT * busy.queue / QUEUES, HEIGHT / QUEUES
                add(timed, QUEUES_ROW, busy.start, busy.end, low, height)
    return dict(bars)


def _colours(bars: dict[Row, list[tuple[Timed, Bar]]]) -> dict[str, str]:
    """A colour for each kind of instruction, those that take longest first."""
    spent: dict[str, float] = defaultdict(float)
    for timed, (_, length, _, height) in (bar for row in bars.values() for bar in row):
        spent[_label(timed)] += length * height
    ranked = sorted(spent, key=lambda label: (-spent[label], label))
    return {label: f"C{i}" if i < NUM_COLOURS else "0.6" for i, label in enumerate(ranked)}


def _draw_bars(
    axes: Axes, times: Timing, bars: dict[Row, list[tuple[Timed, Bar]]], places: dict[Row, float]
) -> list[Any]:
    """Draws one collection for each colour and edge; returns the entries of the legend."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    colours = _colours(bars)
    critical = {part.timed.step for part in times.critical_path}
    groups: dict[tuple[str, bool], list[Rectangle]] = defaultdict(list)
    for row, drawn in bars.items():
        for timed, (start, length, low, height) in drawn:
            key = colours[_label(timed)], timed.step in critical and row[1] != QUEUES_ROW
            groups[key].append(Rectangle((start, places[row] + low), length, height))
    for (colour, is_critical), patches in groups.items():
        edge, width = ("black", 0.9) if is_critical else ("white", 0.15)
        axes.add_collection(
            PatchCollection(patches, facecolor=colour, edgecolor=edge, linewidth=width)
        )
    named = [(label, colour) for label, colour in colours.items() if colour != "0.6"]
    others = [("others", "0.6")] if len(named) < len(colours) else []
    return [Patch(facecolor=colour, label=label) for label, colour in named + others]


def _draw_arrows(axes: Axes, times: Timing, places: dict[Row, float]) -> None:
    """From the sender's trigger to the end of the receiver's transfer."""
    timed_of = {timed.step: timed for program in times.programs for timed in program}
    for sender in timed_of.values():
        if sender.step.peer is None or not sender.queues:
            continue
        receiver = timed_of[sender.step.peer]
        inside = receiver.queues[0].queue == GPSIMD_DMA
        to = places[receiver.step.core, GPSIMD_DMA_ROW if inside else QUEUES_ROW]
        start = places[sender.step.core, sender.cost.lane.value]
        axes.annotate(
            "",
            (receiver.end / 1000, to + HEIGHT / 2),
            (sender.start / 1000, start + HEIGHT / 2),
            arrowprops={"arrowstyle": "-|>", "color": "crimson", "linewidth": 1.0},
            zorder=5,
        )
