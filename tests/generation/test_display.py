"""What a person sees while text is generated."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import jax_tkg.generation
from jax_tkg.generation import Speed, display, show

WORDS = [
    "Once",
    " upon",
    " a",
    " [bold]time[/bold]",
    ",\n",
    "",
    "there",
    " was ",
    "1.\n\n",
    "The end",
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds half a second gone."""
    ticks = itertools.count()
    monkeypatch.setattr(display.time, "perf_counter", lambda: next(ticks) / 2)


def stream_of(count: int) -> list[np.ndarray]:
    return [np.array([i], np.int32) for i in range(count)]


class Terminal:
    """Enough of a terminal to read what stands on it: text, newlines, cursor up, erase line."""

    def __init__(self, width: int) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=width, height=20)

    def screen(self) -> list[str]:
        lines, row = [""], 0
        text = self.file.getvalue()
        while text:
            if text.startswith("\x1b["):
                end = next(i for i, c in enumerate(text) if i > 1 and c.isalpha())
                count, kind, text = text[2:end], text[end], text[end + 1 :]
                if kind == "A":
                    row -= int(count)
                elif kind == "K":
                    lines[row] = ""
                continue
            char, text = text[0], text[1:]
            if char == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif char != "\r":
                lines[row] += char
        return [line.rstrip() for line in lines]


@pytest.mark.usefixtures("clock")
def test_a_pipe_gets_the_text_as_it_is_and_at_once() -> None:
    received = io.BytesIO()
    pipe = io.TextIOWrapper(received, encoding="utf-8", newline="\n")

    def look_up(token: int) -> str:
        assert received.getvalue().decode() == "A tale: " + "".join(WORDS[:token])
        return WORDS[token]

    console = Console(file=pipe, width=10)
    ids, speed = show(stream_of(len(WORDS)), look_up, before="A tale: ", console=console)
    assert ids == list(range(len(WORDS)))
    pipe.flush()
    text, _, last = received.getvalue().decode().rpartition("\n[")
    assert text == "A tale: " + "".join(WORDS)
    assert last == f"{speed}]\n" == "10 tokens, 2.0 tokens/s, first after 0.50 s]\n"


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("width", [12, 60])
def test_a_terminal_shows_the_text_and_the_speed_below(width: int) -> None:
    terminal = Terminal(width)

    def look_up(token: int) -> str:
        assert squeezed(*terminal.screen()).startswith(squeezed(before, *WORDS[:token]))
        return WORDS[token]

    before = "1. "
    _, speed = show(stream_of(len(WORDS)), look_up, before=before, console=terminal.console)
    shown = [line for line in terminal.screen() if line]
    assert squeezed(*shown) == squeezed(before, *WORDS, str(speed))
    assert max(map(len, shown)) <= width
    if width == 60:
        assert shown[0] == "1. Once upon a [bold]time[/bold],"
        assert shown[1] == "there was 1."
        assert shown[-1] == str(speed)


def squeezed(*lines: str) -> str:
    """Without white space: where a terminal breaks lines is its own affair."""
    return "".join("".join(lines).split())


@pytest.mark.usefixtures("clock")
def test_no_tokens_no_speed() -> None:
    ids, speed = show([], str, console=Console(file=io.StringIO()))
    assert (ids, speed.tokens, speed.tokens_per_second) == ([], 0, 0.0)


def test_several_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one row, got tokens of shape \(2,\)"):
        show([np.zeros(2, np.int32)], str, console=Console(file=io.StringIO()))


def test_speed() -> None:
    assert Speed(tokens=11, first_seconds=2.0, seconds=7.0).tokens_per_second == 2.0
    assert Speed(tokens=1, first_seconds=2.0, seconds=2.0).tokens_per_second == 0.0


def test_rich_is_imported_for_show_alone() -> None:
    code = (
        "import sys, jax_tkg, jax_tkg.generation\n"
        "assert not {'rich', 'flax'} & sys.modules.keys()\n"
        "jax_tkg.generation.show; assert 'rich' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'shown'"):
        _ = jax_tkg.generation.shown
