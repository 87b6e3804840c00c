"""GpSimd's gathers and searches, and sums by DMA, against NumPy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError

RNG = np.random.default_rng(9)
BFLOAT16 = ml_dtypes.bfloat16


def issue(op: str, shape: Any, dtype: str, *arrays: np.ndarray, **arguments: Any) -> Any:
    """What `nisa.op(dst, *tiles, **arguments)` leaves in a tile that held -9 before."""
    target = arguments.pop("target", "trn2")

    def kernel(inputs):
        dst = nl.full(shape, 9 if dtype.startswith("u") else -9, dtype)
        getattr(nisa, op)(dst, *(nl.load(x) for x in inputs), **arguments)
        out = nl.ndarray(shape, dtype, nl.shared_hbm)
        nisa.dma_copy(out, dst)
        return out

    return interpreter.run(kernel, arrays, target=target).outputs


def refuses(rule: str, *given: Any, **arguments: Any) -> None:
    with pytest.raises(NkiError) as caught:
        issue(*given, **arguments)
    assert caught.value.rule == f"{given[0]}.{rule}"


# nc_n_gather


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_nc_n_gather(dtype: str) -> None:
    kind = BFLOAT16 if dtype == "bfloat16" else dtype
    data = RNG.integers(0, 99, (32, 5, 7)).astype(kind)
    index = RNG.integers(0, 35, (32, 3, 4)).astype(np.uint32)
    wanted = np.take_along_axis(data.reshape(32, 35), index.reshape(32, 12).astype(int), 1)
    found = issue("nc_n_gather", (32, 12), dtype, data, index)
    np.testing.assert_array_equal(found, wanted)


def test_nc_n_gather_refuses() -> None:
    data = np.zeros((32, 6), np.float32)
    index = np.full((32, 4), 5, np.uint32)
    op, shape = "nc_n_gather", (32, 4)
    issue(op, shape, "float32", data, index)
    refuses("index", op, shape, "float32", data, index + 1)
    refuses("dtype", op, shape, "bfloat16", data, index)
    refuses("indices", op, shape, "float32", data, index.astype(np.int32))
    refuses("shape", op, (32, 5), "float32", data, index)
    refuses("shape", op, shape, "float32", data[:16], index)

    def in_psum(x, i):
        nisa.nc_n_gather(nl.zeros(shape, nl.float32, nl.psum), nl.load(x), nl.load(i))

    with pytest.raises(NkiError, match=r"nc_n_gather\.buffer"):
        interpreter.run(in_psum, data, index)


# local_gather


def gathered(source: np.ndarray, index: np.ndarray, run: int, valid: int) -> np.ndarray:
    result = np.empty((source.shape[0], valid, run), source.dtype)
    for core in range(source.shape[0] // 16):
        rows = slice(16 * core, 16 * core + 16)
        for place, start in enumerate(index[rows].flatten(order="F")[:valid]):
            result[rows, place] = source[rows, start : start + run]
    return result.reshape(source.shape[0], -1)


@pytest.mark.parametrize("run", [1, 2, 32])
@pytest.mark.parametrize("valid", [None, 39, 64])
@pytest.mark.parametrize("partitions", [16, 128])
def test_local_gather(run: int, valid: int | None, partitions: int) -> None:
    source = RNG.standard_normal((partitions, 100)).astype(np.float32)
    index = RNG.integers(0, 101 - run, (partitions, 4)).astype(np.uint16)
    wanted = gathered(source, index, run, valid or 64)
    found = issue(
        "local_gather", wanted.shape, "float32", source, index,
        num_elem_per_idx=run, num_valid_indices=valid,
    )  # fmt: skip
    np.testing.assert_array_equal(found, wanted)


def test_local_gather_refuses() -> None:
    source, index = np.zeros((32, 10), np.float32), np.full((32, 2), 9, np.uint16)
    op, shape = "local_gather", (32, 32)
    issue(op, shape, "float32", source, index)
    refuses("index", op, shape, "float32", source, index + np.uint16(1))
    refuses("index", op, (32, 64), "float32", source, index, num_elem_per_idx=2)
    refuses("elements", op, (32, 96), "float32", source, index, num_elem_per_idx=3)
    refuses("valid-indices", op, (32, 33), "float32", source, index, num_valid_indices=33)
    refuses("valid-indices", op, (16, 4112), "float32", source[:16], np.zeros((16, 257), np.uint16))
    refuses("shape", op, (32, 31), "float32", source, index)
    refuses("shape", op, shape, "float32", source, index[:16])
    refuses("partitions", op, (24, 32), "float32", source[:24], index[:24])
    refuses("indices", op, shape, "float32", source, index.astype(np.uint32))
    refuses("dtype", op, shape, "int32", source, index)


# sequence_bounds


def bounds(ids: list[int]) -> np.ndarray:
    """The statement of the documentation, element by element."""
    n = len(ids)
    starts, ends = [0] * n, [0] * n
    for i in range(n):
        first = last = i
        while first and ids[first - 1] == ids[i]:
            first -= 1
        while last + 1 < n and ids[last + 1] == ids[i]:
            last += 1
        starts[i], ends[i] = (first, last + 1) if ids[i] else (n, -1)
    return np.array([[starts, ends]])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_sequence_bounds(ids: list[int]) -> None:
    given_ids = np.array([ids], np.int32)
    for dtype in ("int32", "float32"):
        found = issue("sequence_bounds", (1, 2, len(ids)), dtype, given_ids.astype(dtype))
        np.testing.assert_array_equal(found, bounds(ids))


def test_sequence_bounds_refuses() -> None:
    ids = np.ones((1, 4), np.float32)
    op, shape = "sequence_bounds", (1, 2, 4)
    issue(op, shape, "float32", ids)
    refuses("shape", op, (1, 8), "float32", ids)
    refuses("shape", op, (2, 2, 4), "float32", np.ones((2, 4), np.float32))
    refuses("dtype", op, shape, "bfloat16", ids)
    refuses("segment-ids", op, shape, "float32", -ids)
    refuses("segment-ids", op, shape, "float32", ids / 2)


# nonzero_with_count


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_nonzero_with_count(dtype: str) -> None:
    src = RNG.integers(0, 2, (48, 20)).astype(dtype)
    found = issue("nonzero_with_count", (48, 21), "int32", src, index_offset=100, padding_val=-7)
    wanted = np.full((48, 21), -9)
    for p in (0, 16, 32):
        where = np.flatnonzero(src[p]) + 100
        wanted[p] = [*where, *[-7] * (20 - len(where)), len(where)]
    np.testing.assert_array_equal(found, wanted)


def test_nonzero_with_count_refuses() -> None:
    src = np.ones((16, 8), np.float32)
    op, shape = "nonzero_with_count", (16, 9)
    issue(op, shape, "int32", src)
    refuses("target", op, shape, "int32", src, target="trn1")
    refuses("dtype", op, shape, "float32", src)
    refuses("dtype", op, shape, "int32", src.astype(BFLOAT16))
    refuses("shape", op, (16, 8), "int32", src)
    refuses("value", op, shape, "int32", src, index_offset=2**31)
    refuses("value", op, shape, "int32", src, padding_val=0.5)


# topk


def largest(src: np.ndarray, n: int, k: int, target: str = "trn2", **types: str) -> Any:
    def kernel(x):
        values = nl.zeros((x.shape[0], k), types.get("values", "bfloat16"))
        indices = nl.zeros((x.shape[0], k), types.get("indices", "uint32"))
        nisa.topk(values, indices, nl.load(x), n)
        outs = []
        for tile in (values, indices):
            outs.append(nl.ndarray(tile.shape, tile.dtype, nl.shared_hbm))
            nisa.dma_copy(outs[-1], tile)
        return tuple(outs)

    return interpreter.run(kernel, src, target=target).outputs


@pytest.mark.parametrize(("n", "k"), [(42, 8), (48, 48), (8, 1), (16, 3)])
def test_topk(n: int, k: int) -> None:
    src = RNG.permutation(96).reshape(32, 3).astype(BFLOAT16)
    values, indices = largest(src, n, k)
    for p in range(32):
        snake = src[p // 16 * 16 : p // 16 * 16 + 16].T.ravel()[:n].astype(np.float32)
        order = np.argsort(snake)[n - k :]
        np.testing.assert_array_equal(values[p].astype(np.float32), snake[order])
        np.testing.assert_array_equal(indices[p], order)


def test_topk_reads_only_its_values() -> None:
    def kernel(x):
        tile = nl.ndarray((16, 2), nl.bfloat16)
        nisa.dma_copy(tile[:, 0:1], x)
        nisa.dma_copy(tile[0:4, 1:2], x[0:4])
        values, indices = nl.zeros((16, 2), nl.bfloat16), nl.zeros((16, 2), nl.uint32)
        nisa.topk(values, indices, tile, 20)
        nisa.topk(values, indices, tile, 21)

    run = interpreter.run
    with pytest.raises(NkiError) as caught:
        run(kernel_of_integers, np.arange(16, dtype=np.int32)[:, None])
    assert caught.value.rule == "topk.dtype"
    assert len(run(kernel, np.arange(16)[:, None].astype(BFLOAT16)).programs[0]) == 6


def kernel_of_integers(x):
    nisa.topk(nl.zeros((16, 2), nl.bfloat16), nl.zeros((16, 2), nl.uint32), nl.load(x), 16)


def test_topk_refuses() -> None:
    src = np.arange(32).reshape(16, 2).astype(BFLOAT16)
    largest(src, 32, 4)
    for rule, arguments in [
        ("size", {"n": 7, "k": 4}),
        ("size", {"n": 16, "k": 17}),
        ("src-size", {"n": 33, "k": 4}),
        ("dtype", {"n": 32, "k": 4, "values": "float32"}),
        ("dtype", {"n": 32, "k": 4, "indices": "int32"}),
    ]:
        with pytest.raises(NkiError) as caught:
            largest(src, **arguments)
        assert caught.value.rule == f"topk.{rule}"
    with pytest.raises(NkiError, match=r"topk\.partitions"):
        largest(src[:8], 8, 4)


# dma_compute


def test_dma_compute_adds_in_float32() -> None:
    arrays = [RNG.standard_normal((16, 8)).astype(BFLOAT16) for _ in range(3)]

    def kernel(x, y, z):
        out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        nisa.dma_compute(out, (x, nl.load(y), z), nl.add, scales=(1.0, 1.0, 1.0))
        return out

    wanted = sum(a.astype(np.float32) for a in arrays).astype(BFLOAT16)
    found = interpreter.run(kernel, *arrays).outputs
    np.testing.assert_array_equal(found, wanted)


TABLE = RNG.standard_normal((10, 6)).astype(np.float32)
ROWS = np.array([[7], [0], [3], [9]], np.int32)
NEW = RNG.standard_normal((4, 6)).astype(np.float32)


def scatter(rows: np.ndarray, **arguments: Any) -> np.ndarray:
    def kernel(table, rows, new):
        where = table.vector_select(0, nl.load(rows))
        nisa.dma_compute(where, (where, nl.load(new)), nl.add, **arguments)

    return interpreter.run(kernel, TABLE.copy(), rows, NEW).arguments["table"]


def gather(rows: np.ndarray, **arguments: Any) -> Any:
    def kernel(table, rows, new):
        tile = nl.load(new)
        where = table.vector_select(0, nl.load(rows))
        nisa.dma_compute(tile, (tile, where), nl.add, **arguments)
        out = nl.ndarray(new.shape, new.dtype, nl.shared_hbm)
        nisa.dma_copy(out, tile)
        return out

    return interpreter.run(kernel, TABLE, rows, NEW).outputs


def test_dma_compute_adds_to_rows_chosen_at_run_time() -> None:
    wanted = TABLE.copy()
    wanted[ROWS.ravel()] += NEW
    np.testing.assert_array_equal(scatter(ROWS), wanted)
    np.testing.assert_array_equal(gather(ROWS), NEW + TABLE[ROWS.ravel()])


def test_dma_compute_leaves_rows_out() -> None:
    rows = np.array([[7], [-1], [10], [9]], np.int32)
    wanted = TABLE.copy()
    wanted[[7, 9]] += NEW[[0, 3]]
    np.testing.assert_array_equal(scatter(rows, oob_mode=nisa.oob_mode.skip), wanted)
    wanted = NEW.copy()
    wanted[[0, 3]] += TABLE[[7, 9]]
    np.testing.assert_array_equal(gather(rows, oob_mode=nisa.oob_mode.skip), wanted)
    for do in (scatter, gather):
        with pytest.raises(NkiError, match=r"dma_compute\.run-time-index"):
            do(rows)


def test_dma_compute_refuses() -> None:
    for do, rows, arguments in [
        (scatter, ROWS, {"unique_indices": False}),
        (gather, ROWS, {"unique_indices": False}),
        (scatter, ROWS * 0, {}),
    ]:
        with pytest.raises(NkiError) as caught:
            do(rows, **arguments)
        assert caught.value.rule == "dma_compute.unique-indices"
    gather(ROWS * 0)

    def calls(x, rows):
        tile = nl.load(x)
        where = x.vector_select(0, nl.load(rows))
        first = nisa.register_alloc(0)
        short = nl.load(x[0:4])
        return {
            "operator": lambda: nisa.dma_compute(tile, (tile, x), nl.multiply),
            "scales": lambda: nisa.dma_compute(tile, (tile, x), nl.add, scales=(1.0, 0.5)),
            "sources": lambda: nisa.dma_compute(tile, (tile,) * 17, nl.add),
            "size": lambda: nisa.dma_compute(tile, (tile, short), nl.add),
            "psum": lambda: nisa.dma_compute(nl.zeros(x.shape, x.dtype, nl.psum), (x,), nl.add),
            "scalar-offset": lambda: nisa.dma_compute(short[0:1], (short[0:1], x[first]), nl.add),
            "in-place": lambda: nisa.dma_compute(nl.load(x[0:4]), (short, where), nl.add),
        }

    for rule in ("operator", "scales", "sources", "size", "psum", "scalar-offset", "in-place"):
        with pytest.raises(NkiError) as caught:
            interpreter.run(lambda x, rows, rule=rule: calls(x, rows)[rule](), TABLE, ROWS)
        assert caught.value.rule == f"dma_compute.{rule}"
