"""Two processes with two devices each decode together, and end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.sharding.processes import initialize, to_host
from tests.distributed.worker import MESHES, OPTIONS, PATIENCE, PROMPTS, decoder

ROOT = Path(__file__).parents[2]
LONGEST = 180.0
"""Seconds after which a test gives up: the processes start JAX, which is slow on a busy machine."""


class Finished(NamedTuple):
    """A worker that has ended: its lines of JSON, what it said of errors, its code, and when."""

    lines: list[Any]
    errors: str
    code: int
    time: float


def run(end: signal.Signals) -> Iterator[list[Finished]]:
    """Both workers after their end; no process is left, whatever happens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    with ExitStack() as stack:
        workers = []
        for rank in (0, 1):
            command = [sys.executable, "-m", "tests.distributed.worker", str(rank), str(port)]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            worker = subprocess.Popen([*command, end.name], cwd=ROOT, env=environment, **pipes)
            stack.enter_context(worker)
            stack.callback(worker.kill)
            workers.append(worker)
        found = []
        for worker in workers:
            if worker is workers[1]:  # one that was only stopped
                worker.kill()
            out, errors = worker.communicate(timeout=LONGEST)
            lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            found.append(Finished(lines, errors, worker.returncode, time.time()))
        yield found


@pytest.fixture(scope="module")
def finished() -> Iterator[list[Finished]]:
    yield from run(signal.SIGKILL)


def test_two_processes_give_the_tokens_of_one(finished: list[Finished]) -> None:
    """Rows over the processes and slots over the devices of each, and the other way round."""
    want = jax_tkg.generate(decoder(), PROMPTS, **OPTIONS).tokens.T.tolist()
    assert len(set(map(tuple, want))) > 2
    for worker in finished:
        assert worker.lines[:2] == [{"axes": list(axes), "tokens": want} for axes in MESHES], (
            worker.errors
        )


def test_a_process_without_the_other_ends_with_an_error(finished: list[Finished]) -> None:
    assert finished[1].code == -signal.SIGKILL
    check_survivor(finished[0])


@pytest.mark.slow(reason="as above; processes take long to start")
def test_so_it_does_when_the_other_is_silent() -> None:
    for workers in run(signal.SIGSTOP):
        check_survivor(workers[0])


def check_survivor(worker: Finished) -> None:
    """It decoded with the other, did not get to the end without it, and did not wait long."""
    assert len(worker.lines) == 3
    assert worker.code not in (0, -signal.SIGKILL), worker.errors
    assert "heartbeat" in worker.errors or "Connection closed by peer" in worker.errors
    assert worker.time - worker.lines[2]["time"] < 4 * PATIENCE


def test_impatience() -> None:
    with pytest.raises(ValueError, match="at least 1 second; got 0"):
        initialize("localhost:1", num_processes=1, process_id=0, patience=0)


def test_timeouts_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def stand_in(address: str, *, heartbeat_timeout_seconds: int, **others: Any) -> None:
        found.update(address=address, heartbeat=heartbeat_timeout_seconds, **others)

    monkeypatch.setattr(jax.distributed, "initialize", stand_in)
    initialize("here:1", process_id=3, patience=7)
    assert found == {"address": "here:1", "heartbeat": 7, "process_id": 3}
    initialize("here:1", heartbeat_timeout_seconds=50)
    assert found["heartbeat"] == 50


def test_to_host_copies() -> None:
    array = jnp.arange(3)
    host = to_host(array)
    host[0] = 7
    assert isinstance(host, np.ndarray)
    assert array.tolist() == [0, 1, 2]
    assert to_host([1, 2]).tolist() == [1, 2]
