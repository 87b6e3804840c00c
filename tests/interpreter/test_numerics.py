"""How values are rounded into NKI's types, against ml_dtypes, NumPy and exact arithmetic."""

import fractions
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_tkg.nki.interpreter.dtypes import BY_NAME, as_dtype, convert, round_tfloat32

FLOATS = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32")
any_float32 = st.floats(width=32, allow_nan=True, allow_infinity=True)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=8), elements=any_float32)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


@pytest.mark.parametrize("name", FLOATS)
@given(values=arrays)
@example(values=np.float32([[448.0, 464.0, 465.0, 240.0, 248.0, 57344.0, 61440.0, 65520.0, 1e-9]]))
def test_floats_round_once(name: str, values: np.ndarray) -> None:
    got = convert(values, BY_NAME[name])
    with np.errstate(over="ignore"):
        want = values.astype(FLOATS[name])
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(bits(got)[~np.isnan(values)], bits(want)[~np.isnan(values)])
    assert np.isnan(got.astype(np.float32)[np.isnan(values)]).all()


@pytest.mark.parametrize("name", FLOATS)
@given(values=arrays)
def test_exact_mode_rounds_nothing(name: str, values: np.ndarray) -> None:
    got = convert(values, BY_NAME[name], exact=True)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(bits(got), bits(values))


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(value=1 + 2**-11)
@example(value=1 + 3 * 2**-11)
@example(value=float(np.finfo(np.float32).max))
@example(value=-0.0)
@example(value=2.0**-149)
def test_tfloat32_is_the_nearest_of_ten_bits(value: float) -> None:
    """Written with exact fractions: of the two neighbours the nearer, of equals the even one."""
    got = float(round_tfloat32(np.float32([value]))[0])
    exponent = max(math.frexp(value)[1] - 1, -126) if value else -126
    unit = fractions.Fraction(2) ** (exponent - 10)
    want = round(fractions.Fraction(value) / unit) * unit  # Python rounds halves to even
    if abs(want) >= 2**128:
        assert math.isinf(got)
        assert math.copysign(1, got) == math.copysign(1, value)
    else:
        assert fractions.Fraction(got) == want
        assert math.copysign(1, got) == math.copysign(1, value)


def test_tfloat32_keeps_what_is_no_number() -> None:
    values = np.float32([np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(round_tfloat32(values), values)
    np.testing.assert_array_equal(convert(values, BY_NAME["tfloat32"]), values)


@given(values=arrays)
def test_tfloat32_is_done_once(values: np.ndarray) -> None:
    once = convert(values, BY_NAME["tfloat32"])
    np.testing.assert_array_equal(convert(once, BY_NAME["tfloat32"]), once)


@pytest.mark.parametrize("name", INTEGERS)
@given(values=arrays)
@example(values=np.float32([[0.5, 1.5, -0.5, -1.5, 2.5, np.nan, np.inf, -np.inf, 3e9, -3e9]]))
@example(values=np.float32([[2**31, 2**31 - 128, 2**32, 2**32 - 256, -(2**31), 127.5, 128.5]]))
def test_integers_are_the_nearest_that_fits(name: str, values: np.ndarray) -> None:
    low, high = np.iinfo(name).min, np.iinfo(name).max

    def one(value: float) -> int:
        if math.isnan(value):
            return 0
        if math.isinf(value):
            return high if value > 0 else low
        return min(max(round(value), low), high)

    got = convert(values, BY_NAME[name])
    assert got.dtype == np.dtype(name)
    assert got.ravel().tolist() == [one(float(v)) for v in values.ravel()]


@pytest.mark.parametrize("name", INTEGERS)
@given(values=hnp.arrays(np.int32, 5, elements=st.integers(-(2**31), 2**31 - 1)))
def test_integers_become_floats_through_float32(name: str, values: np.ndarray) -> None:
    given_ = values.astype(name)
    np.testing.assert_array_equal(
        convert(given_, BY_NAME["float32"]), given_.astype(np.float32), strict=True
    )
    want = given_.astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(convert(given_, BY_NAME["bfloat16"])), bits(want))


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS, "float32"])
def test_the_same_type_is_left_alone(name: str) -> None:
    dtype = BY_NAME[name]
    values = np.arange(0, 256, dtype=np.uint8).view(dtype.numpy)
    np.testing.assert_array_equal(bits(convert(values, dtype)), bits(values))


@pytest.mark.parametrize("given_", ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)])
def test_names_of_types(given_: Any) -> None:
    assert as_dtype(given_) == "bfloat16"
    assert as_dtype(as_dtype(given_)) is as_dtype(given_)


def test_numbers_and_sizes() -> None:
    sizes = {name: dtype.itemsize for name, dtype in BY_NAME.items()}
    assert sizes["tfloat32"] == sizes["float8_e4m3fn_x4"] == 4
    assert sizes["float4_e2m1fn_x4"] == 2
    assert sizes["bool"] == sizes["float8_e8m0fnu"] == 1
    assert as_dtype(bool) == as_dtype(np.bool_) == "bool"


@pytest.mark.parametrize("unknown", [np.float64, "int64", "complex64", np.int64])
def test_types_nki_lacks(unknown: Any) -> None:
    with pytest.raises(TypeError, match="NKI has no data type"):
        as_dtype(unknown)
