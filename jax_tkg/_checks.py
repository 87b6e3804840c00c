"""Settings that users give, checked where they come in: what was given, and what is needed."""

import math
import numbers
import operator
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

LAST_ID = 2**31 - 1
"""The largest id that the int32 arrays of tokens can hold."""


def whole_number(
    name: str, given: Any, *, least: int = 0, most: int | None = None, hint: str = ""
) -> int:
    """The setting as an int.

    Args:
        name: of the setting, for the error.
        given: what the user gave.
        least: the smallest value that it may have.
        most: the largest one; None for no limit.
        hint: what to do instead, a sentence at the end of the error.

    Raises:
        TypeError: for anything else than an integer, such as None, a bool, a float or a string.
        ValueError: for one that is out of range.
    """
    hint = f" {hint}" if hint else ""
    if isinstance(given, bool | np.bool_) or not hasattr(given, "__index__"):
        raise TypeError(f"{name} must be an int, got {described(given)}.{hint}")
    try:
        number = operator.index(given)
    except TypeError:  # an array that is no single integer, or is being traced
        raise TypeError(f"{name} must be an int, got {described(given)}.{hint}") from None
    if number < least:
        bound = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name} {bound}, got {number}.{hint}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}.{hint}")
    return number


def real_number(name: str, given: Any) -> float:
    """The setting as a float; of its range only that it is not NaN is looked at.

    Raises:
        TypeError: for anything else than a real number, such as None, a bool or a string.
        ValueError: for NaN.
    """
    if isinstance(given, bool | np.bool_) or not isinstance(given, numbers.Real):
        raise TypeError(f"{name} must be a number, got {described(given)}.")
    if math.isnan(given):
        raise ValueError(f"{name} must be a number, got {given}.")
    return float(given)


def boolean(name: str, given: Any) -> bool:
    """The setting as a bool.

    Raises:
        TypeError: for anything else, such as a string that says no.
    """
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {described(given)}.")
    return bool(given)


def token_ids(name: str, given: Any, vocab_size: int | None = None) -> tuple[int, ...]:
    """A collection of token ids as a tuple of ints.

    Args:
        name: of the setting, for the error.
        given: what the user gave.
        vocab_size: how many ids the model knows; None if that is not known.

    Raises:
        TypeError: for anything else than a collection of integers.
        ValueError: for an id that is negative, or not in the vocabulary.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(
            f"{name} must be a collection of token ids, such as (2,); got {described(given)}."
            + (" Encode the text first." if isinstance(given, str | bytes) else "")
        )
    what = f"a token id of {name}"
    ids = tuple(whole_number(what, i, least=-sys.maxsize) for i in given)
    if ids:
        check_id_range(name, min(ids), max(ids), vocab_size)
    return ids


def check_id_range(name: str, smallest: int, largest: int, vocab_size: int | None) -> None:
    """Whether ids are ids, and of this vocabulary.

    A model has no row in its embedding for another id; looked up, it would be taken for the nearest
    one, and the text would be wrong without a word.

    Raises:
        ValueError: if not.
    """
    for given in (smallest, largest):
        if not 0 <= given <= LAST_ID:
            raise ValueError(f"{name} must be token ids from 0 to 2^31 - 1; got {given}.")
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{name} has token id {largest}, but the model's vocabulary has {vocab_size} ids, 0 to "
            f"{vocab_size - 1}: encode with the tokenizer of this model."
        )


def described(given: Any) -> str:
    """A number or a short string as it is written, and its type; of all else the type alone."""
    kind = type(given).__name__
    if given is None:
        return "None"
    is_short = (
        isinstance(given, str | bytes | numbers.Number | np.generic) and len(repr(given)) < 40
    )
    return f"{given!r} ({kind})" if is_short else kind
