"""The examples run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_custom_loop() -> None:
    done = run("custom_loop.py")
    assert done.returncode == 0, done.stderr
    assert "tick tock, tick tock, ti|ck tock, tick tock, " in done.stdout
    assert "as expected" in done.stdout
    assert "NOT" not in done.stdout


@pytest.mark.example
@pytest.mark.model
def test_generate_text_reproduces_the_known_ids() -> None:
    done = run("generate_text.py", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris.\n\nThe answer is: 2018-01-22 " in done.stdout
    assert "the same as the known ids" in done.stdout
    assert "> Explain in two sentences why the sky is blue.\n\nThe sky is" in done.stdout
    assert "tokens/s" in done.stdout
    assert "on cpu: xla" in done.stdout


def load(script: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / "examples" / script)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize(("last_id", "status"), [(216, 0), (217, 1)])
def test_generate_text_fails_on_other_ids(
    monkeypatch: pytest.MonkeyPatch, last_id: int, status: int
) -> None:
    example = load("generate_text.py")

    class Writer(example.Writer):
        def __init__(self, console: Console, dtype: str) -> None:
            self.console, self.dtype = console, dtype

        def write(self, *_: Any) -> list[int]:
            return [*example.GREEDY_IDS[:-1], last_id]

        def explain(self) -> str:
            return ""

    monkeypatch.setattr(example, "Writer", Writer)
    monkeypatch.setattr(example, "chat", lambda *_: None)
    assert example.main([]) == status
