"""Interpreted kernels inside JAX programs: jit, vmap, scan, shard_map, threads, dtypes, errors."""

import threading
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_tkg.nki.interpret import interpret
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl

SHAPE = (2, 128, 16)
MATMUL_RESULT = (
    jax.ShapeDtypeStruct((16, 16), jnp.float32),
    jax.ShapeDtypeStruct((128, 4), jnp.float32),
)


def swap_halves(x: Any) -> Any:
    """Two programs: each loads its half, gives it to the other, stores what it got."""
    out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    me = nl.program_id()
    mine = nl.ndarray(x.shape[1:], x.dtype)
    theirs = nl.ndarray(x.shape[1:], x.dtype)
    nisa.dma_copy(mine, x[me])
    nisa.sendrecv(mine, theirs, 1 - me, 1 - me, 0)
    nisa.dma_copy(out[me], theirs)
    return out


def matmul(a: Any, b: Any, fill: float = 0.0) -> Any:
    """a.T @ b, and a tile of a constant."""
    product = nl.ndarray((a.shape[1], b.shape[1]), nl.float32, nl.shared_hbm)
    filled = nl.ndarray((128, 4), nl.float32, nl.shared_hbm)
    left, right = nl.ndarray(a.shape, a.dtype), nl.ndarray(b.shape, b.dtype)
    nisa.dma_copy(left, a)
    nisa.dma_copy(right, b)
    sums = nl.ndarray(product.shape, nl.float32, nl.psum)
    nisa.nc_matmul(sums, left, right)
    result = nl.ndarray(product.shape, nl.float32)
    nisa.tensor_copy(result, sums)
    nisa.dma_copy(product, result)
    constant = nl.ndarray((128, 4), nl.float32)
    nisa.memset(constant, fill)
    nisa.dma_copy(filled, constant)
    return product, filled


def load_to_psum(x: Any) -> Any:
    """What the hardware refuses: DMA does not reach PSUM."""
    out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    nisa.dma_copy(nl.ndarray(x.shape[1:], x.dtype, nl.psum), x[0])
    return out


def swapped(x: jax.Array) -> jax.Array:
    return interpret(swap_halves, x, result=jax.ShapeDtypeStruct(x.shape, x.dtype), programs=2)


def some(*lead: int, dtype: Any = jnp.float32) -> jax.Array:
    shape = (*lead, *SHAPE)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def test_eagerly_and_under_jit() -> None:
    x = some()
    chex.assert_trees_all_equal(swapped(x), x[::-1])
    chex.assert_trees_all_equal(jax.jit(swapped)(x), x[::-1])


def test_several_results_and_static_arguments() -> None:
    a, b = some()[0], some()[1]
    product, filled = jax.jit(
        lambda a, b: interpret(matmul, a, b, result=MATMUL_RESULT, static={"fill": 2.5})
    )(a, b)
    want = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
    chex.assert_trees_all_close(product, jnp.asarray(want, jnp.float32), atol=2e-5)
    chex.assert_trees_all_equal(filled, jnp.full((128, 4), 2.5))


def test_exact_mode_keeps_float32_inside() -> None:
    a, b = some(dtype=jnp.bfloat16)
    exact, _ = interpret(matmul, a, b, result=MATMUL_RESULT, exact=True)
    want = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
    chex.assert_trees_all_close(exact, jnp.asarray(want, jnp.float32), atol=2e-5)


@pytest.mark.parametrize("axes", [0, 1, 3])
def test_vmap_launches_once_for_each_element(axes: int) -> None:
    x = jnp.moveaxis(some(3), 0, axes)
    chex.assert_trees_all_equal(jax.vmap(swapped, in_axes=axes)(x), some(3)[:, ::-1])


def test_nested_vmap_of_different_operands() -> None:
    a = jnp.stack([some()[0], 2 * some()[0], 3 * some()[0]])
    b = jnp.stack([some()[1], -some()[1]])

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return interpret(matmul, a, b, result=MATMUL_RESULT)[0]

    outer = jax.jit(jax.vmap(jax.vmap(product, in_axes=(None, 0)), in_axes=(0, None)))
    got = outer(a, b)
    want = np.einsum("ikm,jkn->ijmn", np.asarray(a, np.float64), np.asarray(b, np.float64))
    chex.assert_shape(got, (3, 2, 16, 16))
    chex.assert_trees_all_close(got, jnp.asarray(want, jnp.float32), atol=1e-4)


def test_inside_scan() -> None:
    x = some()
    last, sums = jax.jit(
        lambda x: jax.lax.scan(lambda c, _: (swapped(c), c[0, 0, 0]), x, None, length=3)
    )(x)
    chex.assert_trees_all_equal(last, x[::-1])
    chex.assert_trees_all_equal(sums, jnp.stack([x[0, 0, 0], x[1, 0, 0], x[0, 0, 0]]))


@pytest.mark.parametrize("columns", [16, 4096])  # 4096: 4 MiB a shard, where pure_callback hangs
def test_inside_shard_map_on_several_devices(columns: int) -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x = jnp.arange(4 * 2 * 128 * columns, dtype=jnp.float32).reshape(4, 2, 128, columns)
    mapped = jax.shard_map(
        lambda s: swapped(s[0])[None], mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )
    chex.assert_trees_all_equal(jax.jit(mapped)(x), x[:, ::-1])


def test_shard_map_with_a_replicated_operand() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    a, b = some(2)[:, 0], some()[1]

    def shard(a: jax.Array, b: jax.Array) -> jax.Array:
        return interpret(matmul, a[0], b, result=MATMUL_RESULT)[0][None]

    specs = {"mesh": mesh, "in_specs": (P("d"), P()), "out_specs": P("d")}
    a = jax.device_put(a, NamedSharding(mesh, P("d")))
    b = jax.device_put(b, NamedSharding(mesh, P()))
    got = jax.jit(jax.shard_map(shard, **specs))(a, b)
    want = np.einsum("ikm,kn->imn", np.asarray(a, np.float64), np.asarray(b, np.float64))
    chex.assert_trees_all_close(np.asarray(got), want.astype(np.float32), atol=2e-5)


def test_from_several_threads_at_once() -> None:
    x, ended = some(), list[bool]()

    def work(i: int) -> None:
        ended.append(bool((jax.jit(swapped)(x + i) == (x + i)[::-1]).all()))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert ended == [True] * 6


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2", "float8_e4m3fn", "int8",
     "uint8", "int16", "uint16", "int32", "uint32", "bool"],
)  # fmt: skip
def test_every_dtype(dtype: str) -> None:
    x = some().astype(dtype)
    got = jax.jit(swapped)(x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(x[::-1], np.float32))


def test_a_refusal_reaches_the_user_with_its_message() -> None:
    x = some()
    fails = jax.jit(lambda x: interpret(load_to_psum, x, result=jax.typeof(x)))
    with pytest.raises(Exception, match="DMA does not reach PSUM") as error:
        jax.block_until_ready(fails(x))
    assert "test_interpret.py" in str(error.value)
    assert "dma_copy.psum" in str(error.value)
    chex.assert_trees_all_equal(jax.jit(swapped)(x), x[::-1])  # and the next launch works


def test_a_result_of_another_shape_is_refused() -> None:
    wrong = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(
        Exception, match=r"returned float32\[2, 128, 16\]; `result` says float32\[3\]"
    ):
        jax.block_until_ready(interpret(swap_halves, some(), result=wrong, programs=2))


def test_operands_the_compiler_sharded_are_refused() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(some(), NamedSharding(mesh, P(None, "d")))
    with pytest.raises(NotImplementedError, match=r"call it inside jax\.shard_map"):
        jax.jit(swapped)(x)


def test_other_platforms_are_refused_when_lowered() -> None:
    with pytest.raises(NotImplementedError, match="run on the CPU, not on neuron"):
        jax.jit(swapped).trace(some()).lower(lowering_platforms=("neuron",))
