"""What a user may give by mistake in place of a number, and what an entry point must say of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

NAN = float("nan")
NO_INTS: tuple[Any, ...] = (None, "4", b"4", 1.5, 4.0, NAN, True, [4], (), {}, object(), int)
NO_COUNTS = (*NO_INTS, -1, np.int64(-1), np.True_, np.float32(2), np.arange(2))
NO_SIZES = (*NO_COUNTS, 0)
NO_NUMBERS: tuple[Any, ...] = (None, "0.5", NAN, -1.0, True, [0.5], 1j, object(), np.arange(2.0))
NO_IDS: tuple[Any, ...] = (
    *(3, None, "text", b"text", 1.5, True, object()),
    *([None], ["4"], [1.5], [NAN], [True], [[4]], [-1], [2**31], [2**80], np.ones(2)),
)
"""Neither are these a collection of token ids."""


def cases(kinds: dict[str, tuple[Any, ...]], optional: tuple[str, ...] = ()) -> list[Any]:
    """A pytest parameter for each setting and each of its odd values; None is right in some."""
    return [
        pytest.param(name, value, id=f"{name}-{type(value).__name__}-{str(value)[:12]}")
        for name, values in kinds.items()
        for value in values
        if value is not None or name not in optional
    ]


def assert_refused(name: str, call: Callable[[], Any]) -> None:
    """One clear error, of the library and not from within: it names the setting and its value."""
    with pytest.raises((TypeError, ValueError)) as found:
        call()
    message = str(found.value)
    assert name in message
    assert any(word in message for word in ("got", "but", "give", "need")), message
    assert found.value.__cause__ is None
    raised_in = found.traceback[-1].path
    assert "jax_tkg" in str(raised_in), f"raised in {raised_in}: {message}"
