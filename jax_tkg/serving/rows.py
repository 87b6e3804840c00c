"""Requests in rows, and the arrays of a call made from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_tkg.cache.paged import NO_PAGE
from jax_tkg.sampling import RowSelection
from jax_tkg.serving.config import ServingConfig
from jax_tkg.serving.pool import PagePool, RowPages
from jax_tkg.serving.programs import DecodeRows
from jax_tkg.serving.request import GREEDY, State, Ticket


@dataclass(eq=False)
class Row:
    """A request that has a row of the batch, and pages.

    Attributes:
        slot: which row.
        ticket: the request.
        tokens: all of it so far, the prompt and the new ones.
        pages: where their keys and values are.
        cached: how many of the tokens, the first ones, are there. All while it takes in its prompt;
            all but the newest one when it decodes.
    """

    slot: int
    ticket: Ticket
    tokens: list[int]
    pages: RowPages
    cached: int
    _words: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def enter(cls, slot: int, ticket: Ticket, tokens: list[int], pool: PagePool) -> "Row":
        """A row that has the pages which others share with it, and computes the rest."""
        pages = RowPages(pool, tokens)
        return cls(slot, ticket, tokens, pages, pages.shared_tokens)

    @property
    def _has_newest(self) -> bool:
        """Whether the newest token is not in the pages yet; before, its prompt gives one more."""
        return self.ticket.state is State.DECODING

    def budget(self, config: ServingConfig, *, drafting: bool = False) -> int:
        """The most tokens it may get from its next decode call."""
        made = len(self.ticket.tokens) + (not self._has_newest)
        most = config.most_new(drafting=drafting)
        return min(most, self.ticket.request.max_new_tokens - made)

    def room(self, config: ServingConfig, *, drafting: bool = False) -> int:
        """Tokens that are in its pages after that call."""
        return len(self.tokens) - self._has_newest + self.budget(config, drafting=drafting)

    def random_words(self, count: int) -> list[np.ndarray]:
        """The random states of its next tokens.

        Each is a hash, and is kept until its token is there: drafts that were rejected left theirs
        unused.
        """
        sampling, made = self.ticket.request.sampling, len(self.ticket.tokens)
        known, indices = self._words, range(made, made + count)
        self._words = {i: known[i] if i in known else sampling.random_words(i) for i in indices}
        return list(self._words.values())


def prefill_arrays(rows: Mapping[int, Row], config: ServingConfig) -> dict[str, np.ndarray]:
    """The arrays of `programs.prefill` for the next chunk of rows, by their index in the call."""
    size, chunk = config.prefill_rows, config.prefill_chunk
    tokens = np.zeros((size, chunk), np.int32)
    lengths, counts = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for i, row in rows.items():
        part = row.tokens[row.cached : row.cached + chunk]
        tokens[i, : len(part)] = part
        lengths[i], counts[i] = row.cached, len(part)
    table = _table(rows, size, config)
    return {"table": table, "lengths": lengths, "tokens": tokens, "counts": counts}


def first_token_arrays(
    rows: Mapping[int, Row], config: ServingConfig
) -> tuple[RowSelection, np.ndarray]:
    """`selection` and `words` of `programs.first_tokens` for the rows of `prefill_arrays`."""
    selection = _selection(rows, config.prefill_rows)
    return selection, _words(rows, config.prefill_rows, count=1)[:, 0]


def decode_arrays(
    rows: Sequence[Row],
    config: ServingConfig,
    *,
    sampled: bool | None = None,
    drafting: bool = False,
) -> DecodeRows:
    """The arrays of `programs.decode` for rows that have pages for it.

    Args:
        rows: what is decoded.
        config: sizes.
        sampled: whether to use the program for rows that are not all greedy; by default if so.
        drafting: whether they are for `speculation.decode_speculatively`.
    """
    size, by_slot = config.max_rows, {row.slot: row for row in rows}
    lengths, tokens, budget = (np.zeros(size, np.int32) for _ in range(3))
    eos_ids = np.full((size, config.max_eos_ids), -1, np.int32)
    for slot, row in by_slot.items():
        lengths[slot], tokens[slot] = row.cached, row.tokens[-1]
        budget[slot] = row.budget(config, drafting=drafting)
        ids = list(row.ticket.request.eos_ids)
        eos_ids[slot, : len(ids)] = ids
    if sampled is None:
        sampled = any(row.ticket.request.sampling.temperature > 0 for row in rows)
    return DecodeRows(
        table=_table(by_slot, size, config),
        lengths=lengths,
        tokens=tokens,
        budget=budget,
        eos_ids=eos_ids,
        selection=_selection(by_slot, size) if sampled else None,
        words=_words(by_slot, size, config.most_new(drafting=drafting)) if sampled else None,
    )


def texts_array(rows: Sequence[Row], config: ServingConfig) -> np.ndarray:
    """All tokens of each row so far, int32 `[max_rows, capacity + 1]`."""
    texts = np.zeros((config.max_rows, config.capacity + 1), np.int32)
    for row in rows:
        texts[row.slot, : len(row.tokens)] = row.tokens
    return texts


def _table(rows: Mapping[int, Row], size: int, config: ServingConfig) -> np.ndarray:
    table = np.full((size, config.pages_per_sequence), NO_PAGE, np.int32)
    for i, row in rows.items():
        table[i, : len(row.pages.pages)] = row.pages.pages
    return table


def _selection(rows: Mapping[int, Row], size: int) -> RowSelection:
    settings = [rows[i].ticket.request.sampling if i in rows else GREEDY for i in range(size)]
    return RowSelection.of([s.selector for s in settings])


def _words(rows: Mapping[int, Row], size: int, count: int) -> np.ndarray:
    """The random states of the next tokens of each row, uint32 `[size, count, 4]`."""
    words = np.zeros((size, count, 4), np.uint32)
    for i, row in rows.items():
        if row.ticket.request.sampling.temperature > 0:
            words[i] = row.random_words(count)
    return words
