"""What a launch keeps: tiles go with their last view, and what stays of it has no bytes."""

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.contents import Contents
from jax_tkg.nki.interpreter.dtypes import to_float32
from jax_tkg.nki.interpreter.hardware import TRN2
from jax_tkg.nki.interpreter.tensor import NkiTensor
from tests.interpreter.launches import filled, loaded, some, stored

MIB = 2**20
TILE = (128, 2048)  # 1 MiB of float32, and as much for the map of what was written
TIMES = 24
SBUF = TRN2.sbuf_usable_bytes * 128 / MIB


def loads(x: Any) -> None:
    for _ in range(TIMES):
        view = loaded(x)[:, :1024]
        nisa.tensor_scalar(nl.ndarray(view.shape, view.dtype), view, nl.add, 1.0)


def loads_in_a_loop_on_the_device(x: Any) -> None:
    for _ in nl.dynamic_range(TIMES):
        loaded(x)


def sums(x: Any) -> None:
    """In PSUM, with the map of what matmuls left there."""
    for _ in range(TIMES):
        nisa.memset(nl.ndarray(TILE, nl.float32, nl.psum), 0.0)


def addressed(x: Any) -> None:
    """Each tile lies where the others did."""
    for i in range(TIMES):
        nisa.dma_copy(nl.ndarray(TILE, nl.float32, address=(0, 4096 * (i % 2))), x)


def swaps(x: Any) -> None:
    mine = loaded(x)
    for _ in range(TIMES):
        other, theirs = 1 - nl.program_id(0), nl.ndarray(TILE, x.dtype)
        nisa.sendrecv(mine, theirs, other, other, 0)


def stores(x: Any) -> None:
    """To shared HBM, where the detector of races remembers every access."""
    out = nl.ndarray((2, *TILE), x.dtype, nl.shared_hbm)
    for _ in range(TIMES):
        nisa.dma_copy(out[nl.program_id(0)], loaded(x))


def gathers(x: Any) -> None:
    """Rows of shared HBM, by an index in SBUF that takes a MiB of its own."""
    for _ in range(TIMES):
        index = filled((128, 2048), nl.int32)
        nisa.dma_copy(nl.ndarray((128, 8), x.dtype), x[:, :8].vector_select(0, index[:, :1]))


def keeps_its_tiles(x: Any) -> None:
    """What would be seen if tiles stayed."""
    kept = [loaded(x)[:, :1] for _ in range(TIMES)]
    nisa.memset(kept[0], 0.0)


def peak_of(kernel: Callable[..., Any], programs: int) -> tuple[int, int, interpreter.Run]:
    """Bytes that a launch takes at its worst and that its `Run` holds; without waiting for `gc`."""
    x = some(*TILE)
    interpreter.run(kernel, x, programs=programs)  # whatever is made once
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        done = interpreter.run(kernel, x, programs=programs)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    return peak - before, after - before, done


# Each with its programs, and the MiB that it may need: twice what it has in use at a time.
KERNELS = (
    (loads, 1, 6), (loads_in_a_loop_on_the_device, 1, 4), (sums, 1, 8), (swaps, 2, 18),
    (stores, 2, 12), (gathers, 2, 12), (addressed, 1, SBUF + 8),
)  # fmt: skip


@pytest.mark.parametrize(("kernel", "programs", "most"), KERNELS)
def test_dead_tiles_are_given_back(
    kernel: Callable[[Any], None], programs: int, most: float
) -> None:
    peak, held, _ = peak_of(kernel, programs)
    assert peak < most * MIB, f"{peak / MIB:.1f} MiB"
    assert held < MIB, f"{held / MIB:.1f} MiB after the launch"


def test_tiles_that_the_kernel_keeps_are_seen() -> None:
    """By a view of a few of their bytes, and only while the kernel runs."""
    peak, held, _ = peak_of(keeps_its_tiles, 1)
    assert peak > TIMES * MIB
    assert held < MIB


def reachable(start: Any) -> Iterator[Any]:
    """All objects that one refers to, however far away, but for classes and modules."""
    seen, left = {id(start)}, [start]
    while left:
        yield (found := left.pop())
        for other in gc.get_referents(found):
            if id(other) not in seen and not isinstance(other, type | ModuleType):
                seen.add(id(other))
                left.append(other)


def has_bytes(found: Any) -> bool:
    return isinstance(found, NkiTensor | Contents | np.ndarray)


def two_cores(x: Any) -> Any:
    """One of everything that the record knows."""
    mine, other = filled((128, 8), x.dtype), 1 - nl.program_id(0)
    nisa.dma_copy(mine, x[:, :8].vector_select(0, filled((128, 1), nl.int32)))
    theirs = nl.ndarray((128, 8), x.dtype, address=(0, 64))
    nisa.sendrecv(mine, theirs, other, other, 0)
    out = stored(theirs)
    nisa.core_barrier(out, (0, 1))
    nisa.nc_matmul(nl.ndarray((8, 8), nl.float32, nl.psum), mine, mine)
    return out


def test_the_record_refers_to_no_bytes() -> None:
    done = interpreter.run(two_cores, some(*TILE), programs=2)
    assert not [type(o) for o in reachable((done.programs, done.memory)) if has_bytes(o)]
    assert any(access.storage.address for step in done.programs[0] for access in step.writes)
    assert any(map(has_bytes, reachable(done.outputs)))


NARROW = ("bfloat16", "float16", "float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")


@pytest.mark.parametrize("name", NARROW)
def test_narrow_floats_in_float32(name: str) -> None:
    """Every value, to the bit, however the numbers lie."""
    dtype = np.dtype(getattr(ml_dtypes, name, np.float16))
    bits = np.arange(256**dtype.itemsize).astype(f"u{dtype.itemsize}").reshape(16, -1)
    values = bits.view(dtype)
    wanted = values.astype(np.float32).view(np.uint32)
    for given, want in ((values, wanted), (values.T, wanted.T), (values[:, ::3], wanted[:, ::3])):
        np.testing.assert_array_equal(to_float32(given).view(np.uint32), want)
