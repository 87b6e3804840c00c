"""Which implementation runs: as asked for, for the platform compiled for, and saying why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_tkg
from jax_tkg import IMPLEMENTATIONS, AttentionProblem, Implementation, Target
from jax_tkg.operands import Operands

QUERY = jnp.ones((2, 1, 4, 16))
KEY = jnp.ones((2, 24, 2, 16))


@dataclass(frozen=True)
class OneNumber:
    """Fills the output with a number, on one platform; tells by it that it ran."""

    name: str = "one-number"
    platform: str = "tpu"
    number: float = 7.0

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        if target.platforms in ((), (self.platform,)):
            return None
        return f"is for {self.platform} only"

    def plan(self, problem: AttentionProblem, target: Target) -> str:
        return f"all {self.number}"

    def run(self, problem: AttentionProblem, ops: Operands, target: Target) -> Any:
        rows = ops.query.shape[:3]
        out = jnp.full((*rows, problem.value_head_dim), self.number, jnp.float32)
        return out, jnp.zeros(rows, jnp.float32)


@dataclass(frozen=True)
class Never(OneNumber):
    """Refuses every problem, before the platform is known."""

    name: str = "never"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        return f"not with S={problem.kv_len}"


TPU_ONLY, CPU_ONLY = OneNumber(), OneNumber(name="cpu-number", platform="cpu", number=5.0)


def attend(implementation: Any) -> jax.Array:
    return jax_tkg.attention_tkg(  # type: ignore[no-any-return]
        QUERY, KEY, KEY, implementation=implementation
    )


def scopes(implementation: Any, platform: str) -> set[str]:
    """The named scopes of the op in a lowered program."""
    traced = jax.jit(lambda: attend(implementation)).trace()
    text = traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)
    return set(re.findall(r"attention_tkg\[([\w-]+)\]", text))


def test_protocol() -> None:
    for name, implementation in IMPLEMENTATIONS.items():
        assert isinstance(implementation, Implementation)
        assert implementation.name == name
        hash(implementation)
    assert isinstance(TPU_ONLY, Implementation)
    assert {"nki", "xla", "reference"} <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        (None, "xla"),
        ("xla", "xla"),
        ("reference", "reference"),
        (("reference", "xla"), "reference"),
        (IMPLEMENTATIONS["reference"], "reference"),
        (CPU_ONLY, "cpu-number"),
        ([TPU_ONLY, Never(), CPU_ONLY, "xla"], "cpu-number"),
    ],
    ids=str,
)
def test_what_is_asked_for_runs(asked: Any, runs: str) -> None:
    assert scopes(asked, "cpu") == {runs}
    assert jax_tkg.explain(QUERY, KEY, KEY, implementation=asked).implementation == runs
    if runs == "cpu-number":
        np.testing.assert_array_equal(attend(asked), CPU_ONLY.number)
        np.testing.assert_array_equal(jax.jit(lambda: attend(asked))(), CPU_ONLY.number)


def test_choice_is_made_for_the_platform_compiled_for() -> None:
    asked = (TPU_ONLY, "xla")
    assert scopes(asked, "tpu") == {"one-number"}
    assert scopes(asked, "cpu") == scopes(asked, "neuron") == {"xla"}
    np.testing.assert_allclose(attend(asked), 1)  # the mean of ones, so not TPU_ONLY's


def test_a_change_of_implementation_is_a_change_of_program() -> None:
    """Not hidden by any cache, eager or compiled, also for problems that are equal."""
    outputs = [float(attend(x)[0, 0, 0, 0]) for x in (CPU_ONLY, "xla", CPU_ONLY)]
    assert outputs == [5.0, 1.0, 5.0]


def several(asked: Any, *platforms: str) -> Any:
    traced = jax.jit(lambda: attend(asked)).trace()
    return traced.lower(lowering_platforms=platforms)


def test_each_platform_of_an_export_has_what_is_for_it() -> None:
    lowered = several((TPU_ONLY, CPU_ONLY, "xla"), "tpu", "cpu", "cuda")
    text = lowered.as_text(debug_info=True)
    for name in ("one-number", "cpu-number", "xla"):
        assert f"attention_tkg[{name}]" in text
    assert text.count("stablehlo.case") > several("xla", "tpu", "cpu", "cuda").as_text().count(
        "stablehlo.case"
    )


def test_platforms_that_agree_share_one_body() -> None:
    """So that what is for one platform alone is compiled for no other."""
    text = several((TPU_ONLY, "xla"), "cuda", "cpu").as_text(debug_info=True)
    assert "attention_tkg[one-number]" not in text
    assert scopes((TPU_ONLY, "xla"), "cpu") == {"xla"}


def test_an_export_must_do_for_every_platform() -> None:
    with pytest.raises(NotImplementedError, match="one-number: is for tpu only"):
        several(TPU_ONLY, "tpu", "cpu")


def test_an_export_runs_the_branch_of_its_platform() -> None:
    jitted = jax.jit(lambda: attend((TPU_ONLY, CPU_ONLY)))
    exported = export.export(jitted, platforms=["tpu", "cpu"])()
    np.testing.assert_array_equal(exported.call(), CPU_ONLY.number)


def test_gradient_and_vmap_run_it_too() -> None:
    out = jax.vmap(lambda q: jax_tkg.attention_tkg(q, KEY, KEY, implementation=CPU_ONLY))(
        QUERY[None]
    )
    np.testing.assert_array_equal(out, CPU_ONLY.number)
    value, _ = jax.value_and_grad(
        lambda q: jnp.sum(jax_tkg.attention_tkg(q, KEY, KEY, implementation=CPU_ONLY))
    )(QUERY)
    assert value == CPU_ONLY.number * QUERY.size


# Refusals


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"unknown implementation 'nope'.*'xla'.*'reference'"):
        attend("nope")
    with pytest.raises(ValueError, match="unknown implementation 'nope'"):
        attend(("xla", "nope"))


def test_empty_sequence() -> None:
    with pytest.raises(ValueError, match="empty sequence; leave it out"):
        attend(())


@pytest.mark.usefixtures("no_shape_checks")
def test_not_an_implementation() -> None:
    for asked in (3, ("xla", 3)):
        with pytest.raises(TypeError, match=r"must be None, a name, .* got 3"):
            attend(asked)


def test_one_that_cannot() -> None:
    for asked in (Never(), (Never(),)):
        with pytest.raises(NotImplementedError, match="never: not with S=24"):
            attend(asked)
        with pytest.raises(NotImplementedError, match="never: not with S=24"):
            jax.eval_shape(lambda asked=asked: attend(asked))  # when traced, not when compiled


def test_several_that_cannot() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        attend((Never(), Never(name="never2")))
    reasons = [str(e) for e in raised.value.exceptions]
    assert reasons == ["never: not with S=24", "never2: not with S=24"]
    assert all(isinstance(e, NotImplementedError) for e in raised.value.exceptions)


def test_one_that_cannot_on_this_platform() -> None:
    with pytest.raises(NotImplementedError, match="one-number: is for tpu only"):
        attend(TPU_ONLY)


# explain


def test_explain_says_all() -> None:
    explained = jax_tkg.explain(QUERY, KEY, KEY, implementation=(Never(), TPU_ONLY, "xla"))
    assert explained.platform == "cpu"
    assert explained.implementation == "xla"
    assert explained.rejected == (
        ("never", "not with S=24"),
        ("one-number", "is for tpu only"),
    )
    text = str(explained)
    for part in (
        "B=2 T=1 S=24 N=4 K=2 H=16",
        "on cpu: xla",
        str(explained.plan),
        "not never: not with S=24",
        "not one-number: is for tpu only",
    ):
        assert part in text


def test_explain_for_another_platform() -> None:
    explained = jax_tkg.explain(QUERY, KEY, KEY, platform="tpu", implementation=(TPU_ONLY, "xla"))
    assert (explained.implementation, explained.plan) == ("one-number", "all 7.0")
    neuron = jax_tkg.explain(
        jax.ShapeDtypeStruct((4, 1, 32, 128), jnp.bfloat16),
        *[jax.ShapeDtypeStruct((4, 65536, 8, 128), jnp.bfloat16)] * 2,
        platform="neuron",
    )
    assert "constant trip count" in str(neuron)
    assert "not nki: no NKI compiler" in str(neuron)


def test_explain_when_none_can() -> None:
    explained = jax_tkg.explain(QUERY, KEY, KEY, implementation=Never())
    assert explained.implementation is explained.plan is None
    assert "on cpu: none can" in str(explained)


@pytest.mark.usefixtures("no_shape_checks")
def test_explain_takes_what_the_op_takes() -> None:
    """Arrays, their types alone, caches and layouts, by position or name: one problem."""
    cache = jax_tkg.KVCache.create(2, 24, 2, 16, layout="BSKH")
    types = jax.eval_shape(lambda: cache)
    for query in (QUERY, np.asarray(QUERY), jax.ShapeDtypeStruct(QUERY.shape, QUERY.dtype)):
        for kv in (cache, types):
            explained = jax_tkg.explain(query, kv, sinks=jnp.ones(4), return_residual=True)
            assert explained.problem.has_lengths
            assert explained.problem.has_sinks
            assert explained.problem.query_dtype == jnp.float32
    by_position = jax_tkg.explain(QUERY, KEY, KEY).problem
    assert by_position == jax_tkg.explain(query=QUERY, key=KEY, value=KEY).problem
    assert by_position == jax_tkg.explain(QUERY, cache.kv).problem


def test_explain_allocates_nothing() -> None:
    huge = jax.ShapeDtypeStruct((64, 2**20, 64, 128), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((64, 1, 64, 128), jnp.bfloat16)
    assert jax_tkg.explain(query, huge, huge, key_value_seq_lengths=2**20).implementation == "xla"


@pytest.mark.usefixtures("no_shape_checks")
def test_explain_raises_as_the_op_does() -> None:
    with pytest.raises(ValueError, match="same head_dim"):
        jax_tkg.explain(QUERY[..., :8], KEY, KEY)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((QUERY,), {}, TypeError, "attention_tkg: missing a required argument: 'key'"),
        ((QUERY, KEY, KEY, None, None, KEY), {}, TypeError, "too many positional arguments"),
        ((QUERY, KEY, KEY), {"key_bounds": KEY}, TypeError, "unexpected keyword .* 'key_bounds'"),
        ((QUERY, KEY, KEY), {"platform": "trainium"}, ValueError, "'trainium'; JAX has .* neuron"),
    ],
)
def test_explain_refuses_what_the_op_refuses(
    args: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        jax_tkg.explain(*args, **options)
