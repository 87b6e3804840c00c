"""examples/swap_tunix.py runs as a user runs it. Needs the 93 MB package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tunix", reason="needs google-tunix: make test-clients installs it")

ROOT = Path(__file__).parents[2]


@pytest.mark.example
@pytest.mark.model
def test_the_example_writes_the_same_text() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "swap_tunix.py", "--tokens", "3"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUMPY_DTYPE_PROMOTION": "standard"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "30 layers swapped" in done.stdout
    assert done.stdout.count("The capital of France is' Paris.") == 2
    assert done.stdout.endswith("the same text three times\n")
