"""Text for humans: printed as it comes, with the speed below it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text


@dataclass(frozen=True)
class Speed:
    """How fast tokens came.

    Attributes:
        tokens: how many.
        first_seconds: until the first: the prompt, and compilation if nothing was compiled yet.
        seconds: until the last.
    """

    tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; 0 while there are none."""
        decoding = self.seconds - self.first_seconds
        return (self.tokens - 1) / decoding if self.tokens > 1 and decoding > 0 else 0.0

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s, "
            f"first after {self.first_seconds:.2f} s"
        )


def show(
    tokens: Iterable[np.ndarray],
    decode: Callable[[int], str],
    *,
    before: str = "",
    console: Console | None = None,
) -> tuple[list[int], Speed]:
    """Prints a text while it is generated.

    On a terminal the speed is kept on a line below the text; anywhere else (a pipe, a file) the
    text is written as it is and the speed on a line of its own at the end.

    Args:
        tokens: from `jax_tkg.stream` with one prompt: int `[1]` each.
        decode: the text that a token adds, possibly empty, for example
            `Tokenizer.stream().push`.
        before: text to print first, such as the prompt.
        console: where to print; by default standard output.

    Returns:
        The token ids, and how fast they came.

    Raises:
        ValueError: if the tokens are those of several rows.
    """
    console = Console(highlight=False) if console is None else console
    ids: list[int] = []
    begin, first, now = time.perf_counter(), 0.0, 0.0
    with _Page(console) as page:
        page.add(before)
        for token in tokens:
            if token.shape != (1,):
                raise ValueError(f"show prints one row, got tokens of shape {token.shape}.")
            now = time.perf_counter() - begin
            first = first or now
            ids.append(int(token[0]))
            page.add(decode(ids[-1]), Speed(len(ids), first, now))
    return ids, Speed(len(ids), first, now)


class _Page:
    """Growing text with a status line below it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._open_text = ""
        self._speed: Speed | None = None

    def __enter__(self) -> "_Page":
        if self._live is not None:
            self._live.start()
        return self

    def add(self, piece: str, speed: Speed | None = None) -> None:
        self._speed = speed
        if self._live is None:
            self._console.file.write(piece)
            self._console.file.flush()
            return
        # Only the last line can still grow: those above it leave the redrawn region.
        lines = Text(self._open_text + piece).wrap(self._console, self._console.width)
        for line in lines[:-1]:
            self._console.print(line)
        self._open_text = lines[-1].plain if lines else ""
        self._draw()

    def _draw(self) -> None:
        assert self._live is not None
        status = Text("" if self._speed is None else str(self._speed), style="dim")
        self._live.update(Group(Text(self._open_text), status), refresh=True)

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._speed is not None:
            self._console.file.write(f"\n[{self._speed}]\n")
