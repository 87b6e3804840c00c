"""`memset`, `tensor_copy`, `tensor_copy_predicated`: what they write and what they refuse."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some, stored

BF16 = ml_dtypes.bfloat16
ENGINES = nisa.engine


# memset.


@pytest.mark.parametrize(
    ("dtype", "value", "want"),
    [
        ("float32", -1.5, -1.5),
        ("float32", float("-inf"), float("-inf")),
        ("float32", 3, 3),
        ("bfloat16", 1.00390625, 1.0),  # halfway: to even
        ("float8_e4m3", 17.1, 18.0),
        ("int32", 2**31 - 1, 2**31 - 1),
        ("int32", 2.5, 2),
        ("int8", -300.0, -128),
        ("uint8", 255, 255),
        ("float8_e4m3fn_x4", 0, 0),
    ],
)
@pytest.mark.parametrize("engine", [ENGINES.unknown, ENGINES.vector, ENGINES.gpsimd])
def test_memset(dtype: str, value: Any, want: Any, engine: Any) -> None:
    def kernel() -> Any:
        tile = nl.ndarray((40, 3), dtype)
        nisa.memset(tile, value, engine=engine)
        return stored(tile)

    run = interpreter.run(kernel)
    np.testing.assert_array_equal(run.outputs.astype(np.float64), np.full((40, 3), want))
    assert run.programs[0][0].engine is (
        ENGINES.gpsimd if engine is ENGINES.gpsimd else ENGINES.vector
    )


def test_memset_of_a_part() -> None:
    def kernel(x: Any) -> Any:
        tile = loaded(x)
        nisa.memset(tile[32:64, 1::2], 0.0)
        return stored(tile)

    x = some(70, 6)
    want = x.copy()
    want[32:64, 1::2] = 0
    np.testing.assert_array_equal(interpreter.run(kernel, x).outputs, want)


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ("memset.packed", lambda: nisa.memset(nl.ndarray((2, 2), "float8_e4m3fn_x4"), 1)),
        ("memset.range", lambda: nisa.memset(nl.ndarray((2, 2), nl.uint8), 256)),
        ("memset.range", lambda: nisa.memset(nl.ndarray((2, 2), nl.uint32), -1)),
        ("memset.value", lambda: nisa.memset(nl.ndarray((2, 2), nl.uint8), filled((2, 2)))),
        ("memset.buffer", lambda: nisa.memset(nl.ndarray((2, 2), nl.uint8, nl.hbm), 1)),
        (
            "memset.engine",
            lambda: nisa.memset(nl.ndarray((2, 2), nl.uint8), 1, engine=ENGINES.scalar),
        ),
        (
            "memset.gpsimd-psum",
            lambda: nisa.memset(nl.ndarray((2, 2), nl.uint8, nl.psum), 1, engine=ENGINES.gpsimd),
        ),
        ("memset.rank", lambda: nisa.memset(nl.ndarray((2, 1, 2, 1, 2, 1), nl.uint8), 1)),
        (
            "memset.broadcast-destination",
            lambda: nisa.memset(nl.ndarray((2, 1), nl.uint8).broadcast(1, 4), 1),
        ),
    ],
)
def test_memset_refuses(rule: str, make: Any) -> None:
    refusal(rule, make)


def test_memset_takes_four_free_axes() -> None:
    interpreter.run(lambda: nisa.memset(nl.ndarray((2, 1, 2, 1, 2), nl.uint8), 1))


def test_assignment_is_no_instruction() -> None:
    def kernel() -> None:
        filled((2, 2))[0:1] = 1.0

    assert "tensor_copy" in str(refusal("view.assignment", kernel))


# tensor_copy.


@pytest.mark.parametrize("engine", [ENGINES.vector, ENGINES.scalar, ENGINES.gpsimd])
@pytest.mark.parametrize("target", [np.float32, BF16, np.int8, np.int32])
@pytest.mark.parametrize("source", [np.float32, BF16, np.int32, np.uint8])
def test_copy_converts_through_float32(source: Any, target: Any, engine: Any) -> None:
    def kernel(x: Any) -> Any:
        tile = nl.ndarray((x.shape[0], x.shape[1] * 2), np.dtype(target).name)
        nisa.tensor_copy(
            tile.reshape((x.shape[0], x.shape[1], 2))[:, :, 1], loaded(x), engine=engine
        )
        nisa.memset(tile[:, ::2], 0)
        return stored(tile)

    x = (90 * some(33, 5)).astype(source) if source != np.uint8 else some(33, 5, dtype=source)
    want = np.zeros((33, 10), target)
    if np.issubdtype(target, np.integer) and source != target:
        limits = np.iinfo(target)
        nearest = np.rint(x.astype(np.float32).astype(np.float64))
        want[:, 1::2] = np.clip(nearest, limits.min, limits.max).astype(target)
    else:
        want[:, 1::2] = x.astype(np.float32).astype(target)
    run = interpreter.run(kernel, x)
    np.testing.assert_array_equal(run.outputs.astype(np.float64), want.astype(np.float64))
    assert run.programs[0][1].engine is engine


def test_copy_of_one_type_keeps_its_bits() -> None:
    def kernel(x: Any) -> Any:
        tile = loaded(x)
        copy = nl.ndarray(tile.shape, tile.dtype)
        nisa.tensor_copy(copy, tile)
        return stored(copy)

    integers = np.array([[2**31 - 1, -(2**31), 2**24 + 1]], np.int32)
    np.testing.assert_array_equal(interpreter.run(kernel, integers).outputs, integers)
    nans = np.array([[0x7FC1, 0xFFFF, 0x7F81]], np.uint16)
    got = interpreter.run(kernel, nans.view(BF16)).outputs
    np.testing.assert_array_equal(got.view(np.uint16), nans)


def copied(shapes: Any, buffers: Any, engine: Any) -> None:
    source = filled(shapes[1], nl.float32, buffers[1])
    nisa.tensor_copy(nl.ndarray(shapes[0], nl.float32, buffers[0]), source, engine=engine)


SAME = ((8, 6), (8, 6))


@pytest.mark.parametrize(
    ("shapes", "buffers", "engine", "target", "rule"),
    [
        (SAME, (nl.psum, nl.sbuf), ENGINES.vector, "trn2", None),
        (SAME, (nl.sbuf, nl.psum), ENGINES.scalar, "trn2", None),
        (SAME, (nl.sbuf, nl.psum), ENGINES.gpsimd, "trn2", "gpsimd-psum"),
        (SAME, (nl.psum, nl.sbuf), ENGINES.gpsimd, "trn2", "gpsimd-psum"),
        (SAME, (nl.sbuf, nl.sbuf), ENGINES.tensor, "trn2", "engine"),
        (SAME, (nl.sbuf, nl.sbuf), ENGINES.scalar, "trn1", "scalar-copy"),
        (SAME, (nl.sbuf, nl.sbuf), ENGINES.vector, "trn1", None),
        (((8, 6), (8, 2, 3)), (nl.sbuf, nl.sbuf), ENGINES.unknown, "trn2", None),
        (((8, 6), (8, 5)), (nl.sbuf, nl.sbuf), ENGINES.unknown, "trn2", "shape"),
        (((8, 6), (6, 8)), (nl.sbuf, nl.sbuf), ENGINES.unknown, "trn2", "shape"),
    ],
)
def test_copy_rules(shapes: Any, buffers: Any, engine: Any, target: str, rule: str | None) -> None:
    if rule is None:
        interpreter.run(copied, shapes, buffers, engine, target=target)
    else:
        refusal(f"tensor_copy.{rule}", copied, shapes, buffers, engine, target=target)


def test_copy_stays_on_chip() -> None:
    error = refusal("tensor_copy.buffer", lambda x: nisa.tensor_copy(filled((2, 2)), x), some(2, 2))
    assert "sbuf or psum" in str(error)


# tensor_copy_predicated.


def predicated(x: Any, mask: Any, old: Any, reverse: bool = False) -> Any:
    target = loaded(old)
    source = x if isinstance(x, float | int) else loaded(x)
    nisa.tensor_copy_predicated(target, source, loaded(mask), reverse_pred=reverse)
    return stored(target)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("dtype", [np.float32, BF16, ml_dtypes.float8_e4m3, np.int32])
def test_predicated(dtype: Any, kind: Any, reverse: bool) -> None:
    x, old = some(20, 6, dtype=dtype), some(20, 6, dtype=dtype, seed=1)
    mask = (np.arange(120).reshape(20, 6) % 3 * 100).astype(kind)
    want = np.where((mask != 0) != reverse, x, old)
    got = interpreter.run(predicated, x, mask, old, reverse).outputs
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


@pytest.mark.parametrize(
    ("dtype", "stored_as"), [(np.float32, -2.7), (BF16, BF16(-2.7)), (np.int32, -3)]
)
def test_predicated_number(dtype: Any, stored_as: Any) -> None:
    old, mask = some(4, 6, dtype=dtype), np.eye(4, 6, dtype=np.uint8)
    got = interpreter.run(predicated, -2.7, mask, old).outputs
    want = np.where(mask != 0, np.array(stored_as, dtype), old)
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def test_predicated_keeps_large_integers() -> None:
    old = np.array([[2**31 - 1, 2**24 + 1]], np.int32)
    got = interpreter.run(predicated, 5, np.array([[0, 0]], np.uint8), old).outputs
    np.testing.assert_array_equal(got, old)


@pytest.mark.parametrize("dtype", [nl.float32, nl.int32])
def test_predicated_reads_what_it_keeps(dtype: Any) -> None:
    def kernel(mask: Any) -> None:
        target = nl.ndarray((2, 4), dtype)
        nisa.memset(target[:, :2], 1)
        nisa.tensor_copy_predicated(target, 3.0, loaded(mask))

    strict: dict[str, Any] = {"refuse_uninitialized": True}
    interpreter.run(kernel, np.array([[0, 1, 1, 1], [1, 0, 1, 1]], np.uint8), **strict)
    never_written = np.array([[0, 1, 1, 1], [1, 0, 0, 1]], np.uint8)
    refusal("memory.never-written", kernel, never_written, **strict)


def some_predicated(dtypes: Any, buffers: Any, shape: Any = (4, 4)) -> None:
    tiles = [
        filled(shape if i == 2 else (4, 4), d, b)
        for i, (d, b) in enumerate(zip(dtypes, buffers, strict=True))
    ]
    nisa.tensor_copy_predicated(*tiles)


F32, U8 = nl.float32, nl.uint8
ALL_SBUF = (nl.sbuf, nl.sbuf, nl.sbuf)


@pytest.mark.parametrize(
    ("dtypes", "buffers", "shape", "rule"),
    [
        ((F32, F32, U8), (nl.psum, nl.sbuf, nl.psum), (4, 4), None),
        ((F32, F32, U8), (nl.psum, nl.psum, nl.sbuf), (4, 4), None),
        ((F32, F32, U8), (nl.sbuf, nl.psum, nl.psum), (4, 4), "psum-port"),
        ((F32, nl.bfloat16, U8), ALL_SBUF, (4, 4), "dtype"),
        ((F32, F32, nl.int32), ALL_SBUF, (4, 4), "predicate"),
        ((F32, F32, F32), ALL_SBUF, (4, 4), "predicate"),
        ((F32, F32, U8), ALL_SBUF, (4, 2, 2), None),
        ((F32, F32, U8), ALL_SBUF, (4, 3), "shape"),
    ],
)
def test_predicated_rules(dtypes: Any, buffers: Any, shape: Any, rule: str | None) -> None:
    if rule is None:
        interpreter.run(some_predicated, dtypes, buffers, shape)
    else:
        refusal(f"tensor_copy_predicated.{rule}", some_predicated, dtypes, buffers, shape)
