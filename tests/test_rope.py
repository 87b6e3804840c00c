"""Rotary embedding against float64 NumPy, its group properties, and its configuration."""

import importlib.util
import math
import pathlib
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import _typing
from jax_tkg.rope import LinearScaling, Llama3Scaling, RotaryEmbedding

FAR = 1 << 20
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True])
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)

# Jitted, with the configuration as a static argument.
turn = jax.jit(lambda rotary, x, positions: rotary(x, positions))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def oracle(x, positions, frequencies, interleaved):
    """Rotation in float64 as multiplication by exp(i * position * frequency)."""
    x, pairs = np.asarray(x, np.float64), len(frequencies)
    indices = np.arange(2 * pairs)
    real, imaginary = (
        (indices[0::2], indices[1::2]) if interleaved else (indices[:pairs], indices[pairs:])
    )
    angle = np.asarray(positions, np.float64)[:, :, None, None] * frequencies
    turned = (x[..., real] + 1j * x[..., imaginary]) * np.exp(1j * angle)
    out = x.copy()
    out[..., real], out[..., imaginary] = turned.real, turned.imag
    return out


def cos_sin_error(rotary, head_dim, positions):
    """Largest absolute error of cos and sin against float64."""
    cos, sin = jax.jit(lambda p: rotary.cos_sin(p, head_dim))(jnp.asarray(positions)[None])
    assert cos.dtype == sin.dtype == jnp.float32
    angle = positions[:, None].astype(np.float64) * rotary.frequencies(head_dim)
    return max(
        np.abs(np.asarray(cos[0], np.float64) - np.cos(angle)).max(),
        np.abs(np.asarray(sin[0], np.float64) - np.sin(angle)).max(),
    )


# Accuracy


def test_every_position_to_2_20_is_exact():
    worst = max(
        cos_sin_error(RotaryEmbedding(), 16, np.arange(start, start + (1 << 17), dtype=np.int32))
        for start in range(0, FAR, 1 << 17)
    )
    assert worst < 2e-7


@pytest.mark.parametrize(
    ("rotary", "head_dim"),
    [
        (RotaryEmbedding(), 128),
        (RotaryEmbedding(base=100000.0), 64),
        (RotaryEmbedding(base=500000.0, scaling=LLAMA3), 128),
        (RotaryEmbedding(scaling=LinearScaling(4.0)), 80),
        (RotaryEmbedding(base=0.5), 96),  # More than a radian a token.
        (RotaryEmbedding(rotary_dim=2), 64),
    ],
    ids=str,
)
def test_cos_sin_near_2_20(rotary, head_dim):
    positions = np.arange(FAR - 2048, FAR + 1, dtype=np.int32)
    assert cos_sin_error(rotary, head_dim, positions) < 2e-7
    assert cos_sin_error(rotary, head_dim, -positions) < 2e-7


def test_many_turns_a_token():
    positions = np.arange(-16, 17, dtype=np.int32)
    assert cos_sin_error(RotaryEmbedding(base=1e-6), 64, positions) < 2e-7


def test_float32_angles_would_fail_the_accuracy_test():
    positions = np.arange(FAR - 2048, FAR, dtype=np.int32)
    frequencies = RotaryEmbedding().frequencies(64)
    naive = jnp.cos(jnp.asarray(positions, jnp.float32)[:, None] * frequencies.astype(np.float32))
    exact = np.cos(positions[:, None].astype(np.float64) * frequencies)
    assert np.abs(np.asarray(naive) - exact).max() > 1e-2


def test_quadrant_boundaries():
    # A frequency of one eighth of a turn visits every boundary of the argument reduction.
    class EighthTurn:
        def scale(self, frequencies):
            return np.full_like(frequencies, math.pi / 4)

    positions = np.arange(-8, 9, dtype=np.int32)
    assert cos_sin_error(RotaryEmbedding(scaling=EighthTurn()), 2, positions) < 2e-7


def integer_extent(function, *args):
    """Largest magnitude of any integer value computed by `function`."""
    largest = 0

    def run(jaxpr, consts, args):
        nonlocal largest
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return atom.val if hasattr(atom, "val") else values[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if "jaxpr" in eqn.params:
                inner = eqn.params["jaxpr"]
                outputs = run(inner.jaxpr, inner.consts, inputs)
            else:
                outputs = eqn.primitive.bind(*inputs, **eqn.params)
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
            for var, value in zip(eqn.outvars, outputs, strict=True):
                values[var] = value
                if jnp.issubdtype(value.dtype, jnp.integer):
                    largest = max(largest, int(np.abs(np.asarray(value, np.int64)).max()))
        return [read(atom) for atom in jaxpr.outvars]

    closed = jax.make_jaxpr(function)(*args)
    run(closed.jaxpr, closed.consts, args)
    return largest


def test_integers_survive_engines_that_carry_them_in_float32():
    positions = jnp.asarray([[0, 2047, 123456, FAR - 1, FAR, (1 << 22) - 1, -FAR]], jnp.int32)
    extent = integer_extent(lambda p: RotaryEmbedding().cos_sin(p, 128), positions)
    assert 1 << 20 < extent < 1 << 24


def test_lowering_needs_no_trigonometry_or_gather():
    text = (
        jax.jit(RotaryEmbedding(interleaved=True))
        .lower(jnp.zeros((1, 1, 2, 8)), jnp.zeros((1, 1), jnp.int32))
        .as_text()
    )
    assert "stablehlo.multiply" in text
    for operation in ("sine", "gather", "dynamic_slice", "while", "custom_call", "case", "xi64"):
        assert operation not in text


# Rotation


@LAYOUTS
@pytest.mark.parametrize("rotary_dim", [None, 8, 2])
def test_rotation_matches_float64(interleaved, rotary_dim):
    rotary = RotaryEmbedding(interleaved=interleaved, rotary_dim=rotary_dim)
    x = normal(0, 2, 3, 4, 16)
    positions = np.array([[0, 1, 5], [FAR - 2, FAR - 1, FAR]], np.int32)
    out = turn(rotary, x, positions)
    expected = oracle(x, positions, rotary.frequencies(16), interleaved)
    assert out.shape == x.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    assert np.abs(expected[:, 1:] - x[:, 1:]).max() > 0.1


@LAYOUTS
def test_channels_beyond_rotary_dim_pass_bit_for_bit(interleaved):
    x = normal(1, 1, 2, 3, 12)
    x[..., 6] = np.nan
    x[..., 7] = -0.0
    rotary = RotaryEmbedding(interleaved=interleaved, rotary_dim=6)
    out = np.asarray(turn(rotary, x, np.array([[3, 4]])))
    np.testing.assert_array_equal(out[..., 6:].view(np.int32), x[..., 6:].view(np.int32))
    assert np.isfinite(out[..., :6]).all()


def test_layouts_are_one_rotation_up_to_a_permutation():
    x, positions = normal(2, 2, 3, 4, 16), jnp.asarray([[0, 7, FAR], [3, 2, 1]])
    to_interleaved = np.arange(16).reshape(2, 8).T.reshape(16)  # 0, 8, 1, 9, ...
    half_split = turn(RotaryEmbedding(), x, positions)
    interleaved = turn(RotaryEmbedding(interleaved=True), x[..., to_interleaved], positions)
    np.testing.assert_array_equal(half_split[..., to_interleaved], interleaved)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounds_once(dtype):
    x = jnp.asarray(normal(3, 1, 4, 2, 32), dtype)
    positions = jnp.asarray([[1, 10, 1000, FAR]])
    out = turn(RotaryEmbedding(), x, positions)
    assert out.dtype == dtype
    exact = turn(RotaryEmbedding(), x.astype(jnp.float32), positions)
    np.testing.assert_array_equal(out.astype(jnp.float32), exact.astype(dtype).astype(jnp.float32))


@LAYOUTS
def test_negative_sine_and_negative_position_are_the_inverse(interleaved):
    rotary = RotaryEmbedding(interleaved=interleaved, rotary_dim=12)
    x = jnp.asarray(normal(4, 2, 2, 3, 16))
    positions = jnp.asarray([[5, 70000], [FAR, 0]])
    turned = turn(rotary, x, positions)
    cos, sin = jax.jit(lambda p: rotary.cos_sin(p, 16))(positions)
    rotate = jax.jit(rotary.rotate)
    np.testing.assert_allclose(rotate(turned, cos, -sin), x, rtol=0, atol=2e-6)
    np.testing.assert_allclose(turn(rotary, turned, -positions), x, rtol=0, atol=2e-6)
    np.testing.assert_allclose(rotate(x, cos, sin), turned, rtol=0, atol=1e-6)


@hypothesis.given(
    position=st.integers(0, FAR - 4096), distance=st.integers(0, 4096), seed=st.integers(0, 99)
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_scores_depend_on_the_distance_only(position, distance, seed):
    rotary = RotaryEmbedding()
    query, key = normal(seed, 2, 1, 1, 1, 32)

    def score(query_position, key_position):
        turned_query = turn(rotary, query, np.array([[query_position]], np.int32))
        turned_key = turn(rotary, key, np.array([[key_position]], np.int32))
        return np.sum(np.asarray(turned_query, np.float64) * np.asarray(turned_key, np.float64))

    frequencies = rotary.frequencies(32)
    expected = np.sum(query * oracle(key, [[distance]], frequencies, interleaved=False))
    scale = np.linalg.norm(query) * np.linalg.norm(key)
    assert abs(score(position, position + distance) - expected) < 5e-7 * scale
    assert abs(score(0, distance) - expected) < 5e-7 * scale


# Transformations


def test_jit_vmap_and_grad():
    rotary = RotaryEmbedding(rotary_dim=6)
    x, weights = jnp.asarray(normal(5, 3, 2, 4, 2, 8)), jnp.asarray(normal(6, 3, 2, 4, 2, 8))
    positions = jnp.asarray(np.random.default_rng(7).integers(0, FAR, (3, 2, 4)), jnp.int32)
    looped = np.stack([turn(rotary, a, p) for a, p in zip(x, positions, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(rotary))(x, positions), looped, rtol=0, atol=1e-6)

    loss = jax.grad(lambda a: jnp.sum(rotary(a, positions[0]) * weights[0]))
    # The rotation is linear and orthogonal: its transpose is the inverse rotation.
    inverse = turn(rotary, weights[0], -positions[0])
    np.testing.assert_allclose(jax.jit(loss)(x[0]), inverse, rtol=0, atol=1e-6)


def test_narrow_position_dtype():
    x, positions = jnp.asarray(normal(8, 1, 3, 1, 8)), jnp.asarray([[0, 1, 3000]])
    expected = turn(RotaryEmbedding(), x, positions)
    np.testing.assert_array_equal(turn(RotaryEmbedding(), x, positions.astype(jnp.int16)), expected)


# Frequencies and configuration


def test_frequencies():
    frequencies = RotaryEmbedding(base=500.0, rotary_dim=6).frequencies(16)
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, [1.0, 500 ** (-1 / 3), 500 ** (-2 / 3)], rtol=1e-15)
    np.testing.assert_array_equal(
        RotaryEmbedding(scaling=LinearScaling(4.0)).frequencies(8),
        RotaryEmbedding().frequencies(8) / 4,
    )


def test_llama3_scaling_by_wavelength():
    plain = RotaryEmbedding(base=500000.0).frequencies(128)
    scaled = RotaryEmbedding(base=500000.0, scaling=LLAMA3).frequencies(128)
    kinds = set()
    for frequency, result in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            kind, expected = "short", frequency
        elif wavelength > 8192 / 1:
            kind, expected = "long", frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        kinds.add(kind)
        assert result == pytest.approx(expected, rel=1e-14)
    assert kinds == {"short", "between", "long"}


def test_static_and_hashable():
    one = RotaryEmbedding(base=5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert one == RotaryEmbedding(base=5e5, scaling=LLAMA3)
    assert hash(one) == hash(RotaryEmbedding(base=5e5, scaling=LLAMA3))
    assert one != RotaryEmbedding(base=5e5)
    assert jax.tree.leaves(one) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryEmbedding(base=0.0), "base must be a positive"),
        (lambda: RotaryEmbedding(base=math.inf), "base must be a positive"),
        (lambda: RotaryEmbedding(rotary_dim=7), "positive even number"),
        (lambda: RotaryEmbedding(rotary_dim=0), "positive even number"),
        (lambda: RotaryEmbedding(rotary_dim=32).frequencies(16), "does not fit head_dim=16"),
        (lambda: RotaryEmbedding().frequencies(15), "does not fit head_dim=15"),
        (lambda: LinearScaling(-1.0), "factor must be a positive"),
        (lambda: Llama3Scaling(8.0, 0.0, 4.0, 8192), "low_freq_factor must be a positive"),
        (lambda: Llama3Scaling(8.0, 4.0, 4.0, 8192), "greater than low_freq_factor"),
        (
            lambda: rotate_zeros(positions=jnp.zeros((2, 4), jnp.int32)),
            r"got x \(2, 3, 4, 8\), cos",
        ),
        (lambda: rotate_zeros(x=jnp.zeros((2, 3, 8))), r"need x \[B, T, heads, H\]"),
        (lambda: rotate_with_pairs(2), "rotates 4 channel pairs"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("no_shape_checks")
def test_type_errors():
    with pytest.raises(TypeError, match="positions must be integers"):
        rotate_zeros(positions=jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match="x must be a float array"):
        rotate_zeros(x=jnp.zeros((2, 3, 4, 8), jnp.int8))


def rotate_zeros(x=None, positions=None):
    x = jnp.zeros((2, 3, 4, 8)) if x is None else x
    return RotaryEmbedding()(x, jnp.zeros((2, 3), jnp.int32) if positions is None else positions)


def rotate_with_pairs(pairs):
    angles = jnp.zeros((2, 3, pairs))
    return RotaryEmbedding().rotate(jnp.zeros((2, 3, 4, 8)), angles, angles)


def test_annotations_without_jaxtyping(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxtyping", None)
    spec = importlib.util.spec_from_file_location("bare_typing", pathlib.Path(_typing.__file__))
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert set(bare.__all__) == set(_typing.__all__)
    assert bare.Float[bare.Array, "B T"] is jax.Array
    assert bare.Int[bare.Array, " B"] | None == jax.Array | None
