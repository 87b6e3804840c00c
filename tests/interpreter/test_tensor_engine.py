"""`nc_matmul` and `nc_transpose`: products, what PSUM holds afterwards, and what they refuse."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some, stored

BF16, F16 = ml_dtypes.bfloat16, np.float16
E4M3, E5M2, E4M3FN = ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn
ENGINES, DOUBLE_ROW = nisa.engine, nisa.matmul_perf_mode.double_row


def product(a: Any, b: Any, **options: Any) -> Any:
    """a.T @ b in one instruction."""
    result = nl.ndarray((a.shape[-1], b.shape[-1]), nl.float32, nl.psum)
    nisa.nc_matmul(result, loaded(a), loaded(b), **options)
    return stored(result)


def multiplied(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64).T @ b.astype(np.float64)


def close(got: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(got, multiplied(a, b), atol=1e-5 * a.shape[0])


# Types.


def matmul_of_types(first: str, second: str) -> None:
    result = nl.ndarray((8, 8), nl.float32, nl.psum)
    nisa.nc_matmul(result, filled((8, 8), first), filled((8, 8), second))


TYPES = ("float32", "tfloat32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2")


@pytest.mark.parametrize("first", TYPES)
@pytest.mark.parametrize("second", TYPES)
def test_types_that_mix(first: str, second: str) -> None:
    wide = ("float32", "tfloat32")
    if (first in wide) == (second in wide):
        interpreter.run(matmul_of_types, first, second)
    else:
        refusal("nc_matmul.mixed-float32", matmul_of_types, first, second)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float8_e8m0fnu"])
def test_types_the_tensor_engine_lacks(dtype: str) -> None:
    refusal("nc_matmul.dtype", matmul_of_types, dtype, "bfloat16")
    refusal("nc_matmul.dtype", matmul_of_types, "bfloat16", dtype)


def test_ocp_fp8_needs_trn3() -> None:
    refusal("nc_matmul.dtype", matmul_of_types, "float8_e4m3fn", "bfloat16")
    interpreter.run(matmul_of_types, "float8_e4m3fn", "bfloat16", target="trn3")
    mixed = ("float8_e4m3fn", "float8_e4m3")
    refusal("nc_matmul.mixed-fp8", matmul_of_types, *mixed, target="trn3")


@pytest.mark.parametrize(
    ("first", "second"), [(np.float32,) * 2, (BF16, F16), (E4M3, BF16), (E5M2,) * 2]
)
def test_product(first: Any, second: Any) -> None:
    a, b = some(96, 40, dtype=first), some(96, 130, dtype=second, seed=1)
    run = interpreter.run(product, a, b)
    close(run.outputs, a, b)
    assert run.programs[0][2].macs == 96 * 40 * 130


def test_tfloat32_operands_have_ten_bits() -> None:
    def kernel(a: Any, b: Any) -> Any:
        result = nl.ndarray((1, 1), nl.float32, nl.psum)
        nisa.nc_matmul(result, loaded(a, nl.tfloat32), loaded(b, nl.tfloat32))
        return stored(result)

    x = np.float32([[1 + 2**-10 + 2**-12]])
    one = np.ones((1, 1), np.float32)
    assert interpreter.run(kernel, x, one).outputs == 1 + 2**-10
    assert interpreter.run(kernel, x, one, exact=True).outputs == x
    assert interpreter.run(product, x, one).outputs == x


@pytest.mark.parametrize("exact", [False, True])
def test_free_axes_count_as_one(exact: bool) -> None:
    def kernel(a: Any, b: Any) -> Any:
        result = nl.ndarray((6, 5, 4), nl.float32, nl.psum)
        nisa.nc_matmul(result, loaded(a), loaded(b))
        return stored(result)

    a, b = some(32, 2, 3), some(32, 5, 4, seed=1)
    got = interpreter.run(kernel, a, b, exact=exact).outputs
    close(got.reshape(6, 20), a.reshape(32, 6), b.reshape(32, 20))


# Sizes and places.


def sizes(k: Any, m: int, n: int, result: Any = None, **options: Any) -> None:
    k, k_moving = k if isinstance(k, tuple) else (k, k)
    target = nl.ndarray(
        (m, n) if result is None else result, options.pop("dtype", nl.float32), nl.psum
    )
    stationary, moving = filled((k, m), nl.bfloat16), filled((k_moving, n), nl.bfloat16)
    nisa.nc_matmul(target, stationary, moving, **options)


@pytest.mark.parametrize(
    ("arguments", "target", "rule"),
    [
        ((128, 128, 512), "trn2", None),
        ((128, 128, 512), "trn1", None),
        ((128, 128, 513), "trn2", "moving-free-size"),
        ((128, 128, 513), "trn1", "moving-free-size"),
        ((128, 128, 513), "trn3", None),
        ((128, 128, 4096), "trn3", None),
        ((1, 1, 4097, (1, 4096)), "trn3", "moving-free-size"),
        ((128, 129, 8, (128, 8)), "trn2", "stationary-free-size"),
        (((64, 32), 8, 8), "trn2", "contraction"),
        ((64, 8, 8, (8, 9)), "trn2", "shape"),
        ((64, 8, 9, (9, 8)), "trn2", "shape"),
    ],
)
def test_sizes(arguments: Any, target: str, rule: str | None) -> None:
    if rule is None:
        interpreter.run(sizes, *arguments, target=target)
    else:
        refusal(f"nc_matmul.{rule}", sizes, *arguments, target=target)


def test_bfloat16_results_are_twice_as_wide_on_trn3() -> None:
    interpreter.run(sizes, 8, 8, 8192, None, target="trn3", dtype=nl.bfloat16)
    refusal(
        "nc_matmul.moving-free-size", sizes, 8, 8, 8193, (8, 8192), target="trn3", dtype=nl.bfloat16
    )


@pytest.mark.parametrize(
    ("dtype", "target", "allowed"),
    [
        (nl.float32, "trn1", True),
        (nl.bfloat16, "trn2", False),
        (nl.bfloat16, "trn3", True),
        (nl.float16, "trn3", False),
        (nl.int32, "trn2", False),
    ],
)
def test_type_of_the_result(dtype: Any, target: str, allowed: bool) -> None:
    if allowed:
        interpreter.run(sizes, 8, 8, 8, target=target, dtype=dtype)
    else:
        refusal("nc_matmul.destination-dtype", sizes, 8, 8, 8, target=target, dtype=dtype)


def test_places() -> None:
    def kernel(stationary: Any, moving: Any, result: Any) -> None:
        target = nl.ndarray((8, 8), nl.float32, result)
        nisa.nc_matmul(
            target, filled((8, 8), nl.float32, stationary), filled((8, 8), nl.float32, moving)
        )

    interpreter.run(kernel, nl.sbuf, nl.sbuf, nl.psum)
    refusal("nc_matmul.buffer", kernel, nl.psum, nl.sbuf, nl.psum)
    refusal("nc_matmul.buffer", kernel, nl.sbuf, nl.psum, nl.psum)
    error = refusal("nc_matmul.destination", kernel, nl.sbuf, nl.sbuf, nl.sbuf)
    assert "PSUM" in str(error)


def test_results_start_where_an_engine_can() -> None:
    def kernel(start: int) -> None:
        result = nl.ndarray((128, 8), nl.float32, nl.psum)
        nisa.nc_matmul(result[start : start + 32], filled((8, 32)), filled((8, 8)))

    interpreter.run(kernel, 96)
    refusal("nc_matmul.start-partition", kernel, 16)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize(
    ("address", "columns", "in_one_bank"),
    [
        ((0, 0), slice(0, 512), True),
        ((0, 0), slice(512, 1024), True),
        ((0, 0), slice(256, 768), False),
        ((0, 2048), slice(0, 512), True),
        ((0, 1024), slice(0, 512), False),
        ((0, 1024), slice(0, 256), True),
        ((0, 1024), slice(255, 257), False),
        (None, slice(500, 520), False),
    ],
)
def test_banks(address: Any, columns: slice, in_one_bank: bool, target: str) -> None:
    def kernel() -> None:
        result = nl.ndarray((8, 1024), nl.float32, nl.psum, address=address)
        nisa.nc_matmul(
            result[:, columns], filled((8, 8)), filled((8, columns.stop - columns.start))
        )

    if in_one_bank or target == "trn3":
        interpreter.run(kernel, target=target)
    else:
        assert "bank" in str(refusal("nc_matmul.psum-bank", kernel, target=target))


# Accumulation.


def accumulated(a: Any, b: Any, flags: Any, first: Any = None) -> Any:
    """The product once for each flag, into one tile, after `first(tile)`."""
    result = nl.ndarray((a.shape[1], b.shape[1]), nl.float32, nl.psum)
    if first is not None:
        first(result)
    stationary, moving = loaded(a), loaded(b)
    for flag in flags:
        nisa.nc_matmul(result, stationary, moving, accumulate=flag)
    return stored(result)


A, B = some(16, 8), some(16, 12, seed=1)


@pytest.mark.parametrize(
    ("flags", "times"),
    [
        ((None,), 1),
        ((None, None, None), 3),
        ((False, True, True), 3),
        ((False, None), 2),
        ((None, True), 2),
        ((None, None, False), 1),
        ((np.bool_(False), np.bool_(True)), 2),
        ((None, np.bool_(False)), 1),
        ((0 > 0, 1 > 0), 2),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_accumulation(flags: Any, times: int, exact: bool) -> None:
    got = interpreter.run(accumulated, A, B, flags, exact=exact).outputs
    np.testing.assert_allclose(got, times * multiplied(A, B), rtol=1e-4, atol=1e-5)


def test_accumulating_onto_nothing() -> None:
    error = refusal("nc_matmul.accumulate", accumulated, A, B, (True,))
    assert "accumulate=False" in str(error)


def ones(tile: Any) -> None:
    nisa.memset(tile, 1.0)


def ones_copied(tile: Any) -> None:
    nisa.tensor_copy(tile, filled(tile.shape))


@pytest.mark.parametrize("first", [ones, ones_copied])
def test_filling_psum_does_not_begin_an_accumulation(first: Any) -> None:
    got = interpreter.run(accumulated, A, B, (None,), first).outputs
    np.testing.assert_allclose(got, multiplied(A, B), rtol=1e-4, atol=1e-5)
    refusal("nc_matmul.accumulate", accumulated, A, B, (True,), first)


def test_filling_psum_ends_an_accumulation() -> None:
    def kernel(a: Any, b: Any, flag: Any) -> Any:
        result = nl.ndarray((8, 12), nl.float32, nl.psum)
        stationary, moving = loaded(a), loaded(b)
        nisa.nc_matmul(result, stationary, moving)
        nisa.memset(result[:, :5], 0.0)
        nisa.nc_matmul(result, stationary, moving, accumulate=flag)
        return stored(result)

    refusal("nc_matmul.accumulate", kernel, A, B, True)
    got = interpreter.run(kernel, A, B, None).outputs
    times = np.where(np.arange(12) < 5, 1, 2)
    np.testing.assert_allclose(got, times * multiplied(A, B), rtol=1e-4, atol=1e-5)


def test_each_location_begins_by_itself() -> None:
    def kernel(a: Any, b: Any) -> Any:
        result = nl.ndarray((8, 12), nl.float32, nl.psum)
        stationary, moving = loaded(a), loaded(b)
        nisa.nc_matmul(result[:, 4:8], stationary, moving[:, 4:8])
        nisa.nc_matmul(result, stationary, moving)
        return stored(result)

    got = interpreter.run(kernel, A, B).outputs
    times = np.where(np.arange(12) // 4 == 1, 2, 1)
    np.testing.assert_allclose(got, times * multiplied(A, B), rtol=1e-4, atol=1e-5)


def test_accumulating_onto_what_another_tensor_overwrote() -> None:
    def kernel(flag: Any) -> None:
        first = nl.ndarray((8, 8), nl.float32, nl.psum, address=(0, 0))
        second = nl.ndarray((8, 8), nl.float32, nl.psum, address=(0, 0))
        tile = filled((8, 8))
        nisa.nc_matmul(first, tile, tile)
        nisa.nc_matmul(second, tile, tile)
        nisa.nc_matmul(first, tile, tile, accumulate=flag)

    interpreter.run(kernel, False)
    refusal("memory.dead-tensor", kernel, None)
    refusal("memory.dead-tensor", kernel, True)


# Tiling.


@pytest.mark.parametrize(
    ("k", "m", "position", "size", "target", "rule"),
    [
        (64, 128, (64, 0), (64, 128), "trn1", None),
        (32, 32, (96, 96), (32, 32), "trn2", None),
        (32, 32, (96, 96), (32, 32), "trn1", "tile-size"),
        (32, 64, (32, 64), (32, 64), "trn2", None),
        (64, 128, (), (64, 128), "trn2", "tiling"),
        (64, 128, (64, 0), (), "trn2", "tiling"),
        (16, 16, (0, 0), (16, 32), "trn2", "tile-size"),
        (65, 64, (0, 0), (64, 64), "trn2", "tile-size"),
        (64, 65, (0, 0), (64, 64), "trn2", "tile-size"),
        (32, 32, (16, 0), (32, 32), "trn2", "tile-position"),
        (32, 32, (0, 128), (32, 32), "trn2", "tile-position"),
    ],
)
def test_tiling(k: int, m: int, position: Any, size: Any, target: str, rule: str | None) -> None:
    a, b = some(k, m), some(k, 6, seed=1)
    options: dict[str, Any] = {"tile_position": position, "tile_size": size}
    if rule is None:
        close(interpreter.run(product, a, b, target=target, **options).outputs, a, b)
    else:
        refusal(f"nc_matmul.{rule}", product, a, b, target=target, **options)


# Two fp8 rows a partition.


@pytest.mark.parametrize(("first", "second"), [(E4M3, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_double_row(first: Any, second: Any, target: str) -> None:
    a, b = some(64, 2, 20, dtype=first), some(64, 2, 30, dtype=second, seed=1)
    run = interpreter.run(product, a, b, perf_mode=DOUBLE_ROW, target=target)
    close(run.outputs, a.reshape(128, 20), b.reshape(128, 30))
    assert run.programs[0][2].macs == 2 * 64 * 20 * 30


@pytest.mark.parametrize(
    ("first", "second", "dtypes", "options"),
    [
        ((8, 2, 4), (8, 2, 4), (E4M3, E4M3), {"target": "trn1"}),
        ((8, 2, 4), (8, 2, 4), (BF16, E4M3), {}),
        ((8, 3, 4), (8, 3, 4), (E4M3, E4M3), {}),
        ((8, 8), (8, 8), (E4M3, E4M3), {}),
        ((8, 2, 4), (4, 2, 4), (E4M3, E4M3), {}),
        ((8, 2, 4), (8, 2, 513), (E4M3, E4M3), {}),
        ((8, 2, 4), (8, 2, 4), (E4M3, E4M3), {"tile_position": (0, 0), "tile_size": (32, 32)}),
    ],
)
def test_double_row_rules(first: Any, second: Any, dtypes: Any, options: Any) -> None:
    a, b = some(*first, dtype=dtypes[0]), some(*second, dtype=dtypes[1])
    refusal("nc_matmul.double-row", product, a, b, perf_mode=DOUBLE_ROW, **options)


def test_double_row_writes_float32() -> None:
    def kernel(dtype: Any) -> None:
        tile = filled((8, 2, 4), nl.float8_e4m3)
        nisa.nc_matmul(nl.ndarray((4, 4), dtype, nl.psum), tile, tile, perf_mode=DOUBLE_ROW)

    interpreter.run(kernel, nl.float32)
    refusal("nc_matmul.destination-dtype", kernel, nl.bfloat16)


# Transposes.


@pytest.mark.parametrize("dtype", [np.float32, BF16, F16])
@pytest.mark.parametrize("shape", [(128, 128), (5, 128), (128, 3), (40, 70)])
def test_transpose_on_the_tensor_engine(shape: tuple[int, int], dtype: Any) -> None:
    def kernel(x: Any, engine: Any) -> Any:
        result = nl.ndarray((x.shape[1], x.shape[0]), x.dtype, nl.psum)
        nisa.nc_transpose(result, loaded(x), engine=engine)
        return stored(result)

    x = some(*shape, dtype=dtype)
    x[0, 0], x[-1, -1] = np.nan, np.inf
    for engine in (ENGINES.unknown, ENGINES.tensor):
        run = interpreter.run(kernel, x, engine)
        np.testing.assert_array_equal(run.outputs.astype(np.float32), x.T.astype(np.float32))
        assert run.programs[0][1].engine is ENGINES.tensor


@pytest.mark.parametrize("buffers", [(nl.sbuf, nl.sbuf), (nl.psum, nl.sbuf), (nl.sbuf, nl.psum)])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.uint8])
def test_transpose_on_the_vector_engine(buffers: Any, dtype: Any) -> None:
    def kernel(x: Any) -> Any:
        source = nl.ndarray(x.shape, x.dtype, buffers[0])
        nisa.tensor_copy(source, loaded(x))
        result = nl.ndarray((6, x.shape[0]), x.dtype, buffers[1])
        nisa.nc_transpose(result, source, engine=ENGINES.vector)
        return stored(result)

    x = some(32, 2, 3, dtype=dtype)
    np.testing.assert_array_equal(interpreter.run(kernel, x).outputs, x.reshape(32, 6).T)


def transposed(shape: Any, result: Any, dtypes: Any, buffers: Any, engine: Any) -> None:
    source = filled(shape, dtypes[0], buffers[0])
    nisa.nc_transpose(nl.ndarray(result, dtypes[1], buffers[1]), source, engine=engine)


F32 = (nl.float32, nl.float32)
TO_PSUM, IN_SBUF = (nl.sbuf, nl.psum), (nl.sbuf, nl.sbuf)


@pytest.mark.parametrize(
    ("shape", "result", "dtypes", "buffers", "engine", "rule"),
    [
        ((8, 128), (128, 8), F32, TO_PSUM, ENGINES.tensor, None),
        ((8, 64, 4), (128, 8), F32, TO_PSUM, ENGINES.tensor, "shape"),
        ((8, 4), (8, 4), F32, TO_PSUM, ENGINES.tensor, "shape"),
        ((8, 4), (4, 8), (nl.bfloat16, nl.float32), TO_PSUM, ENGINES.tensor, "dtype"),
        ((8, 4), (4, 8), F32, IN_SBUF, ENGINES.tensor, "buffer"),
        ((8, 4), (4, 8), F32, (nl.psum, nl.psum), ENGINES.tensor, "buffer"),
        ((8, 4), (4, 8), F32, IN_SBUF, ENGINES.scalar, "engine"),
        ((32, 32), (32, 32), F32, IN_SBUF, ENGINES.vector, None),
        ((33, 32), (32, 33), F32, IN_SBUF, ENGINES.vector, "size"),
        ((32, 33), (33, 32), F32, IN_SBUF, ENGINES.unknown, "size"),
    ],
)
def test_transpose_rules(
    shape: Any, result: Any, dtypes: Any, buffers: Any, engine: Any, rule: str | None
) -> None:
    arguments = (shape, result, dtypes, buffers, engine)
    if rule is None:
        interpreter.run(transposed, *arguments)
    else:
        refusal(f"nc_transpose.{rule}", transposed, *arguments)


def test_transposes_stay_in_a_bank() -> None:
    def kernel(at: int) -> None:
        result = nl.ndarray((8, 1024), nl.float32, nl.psum)
        nisa.nc_transpose(result[:, at : at + 32], filled((32, 8)), engine=ENGINES.tensor)

    interpreter.run(kernel, 480)
    refusal("nc_transpose.psum-bank", kernel, 500)


def test_matmul_with_an_identity_as_transpose() -> None:
    def kernel(x: Any, identity: Any, dtype: Any = None) -> Any:
        kind = x.dtype if dtype is None else dtype
        result = nl.ndarray((x.shape[1], x.shape[0]), kind, nl.psum)
        nisa.nc_matmul(result, loaded(x), loaded(identity), is_transpose=True)
        return stored(result)

    x, identity = some(20, 30, dtype=BF16), np.eye(20, dtype=BF16)
    x[3, 4], x[5, 6] = np.nan, -np.inf
    got = interpreter.run(kernel, x, identity).outputs
    np.testing.assert_array_equal(got.astype(np.float32), x.T.astype(np.float32))
    refusal("nc_matmul.transpose-dtype", kernel, x, identity, nl.float32)
    # Before trn2 it is an ordinary product, in which NaN times 0 is NaN.
    spread = interpreter.run(kernel, x, identity, target="trn1").outputs
    assert np.isnan(spread[4].astype(np.float32)).all()
