"""The trace and the picture of a run."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.report import draw_timeline, timing, write_trace
from jax_tkg.nki.interpreter.report.drawing import timeline_figure
from tests.interpreter.hand_built import Program, exchange, hbm, run, storage

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is in the docs extra"
)


def swap(kind: str = "gpsimd_dma") -> interpreter.Run:
    """A load, a computation, a sendrecv, a store, on each of two cores."""
    cores = [Program(0), Program(1)]
    source, swaps = hbm("in"), []
    for p in cores:
        tile, theirs = storage("tile"), storage("theirs", row_bytes=256)
        p.dma(128 * 4096, run=4096, reads=(source,), writes=(tile,))
        p.compute(Engine.vector, 1024, reads=(tile,), writes=(tile,))
        swaps.append(
            p.dma(128 * 256, 256, "sbuf->sbuf", reads=(tile,), writes=(theirs,), op="sendrecv")
        )
        p.dma(128 * 256, 256, "sbuf->hbm", reads=(theirs,), writes=(hbm(f"out{p.core}"),))
    exchange(kind, *swaps)
    return run(*cores)


def trace(of: interpreter.Run, folder: Path) -> list[dict[str, Any]]:
    path = write_trace(of, folder / "trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    assert isinstance(events, list)
    return events


def test_events_have_what_their_phase_needs(tmp_path: Path) -> None:
    needed = {
        "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
        "M": {"name", "pid", "tid", "args"},
        "s": {"name", "cat", "id", "ts", "pid", "tid"},
        "f": {"name", "cat", "id", "ts", "pid", "tid", "bp"},
    }
    events = trace(swap(), tmp_path)
    assert {e["ph"] for e in events} == set(needed)
    for event in events:
        assert needed[event["ph"]] <= set(event)
        assert event["pid"] in (0, 1)
        assert event.get("dur", 0) >= 0
        assert event.get("ts", 0) >= 0


def test_every_slice_lies_on_a_named_thread(tmp_path: Path) -> None:
    events = trace(swap(), tmp_path)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == named
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        "core 0",
        "core 1",
    ]
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 0}
    queues = {f"DMA queue {i}" for i in range(16)}
    assert threads == queues | {
        "Vector",
        "GpSimd",
        "GpSimd DMA",
        "DMA triggers, HBM",
        "DMA triggers, SBUF",
    }


@pytest.mark.parametrize("kind", ["gpsimd_dma", "dma"])
def test_slices_of_a_thread_follow_each_other(kind: str, tmp_path: Path) -> None:
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace(swap(kind), tmp_path):
        if event["ph"] == "X":
            spans = by_thread.setdefault((event["pid"], event["tid"]), [])
            spans.append((event["ts"], event["ts"] + event["dur"]))
    for spans in by_thread.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))


@pytest.mark.parametrize("kind", ["gpsimd_dma", "dma"])
def test_flows_join_slices_of_both_cores(kind: str, tmp_path: Path) -> None:
    events = trace(swap(kind), tmp_path)
    slices = [e for e in events if e["ph"] == "X" and e["name"] == "sendrecv"]

    def is_in_a_slice(flow: dict[str, Any]) -> bool:
        return any(
            (s["pid"], s["tid"]) == (flow["pid"], flow["tid"])
            and s["ts"] <= flow["ts"] <= s["ts"] + s["dur"]
            for s in slices
        )

    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert len(starts) == 2
    assert starts.keys() == ends.keys()
    for number, start in starts.items():
        end = ends[number]
        assert {start["pid"], end["pid"]} == {0, 1}
        assert start["ts"] <= end["ts"]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert is_in_a_slice(start)
        assert is_in_a_slice(end)


def test_trace_times_are_the_model_s(tmp_path: Path) -> None:
    kernel = swap()
    events = [e for e in trace(kernel, tmp_path) if e["ph"] == "X"]
    last = max(e["ts"] + e["dur"] for e in events)
    assert last == pytest.approx(timing(kernel).total / 1000)
    (vector,) = (e for e in events if e["pid"] == 1 and e["cat"] == "Vector")
    assert vector["dur"] == pytest.approx(1024 / 960)
    assert vector["args"]["cycles"] == 1024


def test_one_core_has_no_flows(tmp_path: Path) -> None:
    p = Program()
    p.compute(Engine.vector, 960)
    assert {e["ph"] for e in trace(run(p), tmp_path)} == {"M", "X"}
    assert trace(run(Program()), tmp_path) == []


@needs_matplotlib
def test_picture_has_a_lane_for_all_that_works() -> None:
    figure = timeline_figure(swap())
    (axes,) = figure.axes
    lanes = [
        "Vector",
        "GpSimd",
        "GpSimd DMA",
        "DMA triggers, HBM",
        "DMA triggers, SBUF",
        "DMA queues",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"core {core}  {name}" for core in range(2) for name in lanes
    ]
    assert len([t for t in axes.texts if t.arrow_patch is not None]) == 2
    (legend,) = figure.legends
    assert {t.get_text() for t in legend.get_texts()} == {
        "dma_copy hbm->sbuf",
        "dma_copy sbuf->hbm",
        "tensor_copy",
        "sendrecv",
    }


@needs_matplotlib
def test_picture_of_more_operations_than_colours() -> None:
    p = Program()
    for i in range(12):
        p.compute(Engine.vector, 100 + i, op=f"op{i}")
    (legend,) = timeline_figure(run(p)).legends
    names = [t.get_text() for t in legend.get_texts()]
    assert names == [f"op{i}" for i in range(11, 2, -1)] + ["others"]


@needs_matplotlib
@pytest.mark.parametrize(("ending", "first"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_picture_is_written(ending: str, first: bytes, tmp_path: Path) -> None:
    paths = [draw_timeline(swap("dma"), tmp_path / f"{name}.{ending}") for name in "ab"]
    contents = [path.read_bytes() for path in paths]
    assert contents[0].startswith(first)
    assert contents[0] == contents[1]


@needs_matplotlib
def test_picture_of_nothing(tmp_path: Path) -> None:
    assert draw_timeline(run(Program()), tmp_path / "empty.png").exists()
