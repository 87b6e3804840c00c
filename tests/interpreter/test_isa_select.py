"""iota, affine_select, range_select, select_reduce and nc_stream_shuffle."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.computing import (
    BF16,
    E4M3,
    F16,
    F32,
    FLOAT32_MIN,
    integers,
    issued,
    normal,
    refused,
    results,
    run,
    wide,
)

COMMAND = nisa.reduce_cmd
COMPARE: dict[str, Callable[..., Any]] = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}


def affine(partitions: int, pattern: Any, offset: int, multiplier: int) -> np.ndarray:
    """The pseudocode of the documentation."""
    found = []
    (sw, nw), (sz, nz), (sy, ny), (sx, nx) = [[0, 1]] * (4 - len(pattern)) + list(pattern)
    for channel in range(partitions):
        for w in range(nw):
            for z in range(nz):
                for y in range(ny):
                    for x in range(nx):
                        inside = w * sw + z * sz + y * sy + x * sx
                        found.append(offset + channel * multiplier + inside)
    return np.array(found).reshape(partitions, -1)


def iota(*args: Any) -> Callable[..., None]:
    return lambda dst: nisa.iota(dst, *args)


def patterns() -> st.SearchStrategy[list[list[int]]]:
    axis = st.tuples(st.integers(-50, 50), st.integers(1, 4)).map(list)
    return st.lists(axis, min_size=1, max_size=4)


# iota


@settings(max_examples=30)
@given(
    partitions=st.sampled_from([1, 5, 33]),
    pattern=patterns(),
    offset=st.integers(-1000, 1000),
    multiplier=st.integers(-20, 20),
    kind=st.sampled_from([np.int32, F32, BF16, np.int16]),
)
def test_iota(partitions: int, pattern: Any, offset: int, multiplier: int, kind: Any) -> None:
    want = affine(partitions, pattern, offset, multiplier)
    got = results(iota(pattern, offset, multiplier), out=[(want.shape, kind)])
    np.testing.assert_array_equal(got, want.astype(F32).astype(kind))


def test_iota_fills_any_free_axes() -> None:
    got = results(iota([[10, 2], [1, 6]], 1, 100), out=[((4, 3, 4), np.int32)])
    np.testing.assert_array_equal(got.reshape(4, 12), affine(4, [[10, 2], [1, 6]], 1, 100))


def test_iota_is_in_int32() -> None:
    got = results(iota([[1, 3]], 2**31 - 2), out=[((1, 3), np.int32)])
    assert got.tolist() == [[2**31 - 2, 2**31 - 1, -(2**31)]]
    exact = results(iota([[1, 2]], 2**24), out=[((1, 2), np.int32)])
    assert exact.tolist() == [[2**24, 2**24 + 1]]
    refused("iota.int32", iota([[1, 3]], 2**31), out=[((1, 3), np.int32)])
    refused("iota.int32", iota([[1.5, 3]]), out=[((1, 3), np.int32)])


def test_iota_refusals() -> None:
    out = [((4, 6), F32)]
    done = run(iota([[1, 6]]), out=out)
    assert issued(done, "iota").engine is nisa.engine.gpsimd
    assert issued(done, "iota").cycles == 156
    refused("iota.pattern", iota([[1, 5]]), out=out)
    refused("iota.pattern", iota([[1, 6], [1, 1], [1, 1], [1, 1], [1, 1]]), out=out)
    refused("iota.buffer", lambda dst: nisa.iota(dst, [[1, 6]]), out=out, psum=["dst"])


# affine_select


@settings(max_examples=30)
@given(
    name=st.sampled_from(list(COMPARE)),
    partitions=st.sampled_from([1, 16, 33]),
    pattern=patterns(),
    offset=st.integers(-30, 30),
    multiplier=st.integers(-5, 5),
    kinds=st.sampled_from(
        [(F32, F32), (BF16, F32), (F32, BF16), (E4M3, F16), (np.int32, np.int32)]
    ),
)
def test_affine_select(
    name: str, partitions: int, pattern: Any, offset: int, multiplier: int, kinds: tuple[Any, Any]
) -> None:
    where = COMPARE[name](affine(partitions, pattern, offset, multiplier), 0)
    x = normal(*where.shape, scale=9).astype(kinds[0])

    def body(dst, x):
        nisa.affine_select(dst, pattern, multiplier, x, -3.0, getattr(nl, name), offset)

    got = results(body, x, out=[(where.shape, kinds[1])])
    np.testing.assert_array_equal(got, np.where(where, wide(x), F32(-3)).astype(kinds[1]))


def test_affine_select_of_one_type_keeps_bits() -> None:
    x = np.full((2, 4), 2**24 + 1, np.int32)

    def body(dst, x):
        nisa.affine_select(dst, [[1, 4]], -2, x, 7.0)

    got = results(body, x, out=[((2, 4), np.int32)])
    assert got.tolist() == [[2**24 + 1, 7, 7, 7], [7, 7, 2**24 + 1, 7]]


@pytest.mark.parametrize("kind", [F32, BF16, F16, E4M3])
def test_affine_select_masks_with_float32_min(kind: Any) -> None:
    """Rounded to the type of dst, which makes -inf of it in the narrow ones."""
    x = normal(8, 8, dtype=kind)

    def causal(dst, x):
        nisa.affine_select(dst, [[-1, 8]], 1, x, float(FLOAT32_MIN), nl.greater_equal)

    got = results(causal, x, out=[((8, 8), kind)])
    lower = np.tril(np.ones((8, 8), bool))
    np.testing.assert_array_equal(got[lower], x[lower])
    assert (wide(got)[~lower] == (FLOAT32_MIN if kind is F32 else -np.inf)).all()


def test_affine_select_refusals() -> None:
    x, out = normal(4, 6), [((4, 6), F32)]

    def body(pattern: Any = ((1, 6),), value: Any = 0.0, op: Any = nl.equal) -> Any:
        return lambda dst, x: nisa.affine_select(dst, pattern, 1, x, value, op)

    done = run(body(), x, out=out)
    assert issued(done, "affine_select").engine is nisa.engine.gpsimd
    assert issued(done, "affine_select").cycles == 156
    for parameter in ("dst", "x"):
        refused(
            "affine_select.buffer",
            lambda dst, x: nisa.affine_select(dst, [[1, 6]], 1, x, 0.0),
            x, out=out, psum=[parameter],
        )  # fmt: skip
    refused("affine_select.pattern", body(pattern=[[1, 7]]), x, out=out)
    refused("affine_select.shape", body(), x, out=[((4, 5), F32)])
    refused("affine_select.operator", body(op=nl.add), x, out=out)
    refused("affine_select.operand", body(value="0"), x, out=out)


# range_select


def range_select(op0: str, op1: str, **kwargs: Any) -> Callable[..., None]:
    """With bounds in the columns of the second array."""

    def body(dst, total, x, bounds):
        nisa.range_select(
            dst, x, getattr(nl, op0), getattr(nl, op1), bounds[:, 0], bounds[:, 1],
            reduce_res=total, **kwargs,
        )  # fmt: skip

    return body


@pytest.mark.parametrize("op0", ["greater_equal", "greater", "equal"])
@pytest.mark.parametrize("op1", ["less", "less_equal"])
@pytest.mark.parametrize("kinds", [(F32, F32), (BF16, BF16), (F32, F16)])
@pytest.mark.parametrize("psum", [(), ("x",), ("dst", "x")])
def test_range_select(op0: str, op1: str, kinds: tuple[Any, Any], psum: tuple[str, ...]) -> None:
    x = normal(64, 4, 10, dtype=kinds[0])
    bounds = integers(64, 2, dtype=F32, low=-5, high=60)
    body = range_select(op0, op1, range_start=3)
    got, top = results(body, x, bounds, out=[((64, 40), kinds[1]), ((64, 1), F32)], psum=psum)
    index = np.arange(3, 43)
    inside = COMPARE[op0](index, bounds[:, :1]) & COMPARE[op1](index, bounds[:, 1:])
    want = np.where(inside, wide(x).reshape(64, 40), FLOAT32_MIN)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, want.astype(kinds[1]))
    np.testing.assert_array_equal(top, want.max(1, keepdims=True))
    assert (top[:, 0] == FLOAT32_MIN).any()
    assert (top[:, 0] > FLOAT32_MIN).any()


def test_a_row_without_keys_gives_zeros_not_nan() -> None:
    """The documented way: fill and maximum in float32, subtracted by the Scalar engine."""
    x, bounds = normal(4, 8, dtype=BF16), np.zeros((4, 2), F32)

    def body(dst, x, bounds):
        masked, top = nl.ndarray((4, 8), nl.bfloat16), nl.ndarray((4, 1), nl.float32)
        op0, op1 = nl.greater_equal, nl.less
        nisa.range_select(masked, x, op0, op1, bounds[:, 0], bounds[:, 1], reduce_res=top)
        nisa.tensor_scalar(top, top, nl.multiply, -1.0)
        nisa.activation(dst, nl.exp, masked, bias=top)

    assert (results(body, x, bounds, out=[((4, 8), F32)]) == 0).all()


def test_range_select_accumulates() -> None:
    x, bounds = normal(8, 30), np.array([[5, 25]] * 8, F32)

    def body(dst, total, x, bounds):
        for low, high, what in ((0, 10, COMMAND.reset_reduce), (10, 30, COMMAND.reduce)):
            nisa.range_select(
                dst[:, low:high], x[:, low:high], nl.greater_equal, nl.less,
                bounds[:, 0], bounds[:, 1], what, total if high == 30 else None,
                range_start=low,
            )  # fmt: skip

    _, top = results(body, x, bounds, out=[((8, 30), F32), ((8, 1), F32)])
    np.testing.assert_array_equal(top, x[:, 5:25].max(1, keepdims=True))


def test_range_select_refusals() -> None:
    x, bounds = normal(4, 6), np.array([[0, 3]] * 4, F32)
    out = [((4, 6), F32), ((4, 1), F32)]

    def refuses(rule: str, data: Any = x, limits: Any = bounds, **kwargs: Any) -> None:
        ops = {"op0": "greater", "op1": "less", **kwargs}
        refused(f"range_select.{rule}", range_select(**ops), data, limits, out=out)

    results(range_select("greater", "less", on_false_value=float(FLOAT32_MIN)), x, bounds, out=out)
    refuses("operator", op0="not_equal")
    refuses("operator", op1="add")
    refuses("operator", reduce_op=nl.add)
    refuses("on-false-value", on_false_value=-1e30)
    refuses("range-start", range_start=2**24 - 5)
    refuses("range-start", range_start=1.0)
    results(range_select("greater", "less", range_start=2**24 - 6), x, bounds, out=out)
    refuses("dtype", data=integers(4, 6, dtype=np.int32))
    refuses("bound-dtype", limits=bounds.astype(BF16))
    refuses("bound-dtype", limits=bounds.astype(np.int32))
    refuses("vector-operand", limits=np.zeros((3, 2), F32))
    refuses("reduce-cmd", reduce_cmd=COMMAND.load_reduce)
    refuses("accumulator", reduce_cmd=COMMAND.reduce)
    trn1 = {"out": out, "target": "trn1"}
    refused("range_select.target", range_select("greater", "less"), x, bounds, **trn1)


# select_reduce


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("as_tile", [False, True])
@pytest.mark.parametrize("psum", [(), ("x",), ("where",), ("dst",)])
def test_select_reduce(kind: Any, reverse: bool, as_tile: bool, psum: tuple[str, ...]) -> None:
    x, column = normal(32, 2, 6, dtype=BF16), normal(32, 1, seed=1)
    where = integers(32, 12, dtype=kind, high=3)

    def body(dst, top, x, where, column):
        nisa.select_reduce(
            dst, where, x, column if as_tile else -1.25, top, COMMAND.reset_reduce,
            reverse_pred=reverse,
        )  # fmt: skip

    out = [((32, 12), F16), ((32, 1), F32)]
    got, top = results(body, x, where, column, out=out, psum=psum)
    other = column if as_tile else F32(-1.25)
    want = np.where((where == 0) if reverse else (where != 0), wide(x).reshape(32, 12), other)
    np.testing.assert_array_equal(got, want.astype(F16))
    np.testing.assert_array_equal(top, want.max(1, keepdims=True))


def select(value: Any = 0.0, *args: Any, **kwargs: Any) -> Callable[..., None]:
    return lambda dst, top, x, where: nisa.select_reduce(dst, where, x, value, *args, **kwargs)


def test_select_reduce_accumulates() -> None:
    x, where = normal(8, 20), integers(8, 20, dtype=np.uint8, high=2)

    def body(dst, top, x, where):
        for low, what in ((0, COMMAND.reset_reduce), (10, COMMAND.reduce)):
            part = slice(low, low + 10)
            nisa.select_reduce(
                dst[:, part], where[:, part], x[:, part], float(FLOAT32_MIN),
                top if low else None, what,
            )  # fmt: skip

    _, top = results(body, x, where, out=[((8, 20), F32), ((8, 1), F32)])
    want = np.where(where != 0, x, FLOAT32_MIN).max(1, keepdims=True)
    np.testing.assert_array_equal(top, want)


def test_select_reduce_refusals() -> None:
    x, where = normal(4, 6), integers(4, 6, dtype=np.uint8, high=2)
    out = [((4, 6), F32), ((4, 1), F32)]
    results(select(), x, where, out=out)
    both = lambda dst, top, x, where: nisa.select_reduce(dst, where, x, 0.0)  # noqa: E731
    refused("select_reduce.psum-port", both, x, where, out=out, psum=["x", "where"])
    refused("select_reduce.predicate", select(), x, where.astype(np.int32), out=out)
    refused("select_reduce.predicate", select(), x, x, out=out)
    refused("select_reduce.dtype", select(), where.astype(np.int32), where, out=out)
    refused("select_reduce.shape", select(), x, where[:, :5].copy(), out=out)
    refused("select_reduce.operator", select(reduce_op=nl.add), x, where, out=out)
    refused("select_reduce.operand", select("0"), x, where, out=out)
    refused("select_reduce.reduce-cmd", select(reduce_cmd=COMMAND.load_reduce), x, where, out=out)

    def reading(what: Any) -> Callable[..., None]:
        return lambda dst, top, x, where: nisa.select_reduce(dst, where, x, 0.0, top, what)

    results(reading(COMMAND.reset_reduce), x, where, out=out)
    refused("select_reduce.accumulator", reading(COMMAND.idle), x, where, out=out)
    refused("select_reduce.accumulator", reading(COMMAND.reduce), x, where, out=out)
    words = [out[0], ((4, 1), np.int32)]
    refused("select_reduce.reduce-res", reading(COMMAND.reset_reduce), x, where, out=words)
    wide_result = [out[0], ((4, 2), F32)]
    refused("select_reduce.reduce-res", reading(COMMAND.reset_reduce), x, where, out=wide_result)


# nc_stream_shuffle


def shuffle(mask: Any) -> Callable[..., None]:
    return lambda dst, x: nisa.nc_stream_shuffle(dst, x, mask)


@settings(max_examples=30)
@given(
    mask=st.lists(st.one_of(st.integers(0, 31), st.just(255)), min_size=32, max_size=32),
    quadrants=st.sampled_from([1, 2, 3, 4]),
    kind=st.sampled_from([F32, BF16, np.uint8]),
)
def test_stream_shuffle(mask: list[int], quadrants: int, kind: Any) -> None:
    x = integers(32 * quadrants, 2, 3, dtype=kind, low=1)
    got = results(shuffle(mask), x, out=[((32 * quadrants, 6), kind)], start=0)
    flat = x.reshape(-1, 6)
    for p in range(32 * quadrants):
        source = mask[p % 32]
        want = 0 if source == 255 else flat[p // 32 * 32 + source]
        np.testing.assert_array_equal(got[p], want)


def test_stream_shuffle_in_place_and_broadcast() -> None:
    x = normal(32, 5)

    def body(dst, x):
        nisa.nc_stream_shuffle(x, x, [*range(16, 32), *range(16)])
        nisa.tensor_copy(dst, x)

    np.testing.assert_array_equal(results(body, x, out=[((32, 5), F32)]), np.roll(x, 16, 0))
    for rows in (1, 20, 32):
        got = results(shuffle([0] * 32), x[:1].copy(), out=[((rows, 5), F32)])
        np.testing.assert_array_equal(got, np.repeat(x[:1], rows, 0))
    done = run(shuffle([0] * 32), normal(32, 100), out=[((32, 100), F32)])
    assert issued(done, "nc_stream_shuffle").cycles == 100


def test_stream_shuffle_leaves_unwritten_partitions_unwritten() -> None:
    x = integers(32, 4, dtype=np.int32)

    def body(read: int) -> Callable[..., None]:
        def issue(dst, x):
            fresh = nl.ndarray((32, 4), nl.int32)
            nisa.nc_stream_shuffle(fresh, x, [5] + [255] * 31)
            nisa.tensor_copy(dst[:read], fresh[:read])

        return issue

    got = results(body(1), x, out=[((32, 4), np.int32)])
    np.testing.assert_array_equal(got[0], x[5])
    refused("memory.never-written", body(2), x, out=[((32, 4), np.int32)])


def test_stream_shuffle_refusals() -> None:
    x, out = normal(32, 5), [((32, 5), F32)]
    refused("nc_stream_shuffle.mask", shuffle([0] * 31), x, out=out)
    refused("nc_stream_shuffle.mask", shuffle([0] * 31 + [32]), x, out=out)
    refused("nc_stream_shuffle.mask", shuffle([-1] + [0] * 31), x, out=out)
    refused("nc_stream_shuffle.shape", shuffle([0] * 32), x, out=[((32, 5), BF16)])
    refused("nc_stream_shuffle.shape", shuffle([0] * 32), x, out=[((32, 4), F32)])
    refused("nc_stream_shuffle.source-partition", shuffle([0, 1] * 16), x[:1].copy(), out=out)
    refused("nc_stream_shuffle.source-partition", shuffle([0] * 32), x, out=[((64, 5), F32)])


@pytest.mark.parametrize(
    ("rows", "start", "fits"),
    [
        (32, 96, True),
        (33, 64, True),
        (33, 32, False),
        (64, 64, True),
        (65, 64, False),
        (16, 32, True),
    ],
)
def test_stream_shuffle_starts_where_the_active_partitions_may(
    rows: int, start: int, fits: bool
) -> None:
    x = normal(128, 5)

    def body(dst, x):
        nisa.nc_stream_shuffle(dst[:rows], x[start : min(start + 32, 128)], [0] + [255] * 31)

    def aligned(dst, x):
        nisa.nc_stream_shuffle(dst[:rows], x[start : start + rows], [0] + [255] * 31)

    out = [((128, 5), F32)]
    if fits:
        np.testing.assert_array_equal(results(aligned, x, out=out)[0], x[start])
    elif start + rows <= 128:
        refused("nc_stream_shuffle.start-partition", aligned, x, out=out)
    else:
        refused("nc_stream_shuffle.start-partition", body, x, out=out)
