"""Registers and the loops that run on the device."""

from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some, stored

INT = np.int32


def register(value: Any = None) -> Any:
    return nisa.register_alloc(value)


def number(value: int) -> np.ndarray:
    return np.array([[value]], INT)


def kept(*registers: Any) -> Any:
    """In a kernel: an output with the values of registers."""
    tile = nl.ndarray((1, len(registers)), nl.int32)
    for i, r in enumerate(registers):
        nisa.register_store(tile[:, i : i + 1], r)
    return stored(tile)


# Moving values.


def test_values_move() -> None:
    def kernel(x: Any) -> Any:
        moved, from_register, from_sbuf, from_hbm = (register() for _ in range(4))
        nisa.register_move(moved, 7)
        nisa.register_move(from_register, moved)
        nisa.register_move(moved, 8)
        nisa.register_load(from_sbuf, loaded(x))
        nisa.register_load(from_hbm, x)
        return kept(register(-3), moved, from_register, from_sbuf, from_hbm)

    want = [[-3, 8, 7, -(2**31), -(2**31)]]
    np.testing.assert_array_equal(interpreter.run(kernel, number(-(2**31))).outputs, want)


def test_a_register_is_stored_in_hbm() -> None:
    def kernel() -> Any:
        output = nl.ndarray((1,), nl.int32, nl.shared_hbm)
        nisa.register_store(output, register(5))
        return output

    assert interpreter.run(kernel).outputs.tolist() == [5]


def test_reading_an_empty_register() -> None:
    def kernel(value: int | None) -> Any:
        return kept(register(value))

    interpreter.run(kernel, 0)
    refusal("register.uninitialized", kernel, None)


def test_what_a_register_begins_with(no_shape_checks: None) -> None:
    refusal("register_alloc.value", lambda: register(1.5))
    refusal("register_alloc.value", lambda: register(filled((1, 1))))


@pytest.mark.parametrize("way", ["load", "store"])
@pytest.mark.parametrize(
    ("shape", "dtype", "buffer", "rule"),
    [
        ((1, 1), nl.int32, nl.sbuf, None),
        ((1, 1), nl.uint8, nl.sbuf, None),
        ((1, 2), nl.int32, nl.sbuf, "size"),
        ((1, 1), nl.float32, nl.sbuf, "dtype"),
        ((1, 1), nl.int32, nl.psum, "buffer"),
    ],
)
def test_loads_and_stores(way: str, shape: Any, dtype: Any, buffer: Any, rule: str | None) -> None:
    def kernel() -> None:
        tile = filled(shape, dtype, buffer)
        if way == "load":
            nisa.register_load(register(), tile)
        else:
            nisa.register_store(tile, register(1))

    if rule is None:
        interpreter.run(kernel)
    else:
        refusal(f"register_{way}.{rule}", kernel)


@pytest.mark.parametrize(
    "compute",
    [
        lambda r: r + 1,
        lambda r: 1 + r,
        lambda r: r - 1,
        lambda r: 1 - r,
        lambda r: 2 * r,
        lambda r: r // 2,
        lambda r: r % 2,
        lambda r: r < 3,
        lambda r: r >= 3,
        lambda r: int(r),
        lambda r: list(range(r)),
        lambda r: [0, 1][r],
    ],
)
def test_python_does_not_compute_with_registers(compute: Any) -> None:
    with pytest.raises(TypeError, match="register has no value while the kernel is built"):
        interpreter.run(lambda: compute(register(1)))

    def body() -> None:
        nl.fori_loop(0, 2, compute)

    with pytest.raises(TypeError, match="register has no value"):
        interpreter.run(body)


# Loops.


def rows_copied(x: Any, first: Any, last: Any, step: int, style: str) -> Any:
    """Rows first, first + step, ... below last of x into a tensor of ones."""
    output = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    nisa.dma_copy(output, filled(x.shape))
    tile = nl.ndarray((1, x.shape[1]), x.dtype)

    def body(i: Any) -> None:
        nisa.dma_copy(tile, x[nl.ds(i, 1)])
        nisa.dma_copy(output[nl.ds(i, 1)], tile)

    if style == "fori":
        nl.fori_loop(first, last, body, step)
    else:
        for i in nl.dynamic_range(first, last, step):
            body(i)
    return output


@pytest.mark.parametrize("style", ["fori", "range"])
@pytest.mark.parametrize(("first", "last", "step"), [(0, 6, 1), (1, 5, 2), (2, 2, 1), (4, 1, 1)])
@pytest.mark.parametrize("by_register", [False, True])
def test_counted_loops(first: int, last: int, step: int, by_register: bool, style: str) -> None:
    def kernel(x: Any, bounds: Any) -> Any:
        first_, last_ = (
            (bounds[0], bounds[1]) if isinstance(bounds, tuple) else (register(), register())
        )
        if not isinstance(bounds, tuple):
            nisa.register_load(first_, bounds[:, 0:1])
            nisa.register_load(last_, bounds[:, 1:2])
        return rows_copied(x, first_, last_, step, style)

    x = some(6, 4)
    want = np.ones_like(x)
    want[first:last:step] = x[first:last:step]
    bounds = np.array([[first, last]], INT) if by_register else (first, last)
    np.testing.assert_array_equal(interpreter.run(kernel, x, bounds).outputs, want)


def test_one_bound_is_the_last() -> None:
    seen = list[int]()

    def kernel() -> None:
        for i in nl.dynamic_range(3):
            seen.append(i.register_value)

    interpreter.run(kernel)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("step", [0, -1])
def test_steps_are_positive(step: int) -> None:
    refusal("loop.step", lambda: nl.fori_loop(0, 2, lambda i: None, step))


def counted_down(start: Any) -> Any:
    """How many times `while_loop` ran from a number down to 0."""
    left, trips = nl.ndarray((1, 1), nl.int32), nl.ndarray((1, 1), nl.int32)
    table = nl.ndarray((1, 8), nl.int32)
    for i in range(8):
        nisa.memset(table[:, i : i + 1], i - 1)
    nisa.memset(trips, 0)
    count = register(0)

    def body(r: Any) -> Any:
        nisa.register_store(left, r)
        following = register()
        nisa.dma_copy(left, table.ap([[8, 1], [1, 1]], scalar_offset=left, indirect_dim=1))
        nisa.register_load(following, left)
        nisa.register_move(count, count.register_value + 1)
        return following

    condition = register()
    nisa.register_load(condition, start)
    nl.while_loop(condition, body)
    return kept(count)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_while_loop(start: int) -> None:
    assert interpreter.run(counted_down, number(start)).outputs.tolist() == [[start]]


def test_a_while_loop_needs_its_next_condition() -> None:
    interpreter.run(lambda: nl.while_loop(register(1), lambda r: register(0)))
    refusal("loop.condition", lambda: nl.while_loop(register(1), lambda r: None))


def test_a_register_as_condition_of_while() -> None:
    def kernel(x: Any) -> Any:
        count, flag = register(), register(1)
        trips = 0
        while flag:
            trips += 1
            nisa.register_load(flag, x[trips : trips + 1])
        nisa.register_move(count, trips)
        return kept(count)

    got = interpreter.run(kernel, np.array([1, 1, 4, 0, 1], INT)).outputs
    assert got.tolist() == [[3]]


@pytest.mark.parametrize("style", ["fori", "range"])
def test_the_induction_register_is_frozen(style: str) -> None:
    def body(i: Any) -> None:
        copy = register()
        nisa.register_move(copy, i)
        nisa.register_move(copy, 1)

    def write(i: Any) -> None:
        nisa.register_move(i, 1)

    def kernel(body: Any) -> None:
        if style == "fori":
            nl.fori_loop(0, 2, body)
        else:
            for i in nl.dynamic_range(2):
                body(i)

    interpreter.run(kernel, body)
    refusal("register.induction", kernel, write)


# Tensors of a loop's body.


def use_after(style: str, where: str) -> None:
    outside = nl.ndarray((2, 2), nl.float32)
    held = [outside]

    def body(_: Any) -> None:
        inside = filled((2, 2))
        nisa.tensor_copy(outside, inside)
        if where == "inside":
            held[0] = inside

    if style == "fori":
        nl.fori_loop(0, 2, body)
    elif style == "while":
        ends = [register(0), register(1)]

        def condition(r: Any) -> Any:
            body(r)
            return ends.pop()

        nl.while_loop(register(1), condition)
    elif style == "nested":
        nl.fori_loop(0, 2, lambda _: nl.fori_loop(0, 2, body))
    elif style == "break":
        for i in nl.dynamic_range(2):
            body(i)
            break
    else:
        for i in nl.dynamic_range(2):
            body(i)
    nisa.tensor_copy(nl.ndarray((2, 2), nl.float32), held[0])


@pytest.mark.parametrize("style", ["fori", "while", "range", "nested", "break"])
def test_tensors_of_the_body_end_with_it(style: str) -> None:
    interpreter.run(use_after, style, "outside")
    error = refusal("loop.local-tensor", use_after, style, "inside")
    assert "declare it before the loop" in str(error)
    assert "launches.py" in str(error)


def test_an_inner_loop_sees_tensors_of_the_outer() -> None:
    def kernel() -> None:
        def outer(_: Any) -> None:
            tile = filled((2, 2))
            nl.fori_loop(0, 2, lambda _: nisa.memset(tile, 2.0))
            nisa.memset(tile, 3.0)

        nl.fori_loop(0, 2, outer)

    interpreter.run(kernel)


def test_a_loop_left_by_an_error_is_over() -> None:
    def fails(_: Any) -> None:
        raise ValueError

    def kernel() -> None:
        try:
            nl.fori_loop(0, 1, fails)
        except ValueError:
            nisa.memset(nl.ndarray((2, 2), nl.float32), 0.0)
        use_after("fori", "outside")

    interpreter.run(kernel)


def test_a_body_declares_its_names_once() -> None:
    def kernel(inside: bool) -> None:
        def body(_: Any) -> None:
            nisa.memset(nl.ndarray((2, 2), nl.float32, name="tile"), 0.0)

        if inside:
            nl.fori_loop(0, 3, body)
        else:
            for _ in nl.static_range(3):
                body(_)

    interpreter.run(kernel, True)
    refusal("memory.name", kernel, False)
