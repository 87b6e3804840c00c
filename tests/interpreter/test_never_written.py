"""Reading memory that was never written, on chip and in HBM; outputs that are not written."""

from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, stored, use

STRICT: dict[str, Any] = {"refuse_uninitialized": True}


# What was never written.


INTEGERS = [nl.int32, nl.int8, nl.uint8, nl.uint16, nl.uint32]
FLOATS = [nl.float32, nl.bfloat16, nl.float16, nl.float8_e4m3, nl.float8_e5m2]


def copy_of_part(dtype: Any, buffer: Any, written: Any, read: Any, address: Any = None) -> Any:
    tile = nl.ndarray((8, 8), dtype, buffer, address=address)
    nisa.memset(tile[written], 1)
    copy = nl.ndarray(tile[read].shape, dtype)
    nisa.tensor_copy(copy, tile[read])
    return stored(copy)


PARTS = [
    (slice(None), slice(None), True),
    ((slice(None), slice(0, 4)), (slice(None), slice(0, 4)), True),
    ((slice(None), slice(0, 4)), (slice(None), slice(1, 5)), False),
    ((slice(None), slice(0, 8, 2)), (slice(None), slice(2, 8, 2)), True),
    ((slice(None), slice(0, 8, 2)), (slice(None), slice(0, 1)), True),
    ((slice(None), slice(0, 8, 2)), (slice(None), slice(0, 2)), False),
    (slice(0, 4), slice(0, 4), True),
    (slice(0, 4), slice(0, 5), False),
]


@pytest.mark.parametrize("address", [None, (0, 64)])
@pytest.mark.parametrize("buffer", [nl.sbuf, nl.psum])
@pytest.mark.parametrize(("written", "read", "allowed"), PARTS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_never_written(
    dtype: Any, written: Any, read: Any, allowed: bool, buffer: Any, address: Any
) -> None:
    arguments = (dtype, buffer, written, read, address)
    if allowed:
        interpreter.run(copy_of_part, *arguments)
        return
    error = refusal("memory.never-written", copy_of_part, *arguments)
    assert isinstance(error, interpreter.UninitializedReadError)
    assert "declared at test_never_written.py" in str(error)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("written", "read", "allowed"), PARTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_never_written(
    dtype: Any, written: Any, read: Any, allowed: bool, exact: bool
) -> None:
    arguments = (dtype, nl.sbuf, written, read)
    run = interpreter.run(copy_of_part, *arguments, exact=exact)
    want = np.full((8, 8), np.nan)
    want[written] = 1
    np.testing.assert_array_equal(run.outputs.astype(np.float64), want[read])
    if allowed:
        assert not run.uninitialized
        interpreter.run(copy_of_part, *arguments, exact=exact, **STRICT)
        return
    ((source, what),) = run.uninitialized.items()
    assert source.function == "copy_of_part"
    assert dtype in what
    refusal("memory.never-written", copy_of_part, *arguments, exact=exact, **STRICT)


def test_writes_add_up() -> None:
    def kernel(parts: Any) -> None:
        tile = nl.ndarray((8, 8), nl.uint8)
        for part in parts:
            nisa.memset(tile[:, part], 1)
        use(tile)

    interpreter.run(kernel, (slice(0, 3), slice(2, 6), slice(6, 8)))
    interpreter.run(kernel, (slice(0, 8, 2), slice(1, 8, 2)))
    error = refusal("memory.never-written", kernel, (slice(0, 3), slice(4, 8)))
    assert "(0, 3)" in str(error)
    refusal("memory.never-written", kernel, (slice(0, 8, 2), slice(0, 8, 4)))


def test_a_write_as_another_type_counts() -> None:
    def kernel(columns: int) -> None:
        tile = nl.ndarray((4, 4), nl.int32)
        nisa.memset(tile.view(nl.int16)[:, :columns], 0)
        use(tile)

    interpreter.run(kernel, 8)
    refusal("memory.never-written", kernel, 7)


def test_hbm_never_written() -> None:
    def kernel(dtype: Any, rows: int) -> None:
        between = nl.ndarray((4, 4), dtype, nl.hbm)
        nisa.dma_copy(between[:rows], filled((rows, 4), dtype))
        loaded(between)

    interpreter.run(kernel, nl.uint8, 4)
    refusal("memory.never-written", kernel, nl.uint8, 3)
    refusal("memory.never-written", kernel, nl.float32, 3, **STRICT)


# Outputs.


def partly_written(columns: Any) -> Any:
    output = nl.ndarray((4, 8), nl.float32, nl.shared_hbm)
    for part in columns:
        nisa.dma_copy(output[:, part], filled(output[:, part].shape))
    return output


def test_outputs_are_written() -> None:
    interpreter.run(partly_written, (slice(0, 8, 2), slice(1, 8, 2)))
    error = refusal("memory.output-never-written", partly_written, (slice(0, 8, 2),))
    assert "16 elements" in str(error)
    assert "(0, 1)" in str(error)
    refusal("memory.output-never-written", partly_written, ())


@pytest.mark.parametrize("buffer", [nl.hbm, nl.sbuf, nl.psum])
def test_outputs_are_in_shared_hbm(buffer: Any) -> None:
    def kernel() -> Any:
        tile = nl.ndarray((4, 4), nl.float32, buffer)
        source = filled((4, 4))
        (nisa.dma_copy if buffer is nl.hbm else nisa.tensor_copy)(tile, source)
        return tile

    assert "shared_hbm" in str(refusal("language.output", kernel))
