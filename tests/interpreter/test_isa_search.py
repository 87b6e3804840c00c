"""Batch-norm statistics and searches for eight values."""

from typing import Any

import numpy as np
import pytest

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.computing import BF16, F32, normal, refused, results, wide


def bn_stats(dst: Any, x: Any) -> None:
    nisa.bn_stats(dst, x)


def bn_aggr(dst: Any, x: Any) -> None:
    nisa.bn_aggr(dst, x)


@pytest.mark.parametrize("shape", [(16, 512), (16, 5), (128, 3, 4), (2, 1)])
@pytest.mark.parametrize("kind", [F32, BF16])
def test_bn_stats(shape: tuple[int, ...], kind: Any) -> None:
    x = (normal(*shape) + 3).astype(kind)
    got = results(bn_stats, x, out=[((shape[0], 6), F32)])
    flat = x.reshape(shape[0], -1).astype(np.float64)
    for part, columns in ((flat[:, ::2], got[:, :3]), (flat[:, 1::2], got[:, 3:])):
        n = part.shape[1]
        mean, var = (part.mean(1), part.var(1)) if n else (0, 0)
        np.testing.assert_array_equal(columns[:, 0], n)
        np.testing.assert_allclose(columns[:, 1], mean, rtol=1e-5)
        np.testing.assert_allclose(columns[:, 2], n * var, rtol=1e-4, atol=1e-5)


def test_bn_aggr_puts_tiles_together() -> None:
    x = normal(32, 1000, scale=2) + 5

    def body(dst, x):
        stats = nl.ndarray((32, 12), nl.float32)
        nisa.bn_stats(stats[:, :6], x[:, :512])
        nisa.bn_stats(stats[:, 6:], x[:, 512:])
        nisa.bn_aggr(dst, stats)

    got = results(body, x, out=[((32, 2), F32)])
    np.testing.assert_allclose(got[:, 0], x.mean(1), rtol=1e-5)
    np.testing.assert_allclose(got[:, 1], x.var(1, dtype=np.float64), rtol=1e-4)


def test_bn_refusals() -> None:
    refused("bn_stats.free-size", bn_stats, normal(4, 513), out=[((4, 6), F32)])
    refused("bn_stats.free-size", bn_stats, normal(4, 512), out=[((4, 5), F32)])
    refused("bn_stats.shape", bn_stats, normal(4, 512), out=[((5, 6), F32)])
    refused("bn_aggr.free-size", bn_aggr, normal(4, 7), out=[((4, 2), F32)])
    refused("bn_aggr.free-size", bn_aggr, normal(4, 6), out=[((4, 3), F32)])


# Eight values


def max8(dst: Any, x: Any) -> None:
    nisa.max8(dst, x)


@pytest.mark.parametrize("shape", [(16, 8), (16, 100), (4, 5, 9)])
@pytest.mark.parametrize("kind", [F32, BF16, np.int16])
def test_max8(shape: tuple[int, ...], kind: Any) -> None:
    x = normal(*shape, scale=20).astype(kind)
    got = results(max8, x, out=[((shape[0], 8), F32)])
    want = -np.sort(-wide(x).reshape(shape[0], -1), 1)[:, :8]
    np.testing.assert_array_equal(got, want)


def test_max8_refusals() -> None:
    refused("max8.free-size", max8, normal(4, 7), out=[((4, 8), F32)])
    refused("max8.free-size", max8, normal(1, 16385), out=[((1, 8), F32)])
    refused("max8.free-size", max8, normal(4, 9), out=[((4, 9), F32)])
    refused("max8.rank", max8, normal(4, 2, 2, 3), out=[((4, 8), F32)])
    refused("max8.rank", max8, normal(4, 9), out=[((4, 2, 4), F32)])
    refused("max8.shape", max8, normal(4, 9), out=[((5, 8), F32)])


def find(dst: Any, x: Any, values: Any) -> None:
    nisa.nc_find_index8(dst, x, values)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_find_index8(kind: Any) -> None:
    data = np.array([[5, 1, 7, 1, 9, 2, 1, 7, 3, 4]] * 3, F32)
    data[1] = data[1][::-1]
    values = np.array([[9, 7, 1, 1, 7, 100, 1, 1]] * 3, F32)
    got = results(find, data, values, out=[((3, 8), kind)])
    none = np.iinfo(kind).max
    assert got.tolist() == [
        [4, 2, 1, 3, 7, none, 6, none],
        [5, 2, 3, 6, 7, none, 8, none],
        [4, 2, 1, 3, 7, none, 6, none],
    ]


def test_find_index8_finds_max8() -> None:
    x = np.random.default_rng(0).permutation(4 * 60).reshape(4, 3, 20).astype(F32)

    def body(dst, x):
        values = nl.ndarray((4, 8), nl.float32)
        nisa.max8(values, x)
        nisa.nc_find_index8(dst, x, values)

    got = results(body, x, out=[((4, 8), np.uint32)])
    np.testing.assert_array_equal(got, np.argsort(-x.reshape(4, 60), 1)[:, :8])


def test_find_index8_refusals() -> None:
    x, values = normal(4, 20), normal(4, 8)
    refused("nc_find_index8.index-dtype", find, x, values, out=[((4, 8), np.int32)])
    refused("nc_find_index8.free-size", find, x, normal(4, 7), out=[((4, 8), np.uint32)])
    refused("nc_find_index8.free-size", find, normal(4, 7), values, out=[((4, 8), np.uint32)])
    refused("nc_find_index8.rank", find, normal(4, 2, 2, 5), values, out=[((4, 8), np.uint32)])
    narrow = normal(4, 2, 2, 2)
    results(find, x, narrow.reshape(4, 2, 4), out=[((4, 8), np.uint32)])
    refused("nc_find_index8.rank", find, x, narrow, out=[((4, 8), np.uint32)])
    refused("nc_find_index8.shape", find, x, normal(5, 8), out=[((4, 8), np.uint32)])


def replace(dst: Any, indices: Any, x: Any, values: Any) -> None:
    nisa.nc_match_replace8(dst, x, values, -1.0, indices)


def test_match_replace8() -> None:
    """The example of the documentation, and values that are not there."""
    data = np.array([[1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8], [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]], F32)
    values = np.array([[3, 8, 8, 8, 8, 8, 8, 8], [1, 2, 3, 4, 5, 6, 7, 2]], F32)
    out = [((2, 11), BF16), ((2, 8), np.uint32)]
    got, indices = results(replace, data, values, out=out)
    none = 2**32 - 1
    assert indices.tolist() == [[2, 10, 9, 8, 7, 6, 5, 4], [0, 3, 4, 6, 8, 10, none, 2]]
    assert wide(got).tolist() == [
        [1, 2, -1, 4, *[-1] * 7],
        [-1, 1, -1, -1, -1, 3, -1, 4, -1, 5, -1],
    ]


def test_match_replace8_without_indices() -> None:
    x = np.random.default_rng(0).permutation(3 * 30).reshape(3, 30).astype(F32)

    def body(dst, x):
        values = nl.ndarray((3, 8), nl.float32)
        nisa.max8(values, x)
        nisa.nc_match_replace8(dst, x, values, -5.0)

    got = results(body, x, out=[((3, 30), F32)])
    top = np.sort(x, 1)[:, -8:-7]
    np.testing.assert_array_equal(got, np.where(x >= top, -5, x))


def test_match_replace8_refusals() -> None:
    x, values = normal(4, 20), normal(4, 8)
    out, op = [((4, 20), F32), ((4, 8), np.uint16)], "nc_match_replace8"
    results(replace, x, values, out=out)
    refused(f"{op}.shape", replace, x, values, out=[((4, 19), F32), out[1]])
    refused(f"{op}.index-dtype", replace, x, values, out=[out[0], ((4, 8), np.int32)])
    refused(f"{op}.free-size", replace, x, values, out=[out[0], ((4, 9), np.uint16)])
