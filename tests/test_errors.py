"""What a user reads when a call cannot work: what was given, what is needed and what to do.

Each case is a good call with one thing wrong, and the way out that its message names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg

# Users run without the annotation checks of the test suite.
pytestmark = pytest.mark.usefixtures("no_shape_checks")

B, T, N, K, H, S = 2, 3, 4, 2, 16, 24
Arguments = dict[str, Any]


def ones(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


QUERY, KEY, NEW = ones(B, T, N, H), ones(B, S, K, H), ones(B, T, K, H)
PLAIN = {"query": QUERY, "key": KEY, "value": KEY}
BESIDE = PLAIN | {"new_key": NEW, "new_value": NEW}
CACHE = jax_tkg.KVCache.create(B, S, K, H, layout="BKSH")
LAYOUT = CACHE.kv
INT8 = jax_tkg.KVCache.create(B, S, K, H, dtype=jnp.int8)
BITS = jax_tkg.KVCache.create(B, S, K, H, dtype=jnp.bfloat16, as_bits=True).kv
PAGES = jax_tkg.Paged(
    key=ones(9, K, 8, H),
    value=ones(9, K, 8, H),
    k_scale=None,
    v_scale=None,
    dtype=np.dtype(np.float32),
    page_indices=jnp.ones((B, 3), jnp.int32),
)
POSITIONS = jnp.tile(jnp.arange(S), (B, 1))
ROPE = jax_tkg.RotaryEmbedding(base=1e4)


@dataclass(frozen=True)
class Wrong:
    """A call that cannot work.

    Attributes:
        name: unique.
        given: its arguments.
        says: parts of the message, in order.
        instead: arguments that work, in which the advice was followed.
        error: its type.
    """

    name: str
    given: Arguments
    says: tuple[str, ...]
    instead: Arguments
    error: type[Exception] = ValueError


SHAPES = (
    Wrong(
        "three dimensions",
        PLAIN | {"query": QUERY[:, 0]},
        ("[B, T, N, H], T = 1", "(2, 4, 16)", "(2, 24, 2, 16)"),
        PLAIN | {"query": QUERY[:, :1]},
    ),
    Wrong(
        "one dimension beside",
        BESIDE | {"query": ones(H)},
        ("four dimensions", "(16,)", "(2, 24, 2, 16)"),
        BESIDE,
    ),
    Wrong(
        "no slots",
        PLAIN | {"key": KEY[:, :0], "value": KEY[:, :0]},
        ("at least 1", "(2, 3, 4, 16)", "(2, 0, 2, 16)"),
        PLAIN,
    ),
    Wrong(
        "batch",
        PLAIN | {"query": QUERY[:1]},
        ("batch 1 and the cache 2", "(1, 3, 4, 16)", "(2, 24, 2, 16)", "jax.vmap"),
        PLAIN,
    ),
    Wrong(
        "head_dim",
        PLAIN | {"query": QUERY[..., :8]},
        ("same head_dim", "(2, 3, 4, 8)", "(2, 24, 2, 16)"),
        PLAIN | {"query": QUERY[..., :8], "key": KEY[..., :8]},
    ),
    Wrong(
        "heads",
        PLAIN | {"query": QUERY[:, :, :3]},
        ("multiple of the number of KV heads", "N=3 and K=2", "(2, 3, 3, 16)"),
        PLAIN | {"query": QUERY[:, :, :2]},
    ),
    Wrong(
        "key and value",
        PLAIN | {"value": KEY[:, 1:]},
        ("agree on B, S and K", "S is 24 and 23", "(2, 24, 2, 16)", "(2, 23, 2, 16)"),
        PLAIN | {"value": KEY[..., :8]},
    ),
    Wrong(
        "key of three dimensions",
        PLAIN | {"key": KEY[0]},
        ("four dimensions", "(24, 2, 16)", "(2, 24, 2, 16)"),
        PLAIN,
    ),
    Wrong(
        "layout of three dimensions",
        {"query": QUERY, "key": replace(LAYOUT, key=LAYOUT.key[0])},
        ("four dimensions", "(2, 24, 16) [B, K, S, H]"),
        {"query": QUERY, "key": LAYOUT},
    ),
    Wrong(
        "pages",
        {"query": QUERY, "key": replace(PAGES, value=PAGES.value[1:])},
        ("[P, K, L, H]", "(9, 2, 8, 16)", "(8, 2, 8, 16)"),
        {"query": QUERY, "key": PAGES},
    ),
    Wrong(
        "page table",
        {"query": QUERY, "key": replace(PAGES, page_indices=jnp.ones(3, jnp.int32))},
        ("page_indices must be [B, pages_per_sequence]", "(3,)"),
        {"query": QUERY, "key": PAGES},
    ),
    Wrong(
        "new_key",
        BESIDE | {"new_key": NEW[:, :1]},
        ("new_key must be [B, T, K, H] = (2, 3, 2, 16)", "got (2, 1, 2, 16)", "query (2, 3, 4"),
        BESIDE,
    ),
    Wrong(
        "new_value",
        BESIDE | {"new_value": NEW[..., :8]},
        ("new_value must be", "(2, 3, 2, 16)", "got (2, 3, 2, 8)", "value (2, 24, 2, 16)"),
        BESIDE | {"new_value": NEW[..., :8], "value": KEY[..., :8]},
    ),
    Wrong(
        "lengths",
        PLAIN | {"key_value_seq_lengths": jnp.ones(3, jnp.int32)},
        ("key_value_seq_lengths must be [B] = (2,)", "got (3,)", "query (2, 3, 4, 16)"),
        PLAIN | {"key_value_seq_lengths": jnp.ones(2, jnp.int32)},
    ),
    Wrong(
        "starts",
        PLAIN | {"key_value_seq_starts": [0, 1, 2]},
        ("key_value_seq_starts must be [B] = (2,)", "got (3,)"),
        PLAIN | {"key_value_seq_starts": [0, 1]},
    ),
    Wrong(
        "query_positions",
        PLAIN | {"query_positions": POSITIONS},
        ("query_positions must be [B, T] = (2, 3)", "got (2, 24)"),
        PLAIN | {"query_positions": POSITIONS[:, :T]},
    ),
    Wrong(
        "key_positions",
        PLAIN | {"key_positions": POSITIONS[:, :T], "key_value_seq_lengths": 30},
        ("key_positions must be [B, S] = (2, 24)", "got (2, 3)"),
        PLAIN | {"key_positions": POSITIONS, "key_value_seq_lengths": 30},
    ),
    Wrong(
        "sinks",
        PLAIN | {"sinks": ones(K)},
        ("sinks must be [N] = (4,)", "got (2,)", "query (2, 3, 4, 16)"),
        PLAIN | {"sinks": ones(N)},
    ),
    Wrong(
        "mask of three dimensions",
        PLAIN | {"mask": ones(B, T, S, dtype=bool)},
        ("mask must be [B or 1, N or 1, T or 1, keys], in full (2, 4, 3, 24)", "(2, 3, 24)"),
        PLAIN | {"mask": ones(B, 1, T, S, dtype=bool)},
    ),
    Wrong(
        "mask without the new keys",
        BESIDE | {"mask": ones(1, 1, T, S, dtype=bool)},
        ("in full (2, 4, 3, 27)", "got (1, 1, 3, 24)", "beside the cache count"),
        BESIDE | {"mask": ones(1, 1, T, S + T, dtype=bool)},
    ),
    Wrong(
        "bias of the KV heads",
        PLAIN | {"bias": ones(B, K, T, S)},
        ("bias must be", "(2, 4, 3, 24)", "got (2, 2, 3, 24)"),
        PLAIN | {"bias": ones(B, N, T, S)},
    ),
    Wrong(
        "one key is not all keys",
        PLAIN | {"bias": ones(B, N, T, 1)},
        ("(2, 4, 3, 24)", "got (2, 4, 3, 1)"),
        PLAIN | {"bias": ones(1, 1, 1, S)},
    ),
    Wrong(
        "scale of an array",
        {"query": QUERY, "key": INT8.kv.key, "value": INT8.kv.key, "k_scale": ones(3)},
        ("k_scale must be a number or one per KV head", "(3,)"),
        {"query": QUERY, "key": KEY.astype(jnp.int8), "value": KEY.astype(jnp.int8)}
        | {"k_scale": ones(K), "v_scale": 0.5},
    ),
    Wrong(
        "scale of a layout",
        {"query": QUERY, "key": replace(INT8.kv, v_scale=ones(K))},
        ("v_scale of a layout must be [1, K] = (1, 2), or [B, K] = (2, 2)", "got (2,)"),
        {"query": QUERY, "key": replace(INT8.kv, v_scale=ones(B, K))},
    ),
)

DTYPES = (
    Wrong(
        "integer query",
        PLAIN | {"query": QUERY.astype(int)},
        ("query must be float32, bfloat16, float16", "int32", "Cast"),
        PLAIN | {"query": QUERY.astype(jnp.float16)},
        TypeError,
    ),
    Wrong(
        "integer key",
        PLAIN | {"key": KEY.astype(int), "value": KEY.astype(int)},
        ("key and value must be float32,", "int8", "int32", "Cast"),
        PLAIN | {"key": KEY.astype(jnp.int8), "value": KEY.astype(jnp.int8)},
        TypeError,
    ),
    Wrong(
        "key unlike value",
        PLAIN | {"key": KEY.astype(jnp.bfloat16)},
        ("one dtype", "bfloat16 and float32"),
        PLAIN | {"key": KEY.astype(jnp.bfloat16), "value": KEY.astype(jnp.bfloat16)},
        TypeError,
    ),
    Wrong(
        "layout of another dtype",
        {"query": QUERY, "key": replace(LAYOUT, dtype=np.dtype(jnp.bfloat16))},
        ("dtype bfloat16", "or its bits as uint16", "got float32", "correct the dtype"),
        {"query": QUERY, "key": BITS},
        TypeError,
    ),
    Wrong(
        "float mask",
        PLAIN | {"mask": ones(1, 1, T, S)},
        ("mask must be bool", "float32", "bias="),
        PLAIN | {"bias": ones(1, 1, T, S)},
        TypeError,
    ),
    Wrong(
        "bool bias",
        PLAIN | {"bias": ones(1, 1, T, S, dtype=bool)},
        ("bias must be a float array", "bool"),
        PLAIN | {"mask": ones(1, 1, T, S, dtype=bool)},
        TypeError,
    ),
    Wrong(
        "integer new_key",
        BESIDE | {"new_key": NEW.astype(int)},
        ("new_key must be a float array", "int32"),
        BESIDE | {"new_key": NEW.astype(jnp.bfloat16)},
        TypeError,
    ),
    Wrong(
        "integer sinks",
        PLAIN | {"sinks": ones(N, dtype=int)},
        ("sinks must be a float array", "int32"),
        PLAIN | {"sinks": [0.5] * N},
        TypeError,
    ),
    *(
        Wrong(
            f"{name} of dtype {np.asarray(given).dtype}",
            PLAIN | {name: given},
            (f"{name} must be integers", str(given.dtype if hasattr(given, "dtype") else "float")),
            PLAIN | {name: [1, 2]},
            TypeError,
        )
        for name in ("key_value_seq_lengths", "key_value_seq_starts")
        for given in (ones(B), [-1.5, 2.0], np.ones(B, bool))
    ),
    Wrong(
        "float positions",
        PLAIN | {"query_positions": ones(B, T)},
        ("query_positions must be integers", "float32"),
        PLAIN | {"query_positions": ones(B, T, dtype=jnp.int8)},
        TypeError,
    ),
    Wrong(
        "float page table",
        {"query": QUERY, "key": replace(PAGES, page_indices=ones(B, 3))},
        ("page_indices must be integers", "float32"),
        {"query": QUERY, "key": PAGES},
        TypeError,
    ),
)

OPTIONS = (
    *(
        Wrong(
            f"{name} of {given}",
            PLAIN | {name: given},
            (f"{name} must be at least 0 and at most 24, the number of keys", said),
            PLAIN | {name: instead},
        )
        for name in ("key_value_seq_lengths", "key_value_seq_starts")
        for given, said, instead in (
            ([3, 25], "[3, 25]", [3, 24]),
            (np.array([-1, 3]), "[-1, 3]", np.array([0, 3], np.uint8)),
            (25, "25", 24),
        )
    ),
    Wrong(
        "length without the new keys",
        BESIDE | {"key_value_seq_lengths": S + T + 1},
        ("at most 27", "28"),
        BESIDE | {"key_value_seq_lengths": S + T},
    ),
    Wrong(
        "negative length of a ring",
        PLAIN | {"key_positions": POSITIONS, "key_value_seq_lengths": [-1, 2]},
        ("must be at least 0; got [-1, 2]",),
        PLAIN | {"key_positions": POSITIONS, "key_value_seq_lengths": [1000, 2]},
    ),
    Wrong(
        "positions without lengths",
        PLAIN | {"key_positions": POSITIONS},
        ("key_positions needs key_value_seq_lengths",),
        PLAIN | {"key_positions": POSITIONS, "key_value_seq_lengths": 3},
    ),
    *(
        Wrong(f"scale {x}", PLAIN | {"scale": x}, ("scale must be a finite", str(x)), PLAIN)
        for x in (float("nan"), float("inf"))
    ),
    *(
        Wrong(
            f"cap {x}",
            PLAIN | {"logits_soft_cap": x},
            ("logits_soft_cap must be a finite positive", str(x), "Leave it out"),
            PLAIN | {"logits_soft_cap": 3},
        )
        for x in (0.0, -1.0, float("inf"))
    ),
    *(
        Wrong(
            f"window {x}",
            PLAIN | {"local_window_size": x},
            ("local_window_size must be an int or a pair", str(x), "(w - 1, 0)"),
            PLAIN | {"local_window_size": (3, None)},
        )
        for x in (1.5, (1, 2, 3), "3", True, (1.0, 0))
    ),
    *(
        Wrong(
            f"window {x}",
            PLAIN | {"local_window_size": x},
            ("local_window_size", side, ">= 0 or None", "-1"),
            PLAIN | {"local_window_size": (0, 0)},
        )
        for x, side in ((-1, "left"), ((None, -1), "right"))
    ),
    Wrong(
        "causal by number",
        PLAIN | {"is_causal": 1},
        ("is_causal must be a Python bool", "1", "mask="),
        PLAIN | {"is_causal": np.bool_(True)},
        TypeError,
    ),
    Wrong(
        "scale of a float cache",
        PLAIN | {"k_scale": 2.0},
        ("k_scale is for int8 and 8-bit float caches", "float32", "Drop it"),
        PLAIN,
    ),
    Wrong(
        "scale of a float layout",
        {"query": QUERY, "key": replace(LAYOUT, k_scale=ones(1, K))},
        ("k_scale is for int8 and 8-bit float caches", "float32", "Drop it"),
        {"query": QUERY, "key": LAYOUT},
    ),
)

TOGETHER = (
    Wrong(
        "key alone",
        {"query": QUERY, "key": KEY},
        ("value is missing", "[B, S, K, H]", "KVCache"),
        {"query": QUERY, "key": CACHE},
    ),
    *(
        Wrong(
            f"new_{given} alone",
            PLAIN | {f"new_{given}": NEW},
            ("given together", f"new_{missing} is missing", "Leave both out"),
            BESIDE,
        )
        for given, missing in (("key", "value"), ("value", "key"))
    ),
    *(
        Wrong(
            f"{name} with {what}",
            {"query": QUERY, "key": key, name: value},
            (f"{name} was given with a", "which has its own", f"leave {name} out"),
            {"query": QUERY, "key": key},
        )
        for what, key, extra in (
            ("a cache", CACHE, ("key_value_seq_lengths", "key_value_seq_starts", "key_positions")),
            ("a layout", LAYOUT, ()),
        )
        for name, value in (
            ("value", KEY),
            ("k_scale", 1.0),
            ("v_scale", ones(K)),
            *((n, POSITIONS if n == "key_positions" else [1, 2]) for n in extra),
        )
    ),
    Wrong(
        "rope with the keys in the cache",
        PLAIN | {"rope": ROPE},
        ("rope= rotates the new queries and keys", "give new_key= and new_value="),
        BESIDE | {"rope": ROPE},
    ),
)

WRONG = (*SHAPES, *DTYPES, *OPTIONS, *TOGETHER)


def traced(function: Callable[..., Any], arguments: Arguments) -> Any:
    """A function under jit, whose JAX arrays are traced; nothing is compiled."""
    leaves, tree = jax.tree.flatten(arguments)
    arrays = [x for x in leaves if isinstance(x, jax.Array)]

    def run(arrays: list[jax.Array]) -> Any:
        left = iter(arrays)
        given = [next(left) if isinstance(x, jax.Array) else x for x in leaves]
        return function(**jax.tree.unflatten(tree, given))

    return jax.eval_shape(jax.jit(run), arrays)


def assert_says(message: str, parts: tuple[str, ...]) -> None:
    at = 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not, or not there, in: {message}"
        at = message.index(part, at) + len(part)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_message(wrong: Wrong) -> None:
    """It is the same called eagerly, under jit and in `explain`."""
    runs: tuple[Callable[[], Any], ...] = (
        lambda: jax_tkg.attention_tkg(**wrong.given),
        lambda: traced(jax_tkg.attention_tkg, wrong.given),
        lambda: jax_tkg.explain(**wrong.given),
    )
    for run in runs:
        with pytest.raises(wrong.error) as raised:
            run()
        assert type(raised.value) is wrong.error
        message = str(raised.value)
        assert_says(message, wrong.says)
        assert "\n" not in message
        assert len(message) < 400
        assert message.endswith(".")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_what_to_do_instead_works(wrong: Wrong) -> None:
    out = traced(jax_tkg.attention_tkg, wrong.instead)
    out = out[0] if isinstance(out, tuple) else out
    assert out.shape[:3] == wrong.instead["query"].shape[:3]


def test_names_are_unique() -> None:
    names = [wrong.name for wrong in WRONG]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("scale", "Multiply a traced scale into the query"),
        ("logits_soft_cap", "must be a finite positive Python number"),
        ("is_causal", "Give a traced choice as mask="),
    ],
)
def test_options_cannot_be_traced(name: str, advice: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(advice)):
        jax.eval_shape(lambda x: jax_tkg.attention_tkg(**PLAIN, **{name: x}), jnp.float32(1))


def test_nothing_is_traced_before_an_error() -> None:
    """Neither is the primitive bound nor an implementation asked."""

    class Untouchable:
        name = "untouchable"

        def why_not(self, *_: Any) -> str:
            raise AssertionError

        plan = run = why_not

    with pytest.raises(ValueError, match="same head_dim"):
        jax_tkg.attention_tkg(QUERY[..., :8], KEY, KEY, implementation=Untouchable())


def test_numpy_arrays_and_lists_are_taken() -> None:
    """As by jax.numpy, wherever an array is asked for."""
    got = jax_tkg.attention_tkg(
        np.asarray(QUERY),
        np.asarray(KEY),
        np.asarray(KEY),
        bias=np.zeros((1, 1, 1, S + T)),
        mask=np.ones((1, 1, 1, S + T), bool),
        new_key=np.asarray(NEW),
        new_value=np.asarray(NEW),
        key_value_seq_lengths=np.array([5, 6]),
        query_positions=[[0, 1, 2], [3, 4, 5]],
        sinks=[-np.inf] * N,
    )
    np.testing.assert_allclose(got, 1, rtol=1e-6)
