"""Kernel files written for the real package run unmodified."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter

FILE = Path(__file__).parent / "kernels" / "samples.py"


@pytest.fixture(scope="module")
def samples() -> ModuleType:
    """The file, imported where `import nki` finds the interpreter."""
    spec = importlib.util.spec_from_file_location("samples", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with interpreter.installed():
        spec.loader.exec_module(module)
    assert "nki" not in sys.modules
    return module


def some(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("k", "m", "n"), [(128, 128, 512), (256, 130, 700), (384, 64, 40)])
def test_tiled_matmul(samples: ModuleType, k: int, m: int, n: int) -> None:
    a, b = some(k, m).astype(ml_dtypes.bfloat16), some(k, n).astype(ml_dtypes.bfloat16)
    got = samples.tiled_matmul(a, b)
    want = a.astype(np.float64).T @ b.astype(np.float64)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=k * 2e-6)


@pytest.mark.parametrize("shape", [(128, 64), (200, 33), (1, 2)])
def test_softmax(samples: ModuleType, shape: tuple[int, int]) -> None:
    x = 10 * some(*shape)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    want = e / e.sum(1, keepdims=True)
    np.testing.assert_allclose(samples.softmax_rows(x), want, rtol=1e-5, atol=1e-7)


def test_transpose(samples: ModuleType) -> None:
    x = some(32, 6 * 5)
    want = x.reshape(32, 6, 5).transpose(0, 2, 1).reshape(32, 30)
    np.testing.assert_array_equal(samples.transpose_free_axes(x, 6, 5), want)


@pytest.mark.parametrize("rows", [7, 128, 300])
def test_rmsnorm(samples: ModuleType, rows: int) -> None:
    x, w = some(rows, 96), some(1, 96)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * w
    np.testing.assert_allclose(samples.rmsnorm(x, w), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_two_programs(samples: ModuleType, seed: int | None) -> None:
    x = some(2, 128, 64)
    run = interpreter.run(samples.sum_of_halves[2], x, seed=seed)
    np.testing.assert_array_equal(run.outputs, x[0] + x[1])
    assert len(run.programs) == 2
