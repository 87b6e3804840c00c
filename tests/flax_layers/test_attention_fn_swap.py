"""Flax's attention modules, swapped: several tokens in decode; how a swap of nnx behaves."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_tkg import attention_tkg
from jax_tkg.flax_layers import AttentionFn, attention_fn
from jax_tkg.flax_layers.swap import (
    Client,
    NnxAdapter,
    NnxLayer,
    SwapError,
    SwapWarning,
    restore_nnx,
    swap_linen,
    swap_nnx,
)
from jax_tkg.flax_layers.swap.adapters.flax_mha_linen import FlaxLinenMultiHeadAttention
from jax_tkg.flax_layers.swap.adapters.flax_mha_nnx import FlaxMultiHeadAttention

BATCH, LENGTH, WIDTH, HEADS = 2, 8, 16, 4
HAS_GQA = "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters


def tokens():
    rng = np.random.default_rng(5)
    return jnp.asarray(rng.standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32)


def assert_close(given, expected):
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def causal():
    return nn.make_causal_mask(jnp.ones((BATCH, LENGTH)))


# Decode with one and with several tokens


def mha(**options):
    options = {"attention_fn": attention_fn, "decode": False} | options
    return nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0), **options)


def nnx_decode(module, size, x, mask=None):
    module.init_cache((BATCH, LENGTH, WIDTH))
    step = nnx.jit(lambda module, x, mask: module(x, mask=mask, decode=True))
    rows = [None if mask is None else mask[:, :, t : t + size] for t in range(0, LENGTH, size)]
    parts = [step(module, x[:, i * size : (i + 1) * size], row) for i, row in enumerate(rows)]
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "normalize_qk": True}], ids=str)
def test_nnx_decode_is_the_full_forward(size, options):
    if not HAS_GQA and options:
        options = {"normalize_qk": True}
    module, x = mha(attention_fn=nnx.dot_product_attention, **options), tokens()
    expected = module(x, mask=causal())  # Flax's own
    with swap_nnx(module, layers=1):
        assert_close(nnx_decode(module, size, x), expected)
        assert module.cache_index[...] == LENGTH
        assert_close(module(x, mask=causal()), expected)


def test_flax_itself_refuses_several_tokens():
    module = mha()
    with pytest.raises(ValueError, match="Autoregressive cache shape error"):
        nnx_decode(module, 4, tokens())


def test_own_mask_and_options_in_decode():
    """The caller's mask narrows what is seen; the window and cap of the AttentionFn are kept."""
    x, padding = tokens(), jnp.asarray([0, 3])
    mask = jnp.broadcast_to(
        (jnp.arange(LENGTH) >= padding[:, None])[:, None, None], (BATCH, 1, LENGTH, LENGTH)
    )
    module = mha(attention_fn=AttentionFn(local_window_size=(2, 0), logits_soft_cap=0.5))
    expected = module(x, mask=mask & (causal() != 0))
    with swap_nnx(module) as swap:
        options = swap.report.layers[0].runs[0].problem
        assert (options.logits_soft_cap, options.rule.window.left) == (0.5, 2)
        decoded = nnx_decode(module, 4, x, mask)
    for row, pad in enumerate(padding.tolist()):
        assert_close(decoded[row, pad:], expected[row, pad:])


def test_further_batch_axes():
    module, x = mha(), tokens().reshape(1, BATCH, LENGTH, WIDTH)
    with swap_nnx(module):
        module.init_cache(x.shape)
        step = nnx.jit(lambda module, x: module(x, decode=True))
        out = jnp.concatenate([step(module, x[:, :, :4]), step(module, x[:, :, 4:])], axis=2)
    assert_close(out[0], module(x[0], mask=causal()))


def test_nnx_refusals():
    x = tokens()
    with pytest.raises(SwapError, match="attention_fn is <function"):
        swap_nnx(mha(attention_fn=lambda *a, **k: a[0]))
    module = mha(dropout_rate=0.5)
    swap_nnx(module)
    with pytest.raises(NotImplementedError, match="dropout needs the attention weights"):
        module(x, deterministic=False)
    with pytest.raises(NotImplementedError, match="sowing attention weights"):
        module(x, deterministic=True, sow_weights=True)
    with pytest.raises(NotImplementedError, match="does not know something_new"):
        module(x, deterministic=True, something_new=1)
    with pytest.raises(ValueError, match="call init_cache first"):
        module(x, deterministic=True, decode=True)
    module.init_cache((BATCH, 2, WIDTH))
    with pytest.raises(ValueError, match=r"takes new keys of shape .* T at most S"):
        module(x, deterministic=True, decode=True)


def linen_mha(**options):
    return nn.MultiHeadDotProductAttention(HEADS, normalize_qk=True, **options)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("attend", [attention_fn, nn.dot_product_attention], ids=["ours", "flax"])
def test_linen_decode_is_the_full_forward(size, attend):
    x, module = tokens(), linen_mha(decode=True, attention_fn=attend)
    params = linen_mha().init(jax.random.key(0), x)["params"]
    expected = linen_mha().apply({"params": params}, x, mask=causal())
    swap = swap_linen([FlaxLinenMultiHeadAttention()], layers=1)
    with swap as report:
        variables = module.init(jax.random.key(0), x)
        step = jax.jit(lambda v, x: module.apply(v, x, mutable=["cache"]))
        cache, out = variables["cache"], []
        for t in range(0, LENGTH, size):
            y, new = step({"params": params, "cache": cache}, x[:, t : t + size])
            cache = new["cache"]
            out.append(y)
    assert_close(jnp.concatenate(out, axis=1), expected)
    assert cache["cache_index"] == LENGTH
    assert report.layers[0].num_heads == HEADS
    shapes = jax.tree.map(jnp.shape, (module.init(jax.random.key(0), x), variables))
    assert shapes[0] == shapes[1]  # the swap makes the parameters and caches that Flax makes


def test_linen_refusals():
    x, swap = tokens(), swap_linen([FlaxLinenMultiHeadAttention()])
    cases = [
        ({"dropout_rate": 0.5}, {"deterministic": False}, "dropout needs the attention weights"),
        ({}, {"sow_weights": True}, "sow_weights needs the attention weights"),
        ({"attention_fn": AttentionFn(local_window_size=2)}, {}, "may have no right end"),
        ({"attention_fn": AttentionFn(implementation="xla")}, {}, "implementation to swap_linen"),
    ]
    for options, call, message in cases:
        with pytest.raises(NotImplementedError, match=message), swap:
            linen_mha(**options).init(jax.random.key(0), x, **call)
    with pytest.raises(NotImplementedError, match="one batch axis"), swap:
        linen_mha().init(jax.random.key(0), x[None])


# The swap of nnx modules


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mha = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mha(self.norm(x))


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.second = Block(rngs), Block(rngs)
        self.again = self.first  # a shared module is one layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.again(self.second(self.first(x)))


def test_parameters_stay_where_and_what_they_are():
    model = Model()
    before = nnx.to_flat_state(nnx.state(model))
    graphdef = nnx.graphdef(model)
    swap = swap_nnx(model, layers=2)
    after = nnx.to_flat_state(nnx.state(model))
    assert [path for path, _ in before] == [path for path, _ in after]
    assert all(x is y for (_, x), (_, y) in zip(before, after, strict=True))
    assert nnx.graphdef(model) != graphdef
    assert isinstance(model.first.mha, nnx.MultiHeadAttention)
    assert [layer.path for layer in swap.report] == ["again/mha", "second/mha"]
    nnx.update(model, nnx.state(Model()))  # a checkpoint of the original loads
    swap.restore()
    assert nnx.graphdef(model) == graphdef
    assert swap.restore() is None


def test_split_merge_and_clone_keep_the_swap():
    model, x = Model(), tokens()
    expected = model(x)
    swap_nnx(model)
    for copy in (nnx.clone(model), nnx.merge(*nnx.split(model))):
        assert type(copy.second.mha) is type(model.second.mha)
        assert_close(copy(x), expected)
        assert restore_nnx(copy) == 2
        assert type(copy.second.mha) is nnx.MultiHeadAttention
    assert restore_nnx(model) == 2


def test_jit_that_takes_the_model_follows_the_swap():
    traced = []

    @nnx.jit
    def call(model, x):
        traced.append(type(model.first.mha).__name__)
        return model(x)

    model, x = Model(), tokens()
    before = call(model, x)
    with swap_nnx(model) as swap:
        assert_close(call(model, x), before)
        assert swap.require_in(call, model, x) == 3  # the shared one twice
    call(model, x)
    with swap_nnx(model):
        call(model, x)
    assert traced == ["MultiHeadAttention", "SwappedMultiHeadAttention"]  # no more than needed


def test_stale_trace_is_found():
    model, x = Model(), tokens()
    stale = jax.jit(lambda x: model(x))
    stale(x)
    swap = swap_nnx(model)
    with pytest.raises(SwapError, match="runs 0 attention ops of jax_tkg, and 2 layers were"):
        swap.require_in(stale, x)
    assert swap.require_in(jax.jit(lambda x: model(x)), x) == 3
    assert swap.require_in(lambda x: model(x), x) == 3
    with pytest.raises(SwapError, match="runs 1 attention ops"):
        swap.require_in(lambda x: model.first(x), x)


def test_swapping_twice_is_refused():
    model = Model()
    swap = swap_nnx(model)
    with pytest.raises(SwapError, match="again/mha is swapped already"):
        swap_nnx(model)
    swap.restore()
    swap_nnx(model, implementation="reference")
    assert model.first.mha(tokens()).shape == (BATCH, LENGTH, WIDTH)


def test_nothing_to_swap_is_an_error_that_names_what_there_is():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
    with pytest.raises(SwapError, match=r"nothing was swapped.*: Linear, Dropout,.* Sequential\."):
        swap_nnx(model)
    with pytest.raises(SwapError, match="2 layers can be swapped and 3 were expected"):
        swap_nnx(Model(), layers=3)
    with pytest.raises(TypeError, match="MultiHeadDotProduct"):
        swap_nnx(linen_mha())


def test_refused_swap_changes_nothing():
    model = Model()
    model.second.mha.attention_fn = lambda *a, **k: a[0]
    graphdef = nnx.graphdef(model)
    with pytest.raises(SwapError, match="second/mha"):
        swap_nnx(model)
    with pytest.raises(ValueError, match="unknown implementation 'no such'"):
        swap_nnx(Model(), implementation="no such")
    assert nnx.graphdef(model) == graphdef


def test_implementation_asked_for_is_reported_and_runs():
    model, x = Model(), tokens()
    swap = swap_nnx(model, implementation="reference")
    assert {layer.implementations for layer in swap.report} == {("attention_tkg: reference",)}
    jaxpr = str(jax.make_jaxpr(lambda x: model(x))(x))
    assert "Reference" in jaxpr
    assert "OnlineSoftmax" not in jaxpr


def test_untested_version_warns():
    old = FlaxMultiHeadAttention(client=Client("flax", ((0, 1), (0, 2))))
    with pytest.warns(SwapWarning, match=r"flax [0-9.]+ is not one of the versions tested"):
        swap_nnx(Model(), [old])


# An adapter of one's own


class Theirs(nnx.Module):
    """Somebody's attention: no cache, causal, one matrix for everything."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
        logits = query @ key.mT * WIDTH**-0.5
        seen = jnp.tri(x.shape[1], dtype=bool)
        return jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)) @ value


@dataclass(frozen=True)
class TheirsAdapter:
    name: str = "theirs"
    client: Client = field(default_factory=Client)
    module_name: str = __name__
    class_name: str = "Theirs"

    def why_not(self, module):
        return None

    def notes(self, module):
        return ()

    def layer(self, module):
        return NnxLayer(1, 1, WIDTH, jnp.float32, "none", {})

    def methods(self, implementation):
        def call(self, x):
            query, key, value = (a[:, :, None] for a in jnp.split(self.qkv(x), 3, axis=-1))
            return attention_tkg(query, key, value, implementation=implementation)[:, :, 0]

        return {"__call__": call}


def test_adapter_of_ones_own():
    model, x = Theirs(nnx.Rngs(0)), tokens()
    expected = model(x)
    with swap_nnx(model, [TheirsAdapter()]) as swap:
        assert swap.require_in(lambda x: model(x), x) == 1
        assert_close(model(x), expected)
    assert isinstance(TheirsAdapter(), NnxAdapter)
    assert swap.report.adapters == ["theirs"]
