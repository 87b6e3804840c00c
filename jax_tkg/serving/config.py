"""The sizes of an engine: what its compiled steps are compiled for, and its policies."""

from dataclasses import dataclass
from typing import Literal

_LEAST = {
    "max_rows": 1,
    "page_len": 1,
    "pages_per_sequence": 1,
    "num_pages": 1,
    "steps_per_call": 1,
    "prefill_chunk": 1,
    "prefill_rows": 1,
    "prefill_calls": 1,
    "max_eos_ids": 0,
    "top_log_probs": 0,
}


@dataclass(frozen=True)
class ServingConfig:
    """Sizes and policies of an `Engine`.

    Attributes:
        max_rows: requests that decode at the same time.
        page_len: tokens of a page.
        pages_per_sequence: the most pages of one request: prompt and answer, without the last
            token, fit into this times `page_len`.
        num_pages: pages of all requests together; by default enough for `max_rows` of the longest.
            With fewer, requests wait for pages or give way to older ones.
        steps_per_call: tokens that a call of the compiled loop decodes for each row. More are less
            overhead; fewer let requests join, leave and be seen sooner.
        prefill_chunk: prompt tokens of a request that one call takes in.
        prefill_rows: requests whose prompts one call takes in.
        prefill_calls: the most such calls between two decode calls: how long the running requests
            may be held up by new ones.
        out_of_pages: "wait": every request that can fit by itself is taken; while there are too
            few pages the youngest running one is put back into the queue and computed again later.
            "refuse": a request is refused when it and those before it might need more pages than
            there are; what was taken is never put back.
        max_eos_ids: the most ids that may end a request.
        top_log_probs: the most likely tokens whose log-probabilities a request may ask for.

    Raises:
        ValueError: for sizes that are too small, or an unknown policy.
    """

    max_rows: int = 8
    page_len: int = 16
    pages_per_sequence: int = 32
    num_pages: int | None = None
    steps_per_call: int = 8
    prefill_chunk: int = 64
    prefill_rows: int = 1
    prefill_calls: int = 4
    out_of_pages: Literal["wait", "refuse"] = "wait"
    max_eos_ids: int = 4
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        """Validates the sizes."""
        for name, least in _LEAST.items():
            size = getattr(self, name)
            if size is not None and size < least:
                raise ValueError(f"ServingConfig: {name} must be at least {least}, got {size}.")
        if self.out_of_pages not in ("wait", "refuse"):
            raise ValueError(
                f"ServingConfig: out_of_pages is 'wait' or 'refuse', got {self.out_of_pages!r}."
            )
        if self.prefill_chunk > self.capacity:
            raise ValueError(
                f"ServingConfig: a prefill_chunk of {self.prefill_chunk} tokens is more than the "
                f"{self.capacity} that a request can have; make it smaller."
            )

    @property
    def pages(self) -> int:
        """Pages in the pool."""
        return self.max_rows * self.pages_per_sequence if self.num_pages is None else self.num_pages

    @property
    def capacity(self) -> int:
        """Tokens that the pages of one request can hold."""
        return self.page_len * self.pages_per_sequence

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_len)
