"""Data races between two programs on shared HBM."""

from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some

SEEDS = [None, *range(10)]
TWO: dict[str, Any] = {"programs": 2}


def exchange() -> None:
    other = 1 - nl.program_id()
    tile = nl.ndarray((2, 2), nl.float32)
    nisa.sendrecv(filled((2, 2)), tile, other, other, 0)


# Data races.


def numbered(shape: tuple[int, ...]) -> Any:
    """A tile that holds something else in each program."""
    tile = nl.ndarray(shape, nl.float32)
    nisa.memset(tile, nl.program_id() + 1.0)
    return tile


def share(x: Any, plan: Any, *, barrier: bool = False) -> Any:
    """Each program runs its part of a plan on one tensor: `plan(program, tensor, tile)`."""
    tensor = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    nisa.dma_copy(tensor[:, nl.program_id() :: 2], x[:, nl.program_id() :: 2])
    nisa.core_barrier(tensor, (0, 1))
    tile = numbered((x.shape[0], 2))
    for step in plan:
        step(nl.program_id(), tensor, tile)
        if barrier:
            nisa.core_barrier(tensor, (0, 1))
    return tensor


def write_all(program: int, tensor: Any, tile: Any) -> None:
    nisa.dma_copy(tensor[:, 2:4], tile)


def write_own(program: int, tensor: Any, tile: Any) -> None:
    nisa.dma_copy(tensor[:, 2 * program : 2 * program + 2], tile)


def write_interleaved(program: int, tensor: Any, tile: Any) -> None:
    nisa.dma_copy(tensor[:, program:4:2], tile)


def read_all(program: int, tensor: Any, tile: Any) -> None:
    nisa.dma_copy(tile, tensor[:, 0:2])


def read_own(program: int, tensor: Any, tile: Any) -> None:
    nisa.dma_copy(tile, tensor[:, 2 * program : 2 * program + 2])


def read_others(program: int, tensor: Any, tile: Any) -> None:
    nisa.dma_copy(tile, tensor[:, 2 - 2 * program : 4 - 2 * program])


def write_first_program_only(program: int, tensor: Any, tile: Any) -> None:
    target = tensor if program == 0 else nl.ndarray(tensor.shape, tensor.dtype, nl.hbm)
    nisa.dma_copy(target[:, 0:2], tile)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("plan", "races", "lines"),
    [
        ((write_own,), False, ()),
        ((write_interleaved,), False, ()),
        ((read_all,), False, ()),
        ((write_own, read_own), False, ()),
        ((write_all,), True, (write_all, write_all)),
        ((write_own, read_others), True, (write_own, read_others)),
        ((read_others, write_own), True, (write_own, read_others)),
        ((write_own, write_interleaved), True, (write_own, write_interleaved)),
        ((write_first_program_only, read_all), True, (write_first_program_only, read_all)),
    ],
)
def test_races(plan: Any, races: bool, lines: Any, seed: int | None) -> None:
    x = some(8, 4)
    if not races:
        interpreter.run(share, x, plan, seed=seed, **TWO)
        return
    error = refusal("programs.data-race", share, x, plan, seed=seed, **TWO)
    assert isinstance(error, interpreter.DataRaceError)
    assert {s.function for s in error.sources} == {f.__name__ for f in lines}
    assert all(str(s) in str(error) for s in error.sources)
    if write_all not in plan:
        # A barrier after each step orders steps with each other.
        interpreter.run(share, x, plan, barrier=True, seed=seed, **TWO)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exchange_does_not_order_hbm(seed: int | None) -> None:
    def kernel(x: Any, barrier: bool) -> None:
        between = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        program = nl.program_id()
        nisa.dma_copy(between[program], loaded(x[program]))
        exchange()
        if barrier:
            nisa.core_barrier(between, (0, 1))
        nisa.dma_copy(nl.ndarray((4, 4), x.dtype), between[1 - program])

    x = some(2, 4, 4)
    interpreter.run(kernel, x, True, seed=seed, **TWO)
    assert "core_barrier" in str(refusal("programs.data-race", kernel, x, False, seed=seed, **TWO))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_orders_its_tensor_only(seed: int | None) -> None:
    def kernel(x: Any, which: int) -> None:
        tensors = [nl.ndarray(x.shape, x.dtype, nl.shared_hbm) for _ in range(2)]
        program = nl.program_id()
        nisa.dma_copy(tensors[0][program], loaded(x[program]))
        nisa.core_barrier(tensors[which], (0, 1))
        nisa.dma_copy(nl.ndarray((4, 4), x.dtype), tensors[0][1 - program])

    interpreter.run(kernel, some(2, 4, 4), 0, seed=seed, **TWO)
    refusal("programs.data-race", kernel, some(2, 4, 4), 1, seed=seed, **TWO)


@pytest.mark.parametrize("seed", SEEDS)
def test_races_on_arguments_and_by_scatter(seed: int | None) -> None:
    def kernel(table: Any, rows: Any) -> None:
        index = loaded(rows[nl.program_id()])
        nisa.dma_copy(table.vector_select(0, index), numbered((2, 4)))

    table = np.zeros((6, 4), np.float32)
    apart = np.array([[[0], [4]], [[2], [5]]], np.int32)  # the boxes around the rows overlap
    interpreter.run(kernel, table, apart, seed=seed, **TWO)
    np.testing.assert_array_equal(table[:, 0], [1, 0, 2, 0, 1, 2])
    both = np.array([[[0], [4]], [[2], [4]]], np.int32)
    refusal("programs.data-race", kernel, table, both, seed=seed, **TWO)


def test_writing_the_same_values_is_no_race() -> None:
    def kernel(same: bool) -> Any:
        output = nl.ndarray((2, 2), nl.float32, nl.shared_hbm)
        nisa.dma_copy(output, filled((2, 2)) if same else numbered((2, 2)))
        return output

    np.testing.assert_array_equal(interpreter.run(kernel, True, **TWO).outputs, np.ones((2, 2)))
    refusal("programs.data-race", kernel, False, **TWO)


def test_private_hbm_is_not_shared() -> None:
    def kernel(x: Any) -> Any:
        private = nl.ndarray(x.shape, x.dtype, nl.hbm)
        nisa.dma_copy(private, loaded(x))
        output = nl.ndarray((2, *x.shape), x.dtype, nl.shared_hbm)
        nisa.dma_copy(output[nl.program_id()], private)
        return output

    x = some(4, 4)
    np.testing.assert_array_equal(interpreter.run(kernel, x, **TWO).outputs, np.stack([x, x]))


def test_each_program_has_its_own_chip_memory() -> None:
    def kernel(x: Any) -> Any:
        program = nl.program_id()
        tile = nl.ndarray((4, 4), nl.float32, address=(0, 64), name="tile")
        nisa.dma_copy(tile, x[program])
        exchange()
        output = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        nisa.dma_copy(output[program], tile)
        return output

    x = some(2, 4, 4)
    run = interpreter.run(kernel, x, capture=("tile",), **TWO)
    np.testing.assert_array_equal(run.outputs, x)
    assert [c.core for c in run.captured] == [0, 1]
