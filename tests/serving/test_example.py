"""The example runs as a user runs it."""

from __future__ import annotations

import pytest

from tests.test_examples import run


@pytest.mark.example
@pytest.mark.model
def test_serve_paged() -> None:
    # With 9 pages the four rows have to give way to each other.
    done = run("serve_paged.py", "--max-new-tokens", "14", "--pages", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert "16 tokens shared" in done.stdout
    assert "cancelled" in done.stdout
    assert "0 running, 0 waiting; 0 of 9 pages used" in done.stdout
    assert "tokens/s" in done.stdout
