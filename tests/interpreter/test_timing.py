"""The time model: expected times are worked out here from the documented numbers."""

import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_tkg.nki.interpreter.hardware import TARGETS, TRN1, TRN2
from jax_tkg.nki.interpreter.record import Access, Engine, Instruction, Transfer
from jax_tkg.nki.interpreter.report import timing
from jax_tkg.nki.interpreter.report.constants import CONSTANTS, RUN_EFFICIENCY, run_efficiency
from jax_tkg.nki.interpreter.report.costs import Lane, cost, lane, queues_used
from jax_tkg.nki.interpreter.report.dependences import dependences, written_memories
from jax_tkg.nki.interpreter.report.simulation import Timed
from jax_tkg.nki.interpreter.storage import Box, MemoryRegion
from tests.interpreter.hand_built import Program, exchange, hbm, part, run, storage

# trn2, from the architecture guide: cycles to nanoseconds.
VECTOR, SCALAR, TENSOR, GPSIMD = 1 / 0.96, 1 / 1.2, 1 / 2.4, 1 / 1.2
# From the same documents: semaphores, DMA start, hardware descriptor generation.
SEMAPHORE, DMA_START, DGE = 100, 1300, 600
QUEUE = 362 / 16  # bytes a nanosecond of one queue, limited by HBM


def times(*programs: Program) -> list[Timed]:
    return [t for p in timing(run(*programs)).programs for t in p]


# Engines and dependences.


def test_independent_instructions_overlap() -> None:
    p, a, b = Program(), storage("a"), storage("b")
    p.compute(Engine.vector, 960, writes=(a,))
    p.compute(Engine.scalar, 1200, writes=(b,))
    first, second = times(p)
    assert first.start == second.start == 0
    assert first.end == second.end == pytest.approx(1000)


def test_result_is_waited_for() -> None:
    p, a = Program(), storage("a")
    p.compute(Engine.vector, 960, writes=(a,))
    p.compute(Engine.scalar, 1200, reads=(a,))
    _, second = times(p)
    assert second.start == pytest.approx(1000 + SEMAPHORE * SCALAR)
    assert second.end == pytest.approx(second.start + 1000)


@pytest.mark.parametrize("kind", ["war", "waw"])
def test_write_does_not_overtake(kind: str) -> None:
    p, a = Program(), storage("a")
    p.compute(Engine.vector, 960, **{"reads" if kind == "war" else "writes": (a,)})
    p.compute(Engine.scalar, 1200, writes=(a,))
    assert times(p)[1].start == pytest.approx(1000 + SEMAPHORE * SCALAR)


def test_reads_do_not_wait_for_reads() -> None:
    p, a = Program(), storage("a")
    p.compute(Engine.vector, 960, reads=(a,))
    p.compute(Engine.scalar, 1200, reads=(a,))
    assert times(p)[1].start == 0


@pytest.mark.parametrize(
    ("second", "waits"),
    [
        (Box(0, 64, 0, 2048), True),
        (Box(64, 128, 0, 2048), False),
        (Box(0, 64, 2048, 4096), False),
        (Box(63, 128, 2047, 4096), True),
    ],
)
def test_only_shared_bytes_are_waited_for(second: Box, waits: bool) -> None:
    p, a = Program(), storage("a")
    p.compute(Engine.vector, 960, writes=(part(a, 0, 64, 0, 2048),))
    p.compute(Engine.scalar, 1200, reads=(Access(a, second),))
    assert (times(p)[1].start > 0) is waits


@pytest.mark.parametrize(("address", "waits"), [((0, 4095), True), ((0, 4096), False)])
def test_tensors_at_the_same_address_share_bytes(address: tuple[int, int], waits: bool) -> None:
    a = storage("a", address=(0, 0))
    b = storage("b", address=address)
    p = Program()
    p.compute(Engine.vector, 960, writes=(a,))
    p.compute(Engine.scalar, 1200, writes=(b,))
    assert (times(p)[1].start > 0) is waits


def test_engine_issues_in_program_order() -> None:
    p, a, b = Program(), storage("a"), storage("b")
    p.compute(Engine.scalar, 1200, writes=(a,))
    p.compute(Engine.vector, 96, reads=(a,))
    p.compute(Engine.vector, 96, writes=(b,))
    late, last = times(p)[1:]
    assert last.start == late.end == pytest.approx(1000 + SEMAPHORE * VECTOR + 100)


def test_engine_reads_its_own_result_after_100_cycles() -> None:
    p, a, b = Program(), storage("a"), storage("b")
    p.compute(Engine.vector, 64, writes=(a,))
    p.compute(Engine.vector, 64, writes=(b,))
    p.compute(Engine.vector, 64, reads=(b,), writes=(a,))
    _, free, bound = times(p)
    assert free.start == pytest.approx(64 * VECTOR)
    assert bound.start == pytest.approx((128 + SEMAPHORE) * VECTOR)


def test_engine_overwrites_its_own_tile_at_once() -> None:
    p, a = Program(), storage("a")
    p.compute(Engine.vector, 64, reads=(a,))
    p.compute(Engine.vector, 64, writes=(a,))
    p.compute(Engine.vector, 64, writes=(a,))
    assert times(p)[-1].end == pytest.approx(3 * 64 * VECTOR)


def test_matmuls_accumulate_without_waiting() -> None:
    p, psum = Program(), storage("psum", MemoryRegion.psum, row_bytes=2048)
    for _ in range(4):
        p.compute(Engine.tensor, 512, reads=(psum,), writes=(psum,))
    assert times(p)[-1].end == pytest.approx(4 * 512 * TENSOR)


def test_scheduling_edges() -> None:
    p = Program()
    a = p.compute(Engine.vector, 960)
    p.compute(Engine.scalar, 1200).depends_on(a)
    assert times(p)[1].start == pytest.approx(1000 + SEMAPHORE * SCALAR)


def test_a_circle_is_refused() -> None:
    a, b = Program(0), Program(1)
    one, two = a.compute(Engine.gpsimd, 64), a.compute(Engine.gpsimd, 64)
    three, four = b.compute(Engine.gpsimd, 64), b.compute(Engine.gpsimd, 64)
    exchange("barrier", one, four)
    exchange("barrier", two, three)
    with pytest.raises(ValueError, match="circle"):
        timing(run(a, b))


# DMA.


def test_dma_starts_then_moves() -> None:
    p = Program()
    p.dma(128 * 32768)
    (only,) = times(p)
    assert only.end == pytest.approx(DMA_START + 128 * 32768 / 362)
    assert only.released == DGE


def test_the_documented_profile_of_four_partitions() -> None:
    """32 KiB into 4 partitions: one DMA engine, 1416 ns in AWS's own profile."""
    p = Program()
    p.dma(4 * 8192, run=8192, partitions=4)
    (only,) = times(p)
    (queue,) = only.queues
    assert queue.end - queue.start == pytest.approx(1416, rel=0.06)


@pytest.mark.parametrize(
    ("partitions", "queues"), [(1, 1), (8, 1), (9, 2), (64, 8), (127, 16), (128, 16)]
)
def test_queues_of_a_transfer(partitions: int, queues: int) -> None:
    transfer = Transfer("hbm->sbuf", partitions * 4096, 4096, partitions, partitions)
    assert queues_used(transfer) == queues


@pytest.mark.parametrize(("size", "queues"), [(64, 1), (4096, 1), (4097, 2), (1 << 20, 16)])
def test_queues_of_a_copy_within_hbm(size: int, queues: int) -> None:
    assert queues_used(Transfer("hbm->hbm", size, size, 1, 1)) == queues


def test_a_copy_within_hbm_uses_its_bandwidth_twice() -> None:
    p = Program()
    p.dma(1 << 20, route="hbm->hbm", partitions=1)
    assert times(p)[0].end == pytest.approx(DMA_START + (1 << 20) / (362 / 2))


def test_transfers_share_the_bandwidth() -> None:
    """Two of all queues take twice as long; two of eight queues each run side by side."""
    whole, half = Program(), Program()
    for _ in range(2):
        whole.dma(128 * 32768)
        half.dma(64 * 32768, partitions=64)
    assert times(whole)[1].end == pytest.approx(DMA_START + 2 * 128 * 32768 / 362)
    first, second = times(half)
    assert first.end == pytest.approx(DMA_START + 128 * 32768 / 362)
    assert second.end == pytest.approx(DGE + DMA_START + 128 * 32768 / 362)
    assert {b.queue for b in first.queues}.isdisjoint(b.queue for b in second.queues)


@given(
    st.lists(
        st.tuples(st.integers(1, 128), st.sampled_from([64, 512, 4096]), st.integers(1, 8)),
        min_size=1,
        max_size=12,
    )
)
def test_bandwidth_is_never_exceeded(sizes: list[tuple[int, int, int]]) -> None:
    p = Program()
    for partitions, row, runs in sizes:
        p.dma(partitions * row * runs, run=row, partitions=partitions)
    timed = times(p)
    moved = sum(t.step.transfer.bytes for t in timed if t.step.transfer)
    first = min(b.start for t in timed for b in t.queues)
    assert moved / (max(t.end for t in timed) - first) <= TRN2.hbm_gbps * (1 + 1e-9)
    for a, b in combinations(timed, 2):
        for x in a.queues:
            for y in b.queues:
                assert x.queue != y.queue or x.end <= y.start + 1e-6 or y.end <= x.start + 1e-6


def test_run_efficiency_is_the_documented_curve() -> None:
    assert all(run_efficiency(n) == pytest.approx(share) for n, share in RUN_EFFICIENCY.items())
    shares = [run_efficiency(n) for n in range(1, 40_000, 7)]
    assert shares == sorted(shares)
    assert run_efficiency(255) < 0.11
    assert run_efficiency(2048) > 0.8
    assert run_efficiency(4096) > 0.95
    assert run_efficiency(1 << 20) == 1
    assert run_efficiency(4) == pytest.approx(run_efficiency(32) / 8)


def test_short_runs_move_slower() -> None:
    p = Program()
    p.dma(128 * 256, run=256)
    assert times(p)[0].end == pytest.approx(DMA_START + 128 * 256 / (362 * 0.103))


@pytest.mark.parametrize(("route", "share"), [("hbm->sbuf", 0.9 * 362), ("sbuf->sbuf", 0.5 * 368)])
def test_transposes_move_slower(route: str, share: float) -> None:
    p = Program()
    p.dma(128 * 32768, route=route, op="dma_transpose")
    assert times(p)[0].end == pytest.approx(DMA_START + 128 * 32768 / share)


def test_descriptor_generators_take_turns_with_themselves_only() -> None:
    p, a = Program(), storage("a")
    p.dma(512, run=4, partitions=1)
    p.dma(512, run=4, partitions=1)
    p.dma(512, run=4, partitions=1, route="sbuf->hbm", reads=(a,))
    load, second, store = times(p)
    assert (load.start, second.start, store.start) == (0, DGE, 0)


def test_software_descriptors_cost_gpsimd_time() -> None:
    p = Program()
    p.dma(128 * 4096, run=4096, software_dge=True)
    p.compute(Engine.gpsimd, 120)
    gather, after = times(p)
    making = 600 + 128 * 8 * GPSIMD
    assert lane(gather.step) is Lane.gpsimd
    assert after.start == pytest.approx(making)
    assert gather.end == pytest.approx(making + DMA_START + 128 * 4096 / (362 * 0.966))


def test_before_trn2_descriptors_are_ready_made() -> None:
    step = Program().dma(4096)
    assert cost(step, TRN1).held == 0
    assert cost(step, TRN2).held == DGE


def test_a_load_into_a_buffer_waits_for_its_reader() -> None:
    p, tile, source = Program(), storage("tile"), hbm()
    p.dma(128 * 4096, run=4096, reads=(source,), writes=(tile,))
    p.compute(Engine.vector, 9600, reads=(tile,))
    p.dma(128 * 4096, run=4096, reads=(source,), writes=(tile,))
    p.dma(128 * 4096, run=4096, reads=(source,), writes=(storage("other"),))
    load, use, again, other = times(p)
    assert use.start == pytest.approx(load.end + SEMAPHORE * VECTOR)
    assert again.start == pytest.approx(use.end)
    assert other.start == pytest.approx(use.end + DGE)  # in order behind it


# Two cores.


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("kind", ["gpsimd_dma", "dma"])
def test_cores_meet_at_a_sendrecv(kind: str, late: int) -> None:
    cores = [Program(0), Program(1)]
    tiles = [[storage(f"{name}{i}", row_bytes=256) for name in "ab"] for i in range(2)]
    swaps = []
    for p, (mine, theirs) in zip(cores, tiles, strict=True):
        p.compute(Engine.vector, 9600 if p.core == late else 960, writes=(mine,))
        swap = p.dma(
            128 * 256, run=256, route="sbuf->sbuf", reads=(mine,), writes=(theirs,), op="sendrecv"
        )
        swaps.append(swap)
    exchange(kind, *swaps)
    _, first, _, second = times(*cores)
    semaphore = 0 if kind == "dma" else SEMAPHORE * GPSIMD
    assert first.start == second.start == pytest.approx(10_000 + semaphore)
    took = {
        "gpsimd_dma": 500 + 128 * 256 / 153,
        "dma": 200 + DMA_START + 128 * 256 / (368 * 0.103),
    }
    assert first.end == second.end == pytest.approx(first.start + took[kind])


@pytest.mark.parametrize("busy", [0, 1])
def test_a_sendrecv_ends_on_both_cores_together(busy: int) -> None:
    """The queues of one core are at work for a load when the swap begins."""
    cores = [Program(0), Program(1)]
    load = cores[busy].dma(128 * 32768)
    swaps = [p.dma(128 * 32768, route="sbuf->sbuf", op="sendrecv") for p in cores]
    exchange("dma", *swaps)
    timed = {t.step: t for t in times(*cores)}
    loaded = DMA_START + 128 * 32768 / 362
    assert timed[load].end == pytest.approx(loaded)
    both = [loaded + 128 * 32768 / 368] * 2
    assert [timed[s].end for s in swaps] == pytest.approx(both)


def test_without_an_exchange_cores_do_not_wait() -> None:
    a, b = Program(0), Program(1)
    a.compute(Engine.vector, 960)
    b.compute(Engine.vector, 9600)
    b.compute(Engine.scalar, 1200)
    assert times(a, b)[2].start == 0


@pytest.mark.parametrize("has_barrier", [True, False])
def test_barrier_orders_shared_hbm(has_barrier: bool) -> None:
    """Core 1 reads what core 0 stores late: after the barrier, and without one far too early."""
    cores, shared = [Program(0), Program(1)], hbm("shared", 1024)
    cores[0].compute(Engine.vector, 96_000, writes=(storage("a"),))
    tile = cores[0].steps[0].writes[0]
    cores[0].dma(512, route="sbuf->hbm", reads=(tile,), writes=(part(shared, b1=512),))
    cores[1].dma(512, route="sbuf->hbm", writes=(part(shared, b0=512),))
    if has_barrier:
        exchange("barrier", *(p.compute(Engine.gpsimd, 60, op="core_barrier") for p in cores))
    cores[1].dma(1024, reads=(shared,), writes=(storage("b"),))
    first, second = timing(run(*cores)).programs
    assert (second[-1].start >= first[1].end) is has_barrier
    if has_barrier:
        meeting = first[1].end + SEMAPHORE * GPSIMD
        assert first[2].end == second[1].end == pytest.approx(meeting + 200 + 50)
        assert second[-1].start == pytest.approx(first[2].end)


# Totals.


def pipeline(tiles: int) -> Program:
    """Loads, two engines, stores: with two buffers each."""
    p, source, target = Program(), hbm("in", 1 << 24), hbm("out", 1 << 24)
    loaded, results = ([storage(f"{n}{i}") for i in range(2)] for n in ("loaded", "result"))
    size = 128 * 4096
    for i in range(tiles):
        piece = {"b0": i * size, "b1": (i + 1) * size}
        p.dma(size, run=4096, reads=(part(source, **piece),), writes=(loaded[i % 2],))
        p.compute(Engine.vector, 1024, reads=(loaded[i % 2],), writes=(results[i % 2],))
        p.compute(Engine.scalar, 1024, reads=(results[i % 2],), writes=(results[i % 2],))
        p.dma(
            size, run=4096, route="sbuf->hbm",
            reads=(results[i % 2],), writes=(part(target, **piece),),
        )  # fmt: skip
    return p


def test_critical_path_adds_up_to_the_total() -> None:
    found = timing(run(pipeline(8)))
    assert found.total == max(t.end for t in found.programs[0])
    assert found.critical_path[0].timed.begin == 0
    for before, after in zip(found.critical_path, found.critical_path[1:], strict=False):
        assert after.timed.waited is before.timed
        assert before.until == after.timed.begin
    assert sum(p.latency + p.work for p in found.critical_path) == pytest.approx(found.total)
    assert sum(found.path_split.values()) == pytest.approx(found.total)
    assert all(time >= 0 for time in found.path_split.values())


def test_critical_path_names_what_is_slow() -> None:
    p, a, b = Program(), storage("a"), storage("b")
    p.compute(Engine.vector, 960, writes=(a,))
    p.compute(Engine.gpsimd, 12, writes=(b,))
    p.compute(Engine.scalar, 120, reads=(a, b))
    found = timing(run(p))
    assert [s.timed.step for s in found.critical_path] == [p.steps[0], p.steps[2]]
    assert found.path_split == pytest.approx(
        {"Vector": 1000, "Scalar": 100, "latency": SEMAPHORE * SCALAR}
    )


def test_critical_path_goes_through_queues() -> None:
    p = Program()
    p.dma(128 * 32768)
    p.dma(128 * 32768)
    found = timing(run(p))
    assert [s.timed.step for s in found.critical_path] == p.steps
    moves = 128 * 32768 / 362
    assert found.path_split == pytest.approx({"DMA queues": 2 * moves, "latency": DMA_START})


def test_busy_share_of_queues_is_their_mean() -> None:
    """A load by one queue of 16; a sendrecv inside GpSimd takes none of them."""
    cores = [Program(0), Program(1)]
    cores[0].dma(8 * 32768, partitions=8)
    swaps = [p.dma(1530, 1530, "sbuf->sbuf", op="sendrecv") for p in cores]
    exchange("gpsimd_dma", *swaps)
    found = timing(run(*cores))
    moves = 8 * 32768 / QUEUE
    assert found.total == pytest.approx(DMA_START + moves)
    assert found.busy == pytest.approx(
        {
            (0, "DMA triggers, HBM"): DGE / found.total,
            (0, "DMA queues"): moves / 16 / found.total,
            (0, "GpSimd"): 500 / found.total,
            (1, "GpSimd"): 500 / found.total,
        }
    )


def test_busy_shares() -> None:
    p = Program()
    p.compute(Engine.vector, 960)
    p.compute(Engine.scalar, 600)
    p.compute(Engine.vector, 960)
    found = timing(run(p))
    assert found.busy == pytest.approx({(0, "Vector"): 1.0, (0, "Scalar"): 0.25})


def test_roofline_counts_every_byte_once() -> None:
    p, source, target = Program(), hbm("in", 1 << 20), hbm("out", 1 << 20)
    for _ in range(3):
        p.dma(1 << 19, reads=(part(source, b1=1 << 19),), writes=(storage("a"),))
    p.dma(1 << 18, route="sbuf->hbm", reads=(storage("b"),), writes=(part(target, b1=1 << 18),))
    found = timing(run(p))
    assert found.hbm_bytes == (1 << 19) + (1 << 18)
    assert found.roofline == pytest.approx(found.hbm_bytes / 362)
    assert found.roofline_share == pytest.approx(found.roofline / found.total)
    assert 0 < found.roofline_share < 1


@pytest.mark.parametrize(
    ("heads", "size"), [(1, 4096), (3, 3 * 4096), (8, 8 * 4096), (9, 8 * 4096)]
)
def test_roofline_of_gaps(heads: int, size: int) -> None:
    """Rows of 8 heads, one head at a time: boxes that overlap, bytes that do not."""
    p, source = Program(), hbm("in", 8 * 4096)
    for _ in range(heads):
        p.dma(4096, run=32, reads=(source,), writes=(storage("c"),))
    assert timing(run(p)).hbm_bytes == size


def test_two_cores_have_two_shares_of_hbm() -> None:
    programs = [pipeline(2), pipeline(2)]
    programs[1].core = 1
    for step in programs[1].steps:
        step.core = 1
    assert timing(run(*programs)).roofline == pytest.approx(timing(run(programs[0])).roofline)


def test_nothing_takes_no_time() -> None:
    found = timing(run(Program()))
    assert (found.total, found.critical_path, found.roofline_share) == (0, (), 0)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_has_times(target: object) -> None:
    assert timing(run(pipeline(2), target=target)).total > 0


# The index of dependences against comparing all pairs.


def orders(program: Program) -> list[set[int]]:
    """Which earlier instructions each one comes after, by lanes and dependences together."""
    needs = dependences(program.steps, written_memories([program.steps]))
    before: list[set[int]] = []
    last: dict[Lane, int] = {}
    for i, step in enumerate(program.steps):
        # A DMA lane starts in order, but does not end in order.
        direct = {n.producer for n in needs[i]}
        if lane(step) in last and not lane(step).is_dma:
            direct.add(last[lane(step)])
        last[lane(step)] = i
        before.append(direct.union(*(before[d] for d in direct)))
    return before


def conflict(a: Instruction, b: Instruction) -> bool:
    return any(
        x.overlaps(y)
        for xs, ys in ((a.writes, b.writes), (a.writes, b.reads), (a.reads, b.writes))
        for x in xs
        for y in ys
    )


@st.composite
def accesses(draw: st.DrawFn) -> tuple[int, tuple[int, int, int, int]]:
    p0, b0 = draw(st.integers(0, 7)), draw(st.integers(0, 15))
    box = p0, draw(st.integers(p0 + 1, 8)), b0, draw(st.integers(b0 + 1, 16))
    return draw(st.integers(0, 2)), box


programs = st.lists(
    st.tuples(
        st.sampled_from([Engine.vector, Engine.scalar, Engine.dma]),
        st.lists(accesses(), max_size=2),
        accesses(),
    ),
    min_size=2,
    max_size=14,
)


def build(plan: list[Any]) -> Program:
    """Instructions on three tensors, two of which share bytes."""
    places = [
        storage("free", partitions=8, row_bytes=16),
        storage("low", partitions=8, row_bytes=16, address=(0, 0)),
        storage("high", partitions=8, row_bytes=16, address=(4, 8)),
    ]
    made = Program()
    for engine, sources, (place, box) in plan:
        reads = tuple(part(places[where], *b) for where, b in sources)
        writes = (part(places[place], *box),)
        if engine is Engine.dma:
            made.dma(64, reads=reads, writes=writes)
        else:
            made.compute(engine, 64, reads, writes)
    return made


@given(programs)
def test_dependences_are_those_of_all_pairs(plan: list[Any]) -> None:
    program = build(plan)
    before = orders(program)
    for i, step in enumerate(program.steps):
        for j, earlier in enumerate(program.steps[:i]):
            assert not conflict(earlier, step) or j in before[i]
    needs = dependences(program.steps, written_memories([program.steps]))
    for i, edges in enumerate(needs):
        assert all(conflict(program.steps[e.producer], program.steps[i]) for e in edges)


@given(programs)
def test_conflicting_instructions_do_not_overlap(plan: list[Any]) -> None:
    for a, b in combinations(times(build(plan)), 2):
        assert not conflict(a.step, b.step) or a.end <= b.start + 1e-6


def test_long_programs_take_little_time() -> None:
    """8,000 instructions on few memories, in pieces: comparing all pairs takes minutes."""
    p, out = Program(), hbm("out", 1 << 24)
    tiles = [storage(f"t{i}", row_bytes=16384) for i in range(4)]
    for i in range(2000):
        tile, at = tiles[i % 4], i * 64 % 16384
        piece = part(tile, 0, 128, at, at + 64)
        p.dma(128 * 64, run=64, writes=(piece,))
        p.compute(Engine.vector, 64, reads=(piece,), writes=(piece,))
        p.compute(Engine.scalar, 64, reads=(piece,))
        p.dma(64, route="sbuf->hbm", reads=(piece,), writes=(part(out, b0=i * 64, b1=i * 64 + 64),))
    began = time.process_time()
    timing(run(p))
    # About 2 s with the types of all calls checked, as here; a fifth of that without.
    assert time.process_time() - began < 30


# The page that describes the model.


def test_the_documented_table_is_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "time-model.md").read_text()
    for name, constant in CONSTANTS.items():
        assert f"| {name} | {constant.value:g} {constant.unit} | {constant.source} |" in page
