"""Text with stop strings, whatever tokens divide it into."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from jax_tkg.serving import TextStream


class Pieces:
    """A decoder whose tokens are pieces of a text."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces, self._rest = pieces, rest

    def push(self, token_id: int, /) -> str:  # type: ignore[override]
        return self._pieces[token_id]

    def flush(self) -> str:
        rest, self._rest = self._rest, ""
        return rest


def shown(pieces: list[str], stop: list[str], rest: str = "") -> tuple[list[str], bool]:
    """What each token adds, and then the end; whether a stop string was found."""
    stream = TextStream(Pieces(pieces, rest), stop)
    texts = []
    for token in range(len(pieces)):
        texts.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*texts, stream.finish()], stream.is_stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "texts", "stopped"),
    [
        (["a", "b"], [], ["a", "b", ""], False),
        (["one", " END", " two"], ["END"], ["one", " ", ""], True),
        (["one E", "N", "D two"], ["END"], ["one ", "", "", ""], True),
        (["one E", "N", "T two"], ["END"], ["one ", "", "ENT two", ""], False),
        (["aaE", "N"], ["END"], ["aa", "", "EN"], False),  # the text ends while in doubt
        (["aab"], ["ab"], ["a", ""], True),
        (["a", "a", "b"], ["aab"], ["", "", "", ""], True),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", "", ""], True),
        (["xabcd"], ["abcd", "bc"], ["xa", ""], True),  # "bc" is complete first
        (["xabc"], ["bc", "abc"], ["x", ""], True),  # of two at once the longer
        (["\n", "\nHuman", ":"], ["\n\n"], ["", "", ""], True),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], texts: list[str], stopped: bool) -> None:
    assert shown(pieces, stop) == (texts, stopped)


def test_what_the_decoder_had_left_is_text_too() -> None:
    assert shown(["a"], ["?!"], rest="?") == (["a", "?"], False)
    assert shown(["a", "?"], ["?!"], rest="!") == (["a", "", ""], True)


def test_nothing_follows_the_end() -> None:
    stream = TextStream(Pieces(["xSTOPy", "z"]), ["STOP"])
    assert [stream.push(0), stream.push(1), stream.finish(), stream.finish()] == ["x", "", "", ""]


def test_strings_that_are_none() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        TextStream(Pieces([]), ["a", ""])
    assert TextStream(Pieces(["x.y"]), ".").push(0) == "x"


def cut(text: str, stop: list[str]) -> str:
    """The text before the stop string that ends first, the longest of these."""
    ends = [(text.index(s) + len(s), -len(s)) for s in stop if s in text]
    return text[: sum(min(ends))] if ends else text


WORDS = st.text("ab", max_size=4)


@hypothesis.given(st.lists(WORDS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4)))
@hypothesis.settings(max_examples=200)
def test_the_same_text_whatever_the_tokens(pieces: list[str], stop: list[str]) -> None:
    texts, stopped = shown(pieces, stop)
    whole = "".join(pieces)
    assert "".join(texts) == cut(whole, stop)
    assert stopped == any(s in whole for s in stop)
