"""Text from tokens as they come, ended by stop strings."""

from collections.abc import Iterable
from typing import Protocol, SupportsIndex, runtime_checkable

from jax_tkg._checks import described


@runtime_checkable
class TokenDecoder(Protocol):
    """Turns token ids into text one by one, as `jax_tkg.models.StreamDecoder`."""

    def push(self, token_id: SupportsIndex, /) -> str:
        """The text that a token completes, possibly none."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


def stop_strings(given: str | Iterable[str]) -> tuple[str, ...]:
    """Strings that end a text, one or several.

    Raises:
        TypeError: for anything else.
        ValueError: for an empty string, which would end every text at once.
    """
    strings = (given,) if isinstance(given, str) else given
    if isinstance(strings, bytes) or not isinstance(strings, Iterable):
        raise TypeError(f"stop must be strings, () for none; got {described(given)}.")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop must be strings, got {described(string)}.")
        if not string:
            raise ValueError("a stop string must have at least one character, got ''.")
    return strings


class TextStream:
    """The text of one request, never showing part of a stop string.

    It ends before the stop string that is complete at the earliest character, and before the
    longest of several that are complete at the same one; so it does not depend on how tokens divide
    the text. Text that could be the beginning of a stop string is held back until it is not.

    Attributes:
        is_stopped: whether a stop string has come; nothing follows then.
    """

    def __init__(self, decoder: TokenDecoder, stop: Iterable[str] = ()) -> None:
        """Starts an empty text.

        Args:
            decoder: turns ids into text.
            stop: strings that end the text, each with a character at least.
        """
        self._decoder, self._stop = decoder, stop_strings(stop)
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token; may be empty."""
        return self._add(self._decoder.push(token))

    def finish(self) -> str:
        """The rest of the text when no token follows; nothing the second time."""
        text = self._add(self._decoder.flush())
        rest, self._held = self._held, ""
        return text + rest

    def _add(self, piece: str) -> str:
        certain = []
        for character in piece:
            if self.is_stopped:
                break
            self._held += character
            found = [s for s in self._stop if self._held.endswith(s)]
            keep = len(max(found, key=len)) if found else self._possible()
            certain.append(self._held[: len(self._held) - keep])
            self.is_stopped = bool(found)
            self._held = "" if found else self._held[len(self._held) - keep :]
        return "".join(certain)

    def _possible(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0
