"""tensor_tensor, tensor_scalar, scalar_tensor_tensor and reciprocal."""

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
    FLOATS,
    integers,
    issued,
    normal,
    refused,
    results,
    run,
    wide,
)

BINARY: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "maximum": lambda x, y: np.where(x > y, x, y),
    "minimum": lambda x, y: np.where(x < y, x, y),
    "equal": lambda x, y: x == y,
    "not_equal": lambda x, y: x != y,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "logical_and": lambda x, y: (x != 0) & (y != 0),
    "logical_or": lambda x, y: (x != 0) | (y != 0),
    "logical_xor": lambda x, y: (x != 0) ^ (y != 0),
}
BITS: dict[str, Callable[..., Any]] = {
    "bitwise_and": lambda x, y: x & y,
    "bitwise_or": lambda x, y: x | y,
    "bitwise_xor": lambda x, y: x ^ y,
}
UNARY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "square": lambda x: x * x,
    "relu": lambda x: np.where(x > 0, x, 0),
    "rsqrt": lambda x: 1 / np.sqrt(x, dtype=np.float64),
    "reciprocal": lambda x: 1 / x.astype(np.float64),
    "bypass": lambda x: x,
}


def small(*shape: int, dtype: Any = F32, seed: int = 0) -> np.ndarray:
    """Few different values, so that comparisons meet equal ones and zeros."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32).astype(dtype)


def tensor_tensor(name: str, **kwargs: Any) -> Callable[..., None]:
    return lambda dst, x, y: nisa.tensor_tensor(dst, x, y, getattr(nl, name), **kwargs)


def tensor_scalar(name: str, operand: Any, *args: Any, **kwargs: Any) -> Callable[..., None]:
    """With the operand given or, if None, the second array's tile."""
    op = getattr(nl, name)
    if operand is None:
        return lambda dst, x, column: nisa.tensor_scalar(dst, x, op, column, *args, **kwargs)
    return lambda dst, x: nisa.tensor_scalar(dst, x, op, operand, *args, **kwargs)


# tensor_tensor


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("make", [small, normal])
def test_tensor_tensor_operators(name: str, make: Callable[..., Any]) -> None:
    x, y = make(64, 33), make(64, 33, seed=1)
    got = results(tensor_tensor(name), x, y, out=[((64, 33), F32)])
    np.testing.assert_array_equal(got, wide(BINARY[name](x, y)))


@pytest.mark.parametrize("kinds", [(F32, BF16, F16), (BF16, BF16, BF16), (E4M3, F32, np.int8)])
def test_tensor_tensor_computes_in_float32_and_rounds_once(kinds: tuple[Any, ...]) -> None:
    x, y = normal(32, 40, dtype=kinds[0]), normal(32, 40, dtype=kinds[1], seed=1)
    got = results(tensor_tensor("multiply"), x, y, out=[((32, 40), kinds[2])])
    want = wide(x) * wide(y)
    if kinds[2] is np.int8:
        want = np.rint(want)
    np.testing.assert_array_equal(got, want.astype(kinds[2]))


def test_tensor_tensor_flattens_free_axes() -> None:
    x, y = normal(16, 2, 3, 4), normal(16, 24, seed=1)
    got = results(tensor_tensor("add"), x, y, out=[((16, 6, 4), F32)])
    np.testing.assert_array_equal(got.reshape(16, 24), x.reshape(16, 24) + y)


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "maximum"])
@pytest.mark.parametrize("kind", [np.int32, np.uint32])
def test_tensor_tensor_of_words_is_exact_on_gpsimd(name: str, kind: Any) -> None:
    low = -(2**31) if kind is np.int32 else 0
    x = integers(8, 50, dtype=kind, low=low, high=low + 2**32)
    y = integers(8, 50, dtype=kind, low=low, high=low + 2**32, seed=1)
    done = run(tensor_tensor(name), x, y, out=[((8, 50), kind)])
    want = BINARY[name](x.astype(object), y.astype(object)) % 2**32
    np.testing.assert_array_equal(done.outputs[0], want.astype(np.uint32).view(kind))
    assert issued(done, "tensor_tensor").engine is nisa.engine.gpsimd


@pytest.mark.parametrize("how", [{"engine": nisa.engine.vector}, {"psum": ["x"]}])
def test_tensor_tensor_of_words_on_vector_goes_through_float32(how: dict[str, Any]) -> None:
    x, y = np.full((4, 8), 2**24, np.int32), np.ones((4, 8), np.int32)
    psum = how.pop("psum", ())
    done = run(tensor_tensor("add", **how), x, y, out=[((4, 8), np.int32)], psum=psum)
    assert (done.outputs[0] == 2**24).all()
    assert issued(done, "tensor_tensor").engine is nisa.engine.vector


def test_tensor_tensor_power_runs_on_gpsimd() -> None:
    x, y = np.abs(normal(8, 9)) + 0.5, normal(8, 9, seed=1)
    done = run(tensor_tensor("power"), x, y, out=[((8, 9), F32)])
    np.testing.assert_allclose(done.outputs[0], np.exp(y * np.log(x)), rtol=1e-5)
    assert issued(done, "tensor_tensor").engine is nisa.engine.gpsimd
    for parameter in ("x", "dst"):
        refused(
            "tensor_tensor.gpsimd-psum", tensor_tensor("power"), x, y,
            out=[((8, 9), F32)], psum=[parameter],
        )  # fmt: skip
    refused(
        "tensor_tensor.engine", tensor_tensor("power", engine=nisa.engine.vector), x, y,
        out=[((8, 9), F32)],
    )  # fmt: skip


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.uint32])
def test_tensor_tensor_bits(name: str, kind: Any) -> None:
    limits = np.iinfo(kind)
    x = integers(8, 50, dtype=kind, low=limits.min, high=limits.max)
    y = integers(8, 50, dtype=kind, low=limits.min, high=limits.max, seed=1)
    got = results(tensor_tensor(name), x, y, out=[((8, 50), kind)])
    np.testing.assert_array_equal(got, BITS[name](x, y))


def test_shifts_are_logical() -> None:
    x, y = np.array([[-8, -1, 5]], np.int32), np.array([[1, 28, 2]], np.int32)
    right = results(tensor_tensor("right_shift"), x, y, out=[((1, 3), np.int32)])
    assert right.tolist() == [[0x7FFFFFFC, 15, 1]]
    left = results(tensor_tensor("left_shift"), x, y, out=[((1, 3), np.int32)])
    assert left.tolist() == [[-16, -(2**28), 20]]


@pytest.mark.parametrize("psum", [(), ("x",), ("y",), ("dst",), ("dst", "x")])
def test_tensor_tensor_reads_psum_through_one_port(psum: tuple[str, ...]) -> None:
    x, y = normal(128, 64), normal(128, 64, seed=1)
    got = results(tensor_tensor("add"), x, y, out=[((128, 64), F32)], psum=psum)
    np.testing.assert_array_equal(got, x + y)
    refused(
        "tensor_tensor.psum-port", tensor_tensor("add"), x, y,
        out=[((128, 64), F32)], psum=["x", "y"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["abs_max", "abs_min"])
def test_magnitudes_keep_signs_and_need_trn3(name: str) -> None:
    x, y = small(16, 40), small(16, 40, seed=1)
    wins = np.abs(x) > np.abs(y) if name == "abs_max" else np.abs(x) < np.abs(y)
    out = [((16, 40), F32)]
    got = results(tensor_tensor(name), x, y, out=out, target="trn3")
    np.testing.assert_array_equal(got, np.where(wins, x, y))
    refused("tensor_tensor.operator-target", tensor_tensor(name), x, y, out=out)


@pytest.mark.parametrize(
    ("rule", "name", "kwargs", "arrays", "shape"),
    [
        ("operator", "exp", {}, (F32, F32), (4, 8)),
        ("operator", "abs", {}, (F32, F32), (4, 8)),
        ("operator", "divide", {}, (F32, F32), (4, 8)),
        ("operator", "average", {}, (F32, F32), (4, 8)),
        ("shape", "add", {}, (F32, F32), (4, 9)),
        ("bitvec-dtype", "bitwise_and", {}, (np.int32, F32), (4, 8)),
        ("bitvec-dtype", "bitwise_and", {}, (np.int32, np.int16), (4, 8)),
        ("engine", "add", {"engine": nisa.engine.scalar}, (F32, F32), (4, 8)),
    ],
)
def test_tensor_tensor_refusals(
    rule: str, name: str, kwargs: dict[str, Any], arrays: tuple[Any, Any], shape: tuple[int, int]
) -> None:
    x, y = (np.ones((4, 8), kind) for kind in arrays)
    body = tensor_tensor(name, **kwargs)
    refused(f"tensor_tensor.{rule}", body, x, y, out=[(shape, arrays[0])])


def test_tensor_tensor_on_gpsimd_does_not_reach_psum() -> None:
    x, out = normal(4, 8), [((4, 8), F32)]
    body = tensor_tensor("add", engine=nisa.engine.gpsimd)
    np.testing.assert_array_equal(results(body, x, x, out=out), x + x)
    refused("tensor_tensor.gpsimd-psum", body, x, x, out=out, psum=["y"])


@pytest.mark.parametrize(
    ("kind", "psum", "cost"),
    [(F32, (), 1024), (BF16, (), 512), (F32, ("x",), 512)],
)
def test_tensor_tensor_cost(kind: Any, psum: tuple[str, ...], cost: int) -> None:
    x, out = np.ones((8, 512), kind), [((8, 512), kind)]
    done = run(tensor_tensor("add"), x, x, out=out, psum=psum)
    assert issued(done, "tensor_tensor").cycles == cost


# tensor_scalar


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("as_tile", [False, True])
def test_tensor_scalar_operators(name: str, reverse: bool, as_tile: bool) -> None:
    x = small(32, 20)
    column = small(32, 1, seed=1) if as_tile else np.float32(1.5)
    body = tensor_scalar(name, None if as_tile else 1.5, reverse0=reverse)
    got = results(body, x, *([column] if as_tile else []), out=[((32, 20), F32)])
    want = BINARY[name](column, x) if reverse else BINARY[name](x, column)
    np.testing.assert_array_equal(got, wide(want))


@settings(max_examples=30)
@given(
    ops=st.tuples(st.sampled_from(list(BINARY)), st.sampled_from(list(BINARY))),
    operands=st.tuples(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32)),
    reverse=st.tuples(st.booleans(), st.booleans()),
    kinds=st.tuples(st.sampled_from(FLOATS), st.sampled_from((F32, BF16, F16))),
    shape=st.sampled_from([(1, 1), (5, 7), (33, 2, 3), (128, 2, 2, 3)]),
)
def test_tensor_scalar_two_stages(
    ops: tuple[str, str],
    operands: tuple[float, float],
    reverse: tuple[bool, bool],
    kinds: tuple[Any, Any],
    shape: tuple[int, ...],
) -> None:
    x = normal(*shape, dtype=kinds[0])
    want = wide(x)
    for name, operand, swapped in zip(ops, operands, reverse, strict=True):
        scalar = np.float32(operand)
        want = wide(BINARY[name](scalar, want) if swapped else BINARY[name](want, scalar))
    body = tensor_scalar(
        ops[0], operands[0], reverse0=reverse[0], op1=getattr(nl, ops[1]), operand1=operands[1],
        reverse1=reverse[1],
    )  # fmt: skip
    got = results(body, x, out=[(shape, kinds[1])])
    np.testing.assert_array_equal(got, want.astype(kinds[1]))


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("operand", [None, 0, 0.0])
def test_tensor_scalar_unary(name: str, operand: Any) -> None:
    x = np.abs(normal(8, 9)) + 0.1 if name == "rsqrt" else normal(8, 9)
    op, out = getattr(nl, name), [((8, 9), F32)]
    got = results(lambda dst, x: nisa.tensor_scalar(dst, x, op, operand), x, out=out)
    np.testing.assert_allclose(got, UNARY[name](x), rtol=2e-7)
    refused("tensor_scalar.unary-operand", tensor_scalar(name, 1.0), x, out=out)
    refused("tensor_scalar.unary-operand", tensor_scalar(name, None), x, x[:, :1], out=out)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32])
def test_tensor_scalar_bits(kind: Any) -> None:
    x, out = integers(8, 50, dtype=kind, high=127), [((8, 50), kind)]
    body = tensor_scalar("bitwise_and", 0x3C, op1=nl.right_shift, operand1=2)
    np.testing.assert_array_equal(results(body, x, out=out), (x & 0x3C) >> 2)
    columns = integers(8, 1, dtype=kind, seed=1)
    got = results(tensor_scalar("bitwise_xor", None), x, columns, out=out)
    np.testing.assert_array_equal(got, x ^ columns)
    got = results(tensor_scalar("invert", 0), x, out=out)
    np.testing.assert_array_equal(got, ~x)
    refused("tensor_scalar.operand", tensor_scalar("bitwise_and", 1.5), x, out=out)
    refused("tensor_scalar.operand", tensor_scalar("bitwise_and", 2**33), x, out=out)
    refused("tensor_scalar.bitvec-dtype", tensor_scalar("bitwise_and", 1), x, out=[((8, 50), F32)])
    scalar = tensor_scalar("bitwise_and", 1, engine=nisa.engine.scalar)
    refused("tensor_scalar.engine", scalar, x, out=out)


def test_tensor_scalar_stages_are_of_one_kind() -> None:
    x, out = integers(4, 5, dtype=np.int32), [((4, 5), np.int32)]
    mixed = tensor_scalar("bitwise_and", 3, op1=nl.add, operand1=1.0)
    refused("tensor_scalar.operators", mixed, x, out=out)
    lone = tensor_scalar("add", 3.0, operand1=1.0)
    refused("tensor_scalar.operand1", lone, x, out=out)
    refused("tensor_scalar.operand", tensor_scalar("add", 3.0, op1=nl.add), x, out=out)
    refused("tensor_scalar.operand", tensor_scalar("add", "3"), x, out=out)
    refused("tensor_scalar.operator", tensor_scalar("exp", 0), x, out=out)


def test_tensor_scalar_operand_tiles_are_float32_columns() -> None:
    x, out = normal(8, 6), [((8, 6), F32)]
    body = tensor_scalar("add", None)
    column = normal(8, 1, seed=1)
    for psum in ((), ("x",), ("column",), ("x", "column")):
        np.testing.assert_array_equal(results(body, x, column, out=out, psum=psum), x + column)
    refused("tensor_scalar.operand-dtype", body, x, column.astype(BF16), out=out)
    refused("tensor_scalar.vector-operand", body, x, normal(8, 2), out=out)
    refused("tensor_scalar.vector-operand", body, x, column[:4], out=out)


def test_tensor_scalar_engines() -> None:
    x, out = normal(8, 6), [((8, 6), F32)]
    scalar = {"engine": nisa.engine.scalar}
    pairs: list[tuple[str, dict[str, Any]]] = [
        ("multiply", {}), ("add", {}), ("multiply", {"op1": nl.add, "operand1": 1.0}),
    ]  # fmt: skip
    for name, second in pairs:
        done = run(tensor_scalar(name, 2.0, **second, **scalar), x, out=out)
        assert issued(done, "tensor_scalar").engine is nisa.engine.scalar
    refused("tensor_scalar.scalar-operators", tensor_scalar("subtract", 2.0, **scalar), x, out=out)
    reversed_pair = tensor_scalar("add", 2.0, op1=nl.multiply, operand1=1.0, **scalar)
    refused("tensor_scalar.scalar-operators", reversed_pair, x, out=out)
    got = results(tensor_scalar("subtract", 2.0, **scalar), x, out=out, target="trn3")
    np.testing.assert_array_equal(got, x - 2)
    gpsimd = {"engine": nisa.engine.gpsimd}
    refused("tensor_scalar.engine", tensor_scalar("add", 2.0, **gpsimd), x, out=out)
    square = tensor_scalar("square", 0, op1=nl.rsqrt, operand1=0, **gpsimd)
    np.testing.assert_allclose(results(square, x, out=out), 1 / np.abs(x), rtol=1e-6)
    refused("tensor_scalar.gpsimd-psum", square, x, out=out, psum=["x"])
    done = run(tensor_scalar("rsqrt", 0), x * x, out=out)
    assert issued(done, "tensor_scalar").engine is nisa.engine.gpsimd


@pytest.mark.parametrize(
    ("kind", "psum", "target", "cost"),
    [
        (F32, (), "trn2", 1024),
        (BF16, (), "trn2", 256),
        (BF16, ("x",), "trn2", 512),
        (BF16, (), "trn1", 1024),
    ],
)
def test_tensor_scalar_cost(kind: Any, psum: tuple[str, ...], target: str, cost: int) -> None:
    x, out = np.ones((8, 1024), kind), [((8, 1024), kind)]
    done = run(tensor_scalar("add", 1.0), x, out=out, psum=psum, target=target)
    assert issued(done, "tensor_scalar").cycles == cost


# scalar_tensor_tensor


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
@pytest.mark.parametrize("kind", [F32, BF16, E4M3])
def test_scalar_tensor_tensor(reverse0: bool, reverse1: bool, kind: Any) -> None:
    x, y, column = normal(16, 4, 6, dtype=kind), normal(16, 24, seed=1), normal(16, 1, seed=2)

    def body(dst, x, y, column):
        nisa.scalar_tensor_tensor(
            dst, x, nl.subtract, column, nl.multiply, y, reverse0=reverse0, reverse1=reverse1
        )

    got = results(body, x, y, column, out=[((16, 24), BF16)])
    first = wide(x).reshape(16, 24) - column
    np.testing.assert_array_equal(got, ((-first if reverse0 else first) * y).astype(BF16))


def test_scalar_tensor_tensor_reverses_the_second_stage() -> None:
    x, y = normal(4, 6), normal(4, 6, seed=1)

    def body(dst, x, y):
        nisa.scalar_tensor_tensor(dst, x, nl.multiply, 2.0, nl.subtract, y, reverse1=True)

    np.testing.assert_array_equal(results(body, x, y, out=[((4, 6), F32)]), y - 2 * x)


def test_scalar_tensor_tensor_refusals() -> None:
    x, i = normal(4, 6), integers(4, 6, dtype=np.int32)
    out = [((4, 6), F32)]

    def body(dst, x, y):
        nisa.scalar_tensor_tensor(dst, x, nl.add, 1.0, nl.multiply, y)

    for psum in (("x",), ("y",), ("dst",)):
        np.testing.assert_array_equal(results(body, x, x, out=out, psum=psum), (x + 1) * x)
    refused("scalar_tensor_tensor.psum-port", body, x, x, out=out, psum=["x", "y"])
    refused("scalar_tensor_tensor.shape", body, x, normal(4, 5), out=out)

    def bits(dst, x, y):
        nisa.scalar_tensor_tensor(dst, x, nl.bitwise_and, 1, nl.bitwise_or, y)

    refused("scalar_tensor_tensor.operator", bits, i, i, out=[((4, 6), np.int32)])

    def unary(dst, x, y):
        nisa.scalar_tensor_tensor(dst, x, nl.add, 1.0, nl.abs, y)

    refused("scalar_tensor_tensor.operator", unary, x, x, out=out)


def test_scalar_tensor_tensor_cost() -> None:
    def body(dst, x, y):
        nisa.scalar_tensor_tensor(dst, x, nl.subtract, 1.0, nl.multiply, y)

    for kind, cost in ((BF16, 200), (F32, 400)):
        x = np.ones((4, 200), kind)
        done = run(body, x, x, out=[((4, 200), F32)])
        assert issued(done, "scalar_tensor_tensor").cycles == cost


# reciprocal


def reciprocal(dst: Any, x: Any) -> None:
    nisa.reciprocal(dst, x)


@pytest.mark.parametrize("psum", [(), ("x",), ("dst", "x")])
@pytest.mark.parametrize("kind", [F32, BF16, np.int16])
def test_reciprocal(psum: tuple[str, ...], kind: Any) -> None:
    x = integers(64, 3, 5, dtype=kind, low=1)
    got = results(reciprocal, x, out=[((64, 15), F16)], psum=psum)
    want = (np.float32(1) / wide(x)).reshape(64, 15)
    np.testing.assert_array_equal(got, want.astype(F16))


def test_reciprocal_of_zero_and_infinity() -> None:
    x = np.array([[0, -0.0, np.inf, -np.inf, np.nan]], F32)
    got = results(reciprocal, x, out=[((1, 5), F32)])
    np.testing.assert_array_equal(got, [[np.inf, -np.inf, 0, -0.0, np.nan]])
    refused("reciprocal.shape", reciprocal, x, out=[((1, 4), F32)])
    assert issued(run(reciprocal, x, out=[((1, 5), F32)]), "reciprocal").cycles == 64
    x = np.ones((1, 50), F32)
    assert issued(run(reciprocal, x, out=[((1, 50), F32)]), "reciprocal").cycles == 400


# What all instructions share


def test_tiles_may_start_at_other_partitions() -> None:
    x = normal(128, 10)

    def body(dst, x):
        nisa.memset(dst, 0.0)
        nisa.tensor_tensor(dst[96:128], x[0:32], x[32:64], nl.add)
        nisa.tensor_scalar(dst[0:32, 2:6], x[64:96, 1:5], nl.multiply, x[32:64, 3])

    got = results(body, x, out=[((128, 10), F32)])
    want = np.zeros((128, 10), F32)
    want[96:] = x[:32] + x[32:64]
    want[:32, 2:6] = x[64:96, 1:5] * x[32:64, 3:4]
    np.testing.assert_array_equal(got, want)

    def between(dst, x):
        nisa.tensor_tensor(dst[16:48], x[0:32], x[0:32], nl.add)

    refused("tensor_tensor.start-partition", between, x, out=[((128, 10), F32)])


def test_a_result_may_overlap_its_operand() -> None:
    x = normal(4, 10)

    def body(dst, x):
        nisa.tensor_scalar(x[:, 1:], x[:, :9], nl.bypass, 0)
        nisa.tensor_copy(dst, x)

    got = results(body, x, out=[((4, 10), F32)])
    np.testing.assert_array_equal(got, np.concatenate([x[:, :1], x[:, :9]], 1))


def test_stride_0_repeats_operands() -> None:
    x, y = normal(8, 6), normal(8, 3, seed=1)

    def body(dst, x, y):
        repeated = y.expand_dim(2).broadcast(2, 2)
        nisa.tensor_tensor(dst, x, repeated, nl.multiply)

    got = results(body, x, y, out=[((8, 6), F32)])
    np.testing.assert_array_equal(got, x * np.repeat(y, 2, 1))


def test_packed_types_have_no_arithmetic() -> None:
    def body(dst, x):
        packed = nl.ndarray((8, 6), nl.float8_e4m3fn_x4)
        nisa.memset(packed, 0)
        nisa.tensor_tensor(dst, x, packed, nl.add)

    refused("tensor_tensor.packed", body, normal(8, 6), out=[((8, 6), F32)])


def test_exact_mode_rounds_nothing() -> None:
    x = normal(8, 6, dtype=BF16)

    def body(dst, x):
        squares = nl.ndarray((8, 6), nl.float8_e4m3)
        nisa.tensor_tensor(squares, x, x, nl.multiply)
        nisa.activation(dst, nl.exp, squares, bias=-1.0)

    square = wide(x) * wide(x)
    exact = results(body, x, out=[((8, 6), F32)], exact=True)
    np.testing.assert_array_equal(exact, np.exp(square - 1))
    rounded = results(body, x, out=[((8, 6), F32)])
    np.testing.assert_array_equal(rounded, np.exp(wide(square.astype(E4M3)) - 1))
