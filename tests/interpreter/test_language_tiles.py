"""Functions of `nki.language` that make and move tiles."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError, UninitializedReadError

RNG = np.random.default_rng(8)
A = RNG.standard_normal((32, 48)).astype(np.float32)


def run(kernel: Any, *arrays: np.ndarray, **options: Any) -> Any:
    return interpreter.run(kernel, *arrays, **options).outputs


def out(tile: Any) -> Any:
    """A tile as an output of the kernel."""
    if tile.buffer == nl.psum:
        tile = nl.copy(tile)
    result = nl.ndarray(tile.shape, tile.dtype, nl.shared_hbm)
    nisa.dma_copy(result, tile)
    return result


def refuses(rule: str, kernel: Any, *arrays: np.ndarray) -> None:
    with pytest.raises(NkiError) as caught:
        run(kernel, *arrays)
    assert caught.value.rule == rule


@pytest.mark.parametrize("shape", [(128, 5), (3, 2, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_constants(shape: tuple[int, ...], dtype: str) -> None:
    for make, value in (
        (nl.zeros, 0),
        (nl.ones, 1),
        (lambda *a, **k: nl.full(a[0], 3, *a[1:], **k), 3),
    ):
        for buffer in (nl.sbuf, nl.psum):
            found = run(lambda make=make, buffer=buffer: out(make(shape, dtype, buffer=buffer)))
            np.testing.assert_array_equal(found.astype(np.float32), np.full(shape, value))


@pytest.mark.parametrize("shape", [(7,), (128,), (3, 4099), (128, 9000), (1, 1, 1)])
def test_constants_in_hbm(shape: tuple[int, ...]) -> None:
    found = run(lambda: nl.full(shape, 2.5, nl.float32, nl.shared_hbm))
    np.testing.assert_array_equal(found, np.full(shape, 2.5))


def test_like_another_tensor() -> None:
    def kernel(x):
        tile = nl.load(x, dtype=nl.bfloat16)
        same, empty, hbm = nl.zeros_like(tile), nl.empty_like(tile), nl.empty_like(x)
        assert (same.shape, same.dtype, same.buffer) == (x.shape, nl.bfloat16, nl.sbuf)
        assert (empty.shape, empty.dtype, empty.buffer) == (x.shape, nl.bfloat16, nl.sbuf)
        assert (hbm.dtype, hbm.buffer == x.buffer) == (nl.float32, True)
        assert nl.zeros_like(x, dtype=nl.int8, buffer=nl.psum).buffer == nl.psum
        return out(same)

    np.testing.assert_array_equal(run(kernel, A).astype(np.float32), 0 * A)
    with pytest.raises(UninitializedReadError):
        run(lambda x: out(nl.empty_like(nl.load(x))), A.astype(np.int32))


def test_load_and_store() -> None:
    def kernel(x):
        result = nl.ndarray(x.shape, nl.bfloat16, nl.shared_hbm)
        nl.store(result, nl.load(x, dtype=nl.float16))
        return result

    wanted = A.astype(np.float16).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run(kernel, A), wanted)
    refuses("load.buffer", lambda x: nl.load(nl.load(x)), A)
    refuses("store.buffer", lambda x: nl.store(nl.load(x), nl.load(x)), A)
    refuses("store.buffer", lambda x: nl.store(x, x), A)


def test_load_transpose2d() -> None:
    half = A.astype(np.float16)
    np.testing.assert_array_equal(run(lambda x: out(nl.load_transpose2d(x)), half), half.T)
    found = run(lambda x: out(nl.load_transpose2d(x, dtype=nl.float32)), half)
    np.testing.assert_array_equal(found, half.T.astype(np.float32))
    refuses("load_transpose2d.rank", lambda x: nl.load_transpose2d(x), half.reshape(2, 16, 48))
    refuses("load_transpose2d.buffer", lambda x: nl.load_transpose2d(nl.load(x)), half)


def test_transpose_is_in_psum() -> None:
    def kernel(x):
        result = nl.transpose(nl.load(x))
        assert result.buffer == nl.psum
        # From PSUM too, and into another type.
        return out(result), out(nl.transpose(result)), out(nl.transpose(nl.load(x), nl.bfloat16))

    transposed, back, narrow = run(kernel, A)
    np.testing.assert_array_equal(transposed, A.T)
    np.testing.assert_array_equal(back, A)
    np.testing.assert_array_equal(narrow, A.T.astype(ml_dtypes.bfloat16))
    refuses("transpose.rank", lambda x: nl.transpose(nl.load(x)), A.reshape(32, 6, 8))


def test_matmul() -> None:
    b = RNG.standard_normal((48, 20)).astype(np.float32)
    found = run(lambda x, y: out(nl.matmul(nl.load(x), nl.load(y))), A, b)
    np.testing.assert_allclose(found, A @ b, rtol=1e-5, atol=1e-5)
    transposed = np.ascontiguousarray(A.T)
    found = run(lambda x, y: out(nl.matmul(nl.load(x), nl.load(y), True)), transposed, b)
    np.testing.assert_allclose(found, A @ b, rtol=1e-5, atol=1e-5)
    refuses("nc_matmul.contraction", lambda x, y: nl.matmul(nl.load(x), nl.load(y), True), A, b)
    refuses("matmul.rank", lambda x: nl.matmul(nl.load(x), nl.load(x)), A.reshape(32, 6, 8))


def test_identity_matrix_is_a_tile() -> None:
    def kernel(x):
        return out(nl.matmul(nl.shared_identity_matrix(32, dtype=nl.float32), nl.load(x), True))

    np.testing.assert_array_equal(run(kernel, A), A)


def test_expand_dims_and_broadcast_to() -> None:
    def kernel(x):
        tile = nl.load(x)
        assert nl.expand_dims(tile, 1).shape == (32, 1, 48)
        assert nl.expand_dims(tile, -1).shape == (32, 48, 1)
        same = nl.broadcast_to(tile, (32, 48))
        assert same is tile
        wide = nl.broadcast_to(nl.expand_dims(tile, 1), (32, 3, 48), dtype=nl.float16)
        tall = nl.broadcast_to(tile[5:6, :], (64, 48))
        return out(wide), out(tall), out(nl.broadcast_to(tile, (32, 48), nl.float16))

    # No compute engine starts at partition 5; DMA, which carries it to the others, does.
    wide, tall, cast = run(kernel, A)
    half = A.astype(np.float16)
    np.testing.assert_array_equal(wide, np.repeat(half[:, None], 3, 1))
    np.testing.assert_array_equal(tall, np.repeat(A[5:6], 64, 0))
    np.testing.assert_array_equal(cast, half)
    refuses("broadcast_to.shape", lambda x: nl.broadcast_to(nl.load(x), (32, 96)), A)
    refuses("broadcast_to.shape", lambda x: nl.broadcast_to(nl.load(x), (32, 48, 1)), A)


def test_gather_flattened() -> None:
    index = RNG.integers(0, 48, (32, 2, 10)).astype(np.int32)
    data = A.reshape(32, 6, 8)
    found = run(lambda x, i: out(nl.gather_flattened(nl.load(x), nl.load(i))), data, index)
    wanted = np.take_along_axis(A, index.reshape(32, -1), 1).reshape(index.shape)
    np.testing.assert_array_equal(found, wanted)
    half = run(
        lambda x, i: out(nl.gather_flattened(nl.load(x), nl.load(i), dtype=nl.float16)), data, index
    )
    np.testing.assert_array_equal(half, wanted.astype(np.float16))
    refuses("gather_flattened.indices", lambda x: nl.gather_flattened(nl.load(x), nl.load(x)), A)
    refuses(
        "gather_flattened.axis",
        lambda x, i: nl.gather_flattened(nl.load(x), nl.load(i), axis=1),
        data,
        index,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
def test_rand_is_uniform_and_never_one(dtype: str) -> None:
    found = run(lambda: out(nl.rand((128, 64), dtype))).astype(np.float64)
    assert found.min() >= 0
    assert found.max() < 1
    step = 1 / 8 if dtype == "float8_e5m2" else 0
    assert abs(found.mean() + step / 2 - 0.5) < 0.02
    assert len(np.unique(found)) > (4 if step else 200)


def test_rand_in_hbm() -> None:
    found = run(lambda: nl.rand((3, 50, 100), nl.float32, nl.shared_hbm))
    assert abs(found.mean() - 0.5) < 0.02
    assert len(np.unique(found)) > 14000
    refuses("rand.dtype", lambda: nl.rand((2, 2), nl.int32))


def test_random_seed_repeats_the_numbers() -> None:
    def kernel():
        draws = []
        for seed in (42, 42, 43):
            nl.random_seed(nl.full((1, 1), seed, nl.int32))
            draws.append(out(nl.rand((16, 20), nl.float32)))
        draws.append(out(nl.rand((16, 20), nl.float32)))
        return tuple(draws)

    first, again, other, later = run(kernel)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99
    assert (later != other).mean() > 0.99
    np.testing.assert_array_equal(run(kernel)[3], later)


def test_dropout() -> None:
    found = run(lambda x: out(nl.dropout(nl.load(x), 0.25)), np.ones((128, 64), np.float32))
    assert set(np.unique(found)) == {0, 1}
    assert abs((found == 0).mean() - 0.25) < 0.03
    assert run(lambda x: out(nl.dropout(nl.load(x), 0.5, nl.float16)), A).dtype == np.float16


def test_no_reorder_is_a_region() -> None:
    def kernel(x):
        with nl.no_reorder():
            tile = nl.load(x)
        return out(tile)

    np.testing.assert_array_equal(run(kernel, A), A)


def test_functions_issue_instructions() -> None:
    def kernel(x):
        return out(nl.softmax(nl.load(x)))

    program = interpreter.run(kernel, A).programs[0]
    names = [i.op for i in program]
    assert names == [
        "dma_copy", "tensor_reduce", "tensor_scalar", "activation", "tensor_reduce", "reciprocal",
        "tensor_scalar", "dma_copy",
    ]  # fmt: skip
    assert {i.source.function for i in program} == {"kernel", "out"}
