"""The known answer: asked once of each device, before the kernel's first use, and only there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tkg
from jax_tkg.nki import self_test
from jax_tkg.nki.arguments import Launch
from jax_tkg.nki.implementation import Interpreter, Nki
from jax_tkg.nki.self_test import SelfTestError, check_device, known_answer
from tests import oracle

set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # jax 0.7

SHAPES = {"query": (1, 1, 2, 16), "key": (1, 40, 1, 16), "value": (1, 40, 1, 16)}
ARRAYS = {
    name: jnp.asarray(np.random.default_rng(i).standard_normal(shape, np.float32))
    for i, (name, shape) in enumerate(SHAPES.items())
}


@dataclass(frozen=True)
class Fake:
    """A compiler for this machine: the interpreter, then whatever is to go wrong; it counts."""

    fault: str = "none"
    platform: str = "cpu"
    launches: list[int] = field(default_factory=list, hash=False, compare=False)
    instance: object = field(default_factory=object)

    def why_not(self, programs: int) -> str | None:
        return None

    def call(self, launch: Launch, programs: int) -> Sequence[jax.Array]:
        self.launches.append(programs)
        if self.fault == "zeros":
            return [jnp.zeros(x.shape, x.dtype) for x in launch.result]
        out, lse = Interpreter().call(launch, programs)
        if self.fault == "not a number":
            out = jnp.where(out == jnp.max(out), jnp.nan, out).astype(out.dtype)
        if self.fault == "one head":
            out = out.at[:, :, 0].set(0)
        if self.fault == "LSE":
            lse = lse + 0.1
        return out, lse


def attend(implementation: Any, **static: Any) -> jax.Array:
    return jax_tkg.attention_tkg(**ARRAYS, **static, implementation=implementation)  # type: ignore[no-any-return]


def exact() -> np.ndarray:
    given = oracle.Inputs(*map(np.asarray, ARRAYS.values()))
    return oracle.attention(given).out.astype(np.float32)


@pytest.mark.parametrize("programs", [1, 2])
def test_a_kernel_that_is_right_passes(programs: int) -> None:
    compiler = Fake()
    out = attend(Nki(compiler=compiler, programs=programs))
    np.testing.assert_allclose(out, exact(), atol=1e-5)
    assert compiler.launches == [programs] * 2  # the known answer, then the caller's


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("zeros", "wrong output on .*, all of it is zero"),
        ("not a number", "wrong output on .*: off by nan"),
        ("one head", "wrong output"),
        ("LSE", "wrong LSE on .*: off by 0.1 where 0.0156 is allowed"),
    ],
)
def test_one_that_is_wrong_raises(fault: str, message: str) -> None:
    nki = Nki(compiler=Fake(fault))
    with pytest.raises(SelfTestError, match=message):
        attend(nki)
    with pytest.raises(SelfTestError, match=message):  # and again, whoever catches the first
        jax.jit(lambda: attend(nki))()


def test_the_error_names_versions_and_ways_out() -> None:
    with pytest.raises(SelfTestError) as raised:
        attend(Nki(compiler=Fake("zeros")))
    text = str(raised.value)
    for part in (
        "no NKI compiler",
        "written for nki 0.6",
        'implementation="xla"',
        "Nki(self_test=False)",
    ):
        assert part in text


def test_it_can_be_switched_off() -> None:
    compiler = Fake("zeros")
    np.testing.assert_array_equal(attend(Nki(compiler=compiler, self_test=False)), 0)
    assert len(compiler.launches) == 1


def test_once_in_a_process() -> None:
    compiler = Fake()
    nki = Nki(compiler=compiler)
    attend(nki)
    attend(nki, scale=0.5)
    jax.jit(lambda: jax.vmap(lambda x: attend(nki) + x)(jnp.ones(2)))()
    assert len(compiler.launches) == 4  # one known answer, three programs


def test_once_for_each_device_and_on_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    run, placed = self_test._run, []

    def record(implementation: Any, device: jax.Device, arrays: Any) -> Any:
        placed.append(device)
        return run(implementation, device, arrays)

    monkeypatch.setattr(self_test, "_run", record)
    nki, devices = Nki(compiler=Fake(), self_test=False), jax.devices()[:2]
    for device in (*devices, *devices):
        check_device(nki, device)
    assert placed == devices


@pytest.mark.parametrize("where", ["jit", "grad", "scan", "eager"])
def test_it_runs_while_something_is_traced(where: str) -> None:
    nki = Nki(compiler=Fake("zeros"))

    def total(query: jax.Array) -> jax.Array:
        arrays = ARRAYS | {"query": query}
        return jnp.sum(jax_tkg.attention_tkg(**arrays, implementation=nki))

    def repeated(query: jax.Array) -> Any:
        return jax.lax.scan(lambda c, _: (c, total(c)), query, None, length=2)

    ways = {"jit": jax.jit(total), "grad": jax.grad(total), "scan": repeated, "eager": total}
    with pytest.raises(SelfTestError), jax.disable_jit(where == "eager"):
        ways[where](ARRAYS["query"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_runs_inside_shard_map_with_a_mesh_in_force(kind: AxisType) -> None:
    mesh, compiler = jax.make_mesh((2,), ("n",), axis_types=(kind,)), Fake()
    spec = {"query": P(None, None, "n"), "key": P(), "value": P()}

    def sharded(arrays: dict[str, jax.Array]) -> jax.Array:
        nki = Nki(compiler=compiler)
        run = partial(jax_tkg.attention_tkg, implementation=nki)
        return jax.shard_map(
            lambda x: run(**x), mesh=mesh, in_specs=(spec,), out_specs=P(None, None, "n")
        )(arrays)

    with set_mesh(mesh):
        arrays = {n: jax.device_put(x, NamedSharding(mesh, spec[n])) for n, x in ARRAYS.items()}
        out = jax.jit(sharded)(arrays)
    np.testing.assert_allclose(out, exact(), atol=1e-5)
    assert len(compiler.launches) == 2


def test_asked_directly_with_a_mesh_in_force() -> None:
    mesh = jax.make_mesh((2,), ("n",), axis_types=(AxisType.Explicit,))
    with set_mesh(mesh):
        check_device(Nki(compiler=Fake(), self_test=False), jax.devices()[0])


def test_not_where_nothing_can_run_it() -> None:
    """Lowered for a platform that is not here, or not chosen, no known answer is asked for."""
    elsewhere = Fake("zeros", platform="neuron")
    traced = jax.jit(lambda: attend((Nki(compiler=elsewhere), "xla"))).trace()
    for platform in ("cpu", "tpu"):
        traced.lower(lowering_platforms=(platform,))
    assert elsewhere.launches == []
    traced.lower(lowering_platforms=("neuron",))
    assert len(elsewhere.launches) == 1  # the caller's


def test_the_known_answer() -> None:
    """Of this module's own NumPy, against the tests' oracle."""
    arrays = self_test._inputs()
    wide = [x.astype(np.float32) for x in arrays[:3]]
    given = oracle.Inputs(*wide, key_value_seq_lengths=arrays[3])
    want = oracle.attention(given)
    for found, expected in zip(known_answer(*arrays), (want.out, want.lse), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_its_problem_moves_the_maximum_and_is_shared_by_two_programs() -> None:
    query, key, _, lengths = self_test._inputs()
    logits = np.einsum("bthd,bskd->bths", query[..., :1, :], key, dtype=np.float64)
    first, second = np.array_split(logits[0, 0, 0, : lengths[0]], 2)
    assert second.max() > first.max() + 1
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, key)]
    explained = jax_tkg.explain(*types, implementation=Nki(compiler=Interpreter()))
    assert "sequence sharding" in str(explained.plan)


def test_it_is_not_imported_where_it_is_not_needed() -> None:
    code = """
import sys, jax, jax.numpy as jnp, jax_tkg
x = jnp.ones((1, 1, 1, 8))
jax_tkg.attention_tkg(x, x, x).block_until_ready()
assert not {"jax_tkg.nki.self_test", "jax_tkg.nki.dialect", "nki"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
