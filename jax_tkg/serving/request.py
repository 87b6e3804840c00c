"""What is asked for and what comes back: requests, tickets, events."""

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jax_tkg._checks import described, real_number, token_ids, whole_number
from jax_tkg.sampling import Greedy, Sample
from jax_tkg.serving.text import TextStream, stop_strings


class OutOfPagesError(RuntimeError):
    """A request was refused because others have been promised the pages it may need."""


class State(enum.Enum):
    """Where a request is; see docs/serving.md."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODING = "decoding"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request has ended."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of one request are chosen.

    Attributes:
        temperature: 0 always takes the most likely token; else as `jax_tkg.Sample`, likewise the
            following, which have no effect at temperature 0.
        top_k: as there.
        top_p: as there.
        min_p: as there.
        seed: of this request's random numbers, not negative. Token i depends on the seed, on i and
            on the logits: not on other requests, the row, or a preemption. Two requests for the
            same prompt need two seeds to differ.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Validates the settings."""
        is_greedy = real_number("SamplingSettings: temperature", self.temperature) == 0
        Sample(1.0 if is_greedy else self.temperature, self.top_k, self.top_p, self.min_p)
        whole_number("SamplingSettings: seed", self.seed)

    @property
    def selector(self) -> Greedy | Sample:
        """The same rule for `jax_tkg.generate`, whose random numbers are others."""
        if not self.temperature:
            return Greedy()
        return Sample(self.temperature, self.top_k, self.top_p, self.min_p)

    def random_words(self, index: int) -> np.ndarray:
        """The state of the random generator for token `index`, uint32 `[4]`.

        A hash (`numpy.random.SeedSequence`), because neighbouring states are not independent: in
        XLA's Philox, adding 1 to the third word shifts the stream by four numbers.
        """
        return np.random.SeedSequence((self.seed, index)).generate_state(4)


GREEDY = SamplingSettings()


@dataclass(frozen=True)
class Request:
    """Something to continue.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the most tokens to add, at least 1.
        sampling: how they are chosen.
        eos_ids: tokens that end it. The token is part of the tokens, not of the text.
        stop: strings that end it; the text ends before the string.
        top_log_probs: give with each token the log-probabilities of this many most likely ones.

    Raises:
        ValueError: for an empty prompt, a negative id, a size below its least, or an empty string.
        TypeError: for ids that are not integers, and anything else of the wrong type.
    """

    prompt: Collection[int]
    max_new_tokens: int
    sampling: SamplingSettings = GREEDY
    eos_ids: Collection[int] = ()
    stop: Collection[str] = ()
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        """Validates, and makes tuples of what may be changed from outside."""
        for name in ("prompt", "eos_ids"):
            object.__setattr__(self, name, token_ids(name, getattr(self, name)))
        object.__setattr__(self, "stop", stop_strings(self.stop))
        if not self.prompt:
            raise ValueError("prompt must have at least one token id, got none.")
        for name, least in (("max_new_tokens", 1), ("top_log_probs", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=least))
        if not isinstance(self.sampling, SamplingSettings):
            raise TypeError(
                "sampling must be SamplingSettings(temperature=...), got "
                f"{described(self.sampling)}."
            )

    @property
    def most_tokens(self) -> int:
        """Tokens that may come into the cache: all but the last new one."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(frozen=True)
class NewToken:
    """One more token of a request.

    Attributes:
        number: of the request.
        index: of the token among the new ones, from 0.
        token: its id.
        log_prob: log of its probability given all before it, before temperature and filters.
        top: the most likely ids with theirs, as many as were asked for, most likely first.
        text: what it adds to the text; may be empty, or begin with characters held back before.
    """

    number: int
    index: int
    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]
    text: str


@dataclass(frozen=True)
class Completion:
    """The end of a request.

    Attributes:
        number: of the request.
        reason: why it ended.
        tokens: the new ids, with the one that ended it.
        log_probs: theirs.
        text: all new text, "" without a decoder: that of the events, and, if it was cancelled, what
            was held back at that time.
        shared_tokens: prompt tokens whose pages were there already, when it was first admitted.
        preemptions: how often it was put back into the queue.
    """

    number: int
    reason: FinishReason
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    shared_tokens: int
    preemptions: int


Event = NewToken | Completion


class Ticket:
    """A request given to an engine; read it, the engine writes it.

    Attributes:
        number: counts the requests of an engine from 0; a smaller one is older.
        request: what was asked for.
        state: where it is.
        events: all that has come so far; the last is a `Completion` once it has finished.
        tokens: the new ids so far.
        shared_tokens: as in `Completion`.
        preemptions: likewise.
    """

    def __init__(self, number: int, request: Request, text: TextStream | None) -> None:
        """For the engine: a request that waits."""
        self.number, self.request = number, request
        self.state = State.WAITING
        self.events: list[Event] = []
        self.tokens: list[int] = []
        self.shared_tokens = self.preemptions = 0
        self._text = text

    @property
    def completion(self) -> Completion | None:
        """How it ended, or None while it has not."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Completion) else None

    def add(
        self, token: int, log_prob: float, top: Sequence[tuple[int, float]]
    ) -> FinishReason | None:
        """For the engine: one more token, and whether it is the last."""
        request, text, piece = self.request, self._text, ""
        if text is not None and token not in request.eos_ids:
            piece = text.push(token)
        reason = None
        if token in request.eos_ids:
            reason = FinishReason.EOS
        elif text is not None and text.is_stopped:
            reason = FinishReason.STOP
        elif len(self.tokens) + 1 == request.max_new_tokens:
            reason = FinishReason.LENGTH
        if text is not None and reason is not None:
            piece += text.finish()
        # Only now, because a decoder is the user's: if it raises, nothing has been added.
        self.tokens.append(token)
        index, top = len(self.tokens) - 1, tuple(top[: request.top_log_probs])
        self.events.append(NewToken(self.number, index, token, log_prob, top, piece))
        return reason

    def end(self, reason: FinishReason) -> None:
        """For the engine: it has finished."""
        new = [event for event in self.events if isinstance(event, NewToken)]
        rest = "" if self._text is None else self._text.finish()
        self.state = State.FINISHED
        self.events.append(
            Completion(
                number=self.number,
                reason=reason,
                tokens=tuple(self.tokens),
                log_probs=tuple(event.log_prob for event in new),
                text="".join(event.text for event in new) + rest,
                shared_tokens=self.shared_tokens,
                preemptions=self.preemptions,
            )
        )
