"""Every number of every dtype: what is stored, and what is read back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_tkg import BSKH, Paged, absmax_scale, attention_tkg
from jax_tkg.cache import storage
from tests.cache.model import DTYPES

NARROW = [d for d in DTYPES if d.itemsize < 4]
FLOATS = [d for d in NARROW if d != np.int8]
BYTES = [d for d in NARROW if d.itemsize == 1]
TARGETS = [np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16)]


def all_numbers(dtype: np.dtype) -> np.ndarray:
    codes = np.arange(1 << 8 * dtype.itemsize)
    return codes.astype(f"uint{8 * dtype.itemsize}").view(dtype)


def assert_same(got: jax.Array, want: np.ndarray) -> None:
    """Equal, NaN where NaN, and zeros of one sign."""
    got = np.asarray(got)
    assert got.dtype == want.dtype
    got, want = got.astype(np.float32), want.astype(np.float32)
    np.testing.assert_array_equal(got, want)
    is_number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[is_number]), np.signbit(want[is_number]))


@pytest.mark.parametrize("as_bits", [True, False], ids=["bits", "native"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_is_decoded(dtype: np.dtype, as_bits: bool) -> None:
    numbers = all_numbers(dtype)
    stored = jnp.asarray(numbers.view(storage.stored_dtype(dtype, as_bits=as_bits)))
    decoded = jax.jit(lambda stored: [storage.decode(stored, dtype, t) for t in TARGETS])(stored)
    for got, target in zip(decoded, TARGETS, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            assert_same(got, numbers.astype(target))


@pytest.mark.parametrize("as_bits", [True, False], ids=["bits", "native"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_survives_being_stored(dtype: np.dtype, as_bits: bool) -> None:
    numbers = all_numbers(dtype)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    stored = storage.stored_dtype(dtype, as_bits=as_bits)
    got = jax.jit(storage.encode, static_argnums=(1, 2))(numbers.astype(np.float32), dtype, stored)
    assert got.dtype == stored
    np.testing.assert_array_equal(np.asarray(got).view(dtype), numbers)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_between_are_rounded_to_the_nearest(dtype: np.dtype) -> None:
    """Ties to even. Between two float16 neighbours jax 0.7 rounds 8-bit floats twice: left out."""
    numbers = all_numbers(dtype).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    between = numbers[:-1] / 2 + numbers[1:] / 2
    if dtype.itemsize == 1:
        near = np.nextafter(between.astype(np.float16), np.float16([[np.inf], [-np.inf]]))
        between = np.concatenate([between, near.astype(np.float32).ravel()])
    else:
        near = np.nextafter(between, np.float32([[np.inf], [-np.inf]]))
        between = np.concatenate([between, near.ravel()])
    between = between[np.isfinite(between)]
    got = jax.jit(storage.encode, static_argnums=(1, 2))(between, dtype, dtype)
    np.testing.assert_array_equal(got, between.astype(dtype))


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_bytes_saturate(dtype: np.dtype) -> None:
    top = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    far = jnp.float32([1.5 * top, -1.5 * top, 1e30, -jnp.inf])
    got = storage.decode(storage.encode(far, dtype, dtype), dtype, np.dtype(np.float32))
    np.testing.assert_array_equal(got, [top, -top, top, -top])


def test_integers_are_rounded_to_even() -> None:
    values = jnp.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4])
    got = storage.encode(values, np.dtype(np.int8), np.dtype(np.int8))
    np.testing.assert_array_equal(got, [0, 2, 2, 0, -2, 126, 127])


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize("per_head", [True, False])
def test_absmax_scale_maps_the_largest_to_the_largest(dtype: np.dtype, per_head: bool) -> None:
    values = np.random.default_rng(0).standard_normal((2, 5, 3, 4)).astype(np.float32)
    values[:, :, 1] *= 100
    scale = np.asarray(absmax_scale(jnp.asarray(values), dtype, per_head=per_head))
    assert scale.shape == ((3,) if per_head else ())
    top = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    largest = np.abs(values).max(axis=(0, 1, 3) if per_head else None)
    np.testing.assert_allclose(scale * top, largest, rtol=1e-6)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_absmax_scale_of_nothing_divides(dtype: np.dtype) -> None:
    """Also where the smallest normal number, divided, would be flushed to zero."""
    zeros = jnp.zeros((1, 2, 3, 4))
    scale = absmax_scale(zeros, dtype)
    np.testing.assert_array_equal(zeros / scale[:, None], 0)


def test_only_8_bit_types_have_scales() -> None:
    with pytest.raises(ValueError, match=r"scales are for int8 and 8-bit floats; got float32"):
        absmax_scale(jnp.ones((1, 1, 1, 1)), np.dtype(np.float32))


@pytest.mark.usefixtures("no_shape_checks")
def test_layouts_need_no_more_than_their_arrays() -> None:
    key = jnp.ones((2, 4, 1, 8), jnp.bfloat16)
    layout = BSKH(key, key)
    assert (layout.k_scale, layout.v_scale, layout.dtype) == (None, None, np.dtype(jnp.bfloat16))
    for dtype in ("bfloat16", jnp.bfloat16):
        assert BSKH(key, key, dtype=dtype).dtype == key.dtype  # type: ignore[arg-type]
    table = jnp.array([[1, 0], [0, -1]])
    lengths = jnp.array([8, 3])
    pages = jnp.moveaxis(key, 2, 1)
    paged = Paged(pages, pages, page_indices=table)
    out = attention_tkg(key[:, :1], paged, key_value_seq_lengths=lengths)
    np.testing.assert_array_equal(out, np.ones((2, 1, 1, 8)))
