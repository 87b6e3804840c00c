"""A model file's weights in the decoder."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_tkg import RotaryEmbedding
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, decoder_from_gguf
from jax_tkg.models.metadata import LlamaConfig
from tests.flax_layers import dense

SIZES = LlamaConfig(
    num_layers=2,
    hidden_size=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=24,
    rope_base=100.0,
    rms_eps=0.1,
    context_length=64,
    vocab_size=30,
    tie_embeddings=False,
)


def make_model(*, tied=False, biased=True):
    """Named arrays as `jax_tkg.models.read_gguf` gives them, matrices as `[out, in]`."""
    rng = np.random.default_rng(0)
    D, F, V = SIZES.hidden_size, SIZES.mlp_size, SIZES.vocab_size
    layer = {"q": (48, D), "k": (16, D), "v": (16, D), "o": (D, 48), "attn_norm": (D,)}
    layer |= {"gate": (F, D), "up": (F, D), "down": (D, F), "mlp_norm": (D,)}
    layer |= {"q_bias": (48,), "k_bias": (16,), "v_bias": (16,)} if biased else {}
    shapes = {"embed": (V, D), "final_norm": (D,)} | ({} if tied else {"lm_head": (V, D)})
    shapes |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    weights = {n: 0.5 * rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    sizes = dataclasses.replace(SIZES, tie_embeddings=tied)
    return types.SimpleNamespace(config=sizes, weights=weights)


def expected_logits(model, ids):
    """From the named arrays alone."""
    w = {name: np.asarray(array, np.float64) for name, array in model.weights.items()}

    def linear(name):
        bias = {"bias": w[f"{name}_bias"]} if f"{name}_bias" in w else {}
        return {"kernel": w[name].T, **bias}

    layers = [
        {
            "attention_norm": {"scale": w[f"layers.{i}.attn_norm"]},
            "mlp_norm": {"scale": w[f"layers.{i}.mlp_norm"]},
            "attention": {
                **{n: linear(f"layers.{i}.{n}") for n in "qkv"},
                "out": linear(f"layers.{i}.o"),
            },
            **{n: linear(f"layers.{i}.{n}") for n in ("gate", "up", "down")},
        }
        for i in range(2)
    ]
    parameters = {
        "embedding": w["embed"],
        "lm_head": w.get("lm_head"),
        "layers": layers,
        "final_norm": {"scale": w["final_norm"]},
    }
    attention = AttentionConfig(20, 6, 2, 8, rope=RotaryEmbedding(base=100.0))
    tied = "lm_head" not in w
    config = DecoderConfig(30, 2, 24, attention, norm_eps=0.1, tie_embeddings=tied)
    return dense.decoder(config, parameters, ids)


@pytest.mark.parametrize(("tied", "biased"), [(True, False), (False, True)])
def test_logits_from_the_named_arrays(tied, biased):
    model = make_model(tied=tied, biased=biased)
    decoder = decoder_from_gguf(model)
    ids = np.array([[3, 1, 4, 1, 5]])
    logits, _ = nnx.jit(lambda d, ids, c: d(ids, c))(
        decoder, jnp.asarray(ids), decoder.init_caches(1, 5)
    )
    np.testing.assert_allclose(logits[0], expected_logits(model, ids[0]), rtol=2e-5, atol=2e-5)


def test_dtype():
    decoder = decoder_from_gguf(make_model(), dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(decoder))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert decoder.dtype == jnp.bfloat16


def test_no_random_weights_are_made(monkeypatch):
    def normal(stddev):
        def init(key, shape, dtype):
            assert isinstance(key, jax.core.Tracer)
            return jnp.zeros(shape, dtype)

        return init

    monkeypatch.setattr(nnx.initializers, "normal", normal)
    decoder_from_gguf(make_model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.up"), "no weight 'layers.1.up'"),
        (lambda w: w.update(extra=w["embed"]), r"no use for: \['extra'\]"),
        (lambda w: w.update(embed=w["embed"][:5]), "shapes that the sizes ask for"),
    ],
    ids=["missing", "left over", "shape"],
)
def test_weights_that_do_not_fit(change, message):
    model = make_model()
    change(model.weights)
    with pytest.raises(ValueError, match=message):
        decoder_from_gguf(model)


@pytest.mark.example
@pytest.mark.model
def test_smollm2_greedy():
    from jax_tkg.models import read_gguf, smollm2_path

    decoder = decoder_from_gguf(read_gguf(smollm2_path()))
    graph, state = nnx.split(decoder)

    @jax.jit
    def step(state, tokens, caches):
        return nnx.merge(graph, state).next_token_logits(tokens, caches)

    tokens, caches, chosen = (
        jnp.array([[504, 3575, 282, 4649, 314]]),
        decoder.init_caches(1, 32),
        [],
    )
    for _ in range(20):
        logits, caches = step(state, tokens, caches)
        chosen.append(int(logits[0].argmax()))
        tokens = jnp.array([chosen[-1:]])
    assert chosen == [
        *(7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34),
        *(32, 33, 40, 29, 32, 33, 29, 34, 34, 216),
    ]
