"""The decoder against its definition, and what its decode step costs once compiled."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_tkg import KVCache, RingKVCache, RotaryEmbedding
from jax_tkg.flax_layers import AttentionConfig, DecoderConfig, LlamaDecoder
from jax_tkg.flax_layers.functional import float32_dot_general
from tests.compiling import AS_USERS
from tests.flax_layers import dense
from tests.hlo import cache_copies

ATTENTION = AttentionConfig(16, 6, 2, 8, rope=RotaryEmbedding(base=100.0))
TIED = DecoderConfig(vocab_size=30, num_layers=2, mlp_dim=24, attention=ATTENTION, norm_eps=0.1)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False, layer_windows=(3, None))
BATCH, LENGTH = 2, 9
TOKENS = np.random.default_rng(0).integers(0, TIED.vocab_size, (BATCH, LENGTH), np.int32)


def parameters_of(decoder):
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))


@functools.cache
def make_decoder(config, dtype=jnp.float32):
    decoder = nnx.eval_shape(
        lambda: LlamaDecoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    nnx.update(decoder, dense.random_like(parameters_of(decoder)))
    return decoder


def definition(decoder):
    """Logits `[B, L, V]` in float64."""
    parameters = dense.float64(parameters_of(decoder))
    return np.stack([dense.decoder(decoder.config, parameters, row) for row in TOKENS])


@nnx.jit
def run(decoder, tokens, caches, counts=None):
    return decoder(tokens, caches, counts)


@nnx.jit
def run_next(decoder, tokens, caches, counts=None):
    return decoder.next_token_logits(tokens, caches, counts)


def assert_close(given, expected):
    np.testing.assert_allclose(given, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-windows"])
def test_decoder_is_its_definition(config):
    decoder, caches = make_decoder(config), make_decoder(config).init_caches(BATCH, LENGTH)
    logits, caches = run(decoder, jnp.asarray(TOKENS), caches)
    assert logits.dtype == jnp.float32
    assert_close(logits, definition(decoder))
    assert [c.lengths.tolist() for c in caches] == [[LENGTH] * BATCH] * config.num_layers


def test_random_weights():
    @jax.jit
    def initial():
        decoder = LlamaDecoder(UNTIED, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
        return parameters_of(decoder)

    leaves = jax.tree.leaves(initial())
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float16)}
    assert all(jnp.any(leaf != 0) for leaf in leaves)


def test_dtype_of_the_computation():
    decoder = make_decoder(TIED, jnp.bfloat16)
    layer, (cache, _) = decoder.layers[0], decoder.init_caches(1, 1)
    out, _ = jax.eval_shape(layer, jnp.ones((1, 1, 16), jnp.bfloat16), cache, None)
    assert out.dtype == jnp.bfloat16
    logits, _ = jax.eval_shape(decoder, jnp.zeros((1, 1), jnp.int32), (cache, cache))
    assert logits.dtype == jnp.float32


def test_a_window_is_of_its_layer():
    assert [UNTIED.layer_attention(i).sliding_window for i in range(2)] == [3, None]
    assert TIED.layer_attention(1) == ATTENTION


@pytest.mark.parametrize("ring_chunk", [None, 4])
def test_next_token_logits_of_ragged_chunks(ring_chunk):
    decoder = make_decoder(UNTIED)
    caches = decoder.init_caches(BATCH, LENGTH, ring_chunk=ring_chunk)
    kinds = [KVCache if ring_chunk is None else RingKVCache, KVCache]
    assert [type(cache) for cache in caches] == kinds
    exact, done = definition(decoder), np.zeros(BATCH, int)
    for counts in ([4, 1], [3, 4], [1, 2], [0, 1], [1, 0]):
        chunk = np.full((BATCH, 4), 29, np.int32)
        for b, count in enumerate(counts):
            chunk[b, :count] = TOKENS[b, done[b] : done[b] + count]
        logits, caches = run_next(decoder, jnp.asarray(chunk), caches, jnp.asarray(counts))
        assert np.isfinite(logits).all()
        done += counts
        for b, count in enumerate(counts):
            if count:
                assert_close(logits[b], exact[b, done[b] - 1])


def test_next_token_logits_in_a_scan():
    decoder = make_decoder(TIED)
    graph, state = nnx.split(decoder)

    @jax.jit
    def generate(state, token, caches):
        def step(carry, _):
            token, caches = carry
            logits, caches = nnx.merge(graph, state).next_token_logits(token[:, None], caches)
            token = jnp.argmax(logits, -1).astype(token.dtype)
            return (token, caches), token

        return jax.lax.scan(step, (token, caches), None, length=6)[1].T

    parameters = dense.float64(parameters_of(decoder))
    chosen = generate(state, jnp.asarray(TOKENS[:, 0]), decoder.init_caches(BATCH, 8))
    for b in range(BATCH):
        ids = [TOKENS[b, 0]]
        for _ in range(6):
            ids.append(int(dense.decoder(TIED, parameters, ids)[-1].argmax()))
        assert chosen[b].tolist() == ids[1:]


def test_tokens_outside_the_vocabulary_are_the_nearest():
    decoder = make_decoder(TIED)
    caches = decoder.init_caches(BATCH, LENGTH)
    outside, nearest = (jnp.asarray(TOKENS).at[:, 3:5].set(ids) for ids in ([-1, 99], [0, 29]))
    chex.assert_trees_all_equal(run(decoder, outside, caches), run(decoder, nearest, caches))


def test_init_caches_passes_its_options_on():
    caches = make_decoder(TIED).init_caches(
        3, 5, dtype=jnp.int8, layout="BSKH", k_scale=0.5, v_scale=2.0
    )
    for cache in caches:
        assert (cache.kv.name, cache.kv.dtype, cache.capacity) == ("BSKH", np.int8, 5)
        assert (cache.kv.k_scale == 0.5).all()
        assert (cache.kv.v_scale == 2.0).all()


def test_wrong_number_of_caches():
    decoder = make_decoder(TIED)
    with pytest.raises(ValueError, match="2 layers and needs a tuple of as many caches, got 1"):
        decoder(jnp.asarray(TOKENS), decoder.init_caches(BATCH, LENGTH)[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"layer_windows": (3,)}, "1 entries for 2 layers"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TIED, **changes)


# What a compiled decode step does with its memory

WIDE = DecoderConfig(
    vocab_size=2048,
    num_layers=2,
    mlp_dim=512,
    attention=AttentionConfig(320, 6, 2, 64, rope=RotaryEmbedding()),
)
CACHE_TILES = {4: 2 * 128 * 1024, 2: 2 * 256 * 1024}  # of keys and of values, in float32
SMALL_MATRIX = 4 * 320 * 384  # the query projection in float32


@pytest.mark.parametrize(
    ("batch", "dtype"), [(1, jnp.float32), (1, jnp.bfloat16), (3, jnp.bfloat16)]
)
def test_decode_step_copies_neither_caches_nor_weights(batch, dtype):
    if dtype == jnp.bfloat16 and jax.__version_info__ < (0, 10):
        pytest.skip("XLA:CPU converted every 16-bit matrix in any case")
    decoder = nnx.eval_shape(
        lambda: LlamaDecoder(WIDE, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(decoder)

    def step(state, tokens, caches):
        return nnx.merge(graph, state).next_token_logits(tokens, caches)

    caches = decoder.init_caches(batch, 8192, dtype=dtype)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=2).lower(state, tokens, caches).compile(AS_USERS)
    assert set(cache_copies(compiled, caches)) <= {"convert"}  # in a fusion: of single elements
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(c.kv.key.nbytes + c.kv.value.nbytes for c in caches)
    assert memory.temp_size_in_bytes < CACHE_TILES[jnp.dtype(dtype).itemsize] + SMALL_MATRIX // 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 1)])
def test_float32_dot_general(shape, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((*shape, 64), (64, 5)))
    dims = (((2,), (0,)), ((), ()))
    exact = np.einsum("btd,df->btf", dense.float64(x), dense.float64(w))
    for wanted in (None, jnp.float32):
        out = float32_dot_general(x, w, dims, preferred_element_type=wanted)
        assert out.dtype == (dtype if wanted is None else wanted)
        one_rounding = float(jnp.finfo(out.dtype).eps) * np.abs(exact) + 1e-5
        assert (np.abs(dense.float64(out) - exact) <= one_rounding).all()
