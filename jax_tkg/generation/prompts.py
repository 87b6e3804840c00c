"""Prompts as rectangles: padding, checks, and sizes that do not change with every prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jax_tkg._typing import Array

Prompts = Sequence[Sequence[int]] | np.ndarray | Array
PromptLengths = Sequence[int] | np.ndarray | Array | None

LAST_ID = 2**31 - 1
"""The largest id that the int32 arrays of tokens can hold."""

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


def pad_prompts(prompts: Prompts, lengths: PromptLengths) -> PaddedPrompts:
    """Checks prompts and pads them on the right.

    Args:
        prompts: a list of lists of token ids, or a padded integer array `[B, P]`.
        lengths: int `[B]`, real tokens of each row of an array; by default all P. Not for lists.

    Raises:
        TypeError: if the ids are not integers.
        ValueError: for no prompt, an empty one, a negative id, or lengths that do not fit.
    """
    if isinstance(prompts, np.ndarray | jax.Array):
        return _from_array(np.asarray(prompts), lengths)
    if lengths is not None:
        raise ValueError(
            "prompt_lengths is for prompts given as one padded array; lists have their own lengths."
        )
    if any(isinstance(row, int | np.integer | str) for row in prompts):
        raise TypeError(
            "prompts must be a list of lists of token ids, one list for each row; for one prompt "
            "give [[1, 2, 3]], for text encode it first."
        )
    rows = [np.asarray(row) for row in prompts]
    counts = np.array([len(row) for row in rows], np.int32)
    _check_lengths(counts, int(counts.max(initial=0)))
    tokens = np.zeros((len(rows), counts.max()), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = _ids(row)
    return PaddedPrompts(tokens, counts)


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
    counts = np.broadcast_to(counts, (batch,)).astype(np.int32)
    _check_lengths(counts, width)
    real = np.arange(width) < counts[:, None]
    return PaddedPrompts(_ids(np.where(real, tokens, np.zeros((), tokens.dtype))), counts)


def _check_lengths(lengths: np.ndarray, width: int) -> None:
    if not lengths.size:
        raise ValueError("prompts is empty: give at least one prompt.")
    for row, length in enumerate(lengths.tolist()):
        if not 1 <= length <= width:
            raise ValueError(
                f"prompt {row} has length {length}: it needs at least one token to continue from "
                f"(a BOS token will do) and at most the {width} given."
            )


def _ids(row: np.ndarray) -> np.ndarray:
    if row.ndim > 2 or not np.issubdtype(row.dtype, np.integer):
        raise TypeError(f"token ids must be integers, got {row.dtype} of shape {row.shape}.")
    for extreme in (row.min(), row.max()) if row.size else ():
        if not 0 <= extreme <= LAST_ID:
            raise ValueError(f"token ids must be from 0 to 2^31 - 1, got {int(extreme)}.")
    return row.astype(np.int32)


def bucket(size: int) -> int:
    """Rounds a cache capacity up, so that few different ones are compiled.

    Buckets are `SMALLEST_CAPACITY` and, above it, four to each doubling (320, 384, 448, 512, 640,
    ...): less than a quarter too large.
    """
    if size <= SMALLEST_CAPACITY:
        return SMALLEST_CAPACITY
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step
