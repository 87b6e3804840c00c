"""Generation on a mesh: the token ids of one device, whatever is split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg import RotaryEmbedding
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder
from jax_tkg.flax_layers.partition import decoder_shardings, shard_decoder
from jax_tkg.sharding import AttentionSharding

P = PartitionSpec

PROMPTS = [[1, 2, 3], list(range(4, 24)), [7], [9, 8]]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "prefill_chunk": 16, "capacity": 32}

FRANCE = [504, 3575, 282, 4649, 314]
"""The capital of France is"""
CONTINUED = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]
CONTINUED += [32, 33, 40, 29, 32, 33, 29, 34, 34, 216]


@pytest.fixture(scope="module", autouse=True)
def compile_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(**attention: Any) -> DecoderConfig:
    sizes = {"model_dim": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8} | attention
    layer = AttentionConfig(rope=RotaryEmbedding(), use_sinks=True, qkv_bias=True, **sizes)
    return DecoderConfig(vocab_size=64, num_layers=1, mlp_dim=32, attention=layer)


@pytest.fixture(scope="module")
def model() -> LlamaDecoder:
    return LlamaDecoder(config(), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens(model: LlamaDecoder) -> np.ndarray:
    """On one device."""
    found = jax_tkg.generate(model, PROMPTS, **OPTIONS).tokens
    assert len(set(found.ravel().tolist())) > 8
    return found


def on_mesh(sizes: dict[str, int], **roles: Any) -> AttentionSharding:
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    return AttentionSharding(mesh, **roles)


ALL = {"batch": "data", "heads": "tensor", "keys": "sequence"}


@pytest.mark.parametrize(
    ("sizes", "roles"),
    [
        ({"tensor": 2}, ["heads"]),
        pytest.param({"data": 2}, ["batch"], marks=pytest.mark.slow(reason="as over 8")),
        pytest.param({"sequence": 2}, ["keys"], marks=pytest.mark.slow(reason="as over 8")),
        pytest.param(
            {"data": 2, "sequence": 2},
            ["batch", "keys"],
            marks=pytest.mark.slow(reason="as over 8"),
        ),
        ({"data": 2, "tensor": 2, "sequence": 2}, ["batch", "heads", "keys"]),
    ],
)
def test_same_tokens_as_on_one_device(
    sizes: dict[str, int], roles: list[str], model: LlamaDecoder, tokens: np.ndarray
) -> None:
    sharding = on_mesh(sizes, **{role: ALL[role] for role in roles})
    sharded = shard_decoder(model, sharding)
    got = jax_tkg.generate(sharded, PROMPTS, cache_options={"sharding": sharding}, **OPTIONS)
    np.testing.assert_array_equal(got.tokens, tokens)


def test_where_the_weights_are(model: LlamaDecoder) -> None:
    sharding = on_mesh({"data": 2, "tensor": 2, "sequence": 2}, **ALL)
    sharded = shard_decoder(model, sharding)
    layer = sharded.layers[0]
    split = NamedSharding(sharding.mesh, P("tensor", None))
    by_rows = (layer.attention.out.kernel, layer.down.kernel, sharded.embedding)
    by_columns = [layer.gate.kernel, layer.up.kernel]
    by_columns += [getattr(layer.attention, name).kernel for name in "qkv"]
    for weight in by_rows:
        assert weight[...].sharding.is_equivalent_to(split, 2)
    split = NamedSharding(sharding.mesh, P(None, "tensor"))
    for weight in by_columns:
        assert weight[...].sharding.is_equivalent_to(split, 2)
    for vector in (layer.attention.q.bias, layer.attention.sinks):
        assert vector[...].sharding.spec == P("tensor")
    for norm in (layer.attention_norm, layer.mlp_norm, sharded.final_norm):
        assert norm.scale[...].sharding.is_fully_replicated
    assert len(model.embedding[...].devices()) == 1  # the one that was given is where it was


def test_kv_heads_that_are_too_few_are_on_every_device() -> None:
    sharding = on_mesh({"tensor": 6}, heads="tensor")
    model = LlamaDecoder(config(model_dim=12), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mlp_dim = 32 does not divide into the 6 parts"):
        shard_decoder(model, sharding)
    state = decoder_shardings(model, sharding)
    attention = state["layers"][0]["attention"]
    specs = {name: jax.tree.leaves(attention[name]["kernel"])[0].spec for name in "qkv"}
    assert specs == {"q": P(None, "tensor"), "k": P(), "v": P()}
    (embedding,) = jax.tree.leaves(state["embedding"])
    assert embedding.spec == P()  # 64 tokens do not divide by 6 either


def test_heads_that_cannot_be_split() -> None:
    model = LlamaDecoder(config(num_heads=9, num_kv_heads=3), rngs=nnx.Rngs(0))
    sharding = on_mesh({"tensor": 2}, heads="tensor")
    with pytest.raises(ValueError, match=r"9 query heads and K = 3.*2 parts.*1, 3, 9.*keys="):
        shard_decoder(model, sharding)


@pytest.mark.model
@pytest.mark.slow(reason="compiles 30 layers for each mesh")
@pytest.mark.parametrize(("devices", "role"), [(3, "heads"), (2, "keys"), (2, "batch")])
def test_a_real_model(devices: int, role: str) -> None:
    """9 query heads and 3 KV heads: split by heads over 3 devices, by slots or rows over 2."""
    from jax_tkg.flax_layers import decoder_from_gguf
    from jax_tkg.models import read_gguf, smollm2_path

    sharding = on_mesh({"x": devices}, **{role: "x"})
    model = shard_decoder(decoder_from_gguf(read_gguf(smollm2_path())), sharding)
    result = jax_tkg.generate(
        model,
        [FRANCE] * (2 if role == "batch" else 1),
        max_new_tokens=len(CONTINUED),
        prefill_chunk=8,
        capacity=32,
        cache_options={"sharding": sharding},
    )
    assert all(row == CONTINUED for row in result.tokens.tolist())
