"""Two programs of a launch: exchanges, waiting for ever, divergence, races, failures, seeds."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some

SEEDS = [None, *range(10)]
GPSIMD = nisa.dma_engine.gpsimd_dma
TWO: dict[str, Any] = {"programs": 2}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def line_of(function: Any, text: str) -> int:
    """The line of a kernel's source that contains a text."""
    import inspect

    lines, first = inspect.getsourcelines(function)
    (found,) = [first + i for i, line in enumerate(lines) if text in line]
    return found


def swap(tile: Any, pipe: int = 0, engine: Any = nisa.dma_engine.dma) -> Any:
    other = 1 - nl.program_id()
    received = nl.ndarray(tile.shape, tile.dtype)
    nisa.sendrecv(tile, received, other, other, pipe, dma_engine=engine)
    return received


# Exchanges.


def swapped(x: Any) -> Any:
    output = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    program = nl.program_id()
    tile = loaded(x[program])
    for step in range(3):
        tile = swap(tile, pipe=step % 2, engine=GPSIMD if step == 1 else nisa.dma_engine.dma)
    nisa.dma_copy(output[program], tile)
    nisa.core_barrier(output, (0, 1))
    return output


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_swaps(seed: int | None, dtype: Any) -> None:
    x = some(2, 128, 32, dtype=dtype)
    run = interpreter.run(swapped, x, seed=seed, **TWO)
    np.testing.assert_array_equal(run.outputs, x[::-1])
    first, second = run.programs
    assert [step.signature for step in first] == [step.signature for step in second]
    met = [step for step in first if step.exchange]
    assert [step.exchange for step in met] == ["dma", "gpsimd_dma", "dma", "barrier"]
    for mine in met:
        assert mine.peer is second[mine.index]
        assert second[mine.index].peer is mine


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_the_same_record_each_time(seed: int | None) -> None:
    order = list[str]()

    def kernel(x: Any) -> Any:
        tile = filled((1, 1))
        for i in range(6):
            nl.device_print(f"{i}", tile)
            nisa.memset(tile, float(i))
        return swapped(x)

    def once() -> tuple[list[str], list[list[str]]]:
        order.clear()
        run = interpreter.run(kernel, some(2, 4, 4), seed=seed, print=order.append, **TWO)
        return list(order), [[str(step) for step in program] for program in run.programs]

    assert once() == once()


def test_seeds_interleave() -> None:
    order = list[int]()

    def kernel() -> None:
        tile = filled((1, 1))
        for _ in range(8):
            order.append(nl.program_id())
            nisa.memset(tile, 1.0)

    orders = set()
    for seed in SEEDS:
        order.clear()
        interpreter.run(kernel, seed=seed, **TWO)
        assert sorted(order) == [0] * 8 + [1] * 8
        orders.add(tuple(order))
    assert len(orders) > 5
    assert (0,) * 8 + (1,) * 8 in orders


@pytest.mark.parametrize(
    ("dtype", "columns", "allowed"),
    [
        (nl.float32, 256, True),
        (nl.float32, 257, False),
        (nl.bfloat16, 256, True),
        (nl.bfloat16, 257, False),
        (nl.uint8, 256, True),
        (nl.uint8, 257, False),
        (nl.float8_e4m3, 257, False),
    ],
)
def test_how_much_gpsimd_moves(dtype: Any, columns: int, allowed: bool) -> None:
    def kernel(engine: Any) -> None:
        swap(filled((128, columns), dtype), engine=engine)

    interpreter.run(kernel, nisa.dma_engine.dma, **TWO)
    if allowed:
        run = interpreter.run(kernel, GPSIMD, **TWO)
        assert run.programs[0][1].engine is nisa.engine.gpsimd
    else:
        refusal("sendrecv.gpsimd-size", kernel, GPSIMD, **TWO)


def exchange(shapes: Any, dtypes: Any, buffers: Any, ranks: Any = None) -> None:
    other = 1 - nl.program_id()
    source = filled(shapes[0], dtypes[0], buffers[0])
    target = nl.ndarray(shapes[1], dtypes[1], buffers[1])
    send, receive = (other, other) if ranks is None else ranks
    nisa.sendrecv(source, target, send, receive, 0)


SAME, F32, SBUF = ((8, 4), (8, 4)), (nl.float32,) * 2, (nl.sbuf,) * 2


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((SAME, F32, SBUF), None),
        ((((8, 4), (8, 5)), F32, SBUF), "shape"),
        ((((8, 4), (4, 8)), F32, SBUF), "shape"),
        ((SAME, (nl.float32, nl.int32), SBUF), "shape"),
        ((SAME, F32, (nl.psum, nl.sbuf)), "buffer"),
        ((SAME, F32, (nl.sbuf, nl.psum)), "buffer"),
        ((SAME, F32, (nl.sbuf, nl.hbm)), "buffer"),
        ((SAME, F32, SBUF, (0, 0)), "rank"),
        ((SAME, F32, SBUF, (2, 2)), "rank"),
    ],
)
def test_sendrecv_rules(arguments: Any, rule: str | None) -> None:
    if rule is None:
        interpreter.run(exchange, *arguments, **TWO)
    else:
        refusal(f"sendrecv.{rule}", exchange, *arguments, **TWO)


def test_exchanges_need_two_programs() -> None:
    def barrier(x: Any) -> None:
        nisa.core_barrier(x, (0, 1))

    refusal("sendrecv.programs", exchange, SAME, F32, SBUF)
    refusal("core_barrier.programs", barrier, some(2, 2))
    interpreter.run(barrier, some(2, 2), **TWO)
    with pytest.raises(ValueError, match="trn1 has no logical cores"):
        interpreter.run(barrier, some(2, 2), target="trn1", **TWO)


def test_barrier_rules() -> None:
    def kernel(x: Any, cores: Any = (0, 1)) -> None:
        nisa.core_barrier(x, cores)

    def private() -> None:
        kernel(nl.ndarray((2, 2), nl.float32, nl.hbm))

    refusal("core_barrier.cores", kernel, some(2, 2), (0,), **TWO)
    refusal("core_barrier.cores", kernel, some(2, 2), (1, 0), **TWO)
    refusal("core_barrier.data", private, **TWO)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shapes", "dtypes", "engines", "words"),
    [
        (((8, 4), (8, 5)), (nl.float32,) * 2, (GPSIMD,) * 2, ("[8, 4]", "[8, 5]")),
        (((8, 4),) * 2, (nl.float32, nl.int32), (GPSIMD,) * 2, ("float32", "int32")),
        (((8, 4),) * 2, (nl.float32,) * 2, (GPSIMD, nisa.dma_engine.dma), ("gpsimd_dma", " dma")),
    ],
)
def test_partners_that_disagree(
    shapes: Any, dtypes: Any, engines: Any, words: Any, seed: int | None
) -> None:
    def kernel() -> None:
        program = nl.program_id()
        swap(filled(shapes[program], dtypes[program]), engine=engines[program])

    error = refusal("sendrecv.partner", kernel, seed=seed, **TWO)
    assert all(word in str(error) for word in words)
    assert len(error.sources) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_on_different_tensors(seed: int | None) -> None:
    def kernel(x: Any, y: Any, same: bool) -> None:
        nisa.core_barrier(y if nl.program_id() and not same else x, (0, 1))

    interpreter.run(kernel, some(2, 2), some(2, 2), True, seed=seed, **TWO)
    error = refusal("core_barrier.partner", kernel, some(2, 2), some(2, 2), False, seed=seed, **TWO)
    assert " x" in str(error)
    assert " y" in str(error)


# Waiting for ever.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lonely", [0, 1])
def test_one_program_ends_early(lonely: int, seed: int | None) -> None:
    def kernel() -> None:
        if nl.program_id() == lonely:
            swap(filled((2, 2)), pipe=5)  # alone

    error = refusal("programs.deadlock", kernel, seed=seed, **TWO)
    assert isinstance(error, interpreter.DeadlockError)
    assert f"program {lonely} waits at" in str(error)
    assert "pipe 5" in str(error)
    assert f"program {1 - lonely} has ended" in str(error)
    assert [s.line for s in error.sources] == [line_of(swap, "nisa.sendrecv(")]


@pytest.mark.parametrize("seed", SEEDS)
def test_two_programs_wait_for_different_things(seed: int | None) -> None:
    def kernel(x: Any) -> None:
        if nl.program_id() == 0:
            swap(filled((2, 2)))
        else:
            nisa.core_barrier(x, (0, 1))

    error = refusal("programs.deadlock", kernel, some(2, 2), seed=seed, **TWO)
    assert "program 0 waits" in str(error)
    assert "sendrecv" in str(error)
    assert "program 1 waits" in str(error)
    assert "core_barrier on x" in str(error)
    assert {s.line for s in error.sources} == {
        line_of(swap, "nisa.sendrecv("),
        line_of(kernel, "nisa.core_barrier("),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_pipes_are_told_apart(seed: int | None) -> None:
    def kernel(pipes: Any) -> None:
        for pipe in pipes[nl.program_id()]:
            swap(filled((2, 2)), pipe=pipe)

    interpreter.run(kernel, ((0, 1), (0, 1)), seed=seed, **TWO)
    error = refusal("programs.deadlock", kernel, ((0, 1), (1, 0)), seed=seed, **TWO)
    assert "pipe 0" in str(error)
    assert "pipe 1" in str(error)


# Different control flow.


def loop(trips: int) -> None:
    def body(_: Any) -> None:
        filled((2, 2))

    nl.fori_loop(0, nisa.register_alloc(trips), body)


def range_loop(trips: int) -> None:
    for _ in nl.dynamic_range(nisa.register_alloc(trips)):
        filled((2, 2))


def count_down(trips: int) -> None:
    counts = [nisa.register_alloc(n) for n in range(trips)]
    nl.while_loop(nisa.register_alloc(trips), lambda _: counts.pop())


def one_loop_more(trips: int) -> None:
    for _ in range(trips):
        loop(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [loop, range_loop, count_down, one_loop_more])
def test_loops_on_the_device_run_alike(kind: Any, seed: int | None) -> None:
    def kernel(trips: Any) -> None:
        kind(trips[nl.program_id()])

    interpreter.run(kernel, (2, 2), seed=seed, **TWO)
    for trips in ((2, 3), (1, 0)):
        error = refusal("programs.control-flow", kernel, trips, seed=seed, **TWO)
        assert isinstance(error, interpreter.DivergenceError)
        assert "program 0" in str(error)
        assert "program 1" in str(error)
        assert {s.function for s in error.sources} <= {kind.__name__, "loop"}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_python_decides_may_differ(seed: int | None) -> None:
    def kernel() -> None:
        tile = filled((2, 2))
        if nl.program_id() == 1:
            nisa.memset(tile, 2.0)
        swap(tile)

    run = interpreter.run(kernel, seed=seed, **TWO)
    assert [len(program) for program in run.programs] == [2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_tensors_agree(seed: int | None) -> None:
    def kernel(shapes: Any, dtypes: Any) -> None:
        program = nl.program_id()
        nl.ndarray(shapes[program], dtypes[program], nl.shared_hbm)

    def more() -> None:
        for _ in range(1 + nl.program_id()):
            nl.ndarray((2, 2), nl.float32, nl.shared_hbm)

    interpreter.run(kernel, ((2, 2), (2, 2)), F32, seed=seed, **TWO)
    rule = "programs.shared-tensor"
    refusal(rule, kernel, ((2, 2), (2, 3)), F32, seed=seed, **TWO)
    refusal(rule, kernel, ((2, 2), (2, 2)), (nl.float32, nl.int32), seed=seed, **TWO)
    assert "program 1 2" in str(refusal(rule, more, seed=seed, **TWO))


# Failures.


class MistakeError(Exception):
    """Something a kernel raises."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("waits", [False, True])
def test_one_program_raises(waits: bool, culprit: int, seed: int | None) -> None:
    cleaned = list[int]()
    mistake = MistakeError("of the kernel")

    def kernel() -> None:
        try:
            tile = filled((2, 2))
            if waits:
                tile = swap(tile)
            if nl.program_id() == culprit:
                raise mistake
            swap(tile)
        finally:
            cleaned.append(nl.program_id())

    with pytest.raises(MistakeError) as caught:
        interpreter.run(kernel, seed=seed, **TWO)
    assert caught.value is mistake
    assert caught.traceback[-1].name == "kernel"
    assert sorted(cleaned) in ([0, 1], [culprit])
    np.testing.assert_array_equal(
        interpreter.run(swapped, some(2, 4, 4), **TWO).outputs, some(2, 4, 4)[::-1]
    )


def test_a_kernel_does_not_catch_the_end_of_the_other() -> None:
    def kernel() -> None:
        if nl.program_id() == 1:
            raise MistakeError
        try:
            swap(filled((2, 2)))
        except Exception:
            pytest.fail("the program went on")

    with pytest.raises(MistakeError):
        interpreter.run(kernel, **TWO)


@pytest.mark.parametrize("seed", [None, 0])
def test_interrupting_the_caller_stops_the_programs(
    monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    started = threading.Event()

    def kernel() -> None:
        tile = filled((2, 2))
        while True:
            nisa.memset(tile, 0.0)
            started.set()

    join = threading.Thread.join
    interrupted = list[str]()

    def interrupt(thread: threading.Thread, timeout: float | None = None) -> None:
        if not interrupted:
            interrupted.append(thread.name)
            assert started.wait(10)
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interpreter.run(kernel, seed=seed, **TWO)


def test_exiting_is_not_swallowed() -> None:
    def kernel() -> None:
        if nl.program_id() == 1:
            raise SystemExit(3)
        swap(filled((2, 2)))

    with pytest.raises(SystemExit):
        interpreter.run(kernel, **TWO)


def test_a_program_that_waits_takes_no_time() -> None:
    def kernel() -> None:
        if nl.program_id() == 1:
            time.sleep(0.2)
        swap(filled((2, 2)))

    before = time.process_time()
    interpreter.run(kernel, **TWO)
    assert time.process_time() - before < 0.2
