"""The example of speculative decoding runs as a user runs it, on the real model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.example
@pytest.mark.model
def test_the_same_letter_in_fewer_steps() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "speculative.py", "--new-tokens=25", "--repeat=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hank you for your order of 12 March. The two oak chairs will leave" in done.stdout
    assert "the speculative text is the same" in done.stdout
    found = re.search(r"([\d.]+) tokens a step, \d+ of \d+ drafts accepted", done.stdout)
    assert found is not None
    assert float(found[1]) > 2
    assert "times as fast" in done.stdout
