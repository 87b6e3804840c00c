"""Runs the examples of docs/generation.md, in their order, as one program."""

import re
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.usefixtures("compile_quickly", "no_shape_checks")
def test_examples() -> None:
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    scope: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "generation.md", "exec"), scope)
    result, plain = scope["result"], scope["plain"]
    assert result.tokens.tolist() == plain.tokens.tolist()
