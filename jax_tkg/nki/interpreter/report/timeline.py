"""The modelled times of a run as a trace for Perfetto or chrome://tracing.

The file is JSON in the Trace Event Format: complete events (`ph: X`) with `ts` and `dur` in
microseconds; cores are processes; engines, descriptor generators and DMA queues are threads; a
sendrecv is two flows (`ph: s` and `f`), one for each direction.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_tkg.nki.interpreter.launch import Run
from jax_tkg.nki.interpreter.report.costs import QUEUES, Lane
from jax_tkg.nki.interpreter.report.simulation import GPSIMD_DMA, Timed
from jax_tkg.nki.interpreter.report.timing import timing

Event = dict[str, Any]
LANE_THREADS = {lane: 1 + i for i, lane in enumerate(Lane)}
QUEUE_THREADS = {queue: 100 + queue for queue in range(QUEUES + 1)}


def write_trace(run: Run, path: str | Path) -> Path:
    """Writes the modelled times of a run as a trace; open it at https://ui.perfetto.dev.

    Args:
        run: a finished run.
        path: of the file, such as `kernel.json`.

    Returns:
        The path.
    """
    times = timing(run)
    trace = {
        "traceEvents": [event for core in times.programs for event in _events(core)]
        + list(_flows(times.programs)),
        "displayTimeUnit": "ns",
        "otherData": {
            "kernel": run.name,
            "target": run.options.target.name,
            "times": "from a model, not measured",
        },
    }
    file = Path(path)
    file.write_text(json.dumps(trace))
    return file


def _events(program: tuple[Timed, ...]) -> Iterator[Event]:
    """Names and slices of one core."""
    if not program:
        return
    core = program[0].step.core
    names = {LANE_THREADS[lane]: lane.value for lane in {t.cost.lane for t in program}}
    for queue in {busy.queue for t in program for busy in t.queues}:
        names[QUEUE_THREADS[queue]] = "GpSimd DMA" if queue == GPSIMD_DMA else f"DMA queue {queue}"
    yield _metadata(core, 0, "process_name", {"name": f"core {core}"})
    for thread, name in sorted(names.items()):
        yield _metadata(core, thread, "thread_name", {"name": name})
        yield _metadata(core, thread, "thread_sort_index", {"sort_index": thread})
    for timed in program:
        thread = LANE_THREADS[timed.cost.lane]
        yield _slice(timed, thread, timed.start, timed.released)
        for busy in timed.queues:
            yield _slice(timed, QUEUE_THREADS[busy.queue], busy.start, busy.end)


def _metadata(core: int, thread: int, name: str, args: Event) -> Event:
    return {"ph": "M", "pid": core, "tid": thread, "name": name, "args": args}


def _slice(timed: Timed, thread: int, start: float, end: float) -> Event:
    step = timed.step
    args: Event = {"line": str(step.source), "operands": list(step.shapes), "index": step.index}
    if step.transfer is not None:
        args |= vars(step.transfer)
    else:
        args["cycles"] = step.cycles
    return {
        "ph": "X",
        "pid": step.core,
        "tid": thread,
        "ts": start / 1000,
        "dur": (end - start) / 1000,
        "name": step.name or step.op,
        "cat": timed.cost.lane.value,
        "args": args,
    }


def _flows(programs: tuple[tuple[Timed, ...], ...]) -> Iterator[Event]:
    """From the trigger of each sendrecv to the queue that delivers the tile on the other core."""
    timed_of = {timed.step: timed for program in programs for timed in program}
    senders = [t for t in timed_of.values() if t.step.peer is not None and t.queues]
    for number, sender in enumerate(senders):
        assert sender.step.peer is not None
        receiver = timed_of[sender.step.peer]
        arrival = receiver.queues[0]
        same: Event = {"id": number, "name": sender.step.op, "cat": "sendrecv"}
        yield same | {
            "ph": "s",
            "pid": sender.step.core,
            "tid": LANE_THREADS[sender.cost.lane],
            "ts": sender.start / 1000,
        }
        yield same | {
            "ph": "f",
            "bp": "e",
            "pid": receiver.step.core,
            "tid": QUEUE_THREADS[arrival.queue],
            "ts": arrival.start / 1000,
        }
