"""From a checked request to blocks of tokens, call by compiled call: plain and speculative."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jax_tkg._typing import Array
from jax_tkg.generation.adaptive import Adaptive, Pace, PausableDrafter
from jax_tkg.generation.loop import (
    DecodeState,
    decode,
    decode_scored,
    prefill,
    token_log_probs,
)
from jax_tkg.generation.model import DecodeModel
from jax_tkg.generation.policy import TokenPolicy
from jax_tkg.generation.prompts import PaddedPrompts
from jax_tkg.generation.speculation import (
    Emitted,
    SpeculativeState,
    decode_speculatively,
    decode_undrafted,
)
from jax_tkg.sharding.processes import to_host


@dataclass(frozen=True, eq=False)
class Request:
    """The checked arguments of `generate` or `stream`."""

    model: DecodeModel
    prompts: PaddedPrompts
    policy: TokenPolicy
    key: Array | None
    max_new_tokens: int
    prefill_chunk: int
    steps_per_call: int
    capacity: int
    cache_options: Mapping[str, Any]
    with_log_probs: bool

    def start(self) -> tuple[DecodeState, "Block"]:
        """Reads the prompts and chooses the first token of each row."""
        batch = len(self.prompts.lengths)
        caches = self.model.init_caches(batch, self.capacity, **self.cache_options)
        logits, caches = prefill(self.model, caches, self.prompts.chunks(self.prefill_chunk))
        state = DecodeState.start(caches, logits, self.key, policy=self.policy)
        scores = None
        if self.with_log_probs:
            scores = to_host(token_log_probs(logits, state.tokens))[:, None]
        return state, Block(to_host(state.tokens)[:, None], np.ones(batch, np.int32), scores)


@dataclass(frozen=True, eq=False)
class Block:
    """Some next tokens of each row, on the host.

    Attributes:
        tokens: int32 `[B, n]`.
        counts: int32 `[B]`, how many of each row mean something, the first ones; those after a
            token that ends the row need not.
        log_probs: float32 `[B, n]`, if asked for.
        steps: int32 `[B]`, steps of the model in which they were made.
        drafted: int32 `[B]`, drafts that these verified.
        undrafted: int32 `[B]`, steps among these for which the drafter was not asked.
    """

    tokens: np.ndarray
    counts: np.ndarray
    log_probs: np.ndarray | None = None
    steps: np.ndarray | int = 0
    drafted: np.ndarray | int = 0
    undrafted: np.ndarray | int = 0


@runtime_checkable
class Decoding(Protocol):
    """A way to decode."""

    def blocks(self, request: Request) -> Iterator[Block]:
        """Endless: whoever iterates it stops when all rows have ended."""
        ...


@dataclass(frozen=True)
class Plain:
    """A token a step."""

    def blocks(self, request: Request) -> Iterator[Block]:
        """See `Decoding`."""
        state, first = request.start()
        yield first
        options: dict[str, Any] = {
            "policy": request.policy,
            "num_steps": request.steps_per_call,
        }
        counts = np.full(len(first.counts), request.steps_per_call)
        while True:
            scores = None
            if request.with_log_probs:
                tokens, scores, state = decode_scored(request.model, state, request.key, **options)
            else:
                tokens, state = decode(request.model, state, request.key, **options)
            host_scores = None if scores is None else to_host(scores)
            yield Block(to_host(tokens), counts, host_scores, counts)


@dataclass(frozen=True, eq=False)
class Speculative:
    """Up to `max_tokens + 1` tokens a step, for a request whose model is a `ScoringModel`.

    The rule is asked before each call of a compiled loop, and told what came of it.
    """

    rule: Adaptive

    def blocks(self, request: Request) -> Iterator[Block]:
        """See `Decoding`."""
        pace = Pace(self.rule)
        state, first = self.start(request)
        yield first
        while True:
            drafts = pace.speculates
            emitted, state = self.call(request, state, drafts=drafts)
            block = _block(emitted, drafted=drafts)
            yield block
            pace.took(
                steps=int(np.max(block.steps)),
                row_steps=int(np.sum(block.steps)),
                tokens=int(np.sum(block.counts)),
            )
            if pace.speculates != drafts:
                state = self.follow(request, state)

    def start(self, request: Request) -> tuple[SpeculativeState, Block]:
        """Reads the prompts, the drafter too, and chooses the first token of each row."""
        decoding, first = request.start()
        drafting = self.rule.drafter.start(request.prompts, request.capacity, request.prefill_chunk)
        state = SpeculativeState.start(
            decoding,
            drafting,
            request.prompts,
            capacity=request.capacity,
            max_new_tokens=request.max_new_tokens,
        )
        return state, first

    def call(
        self, request: Request, state: SpeculativeState, *, drafts: bool
    ) -> tuple[Emitted, SpeculativeState]:
        """One call of the loop with drafts, or of the one without."""
        options: dict[str, Any] = {
            "policy": request.policy,
            "num_steps": request.steps_per_call,
            "with_log_probs": request.with_log_probs,
        }
        if not drafts:
            return decode_undrafted(request.model, state, request.key, **options)
        model: Any = request.model
        return decode_speculatively(model, self.rule.drafter, state, request.key, **options)

    def follow(self, request: Request, state: SpeculativeState) -> SpeculativeState:
        """The state with that of the drafter brought up to the text."""
        drafter = self.rule.drafter
        assert isinstance(drafter, PausableDrafter)
        chunk = request.prefill_chunk
        drafting = drafter.follow(state.tokens, state.lengths, state.drafting, chunk=chunk)
        return replace(state, drafting=drafting)


def _block(emitted: Emitted, *, drafted: bool) -> Block:
    """What a call gave, on the host."""
    counts, log_probs = to_host(emitted.counts), emitted.log_probs
    steps = (counts > 0).sum(axis=0)
    return Block(
        _joined(to_host(emitted.tokens), counts),
        counts.sum(axis=0),
        None if log_probs is None else _joined(to_host(log_probs), counts),
        steps,
        to_host(emitted.drafted).sum(axis=0),
        0 if drafted else steps,
    )


def _joined(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first `counts [n, B]` of `values [n, B, T]`, row by row, padded to `[B, n * T]`."""
    steps, batch, width = values.shape
    flat = np.swapaxes(values, 0, 1).reshape(batch, steps * width)
    is_given = (np.arange(width) < counts.T[:, :, None]).reshape(flat.shape)
    order = np.argsort(~is_given, axis=1, kind="stable")
    return np.take_along_axis(flat, order, axis=1)
