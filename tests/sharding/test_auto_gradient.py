"""Gradients of prompts of which nobody says how they lie: keys and values stay where they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_tkg
from jax_tkg.online import backward as in_tiles
from jax_tkg.prefill import backward
from jax_tkg.prefill import plan as prefill_plan
from jax_tkg.sharding import AttentionSharding
from tests.calls import QUICKLY, assert_close, quickly
from tests.sharding.cells import SPLITS, B, H, K, N, S, collectives, loss, make_mesh
from tests.sharding.test_auto_cache import OF_PROMPT, floats, placed, prompt

SLOW = pytest.mark.slow(reason="programs of their own; the quick one splits everything")
TOKENS = 24


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of queries, and of keys in each part, of which the last ones overlap."""
    monkeypatch.setattr(prefill_plan, "BLOCK_LARGEST", 12)
    monkeypatch.setattr(prefill_plan, "BLOCK_SMALLEST", 3)
    monkeypatch.setattr(in_tiles, "BACKWARD_QUERIES", 9)
    monkeypatch.setattr(in_tiles, "BACKWARD_TILE", 20)
    monkeypatch.setattr(backward, "SMALLEST_TILE", 3)


def beside() -> dict[str, jax.Array]:
    """A chunk beside the cache, with all that its keys and queries share."""
    lengths = jnp.asarray([S + TOKENS, 40, 27, 33, 24, 47, S, 34], jnp.int32)
    return prompt() | {
        "new_key": floats(B, TOKENS, K, H, seed=11),
        "new_value": floats(B, TOKENS, K, H, seed=12),
        "bias": floats(1, N, 1, S + TOKENS, seed=13),
        "alibi_slopes": jnp.abs(floats(N, seed=3)),
        "key_value_seq_lengths": lengths,
    }


LETTERS = OF_PROMPT | {
    "new_key": "BTKH",
    "new_value": "BTKH",
    "bias": "1N11",
    "alibi_slopes": "N",
}


def gradients(given: dict[str, jax.Array], **options: Any) -> Any:
    wanted = {n: x for n, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def total(floats: dict[str, jax.Array]) -> jax.Array:
        call = {**given, **floats}
        return loss(jax_tkg.attention_cte(**call, return_residual=True, **options))

    return jax.grad(total)(wanted)


def program_of(split: str, given: dict[str, jax.Array]) -> tuple[Any, Any, int]:
    """The program, where its arguments lie, and the bytes of a device's keys."""
    sharding = AttentionSharding(make_mesh(split, 8), **SPLITS[split])
    lie = placed(given, {n: LETTERS[n] for n in given}, sharding)
    compiled = jax.jit(lambda x: gradients(x)).lower(lie).compile(QUICKLY)
    return compiled, lie, 4 * B * S * K * H // 8


@pytest.mark.parametrize(
    ("split", "chunk"),
    [
        pytest.param(split, chunk, marks=() if (split, chunk) == ("all", "prompt") else SLOW)
        for split in SPLITS
        for chunk in ("prompt", "beside")
    ],
)
def test_neither_keys_nor_values_are_gathered(split: str, chunk: str) -> None:
    given = prompt() if chunk == "prompt" else beside()
    program, lie, of_device = program_of(split, given)
    found = collectives(program.as_text())
    assert [(n, size) for n, size in found if n != "all-reduce" and size >= of_device] == []
    if chunk == "prompt":
        assert {name for name, _ in found} <= {"all-reduce"}
    want = quickly(lambda x: gradients(x, implementation="reference"))(given)
    assert_close(program(lie), want, 2e-5)


def test_tiles_of_consecutive_slots_would_be_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward.math, "gcd", lambda *_: 1)
    program, _, of_device = program_of("keys", prompt())
    assert collectives(program.as_text()).count(("all-gather", 8 * of_device)) >= 2


@SLOW
def test_second_derivatives_and_vmap() -> None:
    """As before it was a primitive."""
    given = prompt()
    cut = {n: x if n == "sinks" else x[:2] for n, x in given.items()}

    def twice(given: dict[str, jax.Array], **options: Any) -> Any:
        def first(key: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(gradients({**given, "key": key}, **options)["value"]))

        return jax.grad(first)(given["key"])

    want = quickly(lambda x: twice(x, implementation="reference"))(cut)
    assert_close(quickly(twice)(cut), want, 1e-4)
    both = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), given)
    mapped = quickly(jax.vmap(gradients))(both)
    for i in range(2):
        alone = quickly(gradients)(jax.tree.map(lambda x, i=i: x[i], both))
        assert_close(jax.tree.map(lambda x, i=i: x[i], mapped), alone)
