"""The scheduler: who is in which row, who gets which pages, what the next call computes."""

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_tkg._checks import check_id_range, described
from jax_tkg.generation.model import (
    DecodeModel,
    as_pytree,
    check_cache_options,
    scoring_pytree,
    vocabulary_of,
)
from jax_tkg.serving import programs
from jax_tkg.serving.config import ServingConfig
from jax_tkg.serving.places import Places
from jax_tkg.serving.pool import PageUsage
from jax_tkg.serving.programs import Chosen, ChosenToken, DecodeRows, by_rows
from jax_tkg.serving.request import (
    Completion,
    Event,
    FinishReason,
    OutOfPagesError,
    Request,
    State,
    Ticket,
)
from jax_tkg.serving.rows import (
    Row,
    decode_arrays,
    first_token_arrays,
    prefill_arrays,
    texts_array,
)
from jax_tkg.serving.speculation import (
    Drafting,
    SpeculationUsage,
    Verified,
    decode_speculatively,
)
from jax_tkg.serving.text import TextStream, TokenDecoder
from jax_tkg.sharding.spec import AttentionSharding


class Engine:
    """Serves requests with one model in batches that they join and leave at any time.

    Greedy tokens are those that `jax_tkg.generate` gives for each request alone (up to rounding);
    sampled ones depend on the request and its seed. Not for use from several threads at once.
    """

    def __init__(
        self,
        model: DecodeModel,
        config: ServingConfig,
        *,
        decoder: Callable[[], TokenDecoder] | None = None,
        cache_options: Mapping[str, Any] | None = None,
        sharding: AttentionSharding | None = None,
    ) -> None:
        """Makes the pages; compiles nothing yet (see `warm_up`).

        Args:
            model: a `flax.nnx.Module` or a pytree of weights, with the methods of
                `jax_tkg.generation.DecodeModel`, or of `ScoringModel` to speculate; its caches a
                pytree of `KVCache`s.
            config: sizes and policies.
            decoder: makes a decoder of ids to text for each request, such as `Tokenizer.stream`.
                Without one there is no text, and no stop strings.
            cache_options: keywords of the model's `init_caches`, such as `dtype`.
            sharding: mesh axes that split heads and rows. Each device has its KV heads of a page,
                where they divide, and each part of the rows has pages of its own, which its
                requests share. The weights lie where the model has them (`shard_decoder`).

        Raises:
            TypeError: for a model that cannot be served, or an argument of the wrong type.
            ValueError: as the model's `init_caches`, asked for `config.capacity` tokens; for a
                sharding of slots, or of heads, rows or pages that the mesh does not divide; for
                `config.top_log_probs` above the vocabulary.
        """
        _check_types(config, decoder, cache_options, sharding)
        self.config = config
        self._model: Any = as_pytree(model) if config.rule is None else scoring_pytree(model)
        self._pools = programs.make_pools(self._model, config, cache_options or {}, sharding)
        self._sharding = sharding
        self._places = Places(config, 1 if sharding is None else sharding.size("batch"))
        self._vocab_size = self._vocabulary(vocabulary_of(model))
        self._decoder = decoder
        self._drafting = Drafting(config.rule)
        self._waiting: list[Ticket] = []  # the oldest first
        self._number = 0

    def warm_up(self) -> None:
        """Compiles every program; nothing is compiled afterwards, whatever is submitted."""
        logits = self._take_in({})
        self._first_tokens({}, logits)
        for sampled in (False, True):
            self._decode_call(decode_arrays([], self.config, sampled=sampled))
            if self.config.rule is not None:
                self._speculative_call([], sampled=sampled)

    def submit(self, request: Request) -> Ticket:
        """Puts a request into the queue.

        Raises:
            TypeError: if it is no `Request`.
            ValueError: if it can never be served by this engine, or has a token id that its model
                does not know; says why, with numbers.
            OutOfPagesError: under the policy "refuse", if the pages it may need are promised to
                others.
        """
        needed = self._check(request)
        is_promised = self.config.out_of_pages == "refuse"
        if is_promised and needed > self._places.unpromised:
            places = self._places
            raise OutOfPagesError(
                f"the request may need {needed} pages of {self.config.page_len} tokens; of "
                f"{places.pages_each} {places.which_pages} {places.unpromised} are not promised to "
                "others. Submit it again when one of those has finished."
            )
        text = None if self._decoder is None else TextStream(self._decoder(), request.stop)
        ticket = Ticket(self._number, request, text)
        if is_promised:
            self._places.promise(ticket, needed)
        self._number += 1
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> Completion:
        """Ends a request now and frees its row and pages; one that has ended stays as it is.

        Raises:
            ValueError: for a ticket of another engine.
        """
        self._check_mine(ticket)
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._end(ticket, FinishReason.CANCELLED)
        elif (row := self._places.row_of(ticket)) is not None:
            self._places.leave(row)
            self._end(ticket, FinishReason.CANCELLED)
        assert ticket.completion is not None
        return ticket.completion

    def step(self) -> list[Event]:
        """Lets waiting requests in, computes one round, and returns what came of it.

        A round is up to `prefill_calls` calls that take in prompts, and one that decodes
        `steps_per_call` steps of every running request.
        """
        events: list[Event] = []
        self._admit()
        for _ in range(self.config.prefill_calls):
            to_prefill = self._places.to_prefill()
            if not to_prefill:
                break
            events += self._prefill(to_prefill)
        if rows := self._with_pages():
            if self._drafts_for(rows):
                events += self._decode_speculatively(rows)
            else:
                events += self._decode(rows)
        return events

    def stream(self, ticket: Ticket) -> Iterator[Event]:
        """The events of one request as they come, `step` being called when there is none.

        All requests advance meanwhile, and several streams may be read in turns. To stop reading
        is not to cancel.

        Raises:
            ValueError: for a ticket of another engine.
        """
        self._check_mine(ticket)
        seen = 0
        while True:
            while seen < len(ticket.events):  # more may come while one is looked at
                yield ticket.events[seen]
                seen += 1
            if ticket.completion is not None:
                return
            self.step()

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """Serves requests to their end; the completions in the same order.

        Raises:
            ValueError: as `submit`; the requests before stay submitted.
            OutOfPagesError: likewise.
        """
        tickets = [self.submit(request) for request in requests]
        for ticket in tickets:
            while ticket.completion is None:
                self.step()
        return [ticket.completion for ticket in tickets if ticket.completion is not None]

    @property
    def usage(self) -> PageUsage:
        """Pages by state."""
        return self._places.usage

    @property
    def speculation(self) -> SpeculationUsage:
        """What became of drafts so far, and whether the next call will draft."""
        return self._drafting.usage

    def forget_cached(self) -> None:
        """Frees the pages that no request uses: later requests compute their prompts anew."""
        self._places.forget_cached()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in rows."""
        return len(self._places.rows)

    def _check(self, request: Request) -> int:
        """The pages it may need; raises if it can never be served."""
        if not isinstance(request, Request):
            raise TypeError(f"an engine serves a Request(prompt, n), got {described(request)}.")
        for name, ids in (("prompt", request.prompt), ("eos_ids", request.eos_ids)):
            if ids:
                check_id_range(name, min(ids), max(ids), self._vocab_size)
        config, tokens = self.config, request.most_tokens
        needed = config.pages_for(tokens)
        pages = self._places.pages_each
        if needed > min(config.pages_per_sequence, pages):
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and max_new_tokens="
                f"{request.max_new_tokens} need {needed} pages of {config.page_len}; a request "
                f"here can have {config.pages_per_sequence}, and there are {pages} "
                f"{self._places.which_pages}."
            )
        if len(request.eos_ids) > config.max_eos_ids:
            raise ValueError(
                f"{len(request.eos_ids)} eos_ids, but ServingConfig.max_eos_ids is "
                f"{config.max_eos_ids}."
            )
        if request.top_log_probs > config.top_log_probs:
            raise ValueError(
                f"top_log_probs={request.top_log_probs}, but ServingConfig.top_log_probs is "
                f"{config.top_log_probs}."
            )
        if request.stop and self._decoder is None:
            raise ValueError("stop strings need text: give the engine a decoder.")
        return needed

    def _vocabulary(self, told: int | None) -> int:
        """How many token ids the model knows: what it says, else those that have a logit."""
        logits, _ = programs.prefill.eval_shape(
            self._model, self._pools, **prefill_arrays({}, self.config)
        )
        if self.config.top_log_probs > logits.shape[1]:
            raise ValueError(
                f"ServingConfig: top_log_probs={self.config.top_log_probs}, but the model gives "
                f"logits of {logits.shape[1]} tokens."
            )
        return int(logits.shape[1]) if told is None else told

    def _check_mine(self, ticket: Ticket) -> None:
        if not isinstance(ticket, Ticket):
            raise TypeError(f"a Ticket of submit is needed, got {described(ticket)}.")
        known = ticket in self._waiting or self._places.row_of(ticket) is not None
        if not known and ticket.completion is None:
            raise ValueError(f"request {ticket.number} was submitted to another engine.")

    # Rows and pages

    def _admit(self) -> None:
        """Lets waiting requests in, the oldest first, as long as there are rows and pages."""
        for ticket in list(self._waiting):
            row = self._places.enter(ticket)
            if row is None and self.config.out_of_pages == "refuse":
                continue  # it waits for a row in the part that has its pages
            if row is None:
                return  # or younger ones would take the pages that it waits for
            self._waiting.remove(ticket)
            ticket.state = State.PREFILL
            if not ticket.preemptions:
                ticket.shared_tokens = row.pages.shared_tokens

    def _with_pages(self) -> list[Row]:
        """The decoding rows, each with pages for the next call; the youngest may have to go."""
        for row in self._places.by_age(State.DECODING):
            while row.slot in self._places.rows and not row.pages.reserve(row.room(self.config)):
                self._put_back(self._places.youngest_beside(row))
        return self._places.by_age(State.DECODING)

    def _drafts_for(self, rows: Sequence[Row]) -> bool:
        """Whether to draft now: if it pays, and there are pages for what may be accepted.

        Nobody has to go for want of those.
        """
        if not self._drafting.wanted:
            return False
        if all(row.pages.reserve(row.room(self.config, drafting=True)) for row in rows):
            return True
        for row in rows:
            row.pages.keep(row.room(self.config))
        return False

    def _put_back(self, row: Row) -> None:
        """Preempts a row: what it has computed is forgotten, its tokens are not."""
        self._places.leave(row)
        row.ticket.state = State.WAITING
        row.ticket.preemptions += 1
        bisect.insort(self._waiting, row.ticket, key=lambda ticket: ticket.number)

    def _end(self, ticket: Ticket, reason: FinishReason) -> None:
        self._places.redeem(ticket)
        ticket.end(reason)

    # Calls

    def _prefill(self, rows: Mapping[int, Row]) -> list[Event]:
        logits = self._take_in(rows)
        for row in rows.values():
            row.cached = min(row.cached + self.config.prefill_chunk, len(row.tokens))
            row.pages.written(row.tokens, row.cached)
        done = [(i, row) for i, row in rows.items() if row.cached == len(row.tokens)]
        done.sort(key=lambda found: found[1].ticket.number)
        if not done:
            return []
        chosen = self._first_tokens(rows, logits)
        for _, row in done:
            row.ticket.state = State.DECODING
        return self._receive([(row, [chosen.at(i)]) for i, row in done])

    def _decode(self, rows: Sequence[Row]) -> list[Event]:
        chosen, made = self._decode_call(decode_arrays(rows, self.config))
        self._drafting.decoded(made)
        return self._receive(
            [(row, [chosen.at(step, row.slot) for step in range(made[row.slot])]) for row in rows]
        )

    def _decode_speculatively(self, rows: Sequence[Row]) -> list[Event]:
        verified = self._speculative_call(rows)
        self._drafting.verified(verified.counts, verified.drafted)
        new: list[tuple[Row, list[ChosenToken]]] = []
        for row in rows:
            slot, counts = row.slot, verified.counts[:, row.slot]
            places = [(step, slot, i) for step, count in enumerate(counts) for i in range(count)]
            new.append((row, [verified.chosen.at(*place) for place in places]))
        try:
            return self._receive(new)
        finally:
            for row in rows:
                row.pages.keep(row.cached)  # nothing is there of one that has left

    def _receive(self, new: Sequence[tuple[Row, Sequence[ChosenToken]]]) -> list[Event]:
        """Gives rows their next tokens, and lets those leave that end with them.

        A decoder is the user's. If one raises, its row goes on after the last token that it took,
        and the others have theirs before the error is passed on.
        """
        events: list[Event] = []
        errors: list[Exception] = []
        for row, tokens in new:
            before = len(row.ticket.events)
            try:
                reason = self._add(row, tokens)
            except Exception as error:
                errors.append(error)
                reason = None
            row.cached = len(row.tokens) - 1
            row.pages.written(row.tokens, row.cached)
            if reason is not None:
                self._places.leave(row)
                self._end(row.ticket, reason)
            events += row.ticket.events[before:]
        if errors:
            raise errors[0]
        return events

    @staticmethod
    def _add(row: Row, tokens: Sequence[ChosenToken]) -> FinishReason | None:
        """Gives a row tokens up to the one that ends it, and says why that is."""
        for token, log_prob, top in tokens:
            reason = row.ticket.add(token, log_prob, top)
            row.tokens.append(token)
            if reason is not None:
                return reason
        return None

    def _take_in(self, rows: Mapping[int, Row]) -> Any:
        arrays = by_rows(prefill_arrays(rows, self.config), self._sharding)
        logits, self._pools = programs.prefill(self._model, self._pools, **arrays)
        return logits

    def _first_tokens(self, rows: Mapping[int, Row], logits: Any) -> Chosen:
        selection, words = by_rows(first_token_arrays(rows, self.config), self._sharding)
        top = self.config.top_log_probs
        return jax.device_get(programs.first_tokens(logits, selection, words, top=top))

    def _decode_call(self, rows: DecodeRows) -> tuple[Chosen, np.ndarray]:
        chosen, made, self._pools = programs.decode(
            self._model,
            self._pools,
            by_rows(rows, self._sharding),
            num_steps=self.config.steps_per_call,
            top=self.config.top_log_probs,
        )
        return jax.device_get((chosen, made))

    def _speculative_call(self, rows: Sequence[Row], *, sampled: bool | None = None) -> Verified:
        verified, self._pools = decode_speculatively(
            self._model,
            self._pools,
            by_rows(
                decode_arrays(rows, self.config, sampled=sampled, drafting=True), self._sharding
            ),
            by_rows(texts_array(rows, self.config), self._sharding),
            drafter=self.config.drafter,
            num_steps=self.config.steps_per_call,
            top=self.config.top_log_probs,
        )
        return jax.device_get(verified)


def _check_types(config: Any, decoder: Any, cache_options: Any, sharding: Any) -> None:
    """Whether the arguments of an engine are what they are to be."""
    if not isinstance(config, ServingConfig):
        raise TypeError(f"config must be a ServingConfig, got {described(config)}.")
    if decoder is not None and not callable(decoder):
        raise TypeError(
            "decoder must make a new decoder for each request, such as tokenizer.stream (without "
            f"calling it); got {described(decoder)}."
        )
    check_cache_options(cache_options)
    if sharding is not None and not isinstance(sharding, AttentionSharding):
        raise TypeError(f"sharding must be an AttentionSharding, got {described(sharding)}.")
