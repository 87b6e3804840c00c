"""`attention_fn` inside Flax's own attention modules, and called as they call it."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_tkg
from jax_tkg.flax_layers import AttentionFn, attention_fn, drop_in

BATCH, HEADS, WIDTH, CAPACITY = 2, 4, 16, 6
CAUSAL_IS_KNOWN = "is_causal" in inspect.signature(nnx.dot_product_attention).parameters


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tokens(length=CAPACITY):
    return normal(BATCH, length, WIDTH, seed=5)


def assert_close(given, expected):
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def defined(q, k, v, seen, *, bias=0, scale=None, cap=None):
    """`[T, N, H]`, `[S, K, H]`, `[S, K, Hv]`, seen `[N or 1, T, S]`, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    logits = np.einsum("tnh,snh->nts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    weights = np.where(seen, np.exp(logits + bias), 0)
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


# In Flax's modules


def nnx_module(attend, **options):
    return nnx.MultiHeadAttention(
        HEADS, WIDTH, attention_fn=attend, decode=False, rngs=nnx.Rngs(0), **options
    )


def nnx_decode(attend, x, mask=None, **options):
    """One token after another through Flax's cache; `mask [L, L]` is the caller's own."""
    module = nnx_module(attend)
    module.init_cache((BATCH, CAPACITY, WIDTH))
    step = nnx.jit(lambda module, x, mask: module(x, mask=mask, decode=True, **options))
    out = []
    for t in range(x.shape[1]):
        row = None if mask is None else jnp.broadcast_to(mask[t], (BATCH, 1, 1, CAPACITY))
        out.append(step(module, x[:, t : t + 1], row))
    return jnp.concatenate(out, 1)


def linen_module(attend, **options):
    return nn.MultiHeadDotProductAttention(HEADS, attention_fn=attend, **options)


def linen_decode(attend, x, mask=None):
    module = linen_module(attend, decode=True)
    variables = module.init(jax.random.key(0), jnp.ones((BATCH, CAPACITY, WIDTH)))
    step = jax.jit(lambda v, x, mask: module.apply(v, x, mask=mask, mutable=["cache"]))
    out = []
    for t in range(x.shape[1]):
        row = None if mask is None else jnp.broadcast_to(mask[t], (BATCH, 1, 1, CAPACITY))
        y, cache = step(variables, x[:, t : t + 1], row)
        variables = {"params": variables["params"], **cache}
        out.append(y)
    return jnp.concatenate(out, 1)


DECODERS = pytest.mark.parametrize(
    ("decode", "original"),
    [(nnx_decode, nnx.dot_product_attention), (linen_decode, nn.dot_product_attention)],
    ids=["nnx", "linen"],
)


@DECODERS
def test_decode_is_that_of_flax(decode, original):
    assert_close(decode(attention_fn, tokens()), decode(original, tokens()))


@DECODERS
def test_window_in_decode(decode, original):
    behind = np.arange(CAPACITY)[:, None] - np.arange(CAPACITY)
    windowed = decode(AttentionFn(local_window_size=(2, 0)), tokens())
    assert_close(windowed, decode(original, tokens(), mask=jnp.asarray(behind <= 2)))
    assert np.abs(windowed - decode(attention_fn, tokens())).max() > 1e-2


@pytest.mark.skipif(not CAUSAL_IS_KNOWN, reason="this Flax has no is_causal")
def test_is_causal_in_decode_hides_nothing():
    given = nnx_decode(attention_fn, tokens(), is_causal=True)
    assert_close(given, nnx_decode(nnx.dot_product_attention, tokens()))


@pytest.mark.parametrize("mask", [None, nn.make_causal_mask(jnp.ones((BATCH, CAPACITY)))])
def test_whole_sequences_in_flax(mask):
    x = tokens()
    given, expected = (
        nnx_module(f)(x, mask=mask) for f in (attention_fn, nnx.dot_product_attention)
    )
    assert_close(given, expected)
    given, expected = (
        linen_module(f).init_with_output(jax.random.key(0), x, mask=mask)[0]
        for f in (attention_fn, nn.dot_product_attention)
    )
    assert_close(given, expected)


def test_bfloat16_module():
    module = nnx_module(attention_fn, dtype=jnp.bfloat16)
    assert jax.eval_shape(module, tokens()).dtype == jnp.bfloat16


def test_equal_options_compile_once():
    traces = []

    @nnx.jit
    def call(module, x):
        traces.append(1)
        return module(x)

    for cap in (2.0, 2.0, 3.0):
        call(nnx_module(AttentionFn(logits_soft_cap=cap)), tokens())
    assert len(traces) == 2


def test_dropout_is_refused():
    module = nnx_module(attention_fn, dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match="dropout needs the attention weights"):
        module(tokens(), deterministic=False)
    module(tokens(), deterministic=True)


def test_sowing_is_refused():
    with pytest.raises(NotImplementedError, match="sowing attention weights"):
        nnx_module(attention_fn)(tokens(), sow_weights=True)
    with pytest.raises(NotImplementedError, match="sowing attention weights"):
        linen_module(attention_fn).init(jax.random.key(0), tokens(), sow_weights=True)


def test_einsum_of_linen_is_refused():
    options = {
        "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    }
    with pytest.raises(NotImplementedError, match="a custom einsum"):
        linen_module(attention_fn, **options).init(jax.random.key(0), tokens())


@pytest.mark.parametrize("precision", ["highest", "bfloat16", jax.lax.Precision.HIGH])
def test_any_precision_is_met(precision):
    given = nnx_module(attention_fn, precision=precision)(tokens())
    assert_close(given, nnx_module(nnx.dot_product_attention)(tokens()))


def test_algorithm_as_precision_is_refused():
    q = normal(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"only a jax\.lax\.Precision"):
        attention_fn(q, q, q, precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32)


# Called directly


LEADS = [(), (3,), (2, 2)]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("dense_batch", [False, True])
def test_batch_axes_masks_and_biases(lead, dense_batch):
    T, S, N, K = 3, 5, 4, 2
    q, k, v = normal(*lead, T, N, 8), normal(*lead, S, K, 8, seed=1), normal(*lead, S, K, 6, seed=2)
    dense_shape = (*(lead if dense_batch else ()), N, T, S)
    seen = (normal(*dense_shape, seed=3) > 0).astype(jnp.float32).at[..., 0].set(1)
    bias = normal(*dense_shape, seed=4)
    out = attention_fn(q, k, v, bias=bias, mask=seen)
    assert out.shape == (*lead, T, N, 6)
    for i in np.ndindex(lead):
        j = i if dense_batch else ()
        assert_close(out[i], defined(q[i], k[i], v[i], seen[j] != 0, bias=bias[j]))


def test_low_rank_dense_operands_broadcast():
    q, k = normal(2, 3, 4, 8), normal(2, 5, 4, 8, seed=1)
    row, column = jnp.array([1, 0, 1, 1, 0]), normal(3, 1, seed=2)
    out = attention_fn(q, k, k, mask=row, bias=column)
    for b in range(2):
        assert_close(out[b], defined(q[b], k[b], k[b], np.asarray(row) != 0))


def test_options():
    q, k, v = normal(2, 5, 4, 8), normal(2, 5, 2, 8, seed=1), normal(2, 5, 2, 8, seed=2)
    attend = AttentionFn(scale=1.5, local_window_size=(1, 2), logits_soft_cap=0.5)
    ahead = np.arange(5) - np.arange(5)[:, None]
    for causal, right in ((False, 2), (True, 0)):
        out = attend(q, k, v, is_causal=causal)
        seen = (ahead >= -1) & (ahead <= right)
        for b in range(2):
            assert_close(out[b], defined(q[b], k[b], v[b], seen, scale=1.5, cap=0.5))


def test_is_causal_of_a_whole_sequence():
    q = normal(1, 5, 2, 8)
    assert_close(attention_fn(q, q, q, is_causal=True)[0], defined(*[q[0]] * 3, np.tri(5) > 0))


def test_single_query_without_a_mask_sees_everything():
    q, k = normal(1, 1, 2, 8), normal(1, 5, 2, 8, seed=1)
    assert_close(attention_fn(q, k, k, is_causal=True)[0], defined(q[0], k[0], k[0], True))


@pytest.mark.parametrize(
    ("attend", "causal"), [(attention_fn, True), (AttentionFn(local_window_size=1), False)]
)
def test_unknown_positions_are_refused(attend, causal):
    q, k = normal(1, 2, 2, 8), normal(1, 5, 2, 8, seed=1)
    with pytest.raises(ValueError, match="2 queries among 5 keys: their positions"):
        attend(q, k, k, is_causal=causal)


def test_decode_reads_no_further_than_the_mask(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return jax_tkg.attention_tkg(*args, **kwargs)

    monkeypatch.setattr(drop_in, "attention_tkg", spy)
    q, k = normal(2, 1, 2, 8), normal(2, 6, 2, 8, seed=1)
    seen = jnp.arange(6) < jnp.array([2, 4])[:, None, None, None]
    k = jnp.where(jnp.moveaxis(seen, 3, 1), k, jnp.nan)
    out = attention_fn(q, k, k, mask=seen)
    for b, length in enumerate((2, 4)):
        assert_close(out[b], defined(q[b], k[b, :length], k[b, :length], True))
    # Lengths, which let the loop over keys end early, are read off the mask.
    assert calls[0]["key_value_seq_lengths"].tolist() == [2, 4]


def test_query_that_sees_nothing_gives_zero():
    q, k = normal(1, 1, 2, 8), normal(1, 6, 2, 8, seed=1)
    assert (attention_fn(q, k, k, mask=jnp.zeros((1, 1, 1, 6))) == 0).all()


def test_dtype_of_the_result():
    q, k = normal(1, 2, 2, 8), normal(1, 2, 2, 8, seed=1)
    assert attention_fn(q, k, k).dtype == jnp.float32
    out = attention_fn(q, k, k, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    exact = defined(q[0], k[0], k[0], True)
    np.testing.assert_allclose(out[0].astype(jnp.float32), exact, rtol=0.02, atol=0.02)


def test_implementation_is_passed_on():
    q = normal(1, 2, 2, 8)
    with pytest.raises(ValueError, match="unknown implementation 'no such'"):
        AttentionFn(implementation="no such")(q, q, q)
