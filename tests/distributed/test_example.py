"""The example for several processes, started as its documentation says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples" / "multi_process.py")]
    fixed = ("--cpu-devices", "2", "--small", "--new-tokens", "3")
    return subprocess.Popen(
        [*command, *fixed, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow(reason="processes take long to start; the same loop is tested beside it")
def test_as_many_processes_as_one_likes() -> None:
    rows = []
    for ranks, more in ((1, []), (2, []), (2, ["--swap"])):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        given = ("--coordinator", address, "--processes", ranks, *more)
        workers = [start(*given, "--rank", rank) for rank in range(ranks)]
        ends = [worker.communicate(timeout=180) for worker in workers]
        assert [w.returncode for w in workers] == [0] * ranks, ends
        heading, *found = [x for x in ends[0][0].splitlines() if not x.startswith("[Gloo]")]
        assert heading.startswith(f"{ranks} processes, {2 * ranks} devices; batch over")
        rows += found
    assert len(rows) == 1 + 2 + 2
    assert len(set(rows)) == 1
