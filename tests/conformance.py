"""What every implementation must pass: one check of one case, used by the test_conformance_* files.

The error budget. Against float64, an implementation may be off by at most twice what `oracle.naive`
is off by in the same dtype, in the largest and in the root-mean-square error of a case. The naive
result may be exact by luck (one key, say), so one rounding of each number on the way is free:

- the output is an average of values, so rounding it costs up to `eps(dtype) / 2 * max |v|`, and a
  relative error of eps / 2 in every logit x moves it by up to `eps(float32) * mean |x| * max |v|`;
- the log-sum-exp, whose yardstick is naive attention in float32 whatever the query's dtype,
  likewise by `eps(float32) / 2 * (|lse| + mean |x|)`, or `eps(float32)` where that is more.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_tkg
from jax_tkg.cache.layouts import DENSE_LAYOUTS
from jax_tkg.implementations import Implementation, candidates
from jax_tkg.online.blocks import attend_blocks
from jax_tkg.online.plan import Form, OnlinePlan, Target, make_plan
from jax_tkg.online.rows import attend_rows
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem, Op
from tests import oracle
from tests.cases import Case, inputs
from tests.oracle import Array, Inputs

FACTOR = 2
"""How many times the error of naive attention an implementation may make."""

_STATIC = ("scale", "is_causal", "local_window_size", "logits_soft_cap", "rope")


def _attend(*args: Any, op: str = "attention_tkg", normalize: bool = True, **options: Any) -> Any:
    """The public op; of a state, what `finalize` gives."""
    if normalize:
        return getattr(jax_tkg, op)(*args, **options)
    assert options.pop("return_residual")
    found = jax_tkg.attention_cte(*args, **options, normalize=False)
    state, *keys = found if isinstance(found, tuple) else (found,)
    out, lse = state.finalize()
    return out.astype(options["query"].dtype), lse, *keys


def _jitted(**options: Any) -> Any:
    static = (*_STATIC, "op", "normalize", "return_residual", "implementation")
    return jax.jit(_attend, static_argnames=static, compiler_options=options)


run_optimised = _jitted()
# LLVM would take most of the time of this suite; what XLA does to the program is the same.
run_small = _jitted(xla_backend_optimization_level=0)


def parameters(cases: Iterable[Case]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, those of the large grid marked slow."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
        for case in cases
    ]


def check(case: Case, implementation: str | Implementation) -> None:
    """Runs a case through the public op and compares it with float64.

    Asserts that the implementation runs and no other, shapes and dtypes, that rows that see nothing
    are exactly 0 and -inf, the error budgets, and the rotated keys.
    """
    given, (exact, naive_out, naive_lse) = _expected(case)
    arguments = jax_arguments(case, given)
    explained = jax_tkg.explain(**arguments, op=case.op, implementation=implementation)
    assert explained.implementation == candidates(implementation, Op(case.op))[0].name
    run = run_optimised if case.slow else run_small
    out, lse, *keys = run(
        **arguments,
        op=case.op,
        normalize=not case.unnormalised,
        return_residual=True,
        implementation=implementation,
    )

    chex.assert_shape(out, exact.out.shape)
    chex.assert_type([out, lse], [given.query.dtype, jnp.float32])
    out, lse = np.asarray(out).astype(np.float64), np.asarray(lse).astype(np.float64)
    seen = exact.lse > -np.inf
    np.testing.assert_array_equal(lse > -np.inf, seen, "rows with a finite LSE")
    np.testing.assert_array_equal(out[exact.value == 0], 0, "rows that see no key")
    chex.assert_tree_all_finite((out, lse[seen]))
    eps, eps32 = (float(ml_dtypes.finfo(d).eps) for d in (given.query.dtype, np.float32))
    _within(
        "output",
        out - exact.out,
        naive_out - exact.out,
        np.max((eps / 2 + eps32 * exact.logit) * exact.value),
    )
    _within(
        "LSE",
        lse[seen] - exact.lse[seen],
        naive_lse[seen] - exact.lse[seen],
        eps32 * np.max((np.abs(exact.lse) + exact.logit)[seen] / 2, initial=1),
    )
    if given.rope is not None:
        _check_rotated(given, keys[0])


class Expected(NamedTuple):
    """Exact results of a case, and those of naive attention: output as the query, LSE as
    float32."""

    exact: oracle.Exact
    naive_out: Array
    naive_lse: Array


@lru_cache(maxsize=1)  # the large ones take gigabytes
def _expected(case: Case) -> tuple[Inputs, Expected]:
    given, float32 = inputs(case), np.dtype(np.float32)
    naive_out, naive_lse = oracle.naive(given, given.query.dtype)
    if given.query.dtype != float32:
        _, naive_lse = oracle.naive(given, float32)
    return given, Expected(oracle.attention(given), naive_out, naive_lse)


def _within(what: str, error: Array, naive_error: Array, free: float) -> None:
    measures = {"largest": lambda e: np.abs(e).max(), "RMS": lambda e: np.sqrt(np.mean(e**2))}
    for name, measure in measures.items():
        if error.size:
            mine, naive = measure(error), measure(naive_error)
            assert mine <= FACTOR * naive + free, (
                f"{name} error of the {what}: {mine:.3g}, naive {naive:.3g}, free {free:.3g}"
            )


def _check_rotated(given: Inputs, keys: jax.Array) -> None:
    """Rotated once in float32, then rounded: within half a unit of each key's size, and
    float32's."""
    assert given.new_key is not None
    chex.assert_shape(keys, given.new_key.shape)
    chex.assert_type(keys, given.new_key.dtype)
    exact = np.stack(
        [
            oracle.rotated(given.rope, new.astype(np.float64), oracle.visible(given, b)[0])
            for b, new in enumerate(given.new_key)
        ]
    )
    size = np.abs(given.new_key.astype(np.float64)).max()
    eps = float(ml_dtypes.finfo(given.new_key.dtype).eps)
    error = np.abs(np.asarray(keys).astype(np.float64) - exact)
    bound = np.abs(exact) * eps / 2 + 8 * size * float(np.finfo(np.float32).eps)
    np.testing.assert_array_less(error, bound + np.finfo(np.float64).tiny)


# From NumPy to the public op


def jax_arguments(case: Case, given: Inputs) -> dict[str, Any]:
    """Keyword arguments of the op, with keys and values held as the case says."""
    stored = ("key", "value", "page_indices", "k_scale", "v_scale")
    rest = {f.name: getattr(given, f.name) for f in fields(given) if f.name not in stored}
    rest = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in rest.items()}
    if case.op == "attention_tkg":
        assert rest.pop("key_bounds") is rest.pop("alibi_slopes") is None
    if case.holder == "arrays":
        arrays = {n: getattr(given, n) for n in stored if getattr(given, n) is not None}
        return rest | {n: jnp.asarray(x) for n, x in arrays.items()}
    kv = _layout(case, given)
    if case.holder == "layout":
        return rest | {"key": kv}
    lengths, starts = rest.pop("key_value_seq_lengths"), rest.pop("key_value_seq_starts")
    beside = case.tokens if case.beside else 0
    cache_type = jax_tkg.RingKVCache if case.positions == "ring" else jax_tkg.KVCache
    del rest["key_positions"]
    starts = jnp.zeros_like(lengths) if starts is None else starts
    return rest | {"key": cache_type(kv, lengths - beside, starts)}


def _layout(case: Case, given: Inputs) -> jax_tkg.KVLayout:
    def as_stored(array: Array) -> jax.Array:
        bits = np.dtype(f"uint{8 * array.itemsize}")
        return jnp.asarray(array.view(bits) if case.as_bits else array)

    def per_head(scale: Array | None) -> jax.Array | None:
        return None if scale is None else jnp.broadcast_to(scale, (1, case.kv_heads))

    scales = {"k_scale": per_head(given.k_scale), "v_scale": per_head(given.v_scale)}
    if given.page_indices is not None:
        key, value = as_stored(given.key), as_stored(given.value)
        table = jnp.asarray(given.page_indices)
        return jax_tkg.Paged(key, value, **scales, dtype=case.stored, page_indices=table)
    layout = DENSE_LAYOUTS[case.layout]
    key, value = (
        as_stored(np.ascontiguousarray(array.transpose(["BSKH".index(a) for a in axes])))
        for array, axes in ((given.key, layout.key_axes), (given.value, layout.value_axes))
    )
    return layout(key=key, value=value, **scales, dtype=case.stored)


# The forms of the online softmax


@dataclass(frozen=True)
class InTiles:
    """The online softmax in the form it has on some platform, run here, with the cache in `parts`.

    Rows are walked one by one for "cpu", all at once for the others, with a dynamic end of the loop
    except for "neuron".
    """

    platform: str
    parts: int

    def __str__(self) -> str:
        """The name."""
        return self.name

    @property
    def name(self) -> str:
        """Says both."""
        return f"xla-{self.platform}-in-{self.parts}"

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        """It can do every case."""
        del problem, target
        return None

    def plan(self, problem: AttentionProblem, target: Target) -> OnlinePlan:
        """The platform's plan with tiles of whole pages, the last one overlapping if need be.

        Tiles at the edges of a row are half as large, where pages and buffers let them.
        """
        del target
        unit = problem.kv.slot_multiple
        tile = min(-(-problem.kv_len // (self.parts * unit)) * unit, problem.kv_len)
        num_tiles = -(-problem.kv_len // tile)
        made = make_plan(problem, Target((self.platform,)))
        can_halve = tile % (2 * unit) == 0 and not made.buffered
        return replace(
            made,
            edge_tile=tile // 2 if can_halve else tile,
            form=Form.ROWS if self.platform == "cpu" else Form.BLOCKS,
            tile=tile,
            num_tiles=num_tiles,
            dynamic_trips=num_tiles > 1 and self.platform != "neuron",
        )

    def run(
        self, problem: AttentionProblem, ops: Operands, target: Target
    ) -> tuple[jax.Array, jax.Array]:
        """Runs that plan."""
        plan = self.plan(problem, target)
        attend = attend_rows if plan.form is Form.ROWS else attend_blocks
        return attend(problem, ops, plan)
