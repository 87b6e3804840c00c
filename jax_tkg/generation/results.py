"""What was generated, and how it is put together from blocks of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_tkg.generation.runs import Block, Decoding, Request


@dataclass(frozen=True, eq=False)
class Acceptance:
    """What became of the drafts of a speculative generation; NumPy arrays, int32 `[B]`.

    Attributes:
        steps: steps of the model that gave a row tokens, without the one that read its prompt.
        drafted: drafts that these steps verified.
        accepted: drafts that became tokens of the result.
        undrafted: steps among these that were made while speculation paused (`Adaptive`).
    """

    steps: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    undrafted: np.ndarray

    @property
    def tokens_per_step(self) -> float:
        """Over all rows; 1 without any draft accepted, and 0 without a step."""
        steps = int(self.steps.sum())
        return (steps + int(self.accepted.sum())) / steps if steps else 0.0

    @property
    def rate(self) -> float:
        """Accepted drafts of those verified, over all rows; 0 if there were none."""
        drafted = int(self.drafted.sum())
        return int(self.accepted.sum()) / drafted if drafted else 0.0

    def __str__(self) -> str:
        """One line."""
        undrafted = int(self.undrafted.sum())
        paused = f", {undrafted} of {self.steps.sum()} steps without drafts" if undrafted else ""
        return (
            f"{self.tokens_per_step:.2f} tokens a step, "
            f"{self.accepted.sum()} of {self.drafted.sum()} drafts accepted{paused}"
        )


@dataclass(frozen=True, eq=False)
class Generated:
    """What was generated; NumPy arrays.

    Attributes:
        tokens: int32 `[B, max_new_tokens]`, pads after the token that ended a row.
        lengths: int32 `[B]`, tokens of each row up to and with the one that ended it.
        finished: bool `[B]`, whether a row ended with one of `eos_ids`.
        log_probs: float32 `[B, max_new_tokens]`, with `return_log_probs`: the natural logarithm of
            the probability that the model gives each token (the softmax of its logits, before the
            selector's temperature and filters); 0 for pads.
        acceptance: of drafts, with `speculate`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    log_probs: np.ndarray | None = None
    acceptance: Acceptance | None = None

    def rows(self) -> list[list[int]]:
        """The tokens of each row, without pads and without the token that ended it."""
        ends = self.lengths - self.finished
        return [row[:end].tolist() for row, end in zip(self.tokens, ends, strict=True)]


class Collected:
    """The rows of a request as far as they have come; each ends at its own end."""

    def __init__(self, request: Request) -> None:
        """Nothing yet."""
        batch, size = len(request.prompts.lengths), request.max_new_tokens
        self._eos_ids = request.policy.eos_ids
        self.tokens = np.full((batch, size), request.policy.pad_id, np.int32)
        self.log_probs = np.zeros((batch, size), np.float32) if request.with_log_probs else None
        self.lengths = np.zeros(batch, np.int32)
        self.finished = np.zeros(batch, bool)
        self.steps = np.zeros(batch, np.int32)
        self.drafted = np.zeros(batch, np.int32)
        self.undrafted = np.zeros(batch, np.int32)

    @classmethod
    def fill(cls, request: Request, decoding: Decoding) -> Iterator["Collected"]:
        """The same object after each block, until all rows have ended."""
        collected = cls(request)
        for block in decoding.blocks(request):
            collected.add(block)
            yield collected
            if collected.ended.all():
                return

    @property
    def ended(self) -> np.ndarray:
        """Which rows get nothing more, bool `[B]`."""
        ended: np.ndarray = self.finished | (self.lengths == self.tokens.shape[1])
        return ended

    @property
    def complete(self) -> int:
        """So many tokens of every row are known, pads after its end included."""
        ended = self.ended
        return int(self.lengths.max() if ended.all() else self.lengths[~ended].min())

    def add(self, block: Block) -> None:
        """Adds to each row what comes before its end."""
        for row in np.flatnonzero(~self.ended).tolist():
            begin = int(self.lengths[row])
            count = min(int(block.counts[row]), self.tokens.shape[1] - begin)
            new = block.tokens[row, :count]
            ends = np.flatnonzero(np.isin(new, self._eos_ids))
            if ends.size:
                self.finished[row] = True
                count = int(ends[0]) + 1
            self.tokens[row, begin : begin + count] = new[:count]
            if self.log_probs is not None and block.log_probs is not None:
                self.log_probs[row, begin : begin + count] = block.log_probs[row, :count]
            self.lengths[row] = begin + count
        self.steps += block.steps
        self.drafted += block.drafted
        self.undrafted += block.undrafted

    def result(self, *, speculated: bool) -> Generated:
        """What was generated."""
        acceptance = None
        if speculated:
            # Each row has a token of the prompt's pass, and one of each step without a draft.
            accepted = self.lengths - 1 - self.steps
            acceptance = Acceptance(self.steps, self.drafted, accepted, self.undrafted)
        return Generated(self.tokens, self.lengths, self.finished, self.log_probs, acceptance)
