"""`dma_transpose` against transposes in NumPy, and what it refuses."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some, stored

BF16, MODES = ml_dtypes.bfloat16, nisa.dge_mode


# Transposes.


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.uint8])
@pytest.mark.parametrize(
    ("shape", "axes"), [((24, 100), (1, 0)), ((3, 5, 7), (2, 1, 0)), ((6, 5, 4, 3), (3, 1, 2, 0))]
)
def test_transpose(shape: tuple[int, ...], axes: tuple[int, ...], dtype: Any) -> None:
    def kernel(x: Any, given: Any, in_sbuf: bool) -> Any:
        tile = nl.ndarray([shape[a] for a in axes], x.dtype)
        nisa.dma_transpose(tile, loaded(x) if in_sbuf else x, axes=given)
        return stored(tile)

    x = some(*shape, dtype=dtype)
    for given in (None, axes):
        for in_sbuf in (False, True):
            got = interpreter.run(kernel, x, given, in_sbuf).outputs
            np.testing.assert_array_equal(got, x.transpose(axes))
    wrong = tuple(reversed(axes)) if axes[-1] == 0 and len(axes) == 4 else axes[::-1]
    refusal("dma_transpose.axes", kernel, x, wrong, False)


def transpose(x: Any, shape: Any, **options: Any) -> None:
    options = {"dtype": x.dtype, "buffer": nl.sbuf} | options
    target = nl.ndarray(shape, options.pop("dtype"), options.pop("buffer"))
    nisa.dma_transpose(target, x, **options)


@pytest.mark.parametrize(
    ("shape", "target_shape", "options", "rule"),
    [
        ((16, 128), (128, 16), {}, None),
        ((16, 129), (129, 16), {"buffer": nl.hbm}, "buffer"),
        ((129, 16, 129), (129, 16, 129), {}, "memory.partitions"),
        ((16,), (16, 1), {}, "rank"),
        ((2, 2, 2, 2, 2), (2, 2, 2, 2, 2), {}, "rank"),
        ((16, 8), (16, 8), {}, "shape"),
        ((16, 8), (8, 16), {"dtype": nl.bfloat16}, "dtype"),
        ((16, 8), (8, 16), {"buffer": nl.psum}, "psum"),
        ((16, 8), (8, 16), {"dge_mode": MODES.swdge}, "dge"),
        ((16, 8), (8, 16), {"dge_mode": MODES.hwdge}, "hwdge-dtype"),
    ],
)
def test_transposed_layouts(
    shape: tuple[int, ...], target_shape: tuple[int, ...], options: dict[str, Any], rule: str | None
) -> None:
    if rule is None:
        interpreter.run(transpose, some(*shape), target_shape, **options)
        return
    rule = rule if "." in rule else f"dma_transpose.{rule}"
    refusal(rule, transpose, some(*shape), target_shape, **options)


@pytest.mark.parametrize(
    ("shape", "allowed"),
    [
        ((16, 64), True),
        ((32, 64), False),
        ((8, 2, 64), True),
        ((8, 3, 64), False),
        ((3, 16, 64), False),
        ((4, 2, 4, 64), True),
        ((4, 4, 2, 64), False),
    ],
)
def test_rows_of_hardware_transposes(shape: tuple[int, ...], allowed: bool) -> None:
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}[len(shape)]
    x, target = some(*shape, dtype=BF16), tuple(shape[a] for a in order)
    if allowed:
        interpreter.run(transpose, x, target, dge_mode=MODES.hwdge)
    else:
        refusal("dma_transpose.hwdge-rows", transpose, x, target, dge_mode=MODES.hwdge)


def gather_transpose(x: Any, rows: Any, n: int, **options: Any) -> Any:
    """`n` rows of x, whose offsets are read column by column, transposed."""
    inner, order = x.shape[1:], {2: (1, 0), 4: (3, 1, 2, 0)}[x.ndim]
    tile = filled(tuple((n, *inner)[a] for a in order), x.dtype)
    steps = [int(np.prod(inner[i:])) for i in range(len(inner))] + [1]
    pattern = [[s, c] for s, c in zip(steps, (n, *inner), strict=True)]
    nisa.dma_transpose(tile, x.ap(pattern, vector_offset=loaded(rows)), **options)
    return stored(tile)


@pytest.mark.parametrize(
    ("index_shape", "n", "inner"),
    [((32, 1), 32, (20,)), ((64, 1), 48, (8,)), ((128, 2), 256, (16,)), ((16, 1), 16, (3, 1, 8))],
)
def test_gather_transpose(index_shape: tuple[int, int], n: int, inner: tuple[int, ...]) -> None:
    x = some(50, *inner, dtype=BF16)
    rows = np.random.default_rng(1).integers(0, 50, index_shape).astype(np.uint32)
    order = (1, 0) if len(inner) == 1 else (3, 1, 2, 0)
    want = x[rows.T.flatten()[:n]].transpose(order)
    run = interpreter.run(gather_transpose, x, rows, n)
    np.testing.assert_array_equal(run.outputs, want)


def test_gather_transpose_leaves_rows_out() -> None:
    x, rows = some(20, 8, dtype=BF16), np.arange(10, 26, dtype=np.uint32)[:, None]
    refusal("dma_transpose.run-time-index", gather_transpose, x, rows, 16)
    got = interpreter.run(gather_transpose, x, rows, 16, oob_mode=nisa.oob_mode.skip).outputs
    np.testing.assert_array_equal(got[:, :10], x[10:].T)
    np.testing.assert_array_equal(got[:, 10:], np.ones((8, 6)))


@pytest.mark.parametrize(
    ("index_shape", "n", "changes", "rule"),
    [
        ((16, 1), 16, {}, None),
        ((16, 1), 16, {"target": "trn1"}, "gather-target"),
        ((16, 1), 16, {"dge_mode": MODES.hwdge}, "dge"),
        ((16, 1), 16, {"dtype": np.float32}, "gather-dtype"),
        ((16, 1), 16, {"index": np.int32}, "gather-index"),
        ((16, 1), 16, {"inner": (2, 2, 8)}, "gather-shape"),
        ((16, 1), 32, {}, "gather-index"),
        ((24, 1), 16, {}, "gather-index"),
        ((64, 2), 128, {}, "gather-index"),
        ((32, 1), 24, {}, "gather-index"),
    ],
)
def test_gather_transpose_rules(
    index_shape: tuple[int, int], n: int, changes: dict[str, Any], rule: str | None
) -> None:
    options = {k: v for k, v in changes.items() if k in ("target", "dge_mode")}
    x = some(20, *changes.get("inner", (8,)), dtype=changes.get("dtype", BF16))
    rows = np.zeros(index_shape, changes.get("index", np.uint32))
    if rule is None:
        interpreter.run(gather_transpose, x, rows, n, **options)
    else:
        refusal(f"dma_transpose.{rule}", gather_transpose, x, rows, n, **options)
