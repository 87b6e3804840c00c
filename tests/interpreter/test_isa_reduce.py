"""Reductions along free axes and across partitions, cumulative instructions and scans."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.computing import (
    BF16,
    E4M3,
    E5M2,
    F16,
    F32,
    integers,
    issued,
    normal,
    refused,
    results,
    run,
    wide,
)

COMMAND = nisa.reduce_cmd
FOLDS: dict[str, Callable[..., Any]] = {
    "add": lambda x: x.astype(np.float64).sum(1),
    "subtract": lambda x: 2 * x[:, 0].astype(np.float64) - x.astype(np.float64).sum(1),
    "multiply": lambda x: x.astype(np.float64).prod(1),
    "maximum": lambda x: np.sort(x, 1)[:, -1],
    "minimum": lambda x: np.sort(x, 1)[:, 0],
    "logical_and": lambda x: (x != 0).all(1),
    "logical_or": lambda x: (x != 0).any(1),
    "logical_xor": lambda x: (x != 0).sum(1) % 2,
}


def tensor_reduce(name: str, axis: Any, **kwargs: Any) -> Callable[..., None]:
    return lambda dst, x: nisa.tensor_reduce(dst, getattr(nl, name), x, axis, **kwargs)


# tensor_reduce


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("psum", [(), ("x",), ("dst", "x")])
def test_tensor_reduce(name: str, negate: bool, psum: tuple[str, ...]) -> None:
    x = normal(64, 21)
    x[::2, 3] = 0
    got = results(tensor_reduce(name, 1, negate=negate), x, out=[((64, 1), F32)], psum=psum)
    want = FOLDS[name](x)[:, None] * (-1.0 if negate else 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "left"),
    [(3, 6), ((3,), 6), ([2, 3], 2), ((1, 2, 3), 1), ((3, 2), 2), (-1, 6)],
)
@pytest.mark.parametrize("keepdims", [False, True])
def test_tensor_reduce_axes(axis: Any, left: int, keepdims: bool) -> None:
    x = normal(8, 2, 3, 5)
    body = tensor_reduce("maximum", axis, keepdims=keepdims)
    got = results(body, x, out=[((8, left), F32)])
    np.testing.assert_array_equal(got, x.reshape(8, left, -1).max(2))
    refused("tensor_reduce.shape", body, x, out=[((8, left + 1), F32)])


@pytest.mark.parametrize("axis", [0, (0, 1), 1, 2, (1, 3), (), 4])
def test_tensor_reduce_reduces_the_last_free_axes_only(axis: Any) -> None:
    x = normal(8, 2, 3, 5)
    refused("tensor_reduce.axis", tensor_reduce("add", axis), x, out=[((8, 30), F32)])


def test_tensor_reduce_of_a_permuted_view() -> None:
    x = normal(8, 4, 5)

    def body(dst, x):
        nisa.tensor_reduce(dst, nl.add, x.permute((0, 2, 1)), 2)

    np.testing.assert_allclose(results(body, x, out=[((8, 5), F32)]), x.sum(1), rtol=1e-5)


@pytest.mark.parametrize("kinds", [(BF16, BF16), (E4M3, F32), (np.int16, F16), (F32, np.int32)])
def test_tensor_reduce_sums_in_float32_and_rounds_once(kinds: tuple[Any, Any]) -> None:
    x = normal(16, 300, dtype=F32, scale=10).astype(kinds[0])
    got = results(tensor_reduce("add", 1), x, out=[((16, 1), kinds[1])])
    want = wide(x).sum(1, keepdims=True)
    want = np.rint(want) if kinds[1] is np.int32 else want
    np.testing.assert_array_equal(got, want.astype(kinds[1]))


@pytest.mark.parametrize("name", ["bitwise_and", "bitwise_or", "bitwise_xor"])
@pytest.mark.parametrize("kind", [np.uint8, np.int32])
def test_tensor_reduce_bits(name: str, kind: Any) -> None:
    x = integers(8, 6, dtype=kind, high=127)
    want = getattr(np, name).reduce(x, axis=1)[:, None]
    out = [((8, 1), kind)]
    np.testing.assert_array_equal(results(tensor_reduce(name, 1), x, out=out), want)
    refused("tensor_reduce.negate", tensor_reduce(name, 1, negate=True), x, out=out)
    refused("tensor_reduce.bitvec-dtype", tensor_reduce(name, 1), x, out=[((8, 1), F32)])


def test_tensor_reduce_nan_propagates() -> None:
    x = normal(4, 9)
    x[1, 2] = np.nan
    for name in ("add", "maximum", "minimum"):
        got = results(tensor_reduce(name, 1), x, out=[((4, 1), F32)])
        assert np.isnan(got[:, 0]).tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["power", "equal", "left_shift", "abs", "exp", "average"])
def test_tensor_reduce_takes_reduction_operators(name: str) -> None:
    refused("tensor_reduce.operator", tensor_reduce(name, 1), normal(4, 9), out=[((4, 1), F32)])


@pytest.mark.parametrize(("kind", "name", "cost"), [(F32, "add", 512), (BF16, "add", 256)])
def test_tensor_reduce_cost(kind: Any, name: str, cost: int) -> None:
    done = run(tensor_reduce(name, 1), np.ones((4, 512), kind), out=[((4, 1), kind)])
    assert issued(done, "tensor_reduce").cycles == cost
    assert issued(done, "tensor_reduce").engine is nisa.engine.vector


# tensor_partition_reduce


@pytest.mark.parametrize("name", ["add", "average", "maximum"])
@pytest.mark.parametrize("rows", [1, 32, 128])
def test_tensor_partition_reduce(name: str, rows: int) -> None:
    x = normal(rows, 3, 4)

    def body(dst, x):
        nisa.tensor_partition_reduce(dst, getattr(nl, name), x)

    done = run(body, x, out=[((1, 12), F32)])
    numpy = {"add": np.sum, "average": np.mean, "maximum": np.max}[name]
    want = numpy(x.reshape(rows, 12).astype(np.float64), axis=0)[None]
    np.testing.assert_allclose(done.outputs[0], want, rtol=1e-5, atol=1e-5)
    assert issued(done, "tensor_partition_reduce").engine is nisa.engine.gpsimd
    refused("tensor_partition_reduce.buffer", body, x, out=[((1, 12), F32)], psum=["x"])
    refused("tensor_partition_reduce.shape", body, x, out=[((1, 11), F32)])


@pytest.mark.parametrize("name", ["bitwise_and", "bitwise_or"])
def test_tensor_partition_reduce_bits(name: str) -> None:
    x = integers(40, 6, dtype=np.int32)

    def body(dst, x):
        nisa.tensor_partition_reduce(dst, getattr(nl, name), x)

    want = getattr(np, name).reduce(x, axis=0)[None]
    np.testing.assert_array_equal(results(body, x, out=[((1, 6), np.int32)]), want)
    refused("tensor_partition_reduce.bitvec-dtype", body, x, out=[((1, 6), F32)])


def test_tensor_partition_reduce_operators() -> None:
    def body(dst, x):
        nisa.tensor_partition_reduce(dst, nl.multiply, x)

    refused("tensor_partition_reduce.operator", body, normal(4, 6), out=[((1, 6), F32)])


# tensor_scalar_reduce


@pytest.mark.parametrize("name", ["add", "multiply", "maximum", "minimum"])
@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("as_tile", [False, True])
def test_tensor_scalar_reduce(name: str, negate: bool, as_tile: bool) -> None:
    x, column = normal(32, 2, 7), normal(32, 1, seed=1)

    def body(dst, total, x, column):
        nisa.tensor_scalar_reduce(
            dst, x, nl.subtract, column if as_tile else 0.5, getattr(nl, name), total,
            reduce_res_negate=negate,
        )  # fmt: skip

    got, total = results(body, x, column, out=[((32, 14), BF16), ((32, 1), F32)])
    want = x.reshape(32, 14) - (column if as_tile else np.float32(0.5))
    np.testing.assert_array_equal(got, want.astype(BF16))
    folded = FOLDS[name](want)[:, None] * (-1 if negate else 1)
    np.testing.assert_allclose(total, folded, rtol=1e-5, atol=1e-6)


def scalar_reduce(*commands: Any, **last: Any) -> Callable[..., None]:
    """Sums of x, 2x, 3x, ... with these commands; the last one writes."""

    def body(dst, total, x):
        for n, what in enumerate(commands, 1):
            ends = {"reduce_res": total, **last} if n == len(commands) else {}
            nisa.tensor_scalar_reduce(
                dst, x, nl.multiply, float(n), nl.add, reduce_cmd=what, **ends
            )

    return body


def test_tensor_scalar_reduce_accumulates() -> None:
    x, out = normal(40, 7), [((40, 7), F32), ((40, 1), F32)]
    total = x.sum(1, keepdims=True)
    both = scalar_reduce(COMMAND.reset_reduce, COMMAND.reduce)
    np.testing.assert_allclose(results(both, x, out=out)[1], 3 * total, rtol=1e-4, atol=1e-5)
    again = scalar_reduce(COMMAND.reset_reduce, COMMAND.reset_reduce)
    np.testing.assert_allclose(results(again, x, out=out)[1], 2 * total, rtol=1e-4, atol=1e-5)
    loaded = scalar_reduce(COMMAND.load_reduce, reduce_init=10.0)
    np.testing.assert_allclose(results(loaded, x, out=out)[1], 10 + total, rtol=1e-4)
    # Negation concerns what is written, not the registers.
    signed = scalar_reduce(COMMAND.reset_reduce, COMMAND.reduce, reduce_res_negate=True)
    np.testing.assert_allclose(results(signed, x, out=out)[1], -3 * total, rtol=1e-4, atol=1e-5)


def test_registers_belong_to_partitions() -> None:
    x, out = normal(64, 7), [((64, 7), F32), ((64, 1), F32)]

    def body(dst, total, x, first=(0, 32), second=(32, 64), read=(0, 64)):
        for low, high in (first, second):
            nisa.tensor_scalar_reduce(
                dst[low:high], x[low:high], nl.add, 0.0, nl.add,
            )  # fmt: skip
        low, high = read
        nisa.tensor_scalar_reduce(
            dst[low:high], x[low:high], nl.add, 0.0, nl.add, total[low:high],
            reduce_cmd=COMMAND.reduce,
        )  # fmt: skip

    def halves(dst, total, x):
        body(dst, total, x)

    def half(dst, total, x):
        body(dst, total, x, second=(0, 32))

    want = 2 * x.sum(1, keepdims=True)
    np.testing.assert_allclose(results(halves, x, out=out)[1], want, rtol=1e-4, atol=1e-5)
    refused("tensor_scalar_reduce.accumulator", half, x, out=out)


def test_tensor_scalar_reduce_refusals() -> None:
    x, out = normal(40, 7), [((40, 7), F32), ((40, 1), F32)]

    def body(op0: Any = nl.add, operand: Any = 1.0, fold: Any = nl.add, **kwargs: Any) -> Any:
        return lambda dst, total, x: nisa.tensor_scalar_reduce(dst, x, op0, operand, fold, **kwargs)

    results(body(), x, out=out)
    refused("tensor_scalar_reduce.reverse0", body(reverse0=True), x, out=out)
    refused("tensor_scalar_reduce.operator", body(op0=nl.bitwise_and), x, out=out)
    refused("tensor_scalar_reduce.operator", body(fold=nl.subtract), x, out=out)
    refused("tensor_scalar_reduce.unary-operand", body(op0=nl.abs), x, out=out)
    refused("tensor_scalar_reduce.reduce-cmd", body(reduce_cmd=COMMAND.idle), x, out=out)
    refused("tensor_scalar_reduce.reduce-init", body(reduce_cmd=COMMAND.load_reduce), x, out=out)
    refused("tensor_scalar_reduce.reduce-init", body(reduce_init=1.0), x, out=out)
    refused("tensor_scalar_reduce.accumulator", body(reduce_cmd=COMMAND.reduce), x, out=out)
    wide_result = [out[0], ((40, 2), F32)]
    refused(
        "tensor_scalar_reduce.reduce-res", scalar_reduce(COMMAND.reset_reduce), x, out=wide_result
    )


def test_tensor_scalar_reduce_cost() -> None:
    done = run(
        scalar_reduce(COMMAND.reset_reduce),
        np.ones((4, 100), F32),
        out=[((4, 100), F32), ((4, 1), F32)],
    )
    assert issued(done, "tensor_scalar_reduce").cycles == 164


# tensor_scalar_cumulative


def cumulative_by_hand(x: np.ndarray, name: str, start: np.ndarray) -> np.ndarray:
    """The pseudocode of the documentation."""
    step = {
        "add": lambda a, r: a + r,
        "subtract": lambda a, r: a - r,
        "multiply": lambda a, r: a * r,
        "maximum": np.maximum,
        "minimum": np.minimum,
    }[name]
    register, found = start, []
    for i in range(x.shape[1]):
        register = step(x[:, i], register)
        found.append(register)
    return np.stack(found, 1)


STARTS = {"add": 0, "subtract": 0, "multiply": 1, "maximum": -np.inf, "minimum": np.inf}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("kind", [F32, BF16, np.int8, E5M2])
def test_tensor_scalar_cumulative(name: str, kind: Any) -> None:
    x, column = normal(16, 3, 5).astype(kind), normal(16, 1, seed=1)

    def body(dst, x, column):
        nisa.tensor_scalar_cumulative(dst, x, nl.add, getattr(nl, name), column)

    got = results(body, x, column, out=[((16, 15), F32)])
    start = np.full(16, STARTS[name], F32)
    want = cumulative_by_hand(wide(x).reshape(16, 15) + column, name, start)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STARTS)
def test_tensor_scalar_cumulative_continues(name: str) -> None:
    x, column = normal(16, 20), normal(16, 1, seed=1)

    def body(dst, x, column):
        op = getattr(nl, name)
        nisa.tensor_scalar_cumulative(
            dst[:, :7], x[:, :7], nl.multiply, op, 2.0, column, COMMAND.load_reduce
        )
        nisa.tensor_scalar_cumulative(
            dst[:, 7:], x[:, 7:], nl.multiply, op, 2.0, reduce_cmd=COMMAND.reduce
        )

    got = results(body, x, column, out=[((16, 20), F32)])
    want = cumulative_by_hand(x * 2, name, column[:, 0])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_tensor_scalar_cumulative_refusals() -> None:
    x, out = normal(4, 7), [((4, 7), F32)]

    def body(op0: Any = nl.add, op1: Any = nl.add, *args: Any, **kwargs: Any) -> Any:
        return lambda dst, x: nisa.tensor_scalar_cumulative(dst, x, op0, op1, 1.0, *args, **kwargs)

    results(body(), x, out=out)
    op = "tensor_scalar_cumulative"
    refused(f"{op}.dtype", body(), integers(4, 7, dtype=np.int32), out=out)
    refused(f"{op}.dtype", body(), x, out=[((4, 7), np.uint32)])
    refused(f"{op}.operator", body(op0=nl.bitwise_or), x, out=out)
    refused(f"{op}.operator", body(op1=nl.logical_and), x, out=out)
    refused(f"{op}.reduce-init", body(reduce_cmd=COMMAND.load_reduce), x, out=out)
    refused(f"{op}.reduce-cmd", body(reduce_cmd=COMMAND.idle), x, out=out)
    refused(f"{op}.accumulator", body(reduce_cmd=COMMAND.reduce), x, out=out)


# tensor_tensor_scan


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
@pytest.mark.parametrize("ops", [("multiply", "add"), ("subtract", "maximum"), ("add", "subtract")])
@pytest.mark.parametrize("as_tile", [False, True])
def test_tensor_tensor_scan(
    reverse0: bool, reverse1: bool, ops: tuple[str, str], as_tile: bool
) -> None:
    x, y, column = normal(16, 12), normal(16, 3, 4, dtype=BF16, seed=1), normal(16, 1, seed=2)

    def body(dst, x, y, column):
        nisa.tensor_tensor_scan(
            dst, x, y, column if as_tile else -0.5, *(getattr(nl, n) for n in ops),
            reverse0=reverse0, reverse1=reverse1,
        )  # fmt: skip

    got = results(body, x, y, column, out=[((16, 12), F32)])
    numpy = [getattr(np, name) for name in ops]
    state = column[:, 0] if as_tile else np.full(16, -0.5, F32)
    flat = wide(y).reshape(16, 12)
    for i in range(12):
        state = numpy[0](*((state, x[:, i]) if reverse0 else (x[:, i], state)))
        state = numpy[1](*((flat[:, i], state) if reverse1 else (state, flat[:, i])))
        np.testing.assert_array_equal(got[:, i], state)


def test_tensor_tensor_scan_refusals() -> None:
    x, out = normal(8, 12), [((8, 12), F32)]

    def body(op0: Any = nl.add, op1: Any = nl.add) -> Callable[..., None]:
        return lambda dst, x, y: nisa.tensor_tensor_scan(dst, x, y, 0.0, op0, op1)

    for psum in (("x",), ("y",), ("dst",)):
        results(body(), x, x, out=out, psum=psum)
    refused("tensor_tensor_scan.psum-port", body(), x, x, out=out, psum=["x", "y"])
    refused("tensor_tensor_scan.operator", body(op0=nl.bitwise_or), x, x, out=out)
    refused("tensor_tensor_scan.operator", body(op1=nl.abs), x, x, out=out)
    refused("tensor_tensor_scan.shape", body(), x, normal(8, 11), out=out)
    assert (
        issued(
            run(body(), normal(8, 50), normal(8, 50), out=[((8, 50), F32)]), "tensor_tensor_scan"
        ).cycles
        == 100
    )
