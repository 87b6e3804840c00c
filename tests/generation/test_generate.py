"""What is generated: against a float64 oracle, and in all the ways that must not matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import Generated, Greedy, Sample, argmax_tokens, generate, stream
from jax_tkg.generation import DecodeState, TokenPolicy, decode, portable_key, prefill
from jax_tkg.generation.prompts import SMALLEST_CAPACITY, bucket, pad_prompts
from tests.generation.tiny_model import VOCAB, TinyModel

COUNT, CHUNK, STEPS = 10, 16, 4
# Below, exactly at and above the length of a chunk; one row ends long before the others.
PROMPTS = [[7], list(range(3, 3 + 16)), [11, 4] * 20, [5, 6, 7, 8, 9]]
SAMPLE = Sample(temperature=2.0, top_k=3)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture(scope="module")
def expected(model: TinyModel) -> list[list[int]]:
    return [model.oracle_tokens(prompt, COUNT) for prompt in PROMPTS]


def continued(model: Any, prompts: Any = PROMPTS, **options: Any) -> Generated:
    return generate(model, prompts, **{"max_new_tokens": COUNT, "prefill_chunk": CHUNK, **options})


def streamed(model: Any, prompts: Any = PROMPTS, **options: Any) -> np.ndarray:
    defaults = {"max_new_tokens": COUNT, "prefill_chunk": CHUNK, "steps_per_call": STEPS}
    return np.stack(list(stream(model, prompts, **{**defaults, **options})), axis=1)


# Greedy tokens


def test_oracle_tokens_are_worth_comparing(expected: list[list[int]]) -> None:
    assert len({token for row in expected for token in row}) > 12
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_a_ragged_batch_gets_the_oracles_tokens(
    model: TinyModel, expected: list[list[int]]
) -> None:
    result = continued(model)
    assert result.tokens.dtype == np.int32
    assert result.tokens.tolist() == expected == result.rows()
    assert result.lengths.tolist() == [COUNT] * len(PROMPTS)
    assert not result.finished.any()


def test_each_row_alone_gets_the_same(model: TinyModel, expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert continued(model, [prompt]).tokens.tolist() == [tokens]


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_chunk_size_does_not_matter(
    model: TinyModel, expected: list[list[int]], chunk: int
) -> None:
    assert continued(model, prefill_chunk=chunk).tokens.tolist() == expected


def test_padded_arrays(model: TinyModel, expected: list[list[int]]) -> None:
    lengths = [len(prompt) for prompt in PROMPTS]
    padded = np.full((len(PROMPTS), 50), -1)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for array in (padded, jnp.asarray(padded)):
        assert continued(model, array, prompt_lengths=lengths).tokens.tolist() == expected
    whole = np.array([PROMPTS[1]])
    assert continued(model, whole).tokens.tolist() == expected[1:2]


def test_one_new_token(model: TinyModel, expected: list[list[int]]) -> None:
    result = continued(model, max_new_tokens=1)
    assert result.tokens.tolist() == [row[:1] for row in expected]


def test_the_smallest_capacity(model: TinyModel, expected: list[list[int]]) -> None:
    # 49 slots hold the longest prompt and all new tokens but the last. The steps run past the end.
    result = continued(model, capacity=49, steps_per_call=STEPS, prefill_chunk=64)
    assert result.tokens.tolist() == expected


def test_what_the_caches_are_made_with() -> None:
    @jax.tree_util.register_static
    class Spy:
        def init_caches(self, *sizes: int, **options: Any) -> Any:
            raise InterruptedError(sizes, options)

        next_token_logits = TinyModel.next_token_logits

    def made(**options: Any) -> Any:
        with pytest.raises(InterruptedError) as caught:
            continued(Spy(), **options)
        return caught.value.args

    assert made() == ((len(PROMPTS), SMALLEST_CAPACITY), {})
    assert made(prompts=[[1] * 500]) == ((1, 512), {})
    options = {"dtype": jnp.float16, "layout": "BSKH"}
    assert made(capacity=60, cache_options=options) == ((len(PROMPTS), 60), options)


# The end of a row


@pytest.fixture(scope="module")
def eos(expected: list[list[int]]) -> int:
    """A token that one row chooses in the middle, and some other never."""
    return next(
        token
        for token in range(VOCAB)
        if any(token in row[2:-1] and token not in row[:2] for row in expected)
        and any(token not in row for row in expected)
    )


def test_eos_stops_a_row_and_no_other(
    model: TinyModel, expected: list[list[int]], eos: int
) -> None:
    at = [row.index(eos) if eos in row else COUNT for row in expected]
    result = continued(model, eos_ids=[eos, VOCAB + 5], pad_id=77)
    for row, tokens, end in zip(result.tokens, expected, at, strict=True):
        assert row.tolist() == (tokens[: end + 1] + [77] * COUNT)[:COUNT]
    assert result.finished.tolist() == [end < COUNT for end in at]
    assert result.lengths.tolist() == [min(end + 1, COUNT) for end in at]
    assert result.rows() == [tokens[:end] for tokens, end in zip(expected, at, strict=True)]


def test_streams_end_with_the_last_row(model: TinyModel, expected: list[list[int]]) -> None:
    eos = [row[5] for row in expected]
    ends = [min(row.index(e) for e in eos if e in row) for row in expected]
    tokens = streamed(model, eos_ids=eos, pad_id=77)
    assert tokens.shape == (len(PROMPTS), max(ends) + 1)
    result = continued(model, eos_ids=eos, pad_id=77, steps_per_call=STEPS)
    np.testing.assert_array_equal(result.tokens[:, : max(ends) + 1], tokens)
    assert (result.tokens[:, max(ends) + 1 :] == 77).all()
    assert [row[: end + 1].tolist() for row, end in zip(tokens, ends, strict=True)] == [
        row[: end + 1] for row, end in zip(expected, ends, strict=True)
    ]


def test_the_first_token_can_end_a_row(model: TinyModel, expected: list[list[int]]) -> None:
    first = [row[0] for row in expected]
    options = {"eos_ids": first, "pad_id": min(first)}  # pad and end may look the same
    assert streamed(model, **options).tolist() == [[token] for token in first]
    assert continued(model, **options).lengths.tolist() == [1] * len(PROMPTS)
    one = first[0]
    assert all(one not in row for row in expected[1:])
    result = continued(model, eos_ids=[one], pad_id=77)
    assert result.tokens.tolist() == [[one] + [77] * (COUNT - 1), *expected[1:]]


def test_a_finished_rows_cache_stays_as_it_is(
    model: TinyModel, expected: list[list[int]], eos: int
) -> None:
    policy = TokenPolicy(Greedy(), (eos, VOCAB + 5), pad_id=77)
    caches = model.init_caches(len(PROMPTS), SMALLEST_CAPACITY)
    logits, caches = prefill(model, caches, pad_prompts(PROMPTS, None).chunks(CHUNK))
    lengths = [len(prompt) for prompt in PROMPTS]
    assert [cache.lengths.tolist() for cache in caches] == [lengths] * 2
    state = DecodeState.start(caches, logits, policy=policy)
    _, state = decode(model, state, policy=policy, num_steps=COUNT - 1)
    assert state.finished.tolist() == [eos in row for row in expected]
    for cache in state.caches:
        for row, (prompt, tokens) in enumerate(zip(lengths, expected, strict=True)):
            # Of the new tokens the cache holds those before the end.
            held = prompt + (tokens.index(eos) if eos in tokens else COUNT - 1)
            assert cache.lengths[row] == held
            keys = np.asarray(cache.kv.dense(np.dtype(np.float32))[0][row])
            assert keys[:, held - 1].any()
            assert not keys[:, held:].any()


# Streams


def test_streams_are_what_is_generated(model: TinyModel, expected: list[list[int]]) -> None:
    assert streamed(model, steps_per_call=1).tolist() == expected


def test_streams_are_lazy_but_check_at_once(model: TinyModel) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        stream(model, PROMPTS, max_new_tokens=0)
    tokens = stream(model, PROMPTS, max_new_tokens=3, prefill_chunk=CHUNK, steps_per_call=1)
    first = next(tokens)
    assert first.shape == (len(PROMPTS),)
    assert first.dtype == np.int32
    assert len(list(tokens)) == 2


# Choosing tokens


def test_sampling_depends_on_the_seed_alone(model: TinyModel) -> None:
    first = continued(model, selector=SAMPLE)
    again = continued(model, selector=SAMPLE, key=jax.random.key(0))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.tokens, streamed(model, selector=SAMPLE))
    other = continued(model, selector=SAMPLE, key=jax.random.key(1))
    assert (first.tokens != other.tokens).mean() > 0.3


def test_steps_and_rows_draw_independently(model: TinyModel) -> None:
    # The logits are all but equal: what repeats is the random numbers.
    draws = continued(model, [[3, 4]] * 4, selector=Sample(temperature=1e4)).tokens
    assert len({tuple(row) for row in draws.tolist()}) == 4
    assert all(len(set(row)) > COUNT // 2 for row in draws.tolist())
    assert (draws[:, :-1] != draws[:, 1:]).any(axis=0).all()


def test_sampled_tokens_are_among_the_kept(model: TinyModel) -> None:
    for prompt, row in zip(PROMPTS, continued(model, selector=SAMPLE).tokens, strict=True):
        for i, token in enumerate(row.tolist()):
            logits = model.oracle_logits([*prompt, *row[:i].tolist()])
            assert token in np.argsort(-logits)[:3]


def test_keys_of_any_kind_become_one() -> None:
    safe = jax.random.key(5, impl="unsafe_rbg")
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = portable_key(jax.random.key(5, impl=impl))
        assert key.dtype == safe.dtype
        assert jax.random.key_data(key).tolist() == jax.random.key_data(safe).tolist()


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (7, r"key must come from jax.random.key\(seed\); got int"),
        (np.zeros(2, np.uint32), "got ndarray"),
        (jax.random.split(jax.random.key(0)), r"key must be a single key; .* shape \(2,\)"),
    ],
)
def test_keys_of_the_wrong_kind(key: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        portable_key(key)


def test_the_callers_key_survives(model: TinyModel) -> None:
    key = jax.random.key(5, impl="unsafe_rbg")
    continued(model, selector=SAMPLE, key=key)
    assert not key.is_deleted()
    jax.random.bits(key)


@dataclasses.dataclass(frozen=True)
class Banning:
    """A selector of the user's own: greedy without some tokens."""

    banned: tuple[int, ...]
    needs_key = False

    def __call__(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
        assert key is None
        return argmax_tokens(logits.at[:, jnp.array(self.banned)].set(-jnp.inf))


def test_a_selector_of_ones_own(model: TinyModel, expected: list[list[int]]) -> None:
    banned = (expected[0][0], expected[1][3])
    result = continued(model, selector=Banning(banned))
    assert not np.isin(result.tokens, banned).any()
    assert result.tokens[0, 0] == np.argsort(-model.oracle_logits(PROMPTS[0]))[1]


# Prompts and buckets


@hypothesis.given(st.lists(st.lists(st.integers(0, 99), min_size=1), min_size=1), st.integers(1, 9))
@hypothesis.settings(max_examples=50)
def test_chunks_put_together_are_the_prompts(rows: list[list[int]], size: int) -> None:
    chunks = pad_prompts(rows, None).chunks(size)
    assert {(tokens.shape, counts.shape) for tokens, counts in chunks} == {
        ((len(rows), size), (len(rows),))
    }
    joined: list[list[int]] = [[] for _ in rows]
    for tokens, counts in chunks:
        for row, part, count in zip(joined, tokens.tolist(), counts, strict=True):
            row += part[:count]
    assert joined == rows
    assert all(counts.any() for _, counts in chunks)


def test_buckets_are_few_and_close() -> None:
    sizes = range(1, 20_000)
    buckets = [bucket(size) for size in sizes]
    assert all(size <= b for size, b in zip(sizes, buckets, strict=True))
    assert all(
        b < 1.25 * size for size, b in zip(sizes, buckets, strict=True) if b > SMALLEST_CAPACITY
    )
    assert len(set(buckets)) < 27
    assert all(bucket(b) == b for b in buckets)


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": []}, ValueError, "give at least one prompt"),
        ({"prompts": [[1], []]}, ValueError, "prompt 1 has length 0: it needs at least one token"),
        ({"prompts": [1, 2]}, TypeError, r"for one prompt give \[\[1, 2, 3\]\]"),
        ({"prompts": "text"}, TypeError, "for text encode it first"),
        ({"prompts": [[1.5]]}, TypeError, "token ids must be integers, got float64"),
        (
            {"prompts": [[1, -2]]},
            ValueError,
            "prompt 0 must be token ids from 0 to 2.31 - 1; got -2",
        ),
        ({"prompts": [[1, 2**32 + 2]]}, ValueError, "token ids from .*; got 4294967298"),
        ({"prompt_lengths": [1]}, ValueError, "prompt_lengths is for prompts given as one padded"),
        ({"prompts": np.ones(3, int)}, ValueError, r"must be \[B, P\], got shape \(3,\)"),
        ({"prompts": np.ones((2, 3))}, TypeError, "token ids must be integers, got float64"),
        (
            {"prompts": np.ones((2, 3), int), "prompt_lengths": [1]},
            ValueError,
            r"one length for each of the 2 rows; got shape \(1,\)",
        ),
        (
            {"prompts": np.ones((2, 3), int), "prompt_lengths": [1, 4]},
            ValueError,
            "prompt 1 has length 4: .* at most the 3 given",
        ),
        (
            {"prompts": np.ones((2, 3), int), "prompt_lengths": [2**32 + 1, -1]},
            ValueError,
            "prompt 0 has length 4294967297",
        ),
        (
            {"prompts": np.ones((2, 3), int), "prompt_lengths": [1.0, 2.0]},
            TypeError,
            "prompt_lengths must be integers, got float64",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk must be at least 1, got 0"),
        ({"steps_per_call": 0}, ValueError, "steps_per_call must be at least 1, got 0"),
        ({"capacity": 48}, ValueError, "the longest prompt has 40 tokens .* 49, got 48"),
        ({"eos_ids": 2}, TypeError, r"such as \(2,\); got 2"),
        ({"model": object()}, TypeError, "has no init_caches and no next_token_logits"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_errors(
    model: TinyModel, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        continued(**{"model": model, **arguments})


@pytest.mark.usefixtures("no_shape_checks")
def test_models_that_are_no_pytree_are_refused() -> None:
    class Closed:
        init_caches = TinyModel.init_caches
        next_token_logits = TinyModel.next_token_logits

    with pytest.raises(TypeError, match=r"register the class with\s+jax.tree_util"):
        continued(Closed())
