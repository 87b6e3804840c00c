"""examples/swap_llama.py runs as a user runs it. Needs the 93 MB package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients import hf_models  # noqa: F401  skips without the client

ROOT = Path(__file__).parents[2]


@pytest.mark.example
@pytest.mark.model
def test_the_example_writes_the_same_text() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "swap_llama.py", "--max-new-tokens", "3"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "30 layers swapped, hf_llama of transformers" in done.stdout
    assert done.stdout.count("The capital of France is|' Paris.") == 3
    assert done.stdout.endswith("the same text\n")
    assert "NOT" not in done.stdout
