"""What the row-by-row form adds where it pays: buffers for tiles, one dot before the loop."""

import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.cache.layouts import DENSE_LAYOUTS, KVLayout
from jax_tkg.online.plan import OnlinePlan, Target, make_plan
from jax_tkg.online.rows import attend_rows
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from tests.calls import QUICKLY, assert_close
from tests.hlo import cache_copies

BATCH, SLOTS, HEADS, GROUP, WIDTH = 2, 64, 3, 2, 16


@dataclass(frozen=True)
class Changed:
    """The plan for a CPU, changed; records whether the loop over rows ran."""

    changes: tuple[tuple[str, Any], ...]
    name: str = field(default="changed", compare=False)

    def why_not(self, problem: AttentionProblem, target: Target) -> str | None:
        del problem, target
        return None

    def plan(self, problem: AttentionProblem, target: Target) -> OnlinePlan:
        del target
        return replace(make_plan(problem, Target(("cpu",))), **dict(self.changes))

    def run(
        self, problem: AttentionProblem, ops: Operands, target: Target
    ) -> tuple[jax.Array, ...]:
        return attend_rows(problem, ops, self.plan(problem, target))


IN_TILES = (("tile", 16), ("num_tiles", 4), ("edge_tile", 16))
WHOLE = Changed((*IN_TILES, ("whole_first", True)))
LOOP = Changed((*IN_TILES, ("whole_first", False)))


def compiled(implementation: Any, *args: Any, **options: Any) -> Any:
    attend = partial(jax_tkg.attention_tkg, implementation=implementation)
    return jax.jit(attend).lower(*args, **options).compile()


def call(tokens: int, layout: str = "BSKH") -> tuple[jax.Array, KVLayout]:
    """A query and a cache in float32."""
    rng = np.random.default_rng(0)
    sizes = {"B": BATCH, "S": SLOTS, "K": HEADS, "H": WIDTH}
    cls = DENSE_LAYOUTS[layout]
    query, key, value = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in (
            (BATCH, tokens, HEADS * GROUP, WIDTH),
            [sizes[a] for a in cls.key_axes],
            [sizes[a] for a in cls.value_axes],
        )
    )
    return query, cls(key, value, None, None, np.dtype(np.float32))


def with_value(kv: KVLayout, slots: slice, heads: slice, number: float) -> KVLayout:
    """Another number at some slots of some heads of row 0, keys and values, [B, S, K, H]."""
    at = (0, slots, heads)
    return replace(kv, key=kv.key.at[at].set(number), value=kv.value.at[at].set(number))


def several_options() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(1)
    new = jnp.asarray(rng.standard_normal((2, BATCH, 2, HEADS, WIDTH)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((BATCH, HEADS * GROUP, 2, SLOTS)), jnp.float32)
    return {
        "lengths": {},
        "window and cap": {"local_window_size": (50, 0), "logits_soft_cap": 5.0},
        "bias and sinks": {"bias": bias, "sinks": jnp.linspace(-1.0, 1.0, HEADS * GROUP)},
        "mask": {"mask": jnp.asarray(rng.random((BATCH, 1, 2, SLOTS)) < 0.7)},
        "beside": {"new_key": new[0], "new_value": new[1]},
    }


@pytest.mark.parametrize(
    ("layout", "options"),
    [("BSKH", name) for name in several_options()] + [("BKSH", "lengths"), ("BKHS", "lengths")],
)
def test_one_dot_over_all_keys(layout: str, options: str) -> None:
    query, kv = call(2, layout)
    lengths = jnp.array([SLOTS, SLOTS - 5])
    attend = jax.jit(
        partial(jax_tkg.attention_tkg, return_residual=True, **several_options()[options]),
        static_argnames="implementation",
        compiler_options=QUICKLY,
    )
    got, want = (
        attend(query, kv, key_value_seq_lengths=lengths, implementation=name)
        for name in (WHOLE, "reference")
    )
    assert_close(got, want)


def test_the_loop_runs_where_one_dot_is_not_worth_it_or_was_wrong() -> None:
    """Bit for bit the loop's result; where one dot is used, its sums are in another order."""
    query, kv = call(1)
    whole, loop = (
        jax.jit(partial(jax_tkg.attention_tkg, implementation=x), compiler_options=QUICKLY)
        for x in (WHOLE, LOOP)
    )

    def same(kv: KVLayout, lengths: list[int]) -> bool:
        given = {"key_value_seq_lengths": jnp.array(lengths)}
        got, want = (np.asarray(f(query, kv, **given)) for f in (whole, loop))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # NaN where it is NaN
        return np.array_equal(got, want, equal_nan=True)

    most, few = [SLOTS - 5, SLOTS], [SLOTS // 2, SLOTS - 1]
    padding, one_head = slice(SLOTS - 5, None), slice(0, 1)
    assert not same(kv, most)
    assert same(kv, few)
    assert same(with_value(kv, padding, slice(None), np.nan), most)
    assert same(with_value(kv, padding, one_head, np.inf), most)
    # A NaN that is seen stays in its own head.
    seen = replace(kv, value=kv.value.at[0, 3, 0].set(np.nan))
    assert same(seen, most)
    out = np.asarray(whole(query, seen, key_value_seq_lengths=jnp.array(most)))
    assert np.isnan(out[0, :, :GROUP]).all()
    assert np.isfinite(out[0, :, GROUP:]).all()
    assert np.isfinite(out[1]).all()


def test_which_problems_try_one_dot() -> None:
    def explained(
        heads: int,
        group: int,
        slots: int,
        dtype: Any = jnp.float32,
        width: int = 64,
        **options: Any,
    ) -> str:
        query = jax.ShapeDtypeStruct((1, 1, heads * group, width), dtype)
        create = partial(jax_tkg.KVCache.create, 1, slots, heads, width, dtype=dtype, **options)
        cache = jax.eval_shape(create)
        return str(jax_tkg.explain(query, cache))

    wanted = "one dot if most keys are live, else"
    assert wanted in explained(3, 3, 8192)
    assert wanted in explained(3, 3, 8192, layout="BSKH")
    assert wanted not in explained(3, 3, 128)  # small keys and values
    assert wanted not in explained(8, 4, 32768)  # many scores
    assert wanted not in explained(1, 8, 8192)  # many queries a head
    assert wanted not in explained(3, 3, 8192, width=128)
    assert wanted in explained(8, 1, 8192)
    assert wanted not in explained(8, 1, 8192, layout="BSKH")  # 8 times as many, side by side
    assert wanted not in explained(3, 3, 8192, jnp.bfloat16)
    assert "small keys and values" in explained(3, 3, 512, layout="BSKH")
    assert wanted in explained(3, 3, 512)


@pytest.mark.parametrize("layout", ["BSKH", "BKSH", "BKHS"])
def test_one_dot_copies_nothing(layout: str) -> None:
    """Neither beside an update of the cache nor in it."""
    create = partial(jax_tkg.KVCache.create, 1, 8192, 3, 64, dtype=jnp.float32, layout=layout)
    cache = jax.eval_shape(create)
    query = jax.ShapeDtypeStruct((1, 1, 9, 64), jnp.float32)
    new = jax.ShapeDtypeStruct((1, 1, 3, 64), jnp.float32)

    @partial(jax.jit, donate_argnums=0)
    def step(cache: Any, query: jax.Array, new: jax.Array) -> Any:
        cache = cache.append(new, new)
        return jax_tkg.attention_tkg(query, cache), cache

    program: Any = step.lower(cache, query, new).compile()
    assert not cache_copies(program, cache)
    assert program.memory_analysis().temp_size_in_bytes < 2**21


@pytest.mark.parametrize("layout", ["BKSH", "BKHS"])
def test_one_dot_without_lengths_copies_nothing(layout: str) -> None:
    axes = DENSE_LAYOUTS[layout]
    sizes = {"B": 1, "S": 8192, "K": 3, "H": 64}
    arrays = (
        jax.ShapeDtypeStruct([sizes[a] for a in names], jnp.float32)
        for names in (axes.key_axes, axes.value_axes)
    )
    query, kv = jax.ShapeDtypeStruct((1, 1, 9, 64), jnp.float32), axes(*arrays)
    program: Any = jax.jit(jax_tkg.attention_tkg).lower(query, kv).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**21


def native(layout: str, dtype: Any, slots: int, width: int) -> KVLayout:
    """A cache that holds its dtype's own numbers; NaN in the last 7 slots."""
    rng = np.random.default_rng(2)
    cls = DENSE_LAYOUTS[layout]

    def array(axes: str, width: int) -> jax.Array:
        values = rng.standard_normal((1, slots, HEADS, width)).astype(np.float32)
        values[:, -7:] = np.nan
        return jnp.asarray(values.transpose(["BSKH".index(a) for a in axes]), dtype)

    scale = None if dtype == jnp.bfloat16 else jnp.ones((1, HEADS), jnp.float32)
    arrays = array(cls.key_axes, WIDTH), array(cls.value_axes, width)
    return cls(*arrays, scale, scale, np.dtype(dtype))


@pytest.mark.parametrize(("layout", "dtype"), [("BSKH", jnp.bfloat16), ("BKHS", jnp.float8_e4m3fn)])
def test_a_buffer_for_tiles_changes_nothing(layout: str, dtype: Any) -> None:
    kv = native(layout, dtype, 100, 24)
    query = jax.random.normal(jax.random.key(0), (1, 2, HEADS * GROUP, WIDTH))
    lengths = jnp.array([93])
    tiles = (("tile", 16), ("num_tiles", 7), ("edge_tile", 16))
    with_buffer, without = (
        jax.jit(
            partial(jax_tkg.attention_tkg, implementation=Changed((*tiles, ("buffered", x)))),
            compiler_options=QUICKLY,
        )(query, kv, key_value_seq_lengths=lengths)
        for x in (True, False)
    )
    assert np.isfinite(with_buffer).all()
    if layout == "BSKH":
        np.testing.assert_array_equal(with_buffer, without)
    else:  # a dot over more columns may add in another order
        assert_close(with_buffer, without, 1e-6)


@pytest.mark.parametrize("window", [None, 20, 40])
def test_smaller_tiles_at_the_edges_change_nothing(window: int | None) -> None:
    """Rows that fill no tile, some, or all; also those that begin within one."""
    query, kv = call(2)
    small = Changed((("tile", 16), ("edge_tile", 4), ("whole_first", False)))
    attend = jax.jit(
        partial(jax_tkg.attention_tkg, return_residual=True, local_window_size=window),
        static_argnames="implementation",
        compiler_options=QUICKLY,
    )
    for lengths in ([SLOTS, 0], [3, 17], [33, 63], [16, 47]):
        given = {"key_value_seq_lengths": jnp.array(lengths)}
        got, want = (attend(query, kv, implementation=x, **given) for x in (small, "reference"))
        assert_close(got, want)


def test_raw_bits_are_read_in_larger_tiles() -> None:
    def of(slots: int, dtype: Any) -> str:
        cache = jax.eval_shape(lambda: jax_tkg.KVCache.create(1, slots, 8, 128, dtype=dtype))
        query = jax.ShapeDtypeStruct((1, 1, 32, 128), jnp.bfloat16)
        return str(jax_tkg.explain(query, cache, platform="cpu"))

    assert "tiles of 512 keys" in of(8192, jnp.bfloat16)
    assert "of 256 at the edges" in of(8192, jnp.bfloat16)
    assert "tiles of 256 keys" in of(1024, jnp.bfloat16)
    assert "tiles of 256 keys" in of(8192, jnp.float32)


def test_reading_a_tile_is_not_divided_between_threads() -> None:
    """XLA would, for an array of this size: the twin without a buffer shows it."""
    kv = jax.eval_shape(lambda: native("BSKH", jnp.bfloat16, 32768, WIDTH))
    query = jax.ShapeDtypeStruct((1, 1, HEADS * GROUP, WIDTH), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    usual, twin = (
        compiled(x, query, kv, key_value_seq_lengths=lengths).as_text()
        for x in (None, Changed((("buffered", False),)))
    )
    divided = 'outer_dimension_partitions":["'
    assert divided not in usual
    if (os.cpu_count() or 1) > 1:
        assert divided in twin
