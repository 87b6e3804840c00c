"""Runs the README's examples, in their order, as one program."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL
)


def run(blocks: list[str]) -> None:
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 5


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    run([b for b in BLOCKS if "tokenizer" not in b])
    printed = capsys.readouterr().out
    assert "(2, 1, 8, 64)" in printed
    assert "on cpu: xla" in printed


@pytest.mark.example
@pytest.mark.model
def test_model_example_writes_text(capsys: pytest.CaptureFixture[str]) -> None:
    run(["import jax_tkg\n", *[b for b in BLOCKS if "tokenizer" in b]])
    assert "Paris" in capsys.readouterr().out
