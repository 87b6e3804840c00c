"""What a run counts: of instructions made by hand, and of a kernel."""

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.report import counters, difference, difference_table, summary
from jax_tkg.nki.interpreter.report.counters import EngineCount, Traffic, run_class
from jax_tkg.nki.interpreter.report.text import table
from tests.interpreter.hand_built import Program, exchange, run


def two_cores() -> interpreter.Run:
    cores = [Program(0), Program(1)]
    for p in cores:
        p.compute(Engine.vector, 100)
        p.compute(Engine.vector, 28)
        p.compute(Engine.tensor, 512).macs = 128 * 128 * 512
        p.dma(128 * 4096, run=4096)
        p.dma(128 * 256, run=128)
        p.dma(64 * 2048, run=2048, partitions=64, route="sbuf->hbm")
        p.dma(128 * 8192, run=8192)
    exchange("gpsimd_dma", *(p.dma(1024, run=8, route="sbuf->sbuf") for p in cores))
    exchange("dma", *(p.dma(2048, run=16, route="sbuf->sbuf") for p in cores))
    exchange("barrier", *(p.compute(Engine.gpsimd, 64, op="core_barrier") for p in cores))
    return run(*cores)


def test_each_core_is_counted() -> None:
    found = counters(two_cores())
    assert [core.core for core in found.cores] == [0, 1]
    for core in found.cores:
        assert core.engines["vector"] == EngineCount(2, 128, 128, 0)
        assert core.engines["tensor"] == EngineCount(1, 512, 512, 128 * 128 * 512)
        assert core.engines["dma"].instructions == 5  # four copies, and a sendrecv by dma
        assert core.engines["gpsimd"].instructions == 2  # the other sendrecv, and the barrier
        assert "scalar" not in core.engines


def test_dma_by_route_and_by_run() -> None:
    core = counters(two_cores()).cores[0]
    assert core.routes == {
        "hbm->sbuf": Traffic(3, 128 * (4096 + 256 + 8192), 128 + 256 + 128),
        "sbuf->hbm": Traffic(1, 64 * 2048, 64),
    }
    assert core.runs == {
        "runs >= 4 KiB": 128 * (4096 + 8192),
        "runs 2 to 4 KiB": 64 * 2048,
        "runs < 256 B": 128 * 256,
    }
    assert sum(core.runs.values()) == sum(route.bytes for route in core.routes.values())


def test_exchanges_are_no_part_of_the_routes() -> None:
    core = counters(two_cores()).cores[1]
    assert core.exchanges == {"gpsimd_dma": Traffic(1, 1024, 128), "dma": Traffic(1, 2048, 128)}
    assert core.barriers == 1
    assert "sbuf->sbuf" not in core.routes


@pytest.mark.parametrize(
    ("run_bytes", "name"),
    [
        (1, "runs < 256 B"),
        (255, "runs < 256 B"),
        (256, "runs 256 B to 2 KiB"),
        (2047, "runs 256 B to 2 KiB"),
        (2048, "runs 2 to 4 KiB"),
        (4095, "runs 2 to 4 KiB"),
        (4096, "runs >= 4 KiB"),
        (1 << 20, "runs >= 4 KiB"),
    ],
)
def test_classes_of_runs(run_bytes: int, name: str) -> None:
    assert run_class(run_bytes) == name


def test_difference() -> None:
    before, after = Program(), Program()
    before.compute(Engine.vector, 100)
    after.compute(Engine.vector, 100)
    assert difference(counters(run(before)), counters(run(after))) == {}
    assert difference_table(counters(run(before)), counters(run(after))) == "no difference"
    after.compute(Engine.scalar, 64)
    changed = difference(counters(run(before)), counters(run(after)))
    assert changed == {
        "core 0 scalar instructions": (0, 1),
        "core 0 scalar elements": (0, 64),
        "core 0 scalar cycles": (0, 64),
    }
    assert "core 0 scalar instructions" in difference_table(
        counters(run(before)), counters(run(after))
    )


def test_table_aligns_columns() -> None:
    assert table(("what", "n"), [("a", 1234567), ("longer", 2.5)]).splitlines() == [
        "what            n",
        "-----------------",
        "a       1,234,567",
        "longer       2.50",
    ]


def scale(x):
    """Doubles x, a half on each core, after swapping a column."""
    core = nl.program_id(0)
    result = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray((128, 1024), dtype=x.dtype, buffer=nl.sbuf)
    swapped = nl.ndarray((128, 1), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[core])
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=2.0)
    nisa.sendrecv(
        src=tile[:, 0:1], dst=swapped, send_to_rank=1 - core, recv_from_rank=1 - core, pipe_id=0
    )
    nisa.dma_copy(dst=result[core], src=tile)
    nisa.core_barrier(data=result, cores=(0, 1))
    return result


@pytest.fixture(scope="module")
def scaled() -> interpreter.Run:
    x = np.ones((2, 128, 1024), ml_dtypes.bfloat16)
    return interpreter.run(scale, x, programs=2)


def test_counters_of_a_kernel(scaled: interpreter.Run) -> None:
    np.testing.assert_array_equal(scaled.outputs, 2 * np.ones((2, 128, 1024)))
    for core in counters(scaled).cores:
        assert core.routes == {
            "hbm->sbuf": Traffic(1, 128 * 2048, 128),
            "sbuf->hbm": Traffic(1, 128 * 2048, 128),
        }
        assert core.runs == {"runs 2 to 4 KiB": 2 * 128 * 2048}
        assert core.exchanges == {"dma": Traffic(1, 256, 128)}
        assert core.barriers == 1
        assert core.engines["vector"].elements == 1024
        assert core.memory["sbuf"] == 2048 + 2


def test_summary_of_a_kernel(scaled: interpreter.Run) -> None:
    text = summary(scaled)
    for words in (
        "scale on trn2, 2 program(s)",
        "core 0 hbm->sbuf",
        "core 1 sendrecv dma",
        "core 0 runs 2 to 4 KiB",
        "core 1 sbuf",
        "a model, not a measurement",
        "critical path",
        "test_counters.py:",
    ):
        assert words in text
    # 512 KiB read and as many written, by two cores that have 362 GB/s each.
    assert f"HBM roofline {(1 << 20) / (2 * 362) / 1000:.2f} us for 1,048,576 bytes" in text


def test_summary_of_nothing() -> None:
    assert "modelled time 0.00 us" in summary(run(Program()))
