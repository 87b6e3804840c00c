"""`dma_copy` against indexing in NumPy, and what it refuses."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some, stored

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3


def transfers(run: interpreter.Run) -> list[Any]:
    return [step.transfer for step in run.programs[0]]


# Routes and types.


def test_every_route() -> None:
    def kernel(x: Any) -> Any:
        between = nl.ndarray(x.shape, x.dtype, nl.hbm)
        first, second = (nl.ndarray(x.shape, x.dtype) for _ in range(2))
        nisa.dma_copy(between, x)
        nisa.dma_copy(first, between)
        nisa.dma_copy(second, first)
        return stored(second)

    x = some(128, 24)
    run = interpreter.run(kernel, x)
    np.testing.assert_array_equal(run.outputs, x)
    assert [t.route for t in transfers(run)] == [
        "hbm->hbm", "hbm->sbuf", "sbuf->sbuf", "sbuf->hbm",
    ]  # fmt: skip
    assert all(t.bytes == x.nbytes for t in transfers(run))


@pytest.mark.parametrize(
    "target", [np.float32, np.float16, BF16, E4M3, np.int32, np.int8, np.uint8]
)
@pytest.mark.parametrize("source", [np.float32, BF16, E4M3, np.int32, np.int16, np.uint8])
def test_converts_through_float32(source: Any, target: Any) -> None:
    def kernel(x: Any) -> Any:
        return stored(loaded(x, np.dtype(target).name))

    x = (40 * some(16, 8)).astype(source) if source != np.uint8 else some(16, 8, dtype=source)
    if source == target:
        want = x
    elif np.issubdtype(target, np.integer):
        limits = np.iinfo(target)
        nearest = np.rint(x.astype(np.float32).astype(np.float64))
        want = np.clip(nearest, limits.min, limits.max).astype(target)
    else:
        want = x.astype(np.float32).astype(target)
    got = interpreter.run(kernel, x).outputs
    assert got.dtype == np.dtype(target)
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def test_the_same_type_is_copied_bit_by_bit() -> None:
    x = np.array([[0x7FC1, 0xFF81, 0x7F80, 0x8000]], np.uint16)  # NaNs with payloads, inf, -0

    def kernel(x: Any) -> Any:
        return stored(loaded(x))

    got = interpreter.run(kernel, x.view(BF16)).outputs
    np.testing.assert_array_equal(got.view(np.uint16), x)


def test_large_integers_of_one_type_do_not_pass_through_float32() -> None:
    x = np.array([[2**31 - 1, -(2**31) + 1, 2**24 + 1]], np.int32)

    def kernel(x: Any) -> Any:
        return stored(loaded(x))

    np.testing.assert_array_equal(interpreter.run(kernel, x).outputs, x)


def test_only_the_number_of_elements_must_agree() -> None:
    def kernel(x: Any) -> Any:
        tile = nl.ndarray((32, 6), x.dtype)
        nisa.dma_copy(tile, x)
        return stored(tile)

    x = some(8, 4, 6)
    np.testing.assert_array_equal(interpreter.run(kernel, x).outputs, x.reshape(32, 6))

    def other(x: Any) -> None:
        nisa.dma_copy(nl.ndarray((32, 5), x.dtype), x)

    error = refusal("dma_copy.size", other, x)
    assert "160" in str(error)
    assert "192" in str(error)


def test_packed_types_are_not_converted() -> None:
    def kernel(x: Any, dtype: Any) -> Any:
        return stored(loaded(x, dtype).view(nl.uint32))

    x = some(4, 4, dtype=np.uint32)

    def same(x: Any) -> Any:
        packed, copy = nl.ndarray(x.shape, nl.uint32), nl.ndarray(x.shape, "float8_e4m3fn_x4")
        nisa.dma_copy(packed, x)
        nisa.dma_copy(copy, packed.view("float8_e4m3fn_x4"))
        return stored(copy.view(nl.uint32))

    np.testing.assert_array_equal(interpreter.run(same, x).outputs, x)
    refusal("dma_copy.packed", kernel, x.astype(np.float32), "float8_e4m3fn_x4")


def test_psum_is_out_of_reach() -> None:
    def from_psum(x: Any) -> Any:
        return nisa.dma_copy(x, filled(x.shape, x.dtype, nl.psum))

    def to_psum(x: Any) -> None:
        nisa.dma_copy(nl.ndarray(x.shape, x.dtype, nl.psum), x)

    for kernel, role in ((from_psum, "src"), (to_psum, "dst")):
        error = refusal("dma_copy.psum", kernel, some(8, 8))
        assert role in str(error)
        assert "tensor_copy" in str(error)


def test_operands_are_tensors(no_shape_checks: None) -> None:
    assert "3.0" in str(refusal("dma_copy.operand", lambda x: nisa.dma_copy(x, 3.0), some(2, 2)))


def test_a_destination_holds_each_element_once() -> None:
    def kernel(x: Any, pattern: Any) -> Any:
        output = nl.ndarray((16,), x.dtype, nl.shared_hbm)
        nisa.dma_copy(output, x)
        nisa.dma_copy(output.ap(pattern), x.ap([[1, 8]]))
        return output

    x = some(16)
    got = interpreter.run(kernel, x, ((2, 2), (4, 4))).outputs
    want = x.copy()
    want[[0, 4, 8, 12, 2, 6, 10, 14]] = x[:8]
    np.testing.assert_array_equal(got, want)
    # 0, 3, 2, 5, 4, 7, 6, 9: interleaved, but all different.
    interpreter.run(kernel, x, ((2, 4), (3, 2)))
    refusal("dma_copy.broadcast-destination", kernel, x, ((0, 2), (1, 4)))
    refusal("dma_copy.broadcast-destination", kernel, x, ((1, 2), (1, 2), (5, 2)))


# Gather and scatter.


def gather(x: Any, rows: Any, mode: Any = nisa.oob_mode.error) -> Any:
    index, width = loaded(rows), x.shape[1]
    tile = filled((rows.shape[0], width), x.dtype)
    source = x.ap([[width, rows.shape[0]], [1, width]], vector_offset=index, indirect_dim=0)
    nisa.dma_copy(tile, source, oob_mode=mode)
    return stored(tile)


def scatter(x: Any, rows: Any, output: Any, mode: Any = nisa.oob_mode.error) -> None:
    tile, index, width = loaded(x), loaded(rows), x.shape[1]
    target = output.ap([[width, rows.shape[0]], [1, width]], vector_offset=index)
    nisa.dma_copy(target, tile, oob_mode=mode)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@pytest.mark.parametrize("exact", [False, True])
def test_gather(dtype: Any, exact: bool) -> None:
    x, rows = some(40, 12, dtype=BF16), np.array([[3], [39], [0], [3], [17]], dtype)
    run = interpreter.run(gather, x, rows, exact=exact)
    np.testing.assert_array_equal(run.outputs, x[rows[:, 0]])
    assert [t.software_dge for t in transfers(run) if t] == [False, True, False]


def test_gather_converts() -> None:
    def kernel(x: Any, rows: Any) -> Any:
        tile = nl.ndarray((rows.shape[0], x.shape[1]), nl.int8)
        nisa.dma_copy(tile, x.vector_select(0, loaded(rows)))
        return stored(tile)

    x, rows = 100 * some(9, 4), np.array([[8], [1]], np.int32)
    want = np.clip(np.rint(x[[8, 1]]), -128, 127)
    np.testing.assert_array_equal(interpreter.run(kernel, x, rows).outputs, want)


@pytest.mark.parametrize("exact", [False, True])
def test_scatter(exact: bool) -> None:
    x, rows, output = (
        some(5, 12),
        np.array([[3], [6], [0], [4], [1]], np.int32),
        some(7, 12, seed=1),
    )
    want = output.copy()
    want[rows[:, 0]] = x
    interpreter.run(scatter, x, rows, output, exact=exact)
    np.testing.assert_array_equal(output, want)


def test_scatter_converts() -> None:
    x, rows = 200 * some(3, 8), np.array([[2], [0], [1]], np.int32)
    output = np.zeros((4, 8), np.int8)
    interpreter.run(scatter, x, rows, output)
    want = np.zeros((4, 8), np.int8)
    want[[2, 0, 1]] = np.clip(np.rint(x), -128, 127)
    np.testing.assert_array_equal(output, want)


@pytest.mark.parametrize("outside", [40, -1, 2**31 - 1])
def test_gathered_rows_outside(outside: int) -> None:
    x, rows = some(40, 12), np.array([[3], [outside], [0]], np.int32)
    error = refusal("dma_copy.run-time-index", gather, x, rows)
    assert "[1]" in str(error)
    assert "39" in str(error)
    got = interpreter.run(gather, x, rows, nisa.oob_mode.skip).outputs
    np.testing.assert_array_equal(got, np.stack([x[3], np.ones(12, np.float32), x[0]]))


def test_scattered_rows_outside() -> None:
    x, rows = some(3, 4), np.array([[1], [9], [0]], np.int32)
    output = np.zeros((2, 4), np.float32)
    refusal("dma_copy.run-time-index", scatter, x, rows, output)
    assert not output.any()
    interpreter.run(scatter, x, rows, output, nisa.oob_mode.skip)
    np.testing.assert_array_equal(output, x[[2, 0]])


def test_gathered_rows_must_have_been_written() -> None:
    def kernel(rows: Any, dtype: Any) -> Any:
        table = nl.ndarray((4, 8), dtype, nl.hbm)
        nisa.dma_copy(table[:2], filled((2, 8), dtype))
        return gather(table, rows)

    inside, outside = np.array([[1], [0]], np.int32), np.array([[1], [2]], np.int32)
    run = interpreter.run(kernel, inside, nl.float32, refuse_uninitialized=True)
    assert not run.uninitialized
    rule = "dma_copy.never-written"
    refusal(rule, kernel, outside, nl.float32, refuse_uninitialized=True)
    refusal(rule, kernel, outside, nl.int32)
    run = interpreter.run(kernel, outside, nl.float32)
    np.testing.assert_array_equal(np.isnan(run.outputs), np.array([[False] * 8, [True] * 8]))
    assert [source.function for source in run.uninitialized] == ["gather"] * len(run.uninitialized)


def test_skipped_rows_stay_unwritten() -> None:
    def kernel(x: Any, rows: Any) -> Any:
        tile = nl.ndarray((2, 8), x.dtype)
        source = x.vector_select(0, loaded(rows))
        nisa.dma_copy(tile, source, oob_mode=nisa.oob_mode.skip)
        return stored(tile)

    x = some(4, 8, dtype=np.int32)
    interpreter.run(kernel, x, np.array([[1], [2]], np.int32))
    error = refusal("memory.never-written", kernel, x, np.array([[1], [4]], np.int32))
    assert "(1, 0)" in str(error)


def test_offsets_a_row_need_as_many_rows() -> None:
    def kernel(x: Any, rows: Any, shape: Any) -> None:
        nisa.dma_copy(nl.ndarray(shape, nl.float32), x.vector_select(0, loaded(rows)))

    x, rows = some(4, 8), np.array([[1], [2]], np.int32)
    interpreter.run(kernel, x, rows, (2, 4, 2))
    refusal("dma_copy.rows", kernel, x, rows, (4, 4))


def test_fewer_offsets_than_rows() -> None:
    def kernel(x: Any, rows: Any, n: int) -> None:
        source = x.ap([[8, n], [1, 8]], vector_offset=loaded(rows))
        nisa.dma_copy(nl.ndarray((n, 8), nl.float32), source)

    x, rows = some(4, 8), np.array([[1], [2]], np.int32)
    interpreter.run(kernel, x, rows, 2)
    assert "2 offsets for 3 rows" in str(refusal("dma.vector-offset", kernel, x, rows, 3))


def test_the_table_of_offsets() -> None:
    x = some(4, 8)

    def kernel(x: Any, rows: Any) -> None:
        nisa.dma_copy(nl.ndarray((2, 8), nl.float32), x.vector_select(0, loaded(rows)))

    def in_psum(x: Any) -> None:
        index = nl.ndarray((2, 1), nl.int32, nl.psum)
        nisa.memset(index, 0)
        nisa.dma_copy(nl.ndarray((2, 8), nl.float32), x.vector_select(0, index))

    interpreter.run(kernel, x, np.zeros((2, 1), np.uint32))
    assert "uint32" in str(refusal("dma_copy.vector-offset", kernel, x, np.zeros((2, 1), np.int16)))
    assert "SBUF" in str(refusal("dma_copy.vector-offset", in_psum, x))


def test_gathered_rows_leave_the_tensor() -> None:
    def kernel(x: Any, rows: Any, width: int) -> None:
        source = x.ap([[8, 2], [1, width]], vector_offset=loaded(rows))
        nisa.dma_copy(nl.ndarray((2, width), nl.float32), source)

    x, rows = some(4, 8), np.array([[2], [3]], np.int32)
    interpreter.run(kernel, x, rows, 8)
    refusal("memory.out-of-bounds", kernel, x, rows, 9)


@pytest.mark.parametrize("by_register", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_offset_for_all(by_register: bool, axis: int) -> None:
    def kernel(x: Any, at: Any, mode: Any = nisa.oob_mode.error) -> Any:
        index: Any = loaded(at)
        if by_register:
            register = nisa.register_alloc()
            nisa.register_load(register, index)
            index = register
        pattern = [[6, 2], [1, 6]] if axis == 0 else [[6, 4], [1, 1]]
        tile = filled(tuple(n for _, n in pattern))
        source = x.ap(pattern, scalar_offset=index, indirect_dim=axis)
        nisa.dma_copy(tile, source, oob_mode=mode)
        return stored(tile)

    x = some(4, 6)

    def at(i: int) -> np.ndarray:
        return np.array([[i]], np.int32)

    want = x[1:3] if axis == 0 else x[:, 1:2]
    np.testing.assert_array_equal(interpreter.run(kernel, x, at(1)).outputs, want)
    for outside in (-1, x.shape[axis]):
        error = refusal("memory.run-time-index", kernel, x, at(outside))
        assert str(outside) in str(error)
        skipped = interpreter.run(kernel, x, at(outside), nisa.oob_mode.skip).outputs
        np.testing.assert_array_equal(skipped, np.ones_like(want))


def test_one_offset_is_one_element() -> None:
    def kernel(x: Any, at: Any) -> None:
        nisa.dma_copy(
            nl.ndarray((1, 6), nl.float32), x.ap([[6, 1], [1, 6]], scalar_offset=loaded(at))
        )

    interpreter.run(kernel, some(4, 6), np.array([[3]], np.int32))
    refusal("dma.scalar-offset", kernel, some(4, 6), np.array([[3], [1]], np.int32))


def test_an_offset_must_have_been_written() -> None:
    def kernel(x: Any) -> None:
        index = nl.ndarray((1, 1), nl.int32)
        nisa.dma_copy(nl.ndarray((1, 6), nl.float32), x.ap([[6, 1], [1, 6]], scalar_offset=index))

    refusal("memory.never-written", kernel, some(4, 6))


def test_an_offset_is_a_read_of_the_copy() -> None:
    def kernel(x: Any, at: Any) -> None:
        index = loaded(at)
        nisa.dma_copy(nl.ndarray((1, 6), nl.float32), x.ap([[6, 1], [1, 6]], scalar_offset=index))

    program = interpreter.run(kernel, some(4, 6), np.array([[3]], np.int32)).programs[0]
    (index,) = program[0].writes
    assert any(read.storage is index.storage for read in program[1].reads)


def test_compute_engines_take_no_offset_a_row() -> None:
    def kernel(x: Any, rows: Any) -> None:
        nisa.register_store(x.vector_select(0, loaded(rows)).select(1, 0), nisa.register_alloc(1))

    refusal("view.vector-offset", kernel, np.zeros((4, 2), np.int32), np.array([[1]], np.int32))


# Who makes the descriptors.


def copies(x: Any, rows: Any, kind: str, **options: Any) -> None:
    source = {
        "direct": lambda: x[:2],
        "scalar": lambda: x.ap([[8, 2], [1, 8]], scalar_offset=loaded(rows[:1])),
        "vector": lambda: x.vector_select(0, loaded(rows)),
    }[kind]()
    nisa.dma_copy(nl.ndarray((2, 8), x.dtype), source, **options)


MODES = nisa.dge_mode


@pytest.mark.parametrize(
    ("kind", "target", "options", "rule"),
    [
        ("direct", "trn2", {"dge_mode": MODES.hwdge}, None),
        ("direct", "trn1", {"dge_mode": MODES.hwdge}, "hwdge"),
        ("direct", "trn1", {"dge_mode": MODES.none}, None),
        ("direct", "trn2", {"dge_mode": MODES.hwdge, "engine": nisa.engine.sync}, None),
        ("direct", "trn2", {"dge_mode": MODES.hwdge, "engine": nisa.engine.scalar}, None),
        ("direct", "trn2", {"dge_mode": MODES.hwdge, "engine": nisa.engine.vector}, "engine"),
        ("direct", "trn2", {"engine": nisa.engine.sync}, "engine"),
        ("direct", "trn3", {"priority": 3}, None),
        ("direct", "trn3", {"priority": 4}, "priority"),
        ("direct", "trn2", {"priority": 0}, "priority"),
        ("scalar", "trn2", {"dge_mode": MODES.hwdge}, None),
        ("scalar", "trn2", {"dge_mode": MODES.swdge}, None),
        ("scalar", "trn2", {"dge_mode": MODES.none}, "dynamic-dge"),
        ("vector", "trn2", {"dge_mode": MODES.swdge}, None),
        ("vector", "trn2", {"dge_mode": MODES.hwdge}, "vector-offset-dge"),
        ("vector", "trn2", {"dge_mode": MODES.none}, "vector-offset-dge"),
    ],
)
def test_descriptor_generation(
    kind: str, target: str, options: dict[str, Any], rule: str | None
) -> None:
    x, rows = some(4, 8), np.array([[1], [2]], np.int32)
    if rule is None:
        interpreter.run(copies, x, rows, kind, target=target, **options)
    else:
        refusal(f"dma_copy.{rule}", copies, x, rows, kind, target=target, **options)


# How a copy divides into descriptors.


@pytest.mark.parametrize(
    ("make", "run_bytes", "descriptors"),
    [
        # Rows of 64 elements on both sides.
        (lambda x: (nl.ndarray((128, 64), nl.float32), x[:, :64]), 256, 128),
        # One side is contiguous altogether, the other row by row.
        (lambda x: (nl.ndarray((128, 256), nl.float32), x), 1024, 128),
        # Every second element: no runs.
        (lambda x: (nl.ndarray((128, 128), nl.float32), x[:, ::2]), 4, 128 * 128),
        # HBM to HBM in one piece, cut where a descriptor ends.
        (lambda x: (nl.ndarray((128, 256), nl.float32, nl.hbm), x), 64 * 1024, 2),
        # Conversion: runs count in elements, their bytes at the destination.
        (lambda x: (nl.ndarray((128, 256), nl.bfloat16), x), 512, 128),
        # A run-time offset for all moves the start only.
        (
            lambda x: (
                nl.ndarray((2, 256), nl.float32, nl.hbm),
                x.ap([[256, 2], [1, 256]], scalar_offset=nisa.register_alloc(3)),
            ),
            2048,
            1,
        ),
    ],
)
def test_descriptors(make: Any, run_bytes: int, descriptors: int) -> None:
    def kernel(x: Any) -> None:
        nisa.dma_copy(*make(x))

    (transfer,) = transfers(interpreter.run(kernel, some(128, 256)))
    assert (transfer.run_bytes, transfer.descriptors) == (run_bytes, descriptors)


def test_descriptors_of_a_gather() -> None:
    x, rows = some(40, 12), np.array([[3], [39], [0]], np.int32)
    (moved,) = [t for t in transfers(interpreter.run(gather, x, rows)) if t and t.software_dge]
    assert (moved.run_bytes, moved.descriptors, moved.partitions) == (48, 3, 3)
