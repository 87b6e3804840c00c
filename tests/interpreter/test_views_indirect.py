"""Views with an offset that is known only when the kernel runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError
from tests.interpreter.viewing import HBM, ON_CHIP, X, refuses, run, view_of


def scalar(value: int) -> Any:
    tile = nl.ndarray((1, 1), nl.int32)
    nisa.memset(tile, value)
    return tile


def register(value: int) -> Any:
    return nisa.register_alloc(value)


@pytest.mark.parametrize("index", [scalar, register])
@pytest.mark.parametrize("on_chip", [ON_CHIP, HBM])
def test_run_time_index(index: Callable[[int], Any], on_chip: bool) -> None:
    np.testing.assert_array_equal(view_of(X, lambda t: t.select(1, index(3)), on_chip), X[:, 3])
    np.testing.assert_array_equal(
        view_of(X, lambda t: t[2:4, index(1), 1:], on_chip), X[2:4, 1, 1:]
    )
    np.testing.assert_array_equal(
        view_of(X, lambda t: t[:, :, nl.ds(index(3), 3)], on_chip), X[:, :, 3:]
    )
    np.testing.assert_array_equal(
        view_of(X, lambda t: t[:, index(2)].reshape_dim(1, (2, 3)), on_chip),
        X[:, 2].reshape(8, 2, 3),
    )
    refuses("memory.run-time-index", X, lambda t: t.select(1, index(4)), on_chip)
    refuses("memory.run-time-index", X, lambda t: t.select(1, index(-1)), on_chip)
    refuses("memory.run-time-index", X, lambda t: t[:, :, nl.ds(index(4), 3)], on_chip)


def test_run_time_index_of_the_first_axis() -> None:
    np.testing.assert_array_equal(view_of(X, lambda t: t[scalar(6)], HBM), X[6])
    refuses("view.indirect-partition", X, lambda t: t[scalar(6)], ON_CHIP)
    refuses("view.indirect-twice", X, lambda t: t[scalar(1), scalar(1)], HBM)
    refuses("view.indirect-twice", X, lambda t: t[scalar(1)].ap([[1, 4]]), HBM)
    refuses("view.dtype", X, lambda t: t[scalar(1)].view("uint8"), HBM)
    refuses("view.index", X, lambda t: t[register(1) : 3], HBM)
    refuses("dma.scalar-offset", X, lambda t: t[nl.zeros((1, 2), nl.int32)], HBM)


def test_scalar_offset_of_a_pattern_counts_steps_of_the_view() -> None:
    def rows(index):
        return lambda t: t.ap([[24, 2], [1, 24]], scalar_offset=scalar(index), indirect_dim=0)

    np.testing.assert_array_equal(view_of(X, rows(5), HBM), X[5:7].reshape(2, 24))
    refuses("memory.run-time-index", X, rows(8), HBM)
    refuses("memory.out-of-bounds", X, rows(7), HBM)
    refuses("view.indirect-partition", X, rows(0), ON_CHIP)

    def columns(index):
        return lambda t: t[:, :, 2:].ap(
            [[24, 8], [1, 3]], scalar_offset=scalar(index), indirect_dim=1
        )

    np.testing.assert_array_equal(view_of(X, columns(3), ON_CHIP), X[:, 3, 2:5])
    refuses("memory.run-time-index", X, columns(4), ON_CHIP)


def test_scalar_offset_of_another_type_still_counts_steps_of_the_view() -> None:
    def make(t):
        return t.ap([[48, 8], [1, 12]], scalar_offset=scalar(3), indirect_dim=1, dtype="int16")

    wanted = X.view(np.int16).reshape(8, 4, 12)[:, 3]
    np.testing.assert_array_equal(view_of(X, make, ON_CHIP), wanted)


def test_run_time_offset_does_not_wrap_into_the_next_partition() -> None:
    def make(index):
        return lambda t: t.ap(
            [[24, 4], [1, 2]], offset=20, scalar_offset=scalar(index), indirect_dim=2
        )

    np.testing.assert_array_equal(view_of(X, make(2), ON_CHIP), X.reshape(8, 24)[:4, 22:24])
    refuses("memory.out-of-bounds", X, make(4), ON_CHIP)


def gather(rows: list[int], make: Callable[[Any, Any], Any], oob: Any = None) -> Any:
    def kernel(x, index):
        offsets = nl.ndarray(index.shape, index.dtype)
        nisa.dma_copy(offsets, index)
        view = make(x, offsets)
        tile = nl.ndarray(view.shape, x.dtype)
        nisa.memset(tile, -1)
        nisa.dma_copy(tile, view, oob_mode=oob or nisa.oob_mode.error)
        out = nl.ndarray(view.shape, x.dtype, nl.shared_hbm)
        nisa.dma_copy(out, tile)
        return out

    return run(kernel, X, np.array(rows, np.int32)[:, None])


GATHERS = [
    lambda t, rows: t.vector_select(0, rows),
    lambda t, rows: t.ap([[24, 3], [6, 4], [1, 6]], vector_offset=rows),
]


@pytest.mark.parametrize("make", GATHERS)
def test_vector_offset_takes_a_row_for_each_partition(make: Callable[[Any, Any], Any]) -> None:
    np.testing.assert_array_equal(gather([7, 0, 7], make), X[[7, 0, 7]])
    np.testing.assert_array_equal(
        gather([7, 0, 7], lambda t, r: make(t, r)[:, 1:3]), X[[7, 0, 7], 1:3]
    )
    with pytest.raises(NkiError, match=r"dma_copy\.run-time-index"):
        gather([7, 8, 0], make)
    skipped = gather([7, 8, -1], make, nisa.oob_mode.skip)
    np.testing.assert_array_equal(skipped, np.stack([X[7], 0 * X[7] - 1, 0 * X[7] - 1]))


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("view.indirect-axis", lambda v: v[1:]),
        ("view.indirect-axis", lambda v: v.select(0, 1)),
        ("view.indirect-axis", lambda v: v.expand_dim(0)),
        ("view.indirect-axis", lambda v: v.reshape_dim(0, (1, 3))),
        ("view.permute", lambda v: v.permute((1, 0, 2))),
        ("view.reshape", lambda v: v.flatten_dims(0, 1)),
        ("view.indirect-twice", lambda v: v.vector_select(0, v.indirect_offset.index)),
        ("view.indirect-twice", lambda v: v[:, scalar(0)]),
    ],
)
def test_rows_chosen_at_run_time_stay_the_first_axis(
    rule: str, change: Callable[[Any], Any]
) -> None:
    with pytest.raises(NkiError) as caught:
        gather([1, 2, 3], lambda t, rows: change(t.vector_select(0, rows)))
    assert caught.value.rule in (rule, "view.vector-select")


def test_vector_offset_needs_the_first_axis_of_hbm() -> None:
    for rule, make in [
        ("view.vector-select", lambda t, rows: t.vector_select(1, rows)),
        ("view.ap", lambda t, rows: t.ap([[1, 3], [1, 6]], vector_offset=rows, indirect_dim=1)),
        ("view.ap", lambda t, rows: t.ap([[1, 3]], vector_offset=rows, scalar_offset=rows)),
    ]:
        with pytest.raises(NkiError) as caught:
            gather([1, 2, 3], make)
        assert caught.value.rule == rule
    refuses("view.vector-select", X, lambda t: t.vector_select(0, scalar(0)), ON_CHIP)
