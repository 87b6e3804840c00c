"""Two programs in pure JAX agree with the kernel and with each other, and exchange as it does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import jax_tkg
from jax_tkg import neuron
from jax_tkg.attention import prepare
from jax_tkg.lnc.implementation import XlaLnc
from jax_tkg.lnc.on_axis import attend_on_axis, plan_on_axis, sharding_of
from jax_tkg.lnc.program import attend_slice
from jax_tkg.lnc.shares import split_of
from jax_tkg.nki import interpreter
from jax_tkg.nki.arguments import make_launch, plan_kernel
from jax_tkg.nki.custom_call import written_out
from jax_tkg.nki.describe import exchanges_of
from jax_tkg.nki.implementation import NkiInterpret
from jax_tkg.online.plan import Target
from tests import oracle
from tests.calls import assert_close, quickly
from tests.conformance import FACTOR

P = PartitionSpec
Arrays = dict[str, Any]
EXCHANGES = ("deferred", "every tile")
AXES = {
    "query": "BTNH", "key": "BSKH", "value": "BSKH", "new_key": "BTKH", "new_value": "BTKH",
    "key_value_seq_lengths": "B", "sinks": "N", "bias": "BNTS",
}  # fmt: skip


def make_arrays(batch: int, slots: int, dtype: Any = np.float32) -> Arrays:
    """Keys that grow along the context, one short row, new keys beside the cache, sinks."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    tokens, heads, kv_heads, width = 2, 4, 2, 16
    key = normal(batch, slots, kv_heads, width)
    key *= (1 + 3 * np.arange(slots)[:, None, None] / slots).astype(dtype)
    lengths = np.full(batch, slots, np.int32)
    lengths[-1] = 5
    arrays = {
        "query": normal(batch, tokens, heads, width),
        "key": key,
        "value": normal(batch, slots, kv_heads, width),
        "new_key": normal(batch, tokens, kv_heads, width),
        "new_value": normal(batch, tokens, kv_heads, width),
        "key_value_seq_lengths": lengths,
        "sinks": rng.standard_normal(heads).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, arrays)


SEQUENCE, BATCH = make_arrays(1, 1024), make_arrays(2, 128)
HEADS = make_arrays(1, 128)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 keys."""
    monkeypatch.setattr("jax_tkg.nki.tiles.LOGIT_BANKS", 0)


def mesh_of(size: int = 2) -> Mesh:
    devices = jax.devices()[:size]
    return jax.make_mesh((size,), ("lnc",), devices=devices, axis_types=(AxisType.Auto,))


def on_mesh(arrays: Arrays, exchange: str, *, both: bool = False, **options: Any) -> Any:
    """A function of the arrays on two devices: results as one, or of both devices stacked."""
    mesh, plan = mesh_of(), plan_on_axis(**arrays, exchange=exchange)
    sharding = sharding_of(plan, mesh)
    specs = {name: sharding.spec(AXES[name]) for name in arrays}
    if sharding.keys and "bias" in specs:
        specs["bias"] = P()  # the part of a device ends in what both have: cut below
    rows = P() if sharding.keys else sharding.spec("BTN")

    def attend(arrays: Arrays) -> Any:
        if sharding.keys and "bias" in arrays:
            arrays = arrays | {"bias": bias_of_device(arrays["bias"], plan.slots)}
        results = attend_on_axis(plan, **arrays, **options)
        return jax.tree.map(lambda x: x[None], results) if both else results

    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P("lnc") if both else rows,
        check_vma=both,
    )


def bias_of_device(bias: jax.Array, slots: int) -> jax.Array:
    half = slots // 2
    mine = lax.dynamic_slice_in_dim(bias, lax.axis_index("lnc") * half, half, axis=3)
    return jnp.concatenate([mine, bias[..., slots:]], axis=3)


def on_one(arrays: Arrays, implementation: Any) -> Any:
    del arrays

    def attend(given: Arrays) -> Any:
        return jax_tkg.attention_tkg(**given, return_residual=True, implementation=implementation)

    return attend


def within_budget(arrays: Arrays, results: Any) -> None:
    """At most twice the error of naive attention of the same dtype, and one rounding."""
    given = oracle.Inputs(**jax.tree.map(np.asarray, arrays))
    exact = oracle.attention(given)
    dtype = arrays["query"].dtype
    naive_out, naive_lse = oracle.naive(given, dtype)
    if dtype != np.float32:
        naive_lse = oracle.naive(given, np.dtype(np.float32))[1]
    eps, eps32 = (float(ml_dtypes.finfo(d).eps) for d in (dtype, np.float32))
    out, lse = (np.asarray(x, np.float64) for x in results)
    free = np.max((eps / 2 + eps32 * exact.logit) * exact.value)
    assert np.abs(out - exact.out).max() <= FACTOR * np.abs(naive_out - exact.out).max() + free
    free = eps32 * np.max((np.abs(exact.lse) + exact.logit) / 2, initial=1)
    assert np.abs(lse - exact.lse).max() <= FACTOR * np.abs(naive_lse - exact.lse).max() + free


FORMS = {
    "xla": lambda arrays: on_one(arrays, "xla"),
    "kernel, 1 program": lambda arrays: on_one(arrays, NkiInterpret(programs=1)),
    "kernel, 2 programs": lambda arrays: on_one(arrays, NkiInterpret(exchange="every tile")),
    "vmap, deferred": lambda arrays: on_one(arrays, XlaLnc()),
    "vmap, every tile": lambda arrays: on_one(arrays, XlaLnc(exchange="every tile")),
    "mesh, deferred": lambda arrays: on_mesh(arrays, "deferred"),
    "mesh, every tile": lambda arrays: on_mesh(arrays, "every tile"),
}


IN_BFLOAT16 = ("kernel, 2 programs", "vmap, deferred", "mesh, every tile")


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, "float32") for form in FORMS), *((form, "bfloat16") for form in IN_BFLOAT16)],
)
@pytest.mark.usefixtures("small_tiles")
def test_kernel_and_programs_agree(form: str, dtype: str) -> None:
    arrays = make_arrays(1, 1024, jnp.dtype(dtype))
    assert plan_on_axis(**arrays).sharding == "sequence"
    within_budget(arrays, quickly(FORMS[form](arrays))(arrays))


@pytest.mark.parametrize("form", ["vmap, deferred", "mesh, deferred"])
@pytest.mark.parametrize("arrays", [BATCH, HEADS], ids=["sequences", "heads"])
def test_programs_with_their_own_rows(form: str, arrays: Arrays) -> None:
    assert plan_on_axis(**arrays).sharding == "batch"
    within_budget(arrays, quickly(FORMS[form](arrays))(arrays))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.usefixtures("small_tiles")
def test_both_devices_hold_the_same_bits(exchange: str) -> None:
    for both in quickly(on_mesh(SEQUENCE, exchange, both=True))(SEQUENCE):
        np.testing.assert_array_equal(both[0], both[1])
        assert np.isfinite(both).all()


@pytest.mark.parametrize("arrays", [BATCH, HEADS], ids=["sequences", "heads"])
def test_shared_results_are_on_both_devices(arrays: Arrays) -> None:
    function = on_mesh(arrays, "deferred", both=True, share_results=True)
    results = quickly(function)(arrays)
    for both in results:
        np.testing.assert_array_equal(both[0], both[1])
    within_budget(arrays, [both[0] for both in results])
    assert count(function, arrays) == (2, 0)  # output and log-sum-exp, as in SBUF


# Exchanges, counted


def subjaxprs(value: Any) -> Iterator[Any]:
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from subjaxprs(value.jaxpr)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from subjaxprs(item)


def count_in(jaxpr: Any) -> tuple[int, int]:
    """Ppermutes that are executed, and those in the bodies of loops whose trips are not known."""
    known = unknown = 0
    for equation in jaxpr.eqns:
        known += equation.primitive.name == "ppermute"
        for value in equation.params.values():
            for inner in subjaxprs(value):
                some, others = count_in(inner)
                if equation.primitive.name == "while":
                    some, others = 0, some + others
                known += some * equation.params.get("length", 1)
                unknown += others
    return known, unknown


def count(function: Any, *arrays: Any) -> tuple[int, int]:
    return count_in(jax.make_jaxpr(function)(*arrays).jaxpr)


def with_positions(arrays: Arrays) -> Arrays:
    shape = arrays["key"].shape[:2]
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return arrays | {"key_positions": jnp.asarray(positions)}


def sendrecvs(arrays: Arrays, exchange: str) -> list[int]:
    """Of the kernel's two programs."""
    call = prepare(**arrays)
    problem, ops = call.problem, call.operands
    function, arguments = written_out(make_launch(problem, ops, 2, exchange))
    given = [np.asarray(x) if isinstance(x, jax.Array) else x for x in arguments]
    done = interpreter.run(function, *given, programs=2)
    return [sum(step.op == "sendrecv" for step in program) for program in done.programs]


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.usefixtures("small_tiles")
def test_as_many_exchanges_as_the_kernel(exchange: str, tiles: int) -> None:
    arrays = make_arrays(1, 256 * tiles)
    plan = plan_on_axis(**arrays, exchange=exchange)
    assert plan == plan_kernel(prepare(**with_positions(arrays)).problem, 2, exchange)
    assert [len(share.tiles) for share in plan.shares] == [tiles, tiles]
    wanted = 3 if exchange == "deferred" else 2 * tiles + 1
    assert count(on_mesh(arrays, exchange, both=True), arrays) == (wanted, 0)
    assert sendrecvs(with_positions(arrays), exchange) == [wanted, wanted]
    assert exchanges_of(plan) == wanted


def test_as_many_exchanges_as_the_kernel_for_many_rows() -> None:
    """480 rows of one pair: a group of their own, of which every exchange takes two pieces."""
    arrays = make_arrays(1, 256)
    for name in ("query", "new_key", "new_value"):
        arrays[name] = jnp.tile(arrays[name], (1, 120, 1, 1))
    plan = plan_on_axis(**arrays, exchange="every tile")
    wanted = sendrecvs(with_positions(arrays), "every tile")
    assert wanted == [exchanges_of(plan)] * 2 == [12, 12]
    assert count(on_mesh(arrays, "every tile", both=True), arrays) == (12, 0)


@pytest.mark.parametrize(("exchange", "wanted"), [("deferred", (3, 0)), ("every tile", (3, 2))])
def test_exchanges_in_a_loop_over_live_tiles(exchange: str, wanted: tuple[int, int]) -> None:
    """Two a round and one at the end; and two of the tile of new keys."""
    call = prepare(**make_arrays(1, 8192))
    problem, ops = call.problem, call.operands
    plan = plan_kernel(problem, 2, exchange)
    assert plan.live is not None
    slices = partial(attend_slice, problem, plan, split_of(plan), "lnc")
    mapped = jax.shard_map(
        lambda ops: jax.tree.map(lambda x: x[None], slices(ops)),
        mesh=mesh_of(), in_specs=P(), out_specs=P("lnc"), check_vma=False,
    )  # fmt: skip
    assert count(mapped, ops) == wanted


def test_programs_with_their_own_rows_exchange_nothing() -> None:
    assert count(on_mesh(BATCH, "deferred"), BATCH) == (0, 0)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_neuron_can_run_it(exchange: str) -> None:
    """Also loops over live tiles: as many rounds as there can be, whatever is live."""
    arrays = make_arrays(1, 8192)
    attend = on_one(arrays, XlaLnc(exchange=exchange))
    # JAX makes a take of a ppermute over an axis of vmap; on devices it stays one.
    assert {finding.rule for finding in neuron.check(attend, arrays)} == {"out-of-bounds-fill"}
    assert neuron.check(on_mesh(SEQUENCE, exchange), SEQUENCE) == ()
    findings = neuron.check(attend, arrays, platform="cpu")  # where loops end at the live keys
    assert "dynamic-loop" in {finding.rule for finding in findings}


# Gradients


@pytest.mark.parametrize(
    "arrays",
    [
        pytest.param(SEQUENCE, id="sequence"),
        pytest.param(
            BATCH, id="sequences", marks=pytest.mark.slow
        ),  # 2 s: devices are on their own
        pytest.param(HEADS, id="heads"),
    ],
)
def test_gradient_on_a_mesh(arrays: Arrays) -> None:
    rows = (arrays["query"].shape[0], 4, 2)
    keys = arrays["key"].shape[1] + 2
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((*rows, keys), np.float32))
    arrays = arrays | {"bias": bias}
    lengths = {"key_value_seq_lengths": arrays.pop("key_value_seq_lengths")}

    def loss(run: Any) -> Any:
        def total(floats: Arrays) -> jax.Array:
            out, lse = run(floats | lengths)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(0.5 * lse))

        return quickly(jax.grad(total))

    want = loss(on_one(arrays, "xla"))(arrays)
    found = loss(on_mesh(arrays | lengths, "deferred"))(arrays)
    assert_close(found, want)
    if arrays["key"].shape == SEQUENCE["key"].shape:
        assert_close(loss(on_one(arrays, XlaLnc()))(arrays), want)


def test_gradient_inside_the_map() -> None:
    """Each device differentiates the sum of what both say: replicated arrays count both."""
    mesh, plan = mesh_of(), plan_on_axis(**SEQUENCE)
    sharding = sharding_of(plan, mesh)
    specs = {name: sharding.spec(AXES[name]) for name in SEQUENCE}

    def loss(floats: Arrays, lengths: jax.Array) -> jax.Array:
        out, lse = attend_on_axis(plan, **floats, key_value_seq_lengths=lengths)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(0.5 * lse))

    floats = dict(SEQUENCE)
    lengths = floats.pop("key_value_seq_lengths")
    specs.pop("key_value_seq_lengths")
    inside = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(specs, P()), out_specs=specs, check_vma=True
    )

    def twice(floats: Arrays) -> jax.Array:
        out, lse = on_one(floats, "xla")(floats | {"key_value_seq_lengths": lengths})
        return 2 * (jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(0.5 * lse)))

    assert_close(quickly(inside)(floats, lengths), quickly(jax.grad(twice))(floats))


# What is refused


def test_arrays_placed_otherwise_than_planned() -> None:
    plan, mesh = plan_on_axis(**SEQUENCE), mesh_of()
    mapped = jax.shard_map(
        lambda x: attend_on_axis(plan, **x), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match=r"have S=1024; the plan \(sequence .* each device S=512"):
        jax.eval_shape(mapped, SEQUENCE)


def test_an_axis_of_another_size() -> None:
    plan, mesh = plan_on_axis(**SEQUENCE), mesh_of(4)
    mapped = jax.shard_map(
        lambda x: attend_on_axis(plan, **x), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match="'lnc' has size 4; two programs need size 2"):
        jax.eval_shape(mapped, SEQUENCE)


def test_halves_that_devices_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"256 and 44 slots \(300 slots\).*a multiple of 256"):
        plan_on_axis(**make_arrays(1, 300))
    with pytest.raises(ValueError, match=r"2 and 1 sequences.*a multiple of 2"):
        plan_on_axis(**make_arrays(3, 128))


def test_what_the_plan_cannot_do() -> None:
    arrays = make_arrays(1, 128)
    arrays["query"] = jnp.zeros((1, 513, 4, 16))
    del arrays["new_key"], arrays["new_value"]
    for refused in (
        partial(plan_on_axis, **arrays),
        partial(jax.eval_shape, on_one(arrays, XlaLnc()), arrays),
    ):
        with pytest.raises(NotImplementedError, match="T = 513 new tokens"):
            refused()
    with pytest.raises(NotImplementedError, match="not for attention_cte"):
        jax_tkg.attention_cte(*(SEQUENCE[n] for n in ("query", "key", "value")),
                              implementation=XlaLnc())  # fmt: skip


def test_explained_like_the_kernel() -> None:
    of_kernel, of_jax = (
        jax_tkg.explain(**SEQUENCE, implementation=i) for i in (NkiInterpret(), XlaLnc())
    )
    assert of_jax.implementation == "xla_lnc"
    assert of_jax.plan == of_kernel.plan
    alone = XlaLnc(programs=1).plan(of_jax.problem, Target(("cpu",)))
    assert "1 program(s), none sharding" in str(alone)
