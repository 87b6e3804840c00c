"""The command `python -m jax_tkg.nki.interpreter`."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_tkg.nki.interpreter.__main__ import main

SAMPLES = Path(__file__).parent / "kernels" / "samples.py"

REFUSED = """
import nki.isa as nisa
import nki.language as nl


def too_wide(x, *, keep=None):
    tile = nl.ndarray((128, 1024), nl.bfloat16, buffer=nl.sbuf)
    sums = nl.ndarray((128, 1024), nl.float32, buffer=nl.psum)
    nisa.memset(tile, 0.0)
    nisa.nc_matmul(sums, tile[:, 0:128], tile)
    return x
"""


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    path = tmp_path / "refused.py"
    path.write_text(REFUSED)
    return path


def test_run_prints_counters_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["256x64:bfloat16", "256x96:bfloat16"]
    assert main(["run", f"{SAMPLES}:tiled_matmul", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "tensor" in printed
    assert "us" in printed


def test_run_takes_stored_arrays_and_literals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.arange(32 * 6, dtype=np.float32).reshape(32, 6))
    place = f"{SAMPLES}:transpose_free_axes"
    assert main(["run", place, str(tmp_path / "x.npy"), "rows=2", "columns=3"]) == 0
    assert "vector" in capsys.readouterr().out


def test_run_on_two_programs_writes_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    place = f"{SAMPLES}:sum_of_halves"
    assert main(["run", place, "2x128x64", "--programs", "2", "--trace", str(trace)]) == 0
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_refusal_is_printed_and_fails(refused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"{refused}:too_wide", "128x4"]) == 1
    assert "nc_matmul.moving-free-size" in capsys.readouterr().err


def test_check_reports_what_the_compiler_refuses(
    refused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{refused}:too_wide"]) == 1
    assert "refused.py:6" in capsys.readouterr().out
    assert main(["check", f"{SAMPLES}:tiled_matmul"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.py:kernel"], "no such Python file"),
        (["run", f"{SAMPLES}:nothing"], "has no nothing"),
        (["run", "kernel"], "write FILE:KERNEL"),
        (["run", f"{SAMPLES}:rmsnorm", "12xy"], "write SHAPE:DTYPE"),
        (["run", f"{SAMPLES}:rmsnorm", "12x4:float64"], "no data type"),
    ],
)
def test_mistakes_say_what_to_write(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)
