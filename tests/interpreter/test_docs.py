"""The documentation lists every instruction."""

from pathlib import Path

import pytest

from jax_tkg.nki.interpreter import isa

PAGE = (Path(__file__).parents[2] / "docs" / "interpreter.md").read_text()
INSTRUCTIONS = [
    name
    for name in isa.__all__
    if hasattr(getattr(isa, name), "__wrapped__") or name.startswith("register_")
]


def test_there_are_instructions() -> None:
    assert len(INSTRUCTIONS) >= 50


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction_is_listed(name: str) -> None:
    assert f"`{name}`" in PAGE
