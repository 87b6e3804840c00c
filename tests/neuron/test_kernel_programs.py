"""Whole programs with the kernel in them, as a Neuron device would get them: nothing is refused.

The kernel's compiler is a stand-in, the rest of the program is what would be compiled. Each kind of
program has a twin with one mistake, which is found.
"""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import jax_tkg
from jax_tkg import Greedy, KVCache, RotaryEmbedding, Sample
from jax_tkg.flax_layers import (
    Attention,
    AttentionConfig,
    AttentionFn,
    DecoderConfig,
    LinenAttention,
    LlamaDecoder,
)
from jax_tkg.generation import (
    DecodeState,
    TokenPolicy,
    as_pytree,
    decode,
    portable_key,
    prefill_chunk,
)
from jax_tkg.neuron import check_module
from jax_tkg.nki.cte.implementation import NkiPrefill
from jax_tkg.nki.custom_call import Outline
from tests.lowered import lower_for_neuron
from tests.nki.golden.problems import (
    APPEND_OUTLINE,
    LAYER_FILE,
    OUTLINE,
    PROBLEMS,
    B,
    H,
    K,
    N,
    S,
    T,
    array,
    lowered_layer,
    native_calls,
)

PREFILL_OUTLINE = NkiPrefill(compiler=Outline())
BATCH, CAPACITY, LAYERS, VOCAB, WIDTH = 3, 512, 2, 61, 48


def rules(lowered: Any) -> set[str]:
    return {found.rule for found in check_module(lowered)}


# The op

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window and cap": {"local_window_size": (100, 0), "logits_soft_cap": 30.0},
    "not causal": {"is_causal": False, "scale": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["flat", "new keys beside", "paged"])
def test_the_op(name: str, options: dict[str, Any]) -> None:
    def attend(arrays: dict[str, Any]) -> Any:
        return jax_tkg.attention_tkg(**arrays, **options, implementation=OUTLINE)

    lowered = lower_for_neuron(attend, PROBLEMS[name])
    assert check_module(lowered) == ()
    assert len(native_calls(lowered)) == 1


def test_fused_rotation_beside_a_ring() -> None:
    cache = jax.eval_shape(lambda: jax_tkg.RingKVCache.create(B, S, K, H, dtype=jnp.bfloat16))

    def attend(query: Any, new: Any, cache: Any) -> Any:
        return jax_tkg.attention_tkg(
            query, cache, new_key=new, new_value=new, rope=RotaryEmbedding(), implementation=OUTLINE
        )

    lowered = lower_for_neuron(attend, array(B, T, N, H), array(B, T, K, H), cache)
    assert check_module(lowered) == ()
    assert len(native_calls(lowered)) == 1


def test_a_cache_of_what_the_device_does_not_have() -> None:
    """The twin: 8-bit floats of the other kind."""
    stored = array(B, S, K, H, dtype=jnp.float8_e4m3fn)

    def attend(query: Any, stored: Any) -> Any:
        return jax_tkg.attention_tkg(query, stored, stored, implementation=OUTLINE)

    assert rules(lower_for_neuron(attend, array(B, T, N, H), stored)) == {"float8"}


# Layers

CONFIG = AttentionConfig(
    model_dim=WIDTH, num_heads=6, num_kv_heads=2, head_dim=8, rope=RotaryEmbedding(base=500.0),
    implementation=(OUTLINE, PREFILL_OUTLINE),
)  # fmt: skip


def cache_type(dtype: Any = jnp.bfloat16) -> Any:
    return jax.eval_shape(lambda: KVCache.create(BATCH, CAPACITY, 2, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3])
def test_an_nnx_layer(dtype: Any) -> None:
    graph, state = nnx.split(nnx.eval_shape(lambda: Attention(CONFIG, rngs=nnx.Rngs(0))))

    def step(state: Any, x: jax.Array, cache: KVCache) -> Any:
        return nnx.merge(graph, state)(x, cache)

    x = array(BATCH, 1, WIDTH, dtype=jnp.float32)
    lowered = lower_for_neuron(step, state, x, cache_type(dtype))
    assert check_module(lowered) == ()
    assert len(native_calls(lowered)) == 1


def test_a_linen_layer() -> None:
    layer, x = LinenAttention(CONFIG), array(BATCH, 1, WIDTH, dtype=jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, cache_type())
    lowered = lower_for_neuron(layer.apply, variables, x, cache_type())
    assert check_module(lowered) == ()
    assert len(native_calls(lowered)) == 1


def test_flax_own_layer_with_our_attention() -> None:
    attention = AttentionFn(implementation=(OUTLINE, PREFILL_OUTLINE))
    layer = nn.MultiHeadDotProductAttention(num_heads=4, decode=True, attention_fn=attention)
    x = array(BATCH, CAPACITY, 32, dtype=jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def step(variables: Any, x: jax.Array) -> Any:
        return layer.apply(variables, x, mutable=["cache"])

    lowered = lower_for_neuron(step, variables, x.update(shape=(BATCH, 1, 32)))
    assert check_module(lowered) == ()
    assert len(native_calls(lowered)) == 1


@pytest.mark.parametrize("kind", ["flat", "paged"])
def test_a_decoder_layer_on_kernels(kind: str) -> None:
    """Its decode step is an append, in place, and an attention; JAX has made the rest.

    The golden file is made anew by `python -m tests.nki.golden.problems`.
    """
    lowered = lowered_layer(kind, OUTLINE, APPEND_OUTLINE)
    assert check_module(lowered) == ()
    calls = native_calls(lowered)
    assert [call["func_name"] for call in calls] == ["append", "attention_tkg"]
    assert calls == json.loads(LAYER_FILE.read_text())[kind]
    assert lowered.as_text().count("tf.aliasing_output") >= 2
    cache = calls[0]["operands"]["key"]
    assert calls[0]["results"]["output_0"] == calls[1]["operands"]["key"] == cache


@pytest.mark.parametrize(
    ("attention", "append", "left"),
    [("xla", APPEND_OUTLINE, ["append"]), (OUTLINE, "xla", ["attention_tkg"])],
)
def test_a_decoder_layer_with_a_kernel_less(attention: Any, append: Any, left: list[str]) -> None:
    """The twins."""
    calls = native_calls(lowered_layer("flat", attention, append))
    assert [call["func_name"] for call in calls] == left


# The generation loop


@pytest.fixture(scope="module")
def model() -> LlamaDecoder:
    config = DecoderConfig(
        vocab_size=VOCAB,
        num_layers=LAYERS,
        mlp_dim=64,
        attention=CONFIG,
        tie_embeddings=False,
        layer_windows=(100, None),
    )
    return LlamaDecoder(config, rngs=nnx.Rngs(0))


def cache_types(model: LlamaDecoder) -> Any:
    return jax.eval_shape(lambda: model.init_caches(BATCH, CAPACITY, dtype=jnp.bfloat16))


def lowered_loop(model: LlamaDecoder, selector: Any, key: Any) -> Any:
    policy = TokenPolicy(selector, eos_ids=(0, 2))

    def start(caches: Any, key: Any) -> DecodeState:
        return DecodeState.start(caches, jnp.zeros((BATCH, VOCAB)), key, policy=policy)

    state = jax.eval_shape(start, cache_types(model), key)
    return lower_for_neuron(decode, as_pytree(model), state, key, policy=policy, num_steps=7)


SELECTORS = [Greedy(), Sample(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05)]


@pytest.mark.parametrize("selector", SELECTORS, ids=["greedy", "sample"])
def test_the_generation_loop(model: LlamaDecoder, selector: Any) -> None:
    """Its report is empty; it calls the kernel once for each layer, and its caches stay donated."""
    lowered = lowered_loop(model, selector, portable_key(jax.random.key(0)))
    assert check_module(lowered) == ()
    assert len(native_calls(lowered)) == LAYERS
    assert lowered.as_text().count("tf.aliasing_output") >= 2 * LAYERS


def test_the_prefill(model: LlamaDecoder) -> None:
    """A prompt of 16 tokens goes through the prefill kernel."""
    tokens, counts = array(BATCH, 16, dtype=jnp.int32), array(BATCH, dtype=jnp.int32)
    lowered = lower_for_neuron(prefill_chunk, as_pytree(model), cache_types(model), tokens, counts)
    assert check_module(lowered) == ()
    assert len(native_calls(lowered)) == LAYERS


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        (lambda logits, i: jnp.argmax(logits, -1), "variadic-reduce"),
        (lambda logits, i: jnp.argsort(-logits)[:, 0], "multi-operand-sort"),
        (
            lambda logits, i: lax.cond(i > 3, lambda x: x, lambda x: x + 1, greedy(logits)),
            "conditional",
        ),
    ],
)
def test_a_loop_with_a_mistake(model: LlamaDecoder, mistake: Any, rule: str) -> None:
    """The twins: a loop of one's own that selects tokens in ways that Neuron cannot run."""

    def loop(select: Any) -> Any:
        def step(carry: Any, i: jax.Array) -> Any:
            tokens, caches = carry
            logits, caches = model.next_token_logits(tokens, caches)
            return (select(logits, i).astype(jnp.int32)[:, None], caches), tokens

        def run(*carry: Any) -> Any:
            return lax.scan(step, carry, jnp.arange(7))

        return lower_for_neuron(run, array(BATCH, 1, dtype=jnp.int32), cache_types(model))

    fine, wrong = loop(lambda logits, i: greedy(logits)), loop(mistake)
    assert rules(fine) == set()
    assert rule in rules(wrong)
    assert len(native_calls(fine)) == len(native_calls(wrong)) == LAYERS


def greedy(logits: jax.Array) -> jax.Array:
    return jax_tkg.argmax_tokens(logits)


def test_a_loop_with_other_keys(model: LlamaDecoder) -> None:
    assert rules(lowered_loop(model, SELECTORS[1], jax.random.key(0))) == {"threefry"}
