"""Microscaling: quantization and matmul, against a statement of the format in plain loops."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError

RNG = np.random.default_rng(11)
KINDS = {
    "float8_e5m2_x4": (ml_dtypes.float8_e5m2, 15),
    "float8_e4m3fn_x4": (ml_dtypes.float8_e4m3fn, 8),
}


def run(kernel: Any, *arrays: np.ndarray, target: str = "trn3") -> Any:
    return interpreter.run(kernel, *arrays, target=target).outputs


def out(tile: Any) -> Any:
    result = nl.ndarray(tile.shape, tile.dtype, nl.shared_hbm)
    nisa.dma_copy(result, nl.copy(tile) if tile.buffer == nl.psum else tile)
    return result


def expected(x: np.ndarray, kind: Any, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and scale exponents, group by group."""
    values = np.empty(x.shape, kind)
    scales = np.empty((x.shape[0] // 8, x.shape[1] // 4), np.uint8)
    for p in range(0, x.shape[0], 8):
        for f in range(0, x.shape[1], 4):
            group = x[p : p + 8, f : f + 4].astype(np.float64)
            top = np.abs(group).max()
            exponent = max(np.floor(np.log2(top)) - (largest - 1), -127) if top else -127
            values[p : p + 8, f : f + 4] = (group / 2.0**exponent).astype(kind)
            scales[p // 8, f // 4] = exponent + 127
    return values, scales


def quantize(
    x: np.ndarray, dtype: str, scale_dtype: str = "uint8", start: int = 0, **options: Any
) -> Any:
    """The bytes, and all partitions of scales (77 where none was written)."""

    def kernel(x):
        p, f = x.shape
        packed, scales = nl.ndarray((p, f // 4), dtype), nl.full((128, f // 4), 77, nl.uint8)
        nisa.quantize_mx(packed, nl.load(x), scales[start:].view(scale_dtype))
        return out(packed.view(nl.uint8)), out(scales)

    return run(kernel, x, **options)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("partitions", [32, 96])
@pytest.mark.parametrize(("scale_dtype", "start"), [("uint8", 0), ("float8_e8m0fnu", 8)])
def test_quantize(dtype: str, partitions: int, scale_dtype: str, start: int) -> None:
    x = RNG.standard_normal((partitions, 24)) * np.exp2(RNG.integers(-9, 9, (partitions, 1)))
    x[:8, :4] = 0
    x = x.astype(ml_dtypes.bfloat16)
    kind, largest = KINDS[dtype]
    values, scales = expected(x, kind, largest)
    found, found_scales = quantize(x, dtype, scale_dtype, start)
    np.testing.assert_array_equal(found, values.view(np.uint8))
    wanted = np.full((128, 6), 77)
    for group in range(partitions // 8):
        wanted[group // 4 * 32 + start + group % 4] = scales[group]
    np.testing.assert_array_equal(found_scales, wanted)


def test_quantize_refuses() -> None:
    x = np.ones((32, 8), ml_dtypes.bfloat16)
    quantize(x, "float8_e5m2_x4")
    for rule, arguments in [
        ("target", (x, "float8_e5m2_x4", "uint8", 0)),
        ("dtype", (x, "float4_e2m1fn_x4", "uint8", 0)),
        ("dtype", (x.astype(np.float32), "float8_e5m2_x4", "uint8", 0)),
        ("partitions", (x[:16], "float8_e5m2_x4", "uint8", 0)),
        ("shape", (np.ones((32, 10), np.float16), "float8_e5m2_x4", "uint8", 0)),
        ("scale-partition", (x, "float8_e5m2_x4", "uint8", 2)),
        ("scale-partition", (x, "float8_e5m2_x4", "uint8", 32)),
        ("scale-dtype", (x, "float8_e5m2_x4", "int8", 0)),
    ]:
        with pytest.raises(NkiError) as caught:
            quantize(*arguments, target="trn2" if rule == "target" else "trn3")
        assert caught.value.rule == f"quantize_mx.{rule}"


def random_mx(k: int, n: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x4 elements, scales in their places, and the numbers they stand for `[4k, n]`."""
    scales = RNG.integers(120, 134, (k // 8, n)).astype(np.uint8)
    places = np.full((k, n), 255, np.uint8)
    for group in range(k // 8):
        places[group // 4 * 32 + group % 4] = scales[group]
    if dtype == "float4_e2m1fn_x4":
        codes = RNG.integers(0, 16, (k, n, 4))
        table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        values = np.array([(1 if c < 8 else -1) * table[c % 8] for c in codes.ravel()])
        values = values.reshape(codes.shape)
        packed = (codes << np.arange(0, 16, 4)).sum(-1).astype(np.uint16)
    else:
        kind = KINDS[dtype][0]
        small = RNG.standard_normal((k, n, 4)).astype(kind)
        values, packed = small.astype(np.float64), small.view(np.uint8).view(np.uint32)[..., 0]
    factors = np.exp2(scales.astype(np.float64) - 127).repeat(8, 0)[..., None]
    return packed, places, (values * factors).transpose(0, 2, 1).reshape(4 * k, n)


def multiply(
    a: Any, b: Any, types: tuple[str, str], dst: str = "float32", times: int = 1, **tiling: Any
) -> Any:
    def kernel(a, a_scale, b, b_scale):
        left, right = nl.load(a).view(types[0]), nl.load(b).view(types[1])
        acc = nl.ndarray((a.shape[1], b.shape[1]), dst, nl.psum)
        for _ in range(times):
            nisa.nc_matmul_mx(acc, left, right, nl.load(a_scale), nl.load(b_scale), **tiling)
        return out(acc)

    return run(kernel, *a, *b)


@pytest.mark.parametrize("left", [*KINDS, "float4_e2m1fn_x4"])
@pytest.mark.parametrize("k", [32, 128])
def test_matmul_mx(left: str, k: int) -> None:
    *a, x = random_mx(k, 16, left)
    *b, y = random_mx(k, 20, "float8_e4m3fn_x4")
    found = multiply(a, b, (left, "float8_e4m3fn_x4"), times=2)
    wanted = 2 * x.T @ y
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_matmul_mx_refuses() -> None:
    fp8 = "float8_e5m2_x4"
    *a, _ = random_mx(32, 16, fp8)
    *b, _ = random_mx(32, 20, fp8)
    *odd, _ = random_mx(32, 15, fp8)
    *tall, _ = random_mx(64, 20, fp8)
    wide = [np.zeros((32, 4097), np.uint32), np.zeros((32, 4097), np.uint8)]
    types = (fp8, fp8)
    multiply(a, b, types, tile_position=(32, 0), tile_size=(32, 128))
    for rule, arguments, tiling in [
        ("contraction", (a, tall, types), {}),
        ("stationary-free-size", (odd, b, types), {}),
        ("destination-dtype", (a, b, types, "float16"), {}),
        ("moving-free-size", (a, wide, types), {}),
        ("dtype", (a, b, (fp8, "uint32")), {}),
        ("scale-shape", ([a[0], a[1][:, :8]], b, types), {}),
        ("tiling", (a, b, types), {"tile_size": (32, 128)}),
        ("tile-size", (a, b, types), {"tile_size": (32, 64), "tile_position": (32, 0)}),
        ("tile-position", (a, b, types), {"tile_size": (64, 128), "tile_position": (32, 0)}),
    ]:
        with pytest.raises(NkiError) as caught:
            multiply(*arguments, **tiling)
        assert caught.value.rule == f"nc_matmul_mx.{rule}"


def test_quantize_then_multiply() -> None:
    x = RNG.standard_normal((128, 64)).astype(ml_dtypes.bfloat16)

    def kernel(x):
        packed = nl.ndarray((128, 16), nl.float8_e4m3fn_x4)
        scales = nl.ndarray((128, 16), nl.float8_e8m0fnu)
        nisa.quantize_mx(packed, nl.load(x), scales)
        acc = nl.ndarray((16, 16), nl.float32, nl.psum)
        nisa.nc_matmul_mx(acc, packed, packed, scales, scales)
        return out(acc)

    y = x.astype(np.float32).reshape(128, 16, 4).transpose(0, 2, 1).reshape(512, 16)
    found = run(kernel, x)
    assert np.abs(found - y.T @ y).max() < 0.05 * np.abs(y.T @ y).max()
