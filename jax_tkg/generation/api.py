"""`generate` and `stream`: from prompts to tokens, driven from the host call by compiled call."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_tkg._checks import boolean, token_ids, whole_number
from jax_tkg._typing import Array, Key
from jax_tkg.generation.adaptive import Adaptive
from jax_tkg.generation.drafts import Drafter, check_drafter
from jax_tkg.generation.model import (
    DecodeModel,
    as_pytree,
    check_cache_options,
    check_truncation,
    scoring_pytree,
    vocabulary_of,
)
from jax_tkg.generation.policy import TokenPolicy, portable_key
from jax_tkg.generation.prompts import PromptLengths, Prompts, bucket, check_room, pad_prompts
from jax_tkg.generation.results import Collected, Generated
from jax_tkg.generation.runs import Decoding, Plain, Request, Speculative
from jax_tkg.generation.verification import check_selector
from jax_tkg.sampling import Greedy, TokenSelector

__all__ = ["Generated", "generate", "stream"]

GREEDY = Greedy()

SPECULATIVE_STEPS = 4
"""Steps in a call of `generate` when speculating: nobody knows before how many will be needed."""


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
    speculate: Drafter | Adaptive | None = None,
    return_log_probs: bool = False,
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
        steps_per_call: decode in calls of this many steps, and stop when every row has ended; by
            default in one call of `max_new_tokens - 1`, or when speculating in calls of 4.
        capacity: slots of each row of the caches; by default what prompt and answer need, rounded
            up to a bucket.
        cache_options: keywords of the model's `init_caches`, such as `dtype` and `layout`.
        speculate: drafts several tokens a step, which the model (a `ScoringModel`) verifies at
            once: `PromptLookup()`, `DraftModel(smaller_model)` or any `Drafter`; within
            `Adaptive(...)`, only while that pays. Greedy tokens stay the same (up to rounding),
            sampled ones have the same distribution.
        return_log_probs: whether to compute `Generated.log_probs`.

    Returns:
        The tokens of all rows; see `Generated`.

    Raises:
        TypeError: for ids, settings or a key of the wrong kind, a model that cannot be generated
            from, or one or a selector that cannot be speculated with.
        ValueError: for empty prompts, ids that are not in the model's vocabulary (where it has a
            `vocab_size`), sizes below 1, or a capacity that is too small.
    """
    if steps_per_call is None:
        most = whole_number("max_new_tokens", max_new_tokens, least=1)
        steps_per_call = max(most - 1, 1) if speculate is None else SPECULATIVE_STEPS
    request, decoding = prepare(
        model,
        prompts,
        prompt_lengths,
        selector=selector,
        eos_ids=eos_ids,
        pad_id=pad_id,
        key=key,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        steps_per_call=steps_per_call,
        capacity=capacity,
        cache_options=cache_options,
        speculate=speculate,
        with_log_probs=boolean("return_log_probs", return_log_probs),
    )
    *_, collected = Collected.fill(request, decoding)
    return collected.result(speculated=speculate is not None)


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
    speculate: Drafter | Adaptive | None = None,
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
        steps_per_call: steps taken by one call of the compiled loop: few for little delay, many
            for little overhead. It does not change the tokens.
        capacity: as in `generate`.
        cache_options: as in `generate`.
        speculate: as in `generate`. Rows then advance at different speeds; a token is handed out
            when every row that goes on has one.

    Yields:
        int32 `[B]`: the next token of each row, the first one right after the prompts were read.

    Raises:
        TypeError: as `generate`.
        ValueError: as `generate`.
    """
    request, decoding = prepare(
        model,
        prompts,
        prompt_lengths,
        selector=selector,
        eos_ids=eos_ids,
        pad_id=pad_id,
        key=key,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        steps_per_call=steps_per_call,
        capacity=capacity,
        cache_options=cache_options,
        speculate=speculate,
        with_log_probs=False,
    )
    return _columns(request, decoding)


def _columns(request: Request, decoding: Decoding) -> Iterator[np.ndarray]:
    """The tokens `[B]` of one place after another, as soon as all rows have them."""
    given = 0
    for collected in Collected.fill(request, decoding):
        yield from collected.tokens[:, given : collected.complete].T.copy()
        given = collected.complete


def prepare(
    model: DecodeModel,
    given: Prompts,
    prompt_lengths: PromptLengths,
    *,
    selector: TokenSelector,
    eos_ids: Iterable[int],
    pad_id: int,
    key: Key[Array, ""] | None,
    capacity: int | None,
    cache_options: Mapping[str, Any] | None,
    speculate: Drafter | Adaptive | None,
    with_log_probs: bool,
    **sizes: int,
) -> tuple[Request, Decoding]:
    """Checks the arguments of `generate`, by the same names, and says how to decode."""
    vocab_size = vocabulary_of(model)
    prompts = pad_prompts(given, prompt_lengths, vocab_size)
    policy = TokenPolicy(selector, token_ids("eos_ids", eos_ids, vocab_size), pad_id)
    sizes = {name: whole_number(name, size, least=1) for name, size in sizes.items()}
    check_cache_options(cache_options)
    longest, most = prompts.longest, sizes["max_new_tokens"]
    if capacity is None:
        capacity = bucket(max(longest + most - 1, sizes["prefill_chunk"]))
    capacity = whole_number("capacity", capacity, least=1)
    check_room(longest, most, capacity, " Leave capacity out to have it chosen.")
    if policy.selector.needs_key:
        key = portable_key(jax.random.key(0, impl="unsafe_rbg") if key is None else key)
    else:
        key = None
    request = Request(
        model=as_pytree(model) if speculate is None else scoring_pytree(model),
        prompts=prompts,
        policy=policy,
        key=key,
        capacity=capacity,
        cache_options=cache_options or {},
        with_log_probs=with_log_probs,
        **sizes | {"prefill_chunk": min(sizes["prefill_chunk"], capacity)},
    )
    if speculate is None:
        return request, Plain()
    drafter = speculate.drafter if isinstance(speculate, Adaptive) else speculate
    _check_speculation(request, drafter)
    rule = speculate if isinstance(speculate, Adaptive) else Adaptive(drafter, break_even=1)
    return request, Speculative(rule)


def _check_speculation(request: Request, drafter: Drafter) -> None:
    check_drafter("speculate", drafter, request.model, also=", or Adaptive(drafter)")
    check_selector(request.policy.selector)
    batch = len(request.prompts.lengths)
    if request.capacity <= drafter.max_tokens:
        raise ValueError(
            f"a step of {drafter.max_tokens} drafts appends {drafter.max_tokens + 1} tokens to a "
            f"cache of capacity {request.capacity}: leave capacity out, or draft fewer."
        )
    check_truncation(request.model, batch, request.capacity, request.cache_options)
