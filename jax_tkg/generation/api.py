"""`generate` and `stream`: from prompts to tokens, driven from the host call by compiled call."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_tkg._typing import Array, Key
from jax_tkg.generation.loop import DecodeState, TokenPolicy, decode, portable_key, prefill
from jax_tkg.generation.model import DecodeModel, as_pytree
from jax_tkg.generation.prompts import PaddedPrompts, PromptLengths, Prompts, bucket, pad_prompts
from jax_tkg.sampling import Greedy, TokenSelector

GREEDY = Greedy()


@dataclass(frozen=True, eq=False)
class Generated:
    """What was generated; NumPy arrays.

    Attributes:
        tokens: int32 `[B, max_new_tokens]`, pads after the token that ended a row.
        lengths: int32 `[B]`, tokens of each row up to and with the one that ended it.
        finished: bool `[B]`, whether a row ended with one of `eos_ids`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray

    def rows(self) -> list[list[int]]:
        """The tokens of each row, without pads and without the token that ended it."""
        ends = self.lengths - self.finished
        return [row[:end].tolist() for row, end in zip(self.tokens, ends, strict=True)]


def generate(
    model: DecodeModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    prompt_lengths: PromptLengths = None,
    selector: TokenSelector = GREEDY,
    eos_ids: Iterable[int] = (),
    pad_id: int = 0,
    key: Key[Array, ""] | None = None,
    prefill_chunk: int = 64,
    steps_per_call: int | None = None,
    capacity: int | None = None,
    cache_options: Mapping[str, Any] | None = None,
) -> Generated:
    """Continues prompts.

    Two programs are compiled and reused: one takes in `prefill_chunk` tokens of every prompt, one
    decodes. Neither depends on the length of the prompts, only on the batch, the capacity of the
    caches (rounded up to a few sizes) and the static arguments; the caches are updated in place.

    A row gets the same tokens as alone, whatever the lengths of the others (up to rounding; when
    sampling, the random numbers of a row depend on its place in the batch).

    Args:
        model: a `flax.nnx.Module`, or a pytree of weights, with the methods of `DecodeModel`.
        prompts: B lists of token ids, each with one at least; or a padded int array `[B, P]`.
        max_new_tokens: tokens to generate for each row, at least 1.
        prompt_lengths: int `[B]`, real tokens of each row of an array (the first ones).
        selector: how tokens are chosen: `Greedy()`, `Sample(temperature=0.8, top_p=0.95)` or any
            `TokenSelector`.
        eos_ids: tokens that end a row. The token itself is part of the result.
        pad_id: what fills a row after its end.
        key: for selectors that need one. Its seed alone is used, in an `unsafe_rbg` key: the kind
            that Neuron can run. By default seed 0, so the same tokens every time; the numbers
            differ between platforms.
        prefill_chunk: prompt tokens that are taken in at a time.
        steps_per_call: decode in calls of this many tokens, and stop when every row has ended; by
            default in one call of `max_new_tokens - 1`.
        capacity: slots of each row of the caches; by default what prompt and answer need, rounded
            up to a bucket.
        cache_options: keywords of the model's `init_caches`, such as `dtype` and `layout`.

    Returns:
        The tokens of all rows; see `Generated`.

    Raises:
        TypeError: for ids or a key of the wrong kind, or a model that cannot be generated from.
        ValueError: for empty prompts, sizes below 1, or a capacity that is too small.
    """
    steps = max(max_new_tokens - 1, 1) if steps_per_call is None else steps_per_call
    run = _prepare(
        model,
        pad_prompts(prompts, prompt_lengths),
        policy=TokenPolicy(selector, _token_ids(eos_ids), pad_id),
        key=key,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        steps_per_call=steps,
        capacity=capacity,
        cache_options=cache_options,
    )
    columns = list(run.columns())
    tokens = np.full((len(columns[0]), max_new_tokens), pad_id, np.int32)
    tokens[:, : len(columns)] = np.stack(columns, axis=1)
    is_eos = np.isin(tokens, run.policy.eos_ids)
    finished: np.ndarray = np.any(is_eos, axis=1)
    lengths = np.where(finished, np.argmax(is_eos, axis=1) + 1, max_new_tokens)
    return Generated(tokens, lengths.astype(np.int32), finished)


def stream(
    model: DecodeModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    prompt_lengths: PromptLengths = None,
    selector: TokenSelector = GREEDY,
    eos_ids: Iterable[int] = (),
    pad_id: int = 0,
    key: Key[Array, ""] | None = None,
    prefill_chunk: int = 64,
    steps_per_call: int = 8,
    capacity: int | None = None,
    cache_options: Mapping[str, Any] | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts and hands out tokens as they come: the same tokens as `generate`.

    Arguments are checked when it is called, the work is done while it is iterated.

    Args:
        model: this and everything not named below is as in `generate`.
        prompts: as in `generate`; one prompt is `[ids]`.
        max_new_tokens: the most that are generated.
        prompt_lengths: as in `generate`.
        selector: as in `generate`.
        eos_ids: as in `generate`. It stops after the token that ends the last row.
        pad_id: as in `generate`.
        key: as in `generate`.
        prefill_chunk: as in `generate`.
        steps_per_call: tokens decoded by one call of the compiled loop: few for little delay, many
            for little overhead. It does not change the tokens.
        capacity: as in `generate`.
        cache_options: as in `generate`.

    Yields:
        int32 `[B]`: the next token of each row, the first one right after the prompts were read.

    Raises:
        TypeError: as `generate`.
        ValueError: as `generate`.
    """
    run = _prepare(
        model,
        pad_prompts(prompts, prompt_lengths),
        policy=TokenPolicy(selector, _token_ids(eos_ids), pad_id),
        key=key,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        steps_per_call=steps_per_call,
        capacity=capacity,
        cache_options=cache_options,
    )
    return run.columns()


@dataclass(frozen=True, eq=False)
class _Run:
    """A checked call of `generate` or `stream`."""

    model: DecodeModel
    prompts: PaddedPrompts
    policy: TokenPolicy
    key: Array | None
    max_new_tokens: int
    prefill_chunk: int
    steps_per_call: int
    capacity: int
    cache_options: Mapping[str, Any]

    def columns(self) -> Iterator[np.ndarray]:
        """The tokens `[B]` of one step after another, until all rows have ended."""
        ended = np.zeros(len(self.prompts.lengths), bool)
        for made, column in enumerate(self._endless(), start=1):
            yield column
            ended |= np.isin(column, self.policy.eos_ids)
            if made == self.max_new_tokens or ended.all():
                return

    def _endless(self) -> Iterator[np.ndarray]:
        caches = self.model.init_caches(
            len(self.prompts.lengths), self.capacity, **self.cache_options
        )
        logits, caches = prefill(self.model, caches, self.prompts.chunks(self.prefill_chunk))
        state = DecodeState.start(caches, logits, self.key, policy=self.policy)
        yield np.asarray(state.tokens)
        while True:
            block, state = decode(
                self.model, state, self.key, policy=self.policy, num_steps=self.steps_per_call
            )
            yield from np.asarray(block).T


def _prepare(
    model: DecodeModel,
    prompts: PaddedPrompts,
    *,
    policy: TokenPolicy,
    key: Key[Array, ""] | None,
    capacity: int | None,
    cache_options: Mapping[str, Any] | None,
    **sizes: int,
) -> _Run:
    for name, size in sizes.items():
        if operator.index(size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    # The last token is never appended, nor are those of a call that runs past the end.
    needed = prompts.longest + sizes["max_new_tokens"] - 1
    if capacity is None:
        capacity = bucket(max(needed, sizes["prefill_chunk"]))
    if capacity < needed:
        raise ValueError(
            f"the longest prompt has {prompts.longest} tokens and max_new_tokens is "
            f"{sizes['max_new_tokens']}: that needs a capacity of {needed}, got {capacity}. "
            "Leave capacity out to have it chosen."
        )
    if policy.selector.needs_key:
        key = portable_key(jax.random.key(0, impl="unsafe_rbg") if key is None else key)
    else:
        key = None
    return _Run(
        model=as_pytree(model),
        prompts=prompts,
        policy=policy,
        key=key,
        capacity=capacity,
        cache_options=cache_options or {},
        **sizes | {"prefill_chunk": min(sizes["prefill_chunk"], capacity)},
    )


def _token_ids(ids: Iterable[int]) -> tuple[int, ...]:
    """Sorted and without repetition, so that equal sets are one static argument."""
    if not isinstance(ids, Iterable):
        raise TypeError(f"eos_ids must be a collection of token ids, such as ({ids},); got {ids}.")
    return tuple(sorted({operator.index(i) for i in ids}))
