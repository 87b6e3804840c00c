"""The checker of lowered programs: each rule fires on what it is for, and on that alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax
from jax.interpreters import mlir
from jax.sharding import AxisType, PartitionSpec
from jaxlib.mlir import ir

import jax_tkg
from jax_tkg import Greedy, KVCache, Sample
from jax_tkg.flax_layers import Attention, AttentionConfig
from jax_tkg.generation import DecodeState, TokenPolicy, decode, portable_key
from jax_tkg.neuron import RULES, Finding, check, check_module
from tests.generation.tiny_model import VOCAB, TinyModel
from tests.lowered import lower_for_neuron, operations

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
Function = Callable[[jax.Array], Any]


def ints(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32)


def count(x: jax.Array) -> jax.Array:
    """An integer that depends on data."""
    return ints(x[0, 0])


def forever(value: Any, update: Callable[[Any], Any]) -> Any:
    return lax.while_loop(lambda i: i < 5, update, value)


def printing(x: jax.Array) -> jax.Array:
    jax.debug.print("{}", x)
    return x


def external(target: str) -> Function:
    return lambda x: jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def random_bits(impl: str) -> Function:
    return lambda x: jax.random.bits(jax.random.key(0, impl=impl), x.shape, jnp.uint32)


def summed(dtype: Any) -> Function:
    """Over eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec(None, "x"), PartitionSpec()
    return jax.shard_map(
        lambda x: lax.psum(x.astype(dtype), "x"), mesh=mesh, in_specs=split, out_specs=whole
    )


def zero_where(test: Function) -> jax.Array:
    """Indices up to 4, but for those of which something is true."""
    indices = lax.iota(jnp.int32, 5)
    return lax.select(test(indices), jnp.zeros(5, jnp.int32), indices)


class Twins(NamedTuple):
    """Two programs that do about the same, the operation of the first that is refused."""

    fails: Function
    operation: str
    passes: Function


TWINS = {
    "conditional": Twins(
        lambda x: lax.cond(x[0, 0] > 0, lambda: 1, lambda: 2),
        "stablehlo.case",
        lambda x: jnp.where(x[0, 0] > 0, 1, 2),
    ),
    "dynamic-loop": Twins(
        lambda x: lax.fori_loop(0, count(x), lambda i, x: x * 2, x),
        "stablehlo.while",
        lambda x: lax.fori_loop(0, 9, lambda i, y: jnp.where(i < count(x), y * 2, y), x),
    ),
    "host-callback": Twins(
        lambda x: jax.pure_callback(np.sin, X, x), "pure_callback", lambda x: jnp.sin(x)
    ),
    "custom-call": Twins(
        external("a_target"), "stablehlo.custom_call", external("AwsNeuronCustomNativeKernel")
    ),
    "no-lowering": Twins(lambda x: lax.linalg.eigh(x @ x.T), "eigh", lambda x: x @ x.T),
    "threefry": Twins(random_bits("threefry2x32"), "func.call", random_bits("unsafe_rbg")),
    "random-algorithm": Twins(
        lambda x: lax.rng_bit_generator(
            jnp.zeros(4, jnp.uint32), (3,), algorithm=lax.RandomAlgorithm.RNG_PHILOX
        ),
        "stablehlo.rng_bit_generator",
        lambda x: lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), (3,)),
    ),
    "multi-operand-sort": Twins(
        lambda x: jnp.argsort(ints(x)), "stablehlo.sort", lambda x: jnp.sort(ints(x))
    ),
    "float-sort": Twins(jnp.sort, "stablehlo.sort", lambda x: jnp.sort(ints(x), descending=True)),
    "variadic-reduce": Twins(
        lambda x: jnp.argmax(x, axis=-1), "stablehlo.reduce", jax_tkg.argmax_tokens
    ),
    "fft": Twins(
        lambda x: lax.fft(lax.complex(x, x), "FFT", (8,)),
        "stablehlo.fft",
        lambda x: x @ np.cos(np.outer(np.arange(8), np.arange(8)) / 8).astype(np.float32),
    ),
    "decomposition": Twins(
        lambda x: lax.linalg.triangular_solve(x[:, :4], x, left_side=True),
        "stablehlo.triangular_solve",
        lambda x: x[:, :4] @ x,
    ),
    "reduce-precision": Twins(
        lambda x: lax.reduce_precision(x, 8, 7),
        "stablehlo.reduce_precision",
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    ),
    "narrow-shift": Twins(
        lambda x: x.astype(jnp.int8) >> 4,
        "stablehlo.shift_right_arithmetic",
        lambda x: (ints(x) >> 4, x.astype(jnp.uint8) >> 4),
    ),
    "chlo": Twins(lax.erf, "chlo.erf", jnp.tanh),
    "integer-dot": Twins(
        lambda x: ints(x) @ ints(x).T,
        "stablehlo.dot_general",
        lambda x: x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16).T,
    ),
    "integer-scatter": Twins(
        lambda x: ints(x).at[ints(x[0])].add(1),
        "stablehlo.scatter",
        lambda x: (x.at[ints(x[0])].add(1), ints(x).at[ints(x[0])].set(1)),
    ),
    "integer-collective": Twins(summed(jnp.int32), "stablehlo.all_reduce", summed(jnp.float32)),
    "integer-top-k": Twins(
        lambda x: lax.top_k(ints(x), 3), "chlo.top_k", lambda x: jnp.max(x, axis=-1)
    ),
    "float8": Twins(
        lambda x: x.astype(jnp.float8_e4m3fn),
        "stablehlo.convert",
        lambda x: (x.astype(jnp.float8_e4m3), x.astype(jnp.float8_e5m2)),
    ),
    "complex": Twins(lambda x: lax.complex(x, x), "stablehlo.complex", lambda x: (x * 2, x * 2)),
    "out-of-bounds": Twins(
        lambda x: x[jnp.arange(5)], "stablehlo.gather", lambda x: x[jnp.arange(4)]
    ),
    "out-of-bounds-fill": Twins(
        lambda x: jnp.take(x, ints(x[0]), axis=0),
        "stablehlo.gather",
        lambda x: jnp.take(x, ints(x[0]), axis=0, mode="clip"),
    ),
}
# The complex numbers are there before the transform.
ALSO = {"fft": {"complex"}}
TESTED_ELSEWHERE = {"dynamic-shape", "float64", "sort-comparator"}


def rules(function: Callable[..., Any], *args: Any) -> set[str]:
    return {x.rule for x in check(function, *args)}


def test_each_rule_has_twins() -> None:
    assert set(TWINS) | TESTED_ELSEWHERE == set(RULES)


@pytest.mark.parametrize("rule", TWINS)
def test_what_is_refused(rule: str) -> None:
    found = check(TWINS[rule].fails, X)
    assert {x.rule for x in found} == {rule} | ALSO.get(rule, set())
    assert {x.operation for x in found if x.rule == rule} == {TWINS[rule].operation}


@pytest.mark.parametrize("rule", TWINS)
def test_what_is_not(rule: str) -> None:
    assert check(TWINS[rule].passes, X) == ()


def test_warnings_are_what_depends() -> None:
    warnings = {name for name, rule in RULES.items() if rule.severity == "warning"}
    assert warnings == {"chlo", "float-sort", "out-of-bounds-fill"}
    assert all(rule.refused and rule.source for rule in RULES.values())


def test_double_precision() -> None:
    jax.config.update("jax_enable_x64", True)
    try:
        assert rules(lambda x: x.astype(jnp.float64), X) == {"float64"}
        assert rules(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.float64)) == {"float64"}
        assert rules(lambda x: x * 2, X) == set()
    finally:
        jax.config.update("jax_enable_x64", False)


def test_dynamic_shapes() -> None:
    def symbolic(shape: str) -> export.Exported:
        types = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
        return export.export(jax.jit(lambda x: x + x), platforms=["neuron"])(types)

    found = check_module(module(symbolic("b, 8").mlir_module()))
    assert {x.rule for x in found} == {"dynamic-shape", "custom-call"}
    assert "shape_assertion" in next(x.message for x in found if x.rule == "custom-call")
    assert check_module(module(symbolic("4, 8").mlir_module())) == ()


def module(text: str) -> ir.Module:
    with mlir.make_ir_context():
        return ir.Module.parse(text)


def sort_by(comparison: str) -> ir.Module:
    return module(f"""
        func.func @main(%x: tensor<8xi32>) -> tensor<8xi32> {{
          %sorted = "stablehlo.sort"(%x) <{{dimension = 0 : i64, is_stable = true}}> ({{
          ^bb0(%a: tensor<i32>, %b: tensor<i32>):
            {comparison}
            stablehlo.return %c : tensor<i1>
          }}) : (tensor<8xi32>) -> tensor<8xi32>
          return %sorted : tensor<8xi32>
        }}""")


COMPARE = "stablehlo.compare {}, %a, %b, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>"


@pytest.mark.parametrize("direction", ["LT", "LE", "GT", "GE"])
def test_sort_by_an_ordering(direction: str) -> None:
    assert check_module(sort_by(f"%c = {COMPARE.format(direction)}")) == ()


@pytest.mark.parametrize(
    "comparison",
    [
        f"%c = {COMPARE.format('NE')}",
        f"%l = {COMPARE.format('LT')} %c = stablehlo.not %l : tensor<i1>",
    ],
)
def test_sort_by_anything_else(comparison: str) -> None:
    assert [x.rule for x in check_module(sort_by(comparison))] == ["sort-comparator"]


# Loops


@jax.jit
def repeated(x: jax.Array, times: jax.Array) -> jax.Array:
    return lax.fori_loop(0, times + 1, lambda i, x: x * 2, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: lax.fori_loop(0, 5, lambda i, x: x * 2, x),
        lambda x: lax.scan(lambda x, i: (x * 2, i), x, jnp.arange(4), reverse=True),
        lambda x: lax.while_loop(lambda i: i > 0, lambda i: i - 2, 8) + x,
        lambda x: lax.while_loop(lambda i: jnp.int32(5) > i, lambda i: 1 + i, 0) + x,
        lambda x: lax.map(lambda x: lax.fori_loop(0, 3, lambda i, x: x + 1, x), x),
        # The bound is an argument of a function, and a variable of the loop outside.
        lambda x: repeated(x, 3) + repeated(x, 4),
        lambda x: lax.while_loop(
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, c[1], lax.fori_loop(0, c[1], lambda i, x: x * 2, c[2])),
            (0, 7, x),
        )[2],
    ],
)
def test_loops_with_a_constant_trip_count(function: Function) -> None:
    assert check(function, X) == ()


@pytest.mark.parametrize(
    "function",
    [
        # The bound, the start or the step depend on data.
        lambda x: lax.fori_loop(0, count(x), lambda i, x: x * 2, x),
        lambda x: repeated(x, jnp.int32(3)) + repeated(x, count(x)),
        lambda x: forever(count(x), lambda i: i + 1),
        lambda x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + c[1], c[1]), (0, count(x))),
        # The bound changes from turn to turn of the loop outside.
        lambda x: lax.fori_loop(0, 3, lambda n, x: lax.fori_loop(0, n, lambda i, x: x * 2, x), x),
        # A second condition; a result; no constant steps.
        lambda x: lax.while_loop(
            lambda c: (c[0] < 5) & (c[1] > 0), lambda c: (c[0] + 1, c[1]), (0, count(x))
        ),
        lambda x: lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: x * 2, x),
        lambda x: forever(1, lambda i: i * 2) + x,
        lambda x: lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + 2, c[1] + 1), (0, 9)),
    ],
)
def test_loops_without(function: Function) -> None:
    assert rules(function, X) == {"dynamic-loop"}


def test_operations_are_counted_inside_loops() -> None:
    def run(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 3, lambda i, x: lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x), x)

    used = operations(lower_for_neuron(run, X))
    assert used["stablehlo.while"] == 2
    assert used["stablehlo.sine"] == 1


# Other ways into the rules


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (printing, "host-callback"),
        (lambda x: lax.fori_loop(0, 3, lambda i, x: printing(x), x), "host-callback"),
        (lambda x: jax.random.split(jax.random.key(0, impl="rbg"), 3), "threefry"),
        (lambda x: jax.random.categorical(jax.random.key(0, impl="rbg"), x), "variadic-reduce"),
        (lambda x: lax.sort((x, x), num_keys=2), "multi-operand-sort"),
        (lambda x: jnp.linalg.cholesky(x @ x.T), "decomposition"),
        (lambda x: ints(x).at[ints(x[0])].max(1), "integer-scatter"),
        (lambda x: (x > 0).at[ints(x[0])].min(False), "integer-scatter"),
        (lambda x: x.astype(jnp.int8) @ x.astype(jnp.int8).T, "integer-dot"),
        (lambda x: lax.top_k(x, 3), "chlo"),
        (lax.erfc, "chlo"),
        (lambda x: x.at[np.array([1, 7])].set(0.0), "out-of-bounds"),
        (lambda x: jnp.take_along_axis(x, ints(x[:, :2]), axis=1), "out-of-bounds-fill"),
        (lambda x: x.astype(jnp.float8_e5m2fnuz), "float8"),
        (jnp.linalg.svd, "no-lowering"),
    ],
)
def test_also_refused(function: Function, rule: str) -> None:
    assert rule in rules(function, X)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.max(x) + jnp.sum(x) + jnp.cumsum(x)[0],
        jax.nn.softmax,
        lambda x: jax.nn.one_hot(ints(x[0]), 5),
        lambda x: x[ints(x[0])],
        lambda x: x[np.array([-1, 3])],
        lambda x: x.at[jnp.arange(4)].set(0.0),
        lambda x: x[zero_where(lambda i: i < 9)],
        lambda x: x[zero_where(lambda i: i >= 0)],
        summed(jnp.int8),
        lambda x: jax.vmap(lambda r, i: lax.dynamic_update_slice(r, r[:2], (i,)))(x, ints(x[:, 0])),
        lambda x: jax.nn.dot_product_attention(x[None, None], x[None, None], x[None, None]),
    ],
)
def test_fine(function: Function) -> None:
    assert check(function, X) == ()


# What a finding says


def line_of(marker: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"# {marker}"))
    return f"{__file__}:{number}"


def helper(x: jax.Array) -> jax.Array:
    return lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)  # in a helper


def two_sorts(x: jax.Array) -> Any:
    first = jnp.argsort(x)  # the first
    return first, jnp.argsort(x)  # the second


def printed(x: jax.Array) -> jax.Array:
    jax.debug.print("{}", x)  # a print
    return x


@pytest.mark.parametrize(
    ("function", "markers"),
    [
        (lambda x: lax.map(helper, x), ["in a helper"]),
        (jax.jit(lambda x: jax.jit(helper)(x[0])), ["in a helper"]),
        (lambda x: lax.map(printed, x), ["a print"]),
    ],
)
def test_the_line(function: Function, markers: list[str]) -> None:
    assert [x.location for x in check(function, X)] == [line_of(x) for x in markers]


def test_a_function_that_jax_shares_between_its_callers() -> None:
    """Until jax 0.10 its body is said to be where it was called first."""
    lines = [x.location for x in check(two_sorts, X)]
    assert lines in ([line_of("the first")], [line_of("the first"), line_of("the second")])


@pytest.mark.parametrize("name", ["/tmp/größe.py", '/tmp/a "b" \\5c.py'])
def test_a_file_of_any_name(name: str) -> None:
    names: dict[str, Any] = {"lax": lax}
    exec(compile("\ndef function(x):\n    return lax.erf(x)\n", name, "exec"), names)
    assert [x.location for x in check(names["function"], X)] == [f"{name}:3"]


def test_as_text() -> None:
    finding = Finding("chlo", "chlo.erf", "what to do", "file.py:3")
    assert str(finding) == "file.py:3: warning: chlo.erf: what to do [chlo]"
    nowhere = dataclasses.replace(finding, rule="complex", location="")
    assert str(nowhere) == "<unknown>: error: chlo.erf: what to do [complex]"


def test_an_input_of_a_refused_type() -> None:
    (found,) = check(lambda x: x.real, jax.ShapeDtypeStruct((2,), jnp.complex64))
    assert (found.rule, found.operation) == ("complex", "func.func")


def test_arguments_and_jit_options_are_kept() -> None:
    @partial(jax.jit, static_argnames="times")
    def run(x: jax.Array, *, times: int, bound: jax.Array) -> jax.Array:
        return lax.fori_loop(0, times, lambda i, x: jnp.minimum(x * 2, bound), x)

    assert check(run, X, times=3, bound=jax.ShapeDtypeStruct((), jnp.float32)) == ()


def test_other_errors_of_the_function_are_its_own() -> None:
    def broken(x: jax.Array) -> jax.Array:
        raise NotImplementedError("later")

    with pytest.raises(NotImplementedError, match="later"):
        check(broken, X)


def test_another_platform() -> None:
    found = check(printing, X, platform="cpu")
    assert [x.rule for x in found] == ["host-callback"]
    assert found[0].operation == "stablehlo.custom_call"


# This library; more in tests/test_lowering.py, tests/generation/test_neuron.py


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.5, "logits_soft_cap": 30.0},
        {"local_window_size": (100, 0), "return_residual": True},
        {"implementation": "reference"},
    ],
)
def test_attention(options: dict[str, Any]) -> None:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    keys = array(2, 8192, 2, 64)
    attend = partial(jax_tkg.attention_tkg, **options)
    assert check(attend, array(2, 1, 8, 64), keys, keys) == ()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float8_e4m3])
def test_an_nnx_layer(dtype: Any) -> None:
    config = AttentionConfig(model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
    layer = nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(layer)
    cache = jax.eval_shape(lambda: KVCache.create(2, 4096, 2, 8, dtype=dtype))

    def step(state: Any, x: jax.Array, cache: KVCache) -> Any:
        return nnx.merge(graph, state)(x, cache)

    assert check(step, state, jax.ShapeDtypeStruct((2, 1, 32), jnp.float32), cache) == ()


@pytest.mark.parametrize("selector", [Greedy(), Sample(top_k=20, top_p=0.9)], ids=str)
def test_the_generation_loop(selector: Any) -> None:
    model, policy = TinyModel.random(), TokenPolicy(selector, eos_ids=(0,))
    key = portable_key(jax.random.key(0))
    caches = model.init_caches(3, 256, dtype=jnp.bfloat16)
    state = DecodeState.start(caches, jnp.zeros((3, VOCAB)), key, policy=policy)
    assert check(decode, model, state, key, policy=policy, num_steps=7) == ()
