"""The kernel in programs for Neuron, lowered without its plugin: one custom call where it belongs.

The compiler is replaced by `Outline`, which emits the custom call of AWS's documentation.
"""

from __future__ import annotations

import base64
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg.neuron import check, check_module
from jax_tkg.nki import custom_call
from jax_tkg.nki.arguments import Launch, Named
from jax_tkg.nki.attention_tkg import attention_tkg as kernel
from jax_tkg.nki.custom_call import (
    TARGET,
    NativeKernel,
    NkiJit,
    Outline,
    call_native_kernel,
    written_out,
)
from jax_tkg.nki.dialect import nl
from jax_tkg.nki.implementation import Nki, NkiInterpret
from tests.calls import assert_close
from tests.lowered import lower_for_neuron, operations
from tests.nki.golden.problems import (
    FILE,
    FLAT,
    OUTLINE,
    PROBLEMS,
    B,
    H,
    K,
    N,
    S,
    T,
    all_calls,
    array,
    lower,
    native_calls,
)

P = PartitionSpec

NEURON = ("neuron",)


@dataclass(frozen=True)
class Untouchable:
    """A compiler that must not be asked for anything."""

    platform: str = "neuron"

    def why_not(self, programs: int) -> str | None:
        return None

    def call(self, launch: Launch, programs: int) -> Sequence[jax.Array]:
        raise AssertionError("the kernel was traced")


UNTOUCHABLE = Nki(compiler=Untouchable())


def attend(arrays: dict[str, Any], implementation: Any = OUTLINE, **static: Any) -> Any:
    return jax_tkg.attention_tkg(**arrays, **static, implementation=implementation)


def calls_of(function: Callable[..., Any], *args: Any) -> int:
    """Custom calls in a program for Neuron, which must have nothing that Neuron refuses."""
    lowered = lower_for_neuron(function, *args)
    assert check_module(lowered) == ()
    assert not {"stablehlo.case", "stablehlo.if"} & set(operations(lowered))
    return len(native_calls(lowered))


# What is emitted


def test_golden_text_of_a_call() -> None:
    native = NativeKernel("append", (2,), "/tmp/append.klir", ("new", "cache"), ("cache_out",))

    def append(new: jax.Array, cache: jax.Array) -> Any:
        result = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
        return call_native_kernel(native, (new, cache), (result,), aliases={1: 0})

    text = lower_for_neuron(append, array(4, 8), array(16, 8)).as_text()
    (line,) = (line.split(" = ", 1)[1] for line in text.splitlines() if TARGET in line)
    assert line == FILE.with_name("call.mlir").read_text().strip()


def test_the_documented_fields() -> None:
    native = NativeKernel("f", (), "/tmp/f.klir", ("a", "b"), ("c",))
    assert json.loads(base64.b64decode(native.backend_config())) == {
        "func_name": "f",
        "grid": [],
        "has_collectives": False,
        "kernel_version": 1,
        "klir_binary": {"binary": "/tmp/f.klir", "input_names": ["a", "b"], "output_names": ["c"]},
    }
    assert NativeKernel.from_backend_config(native.backend_config()) == native


def test_golden_calls() -> None:
    """Made anew by `python -m tests.nki.golden.problems`."""
    assert all_calls() == json.loads(FILE.read_text())


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_call_with_the_arrays_of_the_problem(name: str) -> None:
    """Independently of the golden file."""
    lowered = lower(PROBLEMS[name])
    assert check_module(lowered) == ()
    assert operations(lowered).keys().isdisjoint({"stablehlo.while", "stablehlo.case"})
    (call,) = native_calls(lowered)
    assert (call["target"], call["api_version"]) == ("AwsNeuronCustomNativeKernel", 2)
    assert (call["func_name"], call["grid"], call["aliases"]) == (kernel.__name__, [2], [])
    parameters = list(inspect.signature(kernel).parameters)
    names = list(call["operands"])
    assert names == sorted(names, key=parameters.index)
    assert {"query", "key", "value"} <= set(names)
    out, lse, *keys = call["results"].values()
    assert keys == ([f"bf16[{B},{T},{K},{H}]{{3,2,1,0}}"] if "rope" in PROBLEMS[name] else [])
    assert out == f"bf16[{B},{T},{N},{H}]{{3,2,1,0}}"
    assert lse == f"f32[{B},{T},{N}]{{2,1,0}}"
    for text in (*call["operands"].values(), *call["results"].values()):
        shape, layout = re.fullmatch(r"\w+\[(.*)\]\{(.*)\}", text).groups()  # type: ignore[union-attr]
        rank = shape.count(",") + 1
        assert layout == ",".join(map(str, reversed(range(rank)))), "row-major"


def test_one_program_has_no_grid() -> None:
    (call,) = native_calls(lower(FLAT, replace(OUTLINE, programs=1)))
    assert call["grid"] == []


def test_only_arrays_and_a_plan_reach_the_kernel() -> None:
    """Parameters that a problem does not have are None, by position."""

    def some(a: Any, b: Any, c: Any, plan: Any) -> None: ...

    arrays = (jnp.ones(1), jnp.ones(2))
    plan: Any = "a plan"
    launch = Launch(Named(some, ("a", "c")), arrays, (), plan)
    assert written_out(launch) == (some, (arrays[0], None, arrays[1], plan))
    assert written_out(replace(launch, kernel=lambda a, b, plan: None))[1] == (*arrays, plan)


class Jitted:
    """What `nki.jit` makes of a kernel that returns some results."""

    def __init__(self, *results: Any, grid: Any = "none") -> None:
        self.results, self.grid = results, grid

    def __getitem__(self, grid: int) -> Jitted:
        return Jitted(*self.results, grid=grid)

    def __call__(self, *arguments: Any) -> Any:
        results = tuple(jnp.zeros(x.shape, x.dtype) for x in self.results)
        return (
            [x + (2 if self.grid == 2 else 1) for x in results] if len(results) > 1 else results[0]
        )


ONE, TWO = array(3), (array(3), array(2, 2, dtype=jnp.float32))


def called(monkeypatch: pytest.MonkeyPatch, made: Any, promised: Any, programs: int) -> Any:
    monkeypatch.setattr(custom_call, "_jitted", lambda function: Jitted(*made))
    launch = Launch(lambda a, plan: None, (jnp.ones(1),), promised, "a plan")  # type: ignore[arg-type]
    return NkiJit().call(launch, programs)


def test_the_number_of_programs_is_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for programs in (1, 2):
        first, second = called(monkeypatch, TWO, TWO, programs)
        assert float(first[0]) == float(second[0, 0]) == programs
    (alone,) = called(monkeypatch, (ONE,), (ONE,), 1)
    assert alone.shape == (3,)


@pytest.mark.parametrize("made", [(ONE,), (array(3, dtype=jnp.float32), TWO[1]), TWO[::-1]])
def test_a_compiler_that_returns_something_else(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    message = r"returns .*, not bfloat16\[3\], float32\[2, 2\]; .*written for nki 0\.6"
    with pytest.raises(RuntimeError, match=message):
        called(monkeypatch, made, TWO, 2)


def parts(value: Any) -> Iterator[Any]:
    """A value and all that it is made of."""
    yield value
    inner = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    for part in inner:
        yield from parts(part)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_plan_is_made_of_what_the_compiler_reads(name: str) -> None:
    """Its language has None, bool, 32-bit int, float32, str, tuples and NKIObjects."""
    plan = jax_tkg.explain(**PROBLEMS[name], platform="neuron", implementation=OUTLINE).plan
    assert isinstance(plan, nl.NKIObject)
    for part in parts(plan):
        assert part is None or isinstance(part, nl.NKIObject) or type(part) in READ, part
        assert not isinstance(part, int) or -(2**31) <= part < 2**31


READ = (bool, int, float, str, tuple)


# The platform


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_nothing_of_it_is_traced_for_another_platform(platform: str) -> None:
    traced = jax.jit(lambda x: attend(x, (UNTOUCHABLE, "xla"))).trace(FLAT)
    lowered = traced.lower(lowering_platforms=(platform,))
    assert "stablehlo.custom_call" not in operations(lowered)
    with pytest.raises(AssertionError, match="the kernel was traced"):
        traced.lower(lowering_platforms=NEURON)


def test_each_platform_of_several_has_its_branch() -> None:
    traced = jax.jit(lambda x: attend(x, (OUTLINE, "xla"))).trace(FLAT)
    both = traced.lower(lowering_platforms=("cpu", "neuron"))
    assert len(native_calls(both)) == 1
    text = both.as_text(debug_info=True)
    assert "attention_tkg[nki]" in text
    assert "attention_tkg[xla]" in text
    assert operations(both)["stablehlo.case"] >= 1
    alone = traced.lower(lowering_platforms=NEURON)
    assert "attention_tkg[xla]" not in alone.as_text(debug_info=True)


def test_named_alone_it_must_do_for_all_platforms() -> None:
    traced = jax.jit(attend).trace(FLAT)
    with pytest.raises(
        NotImplementedError, match=r"nki: the kernel is compiled for neuron, not .*cpu"
    ):
        traced.lower(lowering_platforms=("cpu", "neuron"))


SMALL = {
    "query": np.random.default_rng(0).standard_normal((2, 1, 4, 16), np.float32),
    "key": np.random.default_rng(1).standard_normal((2, 40, 2, 16), np.float32),
    "value": np.random.default_rng(2).standard_normal((2, 40, 2, 16), np.float32),
}


@pytest.mark.parametrize("platforms", [["neuron"], ["cpu", "neuron"]])
def test_export(platforms: list[str]) -> None:
    jitted = jax.jit(lambda x: attend(x, (OUTLINE, "xla")))
    with pytest.raises(ValueError, match=TARGET):
        export.export(jitted, platforms=platforms)(SMALL)
    allowed = [export.DisabledSafetyCheck.custom_call(TARGET)]
    exported = export.export(jitted, platforms=platforms, disabled_checks=allowed)(SMALL)
    loaded = export.deserialize(exported.serialize())
    assert loaded.mlir_module().count(TARGET) == 1
    again = lower_for_neuron(loaded.call, SMALL)
    assert len(native_calls(again)) == 1
    if "cpu" in platforms:
        assert_close(jax.jit(loaded.call)(SMALL), jax.jit(attend, static_argnums=1)(SMALL, "xla"))


# Transformations


def total(arrays: dict[str, Any]) -> jax.Array:
    return jnp.sum(attend(arrays).astype(jnp.float32))


def test_gradient_calls_the_kernel_once() -> None:
    assert calls_of(jax.grad(total), FLAT) == 1
    assert calls_of(jax.value_and_grad(total), FLAT) == 1


def test_checkpoint_calls_it_again_unless_its_results_are_saved() -> None:
    def lowered(*names: str) -> Any:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return lower_for_neuron(jax.value_and_grad(jax.checkpoint(total, policy=policy)), FLAT)

    again = lowered()
    assert len(native_calls(again)) == 2
    assert check_module(again) == ()
    saved = lowered("attention_tkg_out", "attention_tkg_lse")
    assert len(native_calls(saved)) == 1
    # What is saved of a checkpoint JAX rounds by an operation that Neuron does not have.
    assert {x.rule for x in check_module(saved)} == {"reduce-precision"}


COPIES = 3


def copied(arrays: dict[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays with an axis of copies for the named ones, and the axes."""
    axes = {name: 0 if name in names else None for name in arrays}
    made = {
        name: array(COPIES, *x.shape, dtype=x.dtype) if name in names else x
        for name, x in arrays.items()
    }
    return made, axes


@pytest.mark.parametrize(
    ("names", "operand", "shape"),
    [
        (("query",), "key", (B, S, K, H)),  # the cache is not repeated
        (("query", "key", "value"), "key", (COPIES * B, S, K, H)),
    ],
)
def test_vmap_is_one_launch(names: tuple[str, ...], operand: str, shape: tuple[int, ...]) -> None:
    made, axes = copied(FLAT, *names)
    lowered = lower_for_neuron(jax.vmap(attend, in_axes=(axes,)), made)
    (call,) = native_calls(lowered)
    assert call["operands"][operand].startswith(f"bf16[{','.join(map(str, shape))}]")
    elements = re.search(r"\[(.*)\]", call["operands"]["query"])
    assert elements is not None
    assert math.prod(map(int, elements[1].split(","))) == COPIES * B * T * N * H
    assert check_module(lowered) == ()


def test_vmap_over_lengths_alone_launches_in_turn() -> None:
    made, axes = copied(FLAT | {"key_value_seq_lengths": array(B, dtype=jnp.int32)},
                        "key_value_seq_lengths")  # fmt: skip
    lowered = lower_for_neuron(jax.vmap(attend, in_axes=(axes,)), made)
    assert len(native_calls(lowered)) == 1
    assert operations(lowered)["stablehlo.while"] == 1
    assert check_module(lowered) == ()


def step(cache: Any, token: tuple[jax.Array, jax.Array]) -> Any:
    cache = cache.append(token[1], token[1])
    return cache, attend({"query": token[0], "key": cache})


def cache_type() -> Any:
    return jax.eval_shape(lambda: jax_tkg.KVCache.create(B, S, K, H, dtype=jnp.bfloat16))


def test_scan_with_the_cache_as_carry() -> None:
    steps = 5
    tokens = array(steps, B, T, N, H), array(steps, B, T, K, H)
    assert calls_of(lambda c, *x: lax.scan(step, c, x), cache_type(), *tokens) == 1


def test_a_donated_cache_stays_donated() -> None:
    jitted = jax.jit(step, donate_argnums=0)
    lowered = lower_for_neuron(jitted, cache_type(), (array(B, T, N, H), array(B, T, K, H)))
    assert len(native_calls(lowered)) == 1
    assert lowered.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(cache_type()))


# Devices


def mesh_of(kind: str, size: int = 2) -> Any:
    axes = {"axis_types": (AxisType.Auto,) * 2}
    if kind == "abstract":
        return AbstractMesh((size, 2), ("dp", "tp"), **axes)
    return jax.make_mesh((size, 2), ("dp", "tp"), devices=jax.devices()[: 2 * size], **axes)


SPEC = P("dp", None, "tp")


@pytest.mark.parametrize("kind", ["abstract", "host"])
def test_inside_shard_map(kind: str) -> None:
    specs = dict.fromkeys(FLAT, SPEC)
    sharded = jax.shard_map(attend, mesh=mesh_of(kind), in_specs=(specs,), out_specs=SPEC)
    lowered = lower_for_neuron(jax.jit(sharded), FLAT)
    (call,) = native_calls(lowered)
    assert call["operands"]["query"].startswith(f"bf16[{B // 2},{T},{N // 2},{H}]")
    assert call["operands"]["key"].startswith(f"bf16[{B // 2},{S},{K // 2},{H}]")
    assert check_module(lowered) == ()


def test_gradient_inside_shard_map() -> None:
    specs = dict.fromkeys(FLAT, SPEC)
    sharded = jax.shard_map(attend, mesh=mesh_of("host"), in_specs=(specs,), out_specs=SPEC)
    gradient = jax.grad(lambda x: jnp.sum(sharded(x).astype(jnp.float32)))
    assert calls_of(jax.jit(gradient), FLAT) == 1


def test_what_the_compiler_may_split_has_a_rule_for_it() -> None:
    """Also in a `shard_map` over some axes; where something else can run it does."""
    split = NamedSharding(mesh_of("host"), SPEC)
    arrays = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for n, x in FLAT.items()}
    by_rule = lower_for_neuron(attend, arrays).as_text()
    assert "sdy.sharding_rule" in by_rule
    assert TARGET not in by_rule  # it is called in what a device does, which is lowered later
    lowered = lower_for_neuron(lambda x: attend(x, (OUTLINE, "xla")), arrays)
    assert "attention_tkg[xla]" in lowered.as_text(debug_info=True)
    half = jax.shard_map(
        attend,
        mesh=mesh_of("host"),
        in_specs=(dict.fromkeys(FLAT, P("dp")),),
        out_specs=P("dp"),
        axis_names={"dp"},
    )
    partly = lower_for_neuron(jax.jit(half), arrays).as_text()
    assert "sdy.sharding_rule" in partly
    assert TARGET not in partly


# Choice


def test_the_kernel_comes_first_by_default() -> None:
    here = jax_tkg.explain(**FLAT)
    assert here.implementation == "xla"
    assert here.rejected == (("nki", "the kernel is compiled for neuron, not for cpu"),)
    there = jax_tkg.explain(**FLAT, platform="neuron")
    assert there.implementation == "xla"
    assert "looked for nki and neuronxcc.nki, neither is installed" in str(there)
    assert "written for nki 0.6" in str(there)
    outlined = jax_tkg.explain(**FLAT, platform="neuron", implementation=OUTLINE)
    assert outlined.implementation == "nki"
    assert "2 program(s)" in str(outlined)


def test_without_a_toolchain_it_is_refused_before_tracing() -> None:
    with pytest.raises(NotImplementedError, match=r"nki: no NKI compiler .* neither is installed"):
        jax.eval_shape(lambda x: attend(x, "nki"), FLAT)


def test_limits_of_the_kernel_are_refused_before_tracing() -> None:
    wide = FLAT | {"query": array(B, 1000, N, H)}
    with pytest.raises(NotImplementedError, match=r"nki: .*the kernel takes at most"):
        jax.eval_shape(attend, wide)


def test_it_is_for_decoding() -> None:
    with pytest.raises(NotImplementedError, match="for attention_tkg and not for attention_cte"):
        jax.eval_shape(lambda x: jax_tkg.attention_cte(**x, implementation=OUTLINE), FLAT)


def test_as_many_programs_as_the_runtime_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    with pytest.raises(NotImplementedError, match=r"launches 2 program.*Nki\(programs=1\)"):
        jax.eval_shape(lambda x: attend(x, "nki"), FLAT)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2")
    with pytest.raises(NotImplementedError, match="no NKI compiler"):
        jax.eval_shape(lambda x: attend(x, "nki"), FLAT)


def test_both_are_one_kernel_and_one_plan() -> None:
    device, host = Nki(compiler=Outline()), NkiInterpret()
    plans = [
        str(jax_tkg.explain(**FLAT, platform=p, implementation=i).plan)
        for p, i in (("neuron", device), ("cpu", host))
    ]
    assert plans[0] == plans[1]


def test_the_checker_sees_the_call() -> None:
    assert check(attend, FLAT) == ()
    (found,) = check(lambda x: attend(x) + jnp.argmax(x["key"]).astype(jnp.bfloat16), FLAT)
    assert found.rule == "variadic-reduce"


def test_the_examples_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "neuron.md").read_text()
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "neuron.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "on neuron: " in printed
    assert printed.endswith("()\nTrue\n")
