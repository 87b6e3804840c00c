"""Gradients of `attention_cte`: equal to autodiff of the oracle, tile by tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.attention import prepare
from jax_tkg.online import backward
from jax_tkg.problem import Op
from jax_tkg.reference import attend_reference
from tests.calls import assert_close, is_float, make_call
from tests.cases import Case
from tests.conformance import parameters
from tests.test_grad import cotangents

BASE = Case("base", op="attention_cte", batch=2, tokens=20, slots=40, head_dim=8, growth=1.0)
WHOLE = replace(BASE, tokens=40, rows="all", holder="arrays")
CASES = (
    replace(WHOLE, name="packed", bounds="packed", slopes=True, bias="shared"),
    replace(WHOLE, name="window", window=(9, 0), sinks=True, slopes=True, kv_heads=4),
    replace(BASE, name="empty", rows="empty", tokens=37, bounds="random", bias="full", cap=2.0),
    replace(BASE, name="chunk", beside=True, rows="starts", layout="paged", page_len=8,
            slopes=True, mask="full", bias="full"),
    replace(BASE, name="padded", positions="given", beside=True, layout="BKHS", window=(15, 3)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, the last ones overlapping."""
    monkeypatch.setattr(backward, "BACKWARD_TILE", 16)
    monkeypatch.setattr(backward, "BACKWARD_QUERIES", 12)


SLOW = ("window", "padded", "empty")


@pytest.mark.parametrize("case", parameters(replace(c, slow=c.name in SLOW) for c in CASES))
def test_equals_autodiff_of_the_oracle(case: Case) -> None:
    call = make_call(case)
    assert_close(cotangents(call.ours, call.arrays), cotangents(call.oracle, call.clean))


def halves(arrays: dict[str, Any]) -> Any:
    """Merged from states over each half of the keys: T queries at the end of S keys."""
    slots = arrays["key"].shape[1]
    at = jnp.broadcast_to(jnp.arange(slots - 20, slots, dtype=jnp.int32), (2, 20))
    parts = []
    for begin, end in ((0, slots // 2), (slots // 2, slots)):
        held = jnp.broadcast_to(jnp.arange(begin, end, dtype=jnp.int32), (2, end - begin))
        parts.append(
            jax_tkg.attention_cte(
                arrays["query"], *(arrays[n][:, begin:end] for n in ("key", "value")),
                key_positions=held, query_positions=at, normalize=False,
                key_value_seq_lengths=jnp.full(2, slots),
                sinks=arrays["sinks"] if begin else None,
            )
        )  # fmt: skip
    return parts[0].merge(parts[1]).finalize()


def test_through_the_merge_of_unnormalised_states() -> None:
    case = replace(BASE, name="states", sinks=True, rows="all", holder="arrays")
    call = make_call(case)
    assert_close(halves(call.arrays), call.ours(call.arrays))
    assert_close(cotangents(halves, call.arrays), cotangents(call.oracle, call.arrays))


@pytest.mark.slow
def test_of_a_state_itself_with_its_maximum_constant() -> None:
    """Also where output and sum do not go into a quotient."""
    call = make_call(replace(WHOLE, name="a state", slopes=True, bounds="random"))

    def ours(arrays: dict[str, Any]) -> Any:
        state = jax_tkg.attention_cte(**arrays, normalize=False)
        return state.output, state.sum

    def oracle(arrays: dict[str, Any]) -> Any:
        problem, ops = prepare(**arrays, op=Op.CTE)
        out, lse = attend_reference(problem, ops)
        top = jax.lax.stop_gradient(jax_tkg.attention_cte(**arrays, normalize=False).max)
        total = jnp.exp(lse - top)
        return out * total[..., None], total

    assert_close(cotangents(ours, call.arrays), cotangents(oracle, call.clean))


def test_memory_is_linear_in_the_prompt() -> None:
    """Forward and backward: nothing of size T x S, whatever the platform's form."""

    def loss(query: jax.Array, key: jax.Array, slopes: jax.Array) -> jax.Array:
        out = jax_tkg.attention_cte(query, key, key, alibi_slopes=slopes)
        return jnp.sum(out.astype(jnp.float32))

    def largest(tokens: int) -> int:
        arrays = [
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((1, tokens, 2, 16), (1, tokens, 1, 16), (2,))
        ]
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled = gradient.lower(*arrays).compile({"xla_backend_optimization_level": 0})
        return int(compiled.memory_analysis().temp_size_in_bytes)

    small, large = largest(2048), largest(8192)
    assert large < 4.5 * small
    assert large < 8192 * 8192  # a byte for each pair would be more


@pytest.mark.slow
def test_narrow_slopes_and_bias_keep_their_dtype() -> None:
    call = make_call(replace(WHOLE, name="narrow", tokens=4, slots=4))
    extra = {
        "alibi_slopes": jnp.ones(4, jnp.bfloat16),
        "bias": jnp.zeros((1, 1, 4, 4), jnp.bfloat16),
    }
    found = cotangents(call.ours, call.arrays | extra)
    assert all(found[name].dtype == jnp.bfloat16 for name in extra)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found) if is_float(x))
