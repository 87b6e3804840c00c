"""The attention layer against its dense definition: every option, every way to feed it tokens."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_tkg import KVCache, RingKVCache, RotaryEmbedding
from jax_tkg.flax_layers import Attention, AttentionConfig, LinenAttention
from tests.flax_layers import dense

BASE = AttentionConfig(model_dim=20, num_heads=6, num_kv_heads=2, head_dim=8)
OPTIONS = {
    "none": {},
    "mha": {"num_kv_heads": 6},
    "mqa": {"num_kv_heads": 1},
    "value_head_dim": {"value_head_dim": 5},
    "qkv_bias": {"qkv_bias": True},
    "out_bias": {"out_bias": True},
    "qk_norm": {"qk_norm_eps": 0.1},
    "rope": {"rope": RotaryEmbedding(base=100.0)},
    "partial_rope": {"rope": RotaryEmbedding(base=100.0, rotary_dim=4, interleaved=True)},
    "window": {"sliding_window": 3},
    "sinks": {"use_sinks": True},
    "soft_cap": {"logits_soft_cap": 0.7},
    "scale": {"scale": 1.5},
    "reference": {"implementation": ("reference", "xla")},
}
EVERYTHING = {
    key: value
    for name, options in OPTIONS.items()
    if name not in ("mha", "mqa", "partial_rope", "reference")
    for key, value in options.items()
}
CONFIGS = {name: dataclasses.replace(BASE, **o) for name, o in OPTIONS.items()}
CONFIGS["everything"] = dataclasses.replace(BASE, **EVERYTHING)
ALL = CONFIGS["everything"]
BATCH, LENGTH, CAPACITY = 2, 9, 12


def parameters_of(layer: Attention) -> dict:
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


@functools.cache
def make_layer(config: AttentionConfig, **options) -> Attention:
    layer = nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0), **options))
    nnx.update(layer, dense.random_like(parameters_of(layer)))
    return layer


def inputs(length: int = LENGTH, seed: int = 1) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((BATCH, length, BASE.model_dim)), jnp.float32)


def definition(layer: Attention, x: jax.Array) -> np.ndarray:
    """`[B, L, D]` in float64."""
    parameters = dense.float64(parameters_of(layer))
    return np.stack([dense.attention(layer.config, parameters, row) for row in dense.float64(x)])


@nnx.jit
def run(layer: Attention, x: jax.Array, cache: KVCache, counts: jax.Array | None = None):
    return layer(x, cache, counts)


def dense_rows(parameters, x: jax.Array) -> jax.Array:
    """The definition with `ALL`, in the dtype of its inputs, differentiable."""
    return jax.vmap(lambda row: dense.attention(ALL, parameters, row, jnp))(x)


def feed(layer: Attention, x: jax.Array, chunk: int, cache: KVCache) -> tuple[jax.Array, KVCache]:
    out = []
    for begin in range(0, x.shape[1], chunk):
        y, cache = run(layer, x[:, begin : begin + chunk], cache)
        out.append(y)
    return jnp.concatenate(out, 1), cache


def assert_close(given, expected, tolerance=2e-5):
    np.testing.assert_allclose(given, expected, rtol=tolerance, atol=tolerance)


# What is computed


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layer_is_its_definition(config):
    layer, x = make_layer(config), inputs()
    out, cache = feed(layer, x, LENGTH, config.init_cache(BATCH, CAPACITY))
    assert_close(out, definition(layer, x))
    assert cache.lengths.tolist() == [LENGTH] * BATCH


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("none", "reference")])
def test_every_option_matters(name):
    # If an option made no difference here, the test above could not tell whether it works.
    x, base, other = inputs(), make_layer(BASE), make_layer(CONFIGS[name])
    assert np.abs(definition(base, x) - definition(other, x)).max() > 1e-2


def test_config_chooses_the_implementation():
    layer = make_layer(dataclasses.replace(BASE, implementation="no such"))
    with pytest.raises(ValueError, match="unknown implementation 'no such'"):
        layer(inputs(), BASE.init_cache(BATCH, CAPACITY))


@pytest.mark.parametrize("config", [BASE, ALL], ids=["none", "everything"])
def test_linen_is_nnx(config):
    layer, x, cache = make_layer(config), inputs(), config.init_cache(BATCH, CAPACITY)
    twin = LinenAttention(config)
    initial = jax.eval_shape(twin.init, jax.random.key(0), x, cache)["params"]
    parameters = parameters_of(layer)
    chex.assert_trees_all_equal_shapes_and_dtypes(initial, parameters)
    counts = jnp.array([LENGTH, 4])
    out = jax.jit(twin.apply)({"params": parameters}, x, cache, counts)
    chex.assert_trees_all_equal(run(layer, x, cache, counts), out)


@pytest.mark.parametrize("module", [Attention, LinenAttention])
def test_initialisers_and_dtypes(module):
    ones = nnx.initializers.ones
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float16, "kernel_init": ones}
    x, cache = inputs().astype(jnp.bfloat16), ALL.init_cache(BATCH, CAPACITY)
    if module is Attention:
        layer = Attention(ALL, rngs=nnx.Rngs(0), **options)
        parameters, out = parameters_of(layer), jax.eval_shape(lambda: layer(x, cache)[0])
    else:
        layer = LinenAttention(ALL, **options)
        (out, _), variables = jax.jit(layer.init_with_output)(jax.random.key(0), x, cache)
        parameters = variables["params"]
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype(jnp.float16)}
    for name in ("q", "k", "v", "out"):
        assert (parameters[name]["kernel"] == 1).all()
        assert (parameters[name]["bias"] == 0).all()
    assert (parameters["sinks"] == 0).all()
    assert (parameters["q_norm"]["scale"] == 1).all()


def test_bfloat16_within_twice_the_error_of_naive():
    layer = make_layer(ALL, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = inputs().astype(jnp.bfloat16)
    out, _ = feed(layer, x, 1, ALL.init_cache(BATCH, CAPACITY, dtype=jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = definition(layer, x)
    parameters = parameters_of(layer)
    naive = jax.jit(dense_rows)(parameters, x)
    assert naive.dtype == jnp.bfloat16
    error, budget = (np.abs(dense.float64(y) - exact).max() for y in (out, naive))
    assert error <= 2 * budget


# How the tokens come


def test_chunks_do_not_matter():
    layer, x = make_layer(ALL), inputs()
    whole = feed(layer, x, LENGTH, ALL.init_cache(BATCH, CAPACITY))
    for chunk in (1, 4):
        in_chunks = feed(layer, x, chunk, ALL.init_cache(BATCH, CAPACITY))
        chex.assert_trees_all_close(in_chunks, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("layout", "ring"), [("BKSH", False), ("BSKH", True)])
def test_ragged_chunks(layout, ring):
    layer, x = make_layer(ALL), inputs(20)
    exact = definition(layer, x)
    chunk, done = 5, np.zeros(BATCH, int)
    cache = ALL.init_cache(BATCH, 20, layout=layout, ring_chunk=chunk if ring else None)
    assert isinstance(cache, RingKVCache) is ring
    for counts in ([5, 2], [1, 5], [3, 0], [0, 4], [5, 5], [1, 1]):
        padded = np.full((BATCH, chunk, BASE.model_dim), 1e3, np.float32)
        for b, count in enumerate(counts):
            padded[b, :count] = x[b, done[b] : done[b] + count]
        out, cache = run(layer, jnp.asarray(padded), cache, jnp.asarray(counts))
        assert np.isfinite(out).all()
        for b, count in enumerate(counts):
            assert_close(out[b, :count], exact[b, done[b] : done[b] + count])
        done += counts
        assert cache.lengths.tolist() == done.tolist()


@pytest.mark.parametrize("with_counts", [False, True])
def test_left_padding(with_counts):
    layer, x, starts = make_layer(ALL), inputs(), np.array([3, 0])
    exact = definition(layer, x)
    cache = ALL.init_cache(BATCH, LENGTH + 3)
    cache = dataclasses.replace(cache, starts=jnp.asarray(starts, jnp.int32))
    padded = np.full((BATCH, 6, BASE.model_dim), 1e3, np.float32)
    for b, start in enumerate(starts):
        padded[b, start:] = x[b, : 6 - start]
    counts = jnp.full(BATCH, 6) if with_counts else None
    prompt, cache = run(layer, jnp.asarray(padded), cache, counts)
    next_x = jnp.stack([x[b, 6 - start] for b, start in enumerate(starts)])[:, None]
    out, cache = run(layer, next_x, cache)
    assert np.isfinite(prompt).all()
    for b, start in enumerate(starts):
        assert_close(prompt[b, start:], exact[b, : 6 - start])
        assert_close(out[b, 0], exact[b, 6 - start])


def test_ring_is_a_cache_with_a_window():
    layer, x = make_layer(ALL), inputs(40)
    ring = ALL.init_cache(BATCH, 40, ring_chunk=4)
    assert ring.capacity == ALL.sliding_window + 4 - 1
    out, ring = feed(layer, x, 4, ring)  # round the ring several times
    linear, _ = feed(layer, x, 4, ALL.init_cache(BATCH, 40))
    assert_close(out, linear)
    assert_close(out, definition(layer, x))


def test_scan_over_decode_steps():
    layer, x = make_layer(ALL), inputs()
    graph, state = nnx.split(layer)

    @jax.jit
    def scan(state, x, cache):
        def step(cache, token):
            out, cache = nnx.merge(graph, state)(token[:, None], cache)
            return cache, out[:, 0]

        _, out = jax.lax.scan(step, cache, jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(out, 0, 1)

    assert_close(scan(state, x, ALL.init_cache(BATCH, CAPACITY)), definition(layer, x))


# Training


def test_gradients_are_those_of_the_definition():
    layer, x = make_layer(ALL), inputs()
    graph, state = nnx.split(layer)
    weights = inputs(seed=2)

    def loss(state, x):
        out, _ = nnx.merge(graph, state)(x, ALL.init_cache(BATCH, LENGTH))
        return jnp.vdot(out, weights)

    def dense_loss(parameters, x):
        return jnp.vdot(dense_rows(parameters, x), weights)

    value, (of_state, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)
    given = value, (nnx.to_pure_dict(of_state), of_x)
    expected = jax.jit(jax.value_and_grad(dense_loss, (0, 1)))(parameters_of(layer), x)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2
    chex.assert_trees_all_close(given, expected, rtol=1e-4, atol=1e-4)


# Caches and errors


def test_init_cache_passes_its_options_on():
    cache = ALL.init_cache(
        3, 4, dtype=jnp.int8, layout="BSKH", k_scale=0.5, v_scale=np.array([1.0, 2.0])
    )
    sizes = cache.kv.shape
    assert (type(cache), cache.kv.name, cache.kv.dtype) == (KVCache, "BSKH", np.int8)
    assert (sizes.batch, cache.capacity, sizes.num_kv_heads) == (3, 4, 2)
    assert (sizes.head_dim, sizes.value_head_dim) == (8, 5)
    assert cache.kv.k_scale.tolist() == [[0.5, 0.5]]
    assert cache.kv.v_scale.tolist() == [[1.0, 2.0]]
    assert ALL.init_cache(1, 4, dtype=jnp.bfloat16, as_bits=False).kv.key.dtype == jnp.bfloat16


def test_ring_only_where_it_saves_something():
    assert type(BASE.init_cache(1, 100, ring_chunk=1)) is KVCache
    small = ALL.init_cache(1, 4, ring_chunk=2)  # a ring would have 3 + 2 - 1 slots
    assert (type(small), small.capacity) == (KVCache, 4)


def test_ring_without_a_window_is_refused():
    cache = RingKVCache.create(BATCH, CAPACITY, 2, 8)
    with pytest.raises(ValueError, match="no sliding window and sees every token"):
        make_layer(BASE)(inputs(), cache)


def test_ring_too_small_for_the_chunk_is_refused():
    layer, cache = make_layer(ALL), ALL.init_cache(BATCH, 100, ring_chunk=4)
    with pytest.raises(ValueError, match=r"6 slots is too small for 5 new tokens.*Make it 7"):
        layer(inputs(5), cache)
    jax.eval_shape(lambda: layer(inputs(4), cache))


def test_cache_of_another_layer_is_refused():
    with pytest.raises(ValueError, match="for this cache"):
        make_layer(BASE)(inputs(), ALL.init_cache(BATCH, CAPACITY))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "multiple of num_kv_heads, got 5 and 2"),
        ({"model_dim": 0}, "model_dim must be at least 1"),
        ({"value_head_dim": 0}, "value_dim must be at least 1"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"rope": RotaryEmbedding(rotary_dim=16)}, "does not fit head_dim=8"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)
