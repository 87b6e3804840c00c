"""Random numbers: their distribution, and the states that make them repeat."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError

GPSIMD, VECTOR = nisa.engine.gpsimd, nisa.engine.vector
WORDS = {GPSIMD: 6, VECTOR: 24}


def run(kernel: Any, *arrays: np.ndarray, **options: Any) -> Any:
    return interpreter.run(kernel, *arrays, **options).outputs


def out(tile: Any) -> Any:
    result = nl.ndarray(tile.shape, tile.dtype, nl.shared_hbm)
    nisa.dma_copy(result, nl.copy(tile) if tile.buffer == nl.psum else tile)
    return result


def refuses(rule: str, kernel: Any, *arrays: np.ndarray, target: str = "trn2") -> None:
    with pytest.raises(NkiError) as caught:
        run(kernel, *arrays, target=target)
    assert caught.value.rule == rule


def drawn(shape: tuple[int, ...], dtype: str, engine: Any = VECTOR, buffer: Any = None) -> Any:
    tile = nl.ndarray(shape, dtype, buffer or nl.sbuf)
    nisa.rng(tile, engine=engine)
    return tile


def xorwow(state: np.ndarray, count: int) -> list[int]:
    """Marsaglia's xorwow in Python's integers."""
    x, y, z, w, v, d = (int(n) for n in state)
    numbers = []
    for _ in range(count):
        t = x ^ (x >> 2)
        x, y, z, w = y, z, w, v
        v = (v ^ (v << 4) ^ t ^ (t << 1)) & 0xFFFFFFFF
        d = (d + 362437) & 0xFFFFFFFF
        numbers.append((v + d) & 0xFFFFFFFF)
    return numbers


@pytest.mark.parametrize("engine", [GPSIMD, VECTOR])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_rng_fills_with_uniform_bits(engine: Any, dtype: str) -> None:
    found = run(lambda: out(drawn((128, 60), dtype, engine)))
    bits = np.unpackbits(np.ascontiguousarray(found).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01
    assert len(np.unique(found, axis=0)) == 128


def test_every_engine_core_and_draw_has_numbers_of_its_own() -> None:
    def kernel():
        return tuple(out(drawn((32, 8), "uint32", e)) for e in (VECTOR, VECTOR, GPSIMD))

    first, second, third = run(kernel)
    assert (first != second).all()
    assert (first != third).all()
    np.testing.assert_array_equal(run(kernel)[1], second)

    def on_two_cores():
        both = nl.ndarray((2, 32, 8), nl.uint32, nl.shared_hbm)
        nisa.dma_copy(both[nl.program_id()], drawn((32, 8), "uint32"))
        nisa.core_barrier(both, (0, 1))
        return both

    both = run(on_two_cores, programs=2)
    assert (both[0] != both[1]).all()


def test_a_narrow_type_takes_the_lowest_bits() -> None:
    wide = run(lambda: out(drawn((32, 8), "uint32")))
    narrow = run(lambda: out(drawn((32, 8), "int8")))
    np.testing.assert_array_equal(narrow, wide.astype(np.uint8).view(np.int8))


def test_rng_refuses() -> None:
    run(lambda: out(drawn((4, 4), "int32", VECTOR, nl.psum)))
    refuses("rng.gpsimd-psum", lambda: drawn((4, 4), "int32", GPSIMD, nl.psum))
    refuses("rng.dtype", lambda: drawn((4, 4), "float32"))
    refuses("rng.engine", lambda: drawn((4, 4), "int32", nisa.engine.scalar))
    run(lambda: out(drawn((4, 4), "int32", VECTOR)), target="trn1")
    refuses("rng.engine", lambda: drawn((4, 4), "int32", GPSIMD), target="trn1")


@pytest.mark.parametrize(("engine", "target"), [(GPSIMD, "trn2"), (VECTOR, "trn3")])
def test_a_state_continues_where_it_was_saved(engine: Any, target: str) -> None:
    def kernel():
        state = nl.ndarray((64, WORDS[engine]), nl.uint32)
        drawn((64, 7), "uint32", engine)
        nisa.rand_get_state(state, engine=engine)
        first = out(drawn((64, 20), "uint32", engine))
        nisa.rand_set_state(state, engine=engine)
        return out(state), first, out(drawn((64, 20), "uint32", engine))

    state, first, again = run(kernel, target=target)
    np.testing.assert_array_equal(first, again)
    streams = WORDS[engine] // 6
    for p in (0, 63):
        lanes = [xorwow(state[p, 6 * s : 6 * s + 6], 20 // streams) for s in range(streams)]
        np.testing.assert_array_equal(first[p], np.array(lanes).T.ravel())


def test_a_state_belongs_to_its_partitions() -> None:
    def kernel(seeds):
        nisa.rand_set_state(nl.load(seeds))
        tile = nl.ndarray((64, 5), nl.uint32)
        nisa.rng(tile[32:64], engine=GPSIMD)
        nisa.rng(tile[0:32], engine=GPSIMD)
        return out(tile)

    seeds = np.arange(1, 64 * 6 + 1, dtype=np.uint32).reshape(64, 6)
    found = run(kernel, seeds)
    for p in (0, 31, 32, 63):
        assert found[p].tolist() == xorwow(seeds[p], 5)


def test_states_are_checked() -> None:
    good, bad = np.ones((4, 6), np.uint32), np.ones((4, 5), np.uint32)
    wide = np.ones((4, 24), np.uint32)
    run(lambda x: out(nl.load(x)) if nisa.rand_set_state(nl.load(x)) else None, good)
    run(lambda x: nisa.rand_set_state(nl.load(x), engine=VECTOR) and None, wide, target="trn3")
    refuses("rand_set_state.state", lambda x: nisa.rand_set_state(nl.load(x)), bad)
    refuses("rand_set_state.state", lambda x: nisa.rand_set_state(nl.load(x)), good.view(np.int32))
    refuses("rand_set_state.engine", lambda x: nisa.rand_set_state(nl.load(x), engine=VECTOR), wide)
    refuses("rand_set_state.engine", lambda x: nisa.rand_set_state(nl.load(x)), good, target="trn1")
    refuses(
        "rand_set_state.buffer",
        lambda x: nisa.rand_set_state(nl.zeros((4, 6), nl.uint32, nl.psum)),
        good,
    )
    refuses("rand_get_state.state", lambda: nisa.rand_get_state(nl.zeros((4, 7), nl.uint32)))

    def into_psum():
        state = nl.ndarray((4, 24), nl.uint32, nl.psum)
        nisa.rand_get_state(state, engine=VECTOR)
        return out(state)

    run(into_psum, target="trn3")
    refuses("rand_get_state.buffer", into_psum)
    refuses(
        "rand_get_state.gpsimd-psum",
        lambda: nisa.rand_get_state(nl.zeros((4, 6), nl.uint32, nl.psum)),
        target="trn3",
    )


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32"])
def test_set_rng_seed(dtype: str) -> None:
    def kernel(seeds):
        found = []
        for i in (0, 1, 0):
            nisa.set_rng_seed(nl.load(seeds[i : i + 1]))
            found.append(out(drawn((16, 6), "uint32")))
        return tuple(found)

    first, other, again = run(kernel, np.array([[42], [43]]).astype(dtype))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_seeds_are_checked() -> None:
    refuses("set_rng_seed.seed", lambda: nisa.set_rng_seed(nl.zeros((1, 2), nl.int32)))
    refuses("set_rng_seed.seed", lambda: nisa.set_rng_seed(nl.zeros((2, 1), nl.int32)))
    refuses("set_rng_seed.seed", lambda: nisa.set_rng_seed(nl.zeros((1, 1), nl.int16)))


# dropout


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int16])
@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_dropout(dtype: Any, prob: float) -> None:
    data = np.arange(1, 128 * 50 + 1).reshape(128, 50).astype(dtype)

    def kernel(x):
        tile = nl.load(x)
        result = nl.ndarray(x.shape, x.dtype)
        nisa.dropout(result, tile, prob)
        return out(result)

    found = run(kernel, data)
    dropped = found == np.zeros((), dtype)
    np.testing.assert_array_equal(found[~dropped], data[~dropped])
    assert abs(dropped.mean() - prob) < (0.02 if prob == 0.3 else 1e-9)


def test_dropout_of_each_partition() -> None:
    def kernel(x, p):
        result = nl.ndarray(x.shape, x.dtype)
        nisa.dropout(result, nl.load(x), nl.load(p))
        return out(result)

    data, prob = np.ones((8, 400), np.float32), np.linspace(0, 1, 8).astype(np.float32)[:, None]
    found = run(kernel, data, prob)
    np.testing.assert_allclose((found == 0).mean(1), prob[:, 0], atol=0.07)
    run(kernel, data, prob.astype(np.float16))
    run(kernel, data.astype(np.int32), prob)
    refuses("dropout.prob-dtype", kernel, data.astype(np.int32), prob.astype(np.float16))
    refuses("dropout.prob-dtype", kernel, data, prob.astype(np.int32))
    refuses("dropout.prob", kernel, data, prob + 1)
    refuses("dropout.vector-operand", kernel, data, prob[:4])


def test_dropout_converts_nothing() -> None:
    def kernel(x):
        nisa.dropout(nl.zeros(x.shape, nl.bfloat16), nl.load(x), 0.5)

    refuses("dropout.dtype", kernel, np.ones((4, 4), np.float32))


# rand2


def uniform(dtype: str, low: Any, high: Any, target: str = "trn3") -> Any:
    def kernel():
        tile = nl.ndarray((128, 40), dtype)
        nisa.rand2(tile, low, high)
        return out(tile)

    return run(kernel, target=target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "float8_e5m2"])
def test_rand2(dtype: str) -> None:
    found = uniform(dtype, -2.0, 6.0).astype(np.float64)
    assert found.min() >= -2
    assert found.max() <= 6
    assert abs(found.mean() - 2) < 0.15


def test_rand2_of_each_partition() -> None:
    def kernel(low, high):
        tile = nl.ndarray((8, 100), nl.float32)
        nisa.rand2(tile, nl.load(low), nl.load(high))
        return out(tile)

    low = np.arange(8, dtype=np.float32)[:, None]
    found = run(kernel, low, low + 1, target="trn3")
    np.testing.assert_array_equal(np.floor(found), np.repeat(low, 100, 1))
    refuses("rand2.range", kernel, low, low[::-1].copy(), target="trn3")


def test_rand2_refuses() -> None:
    for rule, arguments in [
        ("target", ("float32", 0.0, 1.0, "trn2")),
        ("range", ("float32", 1.0, 1.0)),
        ("dtype", ("float8_e4m3fn", 0.0, 1.0)),
    ]:
        with pytest.raises(NkiError) as caught:
            uniform(*arguments)
        assert caught.value.rule == f"rand2.{rule}"
