"""The sizes of an engine: what its compiled steps are compiled for, and its policies."""

from dataclasses import dataclass
from typing import Any, Literal

from jax_tkg._checks import described, whole_number
from jax_tkg.generation.adaptive import Adaptive
from jax_tkg.generation.drafts import PromptLookup

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
        speculate: drafts several tokens a step for every row, which the model verifies at once:
            `PromptLookup()`, or `Adaptive(PromptLookup())` to pause where that does not pay. The
            tokens stay the same, sampled ones too (up to rounding).

    Raises:
        ValueError: for sizes that are too small, or an unknown policy.
        TypeError: for sizes that are no integers, or a drafter that needs more than the text of a
            row.
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
    speculate: PromptLookup | Adaptive | None = None

    def __post_init__(self) -> None:
        """Validates the sizes."""
        for name, least in _LEAST.items():
            size = getattr(self, name)
            if size is not None or name != "num_pages":
                whole_number(f"ServingConfig: {name}", size, least=least)
        if self.out_of_pages not in ("wait", "refuse"):
            raise ValueError(
                f"ServingConfig: out_of_pages is 'wait' or 'refuse', got {self.out_of_pages!r}."
            )
        if self.prefill_chunk > self.capacity:
            raise ValueError(
                f"ServingConfig: a prefill_chunk of {self.prefill_chunk} tokens is more than the "
                f"{self.capacity} that a request can have; make it smaller."
            )

        drafter = self.drafter
        if drafter is None:
            return
        if not isinstance(drafter, PromptLookup):
            raise TypeError(
                "ServingConfig: speculate must be PromptLookup() or Adaptive(PromptLookup()), "
                f"which draft from the text of a row alone, got {described(drafter)}: the pages of "
                "an engine hold nothing for a drafter. jax_tkg.generate takes any."
            )
        if drafter.max_tokens >= self.capacity:
            raise ValueError(
                f"ServingConfig: {drafter.max_tokens} drafts and a token are more than the "
                f"{self.capacity} that a request can have; draft fewer."
            )

    @property
    def rule(self) -> Adaptive | None:
        """When to draft."""
        if self.speculate is None or isinstance(self.speculate, Adaptive):
            return self.speculate
        return Adaptive(self.speculate, break_even=1)

    @property
    def drafter(self) -> Any:
        """What makes drafts, checked to be a `PromptLookup`, or None."""
        return self.speculate.drafter if isinstance(self.speculate, Adaptive) else self.speculate

    def most_new(self, *, drafting: bool) -> int:
        """The most tokens that a row gets in a call of the compiled loop."""
        each = 1 + self.drafter.max_tokens if drafting else 1
        return self.steps_per_call * int(each)

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
