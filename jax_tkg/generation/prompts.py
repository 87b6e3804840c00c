"""Prompts as rectangles: padding, checks, and sizes that do not change with every prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jax_tkg._checks import check_id_range, described
from jax_tkg._typing import Array

Prompts = Sequence[Sequence[int]] | np.ndarray | Array
PromptLengths = Sequence[int] | np.ndarray | Array | None

SMALLEST_CAPACITY = 256
"""Caches are never made smaller: short chats then share one compiled program."""


@dataclass(frozen=True, eq=False)
class PaddedPrompts:
    """Prompts of a batch on the host.

    Attributes:
        tokens: int32 `[B, P]`; row b is real up to `lengths[b]`.
        lengths: int32 `[B]`, at least 1.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max())

    def chunks(self, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pieces `(tokens [B, size], counts [B])` that cover every prompt from its start."""
        batch = self.tokens.shape[0]
        pieces = []
        for begin in range(0, self.longest, size):
            part = self.tokens[:, begin : begin + size]
            block = np.zeros((batch, size), np.int32)
            block[:, : part.shape[1]] = part
            pieces.append((block, np.clip(self.lengths - begin, 0, size).astype(np.int32)))
        return pieces


def pad_prompts(
    prompts: Prompts, lengths: PromptLengths, vocab_size: int | None = None
) -> PaddedPrompts:
    """Checks prompts and pads them on the right.

    Args:
        prompts: a list of lists of token ids, or a padded integer array `[B, P]`.
        lengths: int `[B]`, real tokens of each row of an array; by default all P. Not for lists.
        vocab_size: how many ids the model knows; None if that is not known.

    Raises:
        TypeError: if the ids are not integers.
        ValueError: for no prompt, an empty one, an id that is negative or not in the vocabulary, or
            lengths that do not fit.
    """
    if isinstance(prompts, np.ndarray | jax.Array):
        padded = _from_array(np.asarray(prompts), lengths)
    elif lengths is not None:
        raise ValueError(
            "prompt_lengths is for prompts given as one padded array; lists have their own lengths."
        )
    else:
        padded = _from_rows(prompts)
    check_ids(padded.tokens, padded.lengths, vocab_size)
    return PaddedPrompts(padded.tokens.astype(np.int32), padded.lengths)


def check_ids(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int | None) -> None:
    """Raises a ValueError for an id in the real part of a row that is none, or not the model's."""
    for i, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        if length:
            real = row[:length]
            check_id_range(f"prompt {i}", int(real.min()), int(real.max()), vocab_size)


def check_room(longest: int, max_new_tokens: int, capacity: int, hint: str = "") -> None:
    """Raises a ValueError if a generation does not fit into caches of a capacity.

    The last token is never appended, nor are those of a call that runs past the end.
    """
    needed = longest + max_new_tokens - 1
    if capacity < needed:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}: that "
            f"needs a capacity of {needed}, got {capacity}.{hint}"
        )


def _from_rows(prompts: Sequence[Sequence[int]]) -> PaddedPrompts:
    numbers = int | float | np.number | str | bytes
    if not isinstance(prompts, Sequence) or any(isinstance(row, numbers) for row in prompts):
        raise TypeError(
            "prompts must be a list of lists of token ids, one list for each row; for one prompt "
            "give [[1, 2, 3]], for text encode it first. Got "
            f"{described(prompts)}."
        )
    rows = [_row(i, row) for i, row in enumerate(prompts)]
    counts = np.array([len(row) for row in rows], np.int64)
    width = int(counts.max(initial=0))
    _check_lengths(counts, width)
    tokens = np.zeros((len(rows), width), np.int64)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return PaddedPrompts(tokens, counts.astype(np.int32))


def _row(index: int, row: Sequence[int]) -> np.ndarray:
    try:
        ids = np.asarray(row)
    except ValueError:  # lists within it
        ids = np.empty((), object)
    if ids.ndim != 1:
        raise TypeError(f"prompt {index} must be a list of token ids, got {described(row)}.")
    return _integers(f"prompt {index}", ids) if ids.size else ids


def _from_array(tokens: np.ndarray, lengths: PromptLengths) -> PaddedPrompts:
    if tokens.ndim != 2:
        raise ValueError(f"prompts as an array must be [B, P], got shape {tokens.shape}.")
    batch, width = tokens.shape
    counts = np.asarray(width if lengths is None else lengths)
    if not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"prompt_lengths must be integers, got {counts.dtype}.")
    if lengths is not None and counts.shape != (batch,):
        raise ValueError(
            f"prompt_lengths must have one length for each of the {batch} rows; "
            f"got shape {counts.shape}."
        )
    counts = np.broadcast_to(counts, (batch,))
    _check_lengths(counts, width)
    real = np.arange(width) < counts[:, None]
    ids = np.where(real, _integers("prompts", tokens), np.zeros((), tokens.dtype))
    return PaddedPrompts(ids, counts.astype(np.int32))


def _check_lengths(lengths: np.ndarray, width: int) -> None:
    if not lengths.size:
        raise ValueError("prompts is empty: give at least one prompt.")
    for row, length in enumerate(lengths.tolist()):
        if not 1 <= length <= width:
            raise ValueError(
                f"prompt {row} has length {length}: it needs at least one token to continue from "
                f"(a BOS token will do) and at most the {width} given."
            )


def _integers(name: str, ids: np.ndarray) -> np.ndarray:
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name}: token ids must be integers, got {ids.dtype}.")
    return ids


def bucket(size: int) -> int:
    """Rounds a cache capacity up, so that few different ones are compiled.

    Buckets are `SMALLEST_CAPACITY` and, above it, four to each doubling (320, 384, 448, 512, 640,
    ...): less than a quarter too large.
    """
    if size <= SMALLEST_CAPACITY:
        return SMALLEST_CAPACITY
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step
