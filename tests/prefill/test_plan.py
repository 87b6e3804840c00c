"""Which tiles are walked: counted without running anything."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.attention import prepare
from jax_tkg.online.grid import make_grid
from jax_tkg.online.plan import Form, Target
from jax_tkg.prefill.plan import PrefillPlan, divided, make_prefill_plan
from jax_tkg.problem import AttentionProblem, Op
from tests import oracle

PLATFORMS = ("cpu", "neuron", "tpu")


def problem(tokens: int, slots: int | None = None, **options: Any) -> AttentionProblem:
    slots = tokens if slots is None else slots
    found: list[AttentionProblem] = []

    def trace(query: Any, keys: Any, new: Any) -> None:
        beside = {"new_key": new, "new_value": new} if options.pop("beside", False) else {}
        found.append(prepare(query, keys, keys, op=Op.CTE, **beside, **options).problem)

    jax.eval_shape(
        trace, *(jax.ShapeDtypeStruct((1, n, h, 64), jnp.float32)
                 for n, h in ((tokens, 8), (slots, 2), (tokens, 2)))
    )  # fmt: skip
    return found[0]


def plan(tokens: int, platform: str, slots: int | None = None, **options: Any) -> PrefillPlan:
    return make_prefill_plan(problem(tokens, slots, **options), Target((platform,)))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_causal_leaves_out_nearly_half(platform: str) -> None:
    made = plan(8192, platform)
    assert made.tiles_computed <= 0.55 * made.tiles_total
    assert made.cached.pairs().shape == (made.tiles_computed, 2)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_window_costs_what_it_shows(platform: str) -> None:
    counts = [
        plan(t, platform, local_window_size=(1023, 0)).tiles_computed for t in (8192, 16384, 32768)
    ]
    assert 1.8 < counts[1] / counts[0] < 2.2
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])  # linear
    made = plan(32768, platform, local_window_size=(1023, 0)).cached
    keys_each = 1023 + made.query_tile  # seen by a tile of queries
    assert counts[2] <= len(made.spans) * (keys_each // made.key_tile + 2)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_chunk_beside_a_prefix_is_causal_in_itself(platform: str) -> None:
    made = plan(4096, platform, slots=2048, beside=True)
    assert made.cached.computed == made.cached.total
    assert made.beside is not None
    assert made.beside.computed <= 0.57 * made.beside.total


@pytest.mark.parametrize("platform", PLATFORMS)
def test_lengths_hide_no_more_than_they_can(platform: str) -> None:
    lengths = np.full(1, 8192)
    made = plan(8192, platform, key_value_seq_lengths=lengths)
    assert made.tiles_computed <= 0.55 * made.tiles_total
    windowed = plan(8192, platform, key_value_seq_lengths=lengths, local_window_size=(1023, 0))
    assert windowed.tiles_computed == made.tiles_computed  # a short row looks back further


@pytest.mark.parametrize("platform", PLATFORMS)
def test_positions_known_only_to_arrays_hide_nothing(platform: str) -> None:
    made = plan(2048, platform, query_positions=jnp.zeros((1, 2048), jnp.int32))
    assert made.tiles_computed == made.tiles_total


def test_the_tiles_walked_are_those_with_something_visible() -> None:
    """Against the oracle's visibility, for sizes that do not divide."""
    windows = (None, (5, 0), (0, 0), (None, 3), (4, 2), (40, None))
    sizes = ((1, 9), (9, 9), (23, 23), (10, 31), (31, 10))
    for causal, window, (tokens, slots) in itertools.product((True, False), windows, sizes):
        for beside in (False, True):
            options = {"is_causal": causal, "local_window_size": window}
            described = problem(tokens, slots, beside=beside, **options)
            blank, new = (np.zeros((1, n, 2, 64)) for n in (slots, tokens))
            given = oracle.Inputs(
                np.zeros((1, tokens, 8, 64)), blank, blank, **options,
                **({"new_key": new, "new_value": new} if beside else {}),
            )  # fmt: skip
            seen = oracle.visible(given, 0)[2][0]
            runs = [(False, seen[:, :slots])] + [(True, seen[:, slots:])] * beside
            for of_beside, visible in runs:
                grid = make_grid(described, min(4, tokens), min(3, visible.shape[1]),
                                 beside=of_beside)  # fmt: skip
                walked = {tuple(pair) for pair in grid.pairs().tolist()}
                for t, s in np.argwhere(visible):
                    assert (t // grid.query_tile, s // grid.key_tile) in walked
                assert grid.computed == len(walked)
                assert all(0 <= a <= b for a, b in grid.spans)
                for q, k in walked:  # and none is walked in vain
                    start = min(q * grid.query_tile, tokens - grid.query_tile)
                    rows = visible[start : start + grid.query_tile]
                    assert rows[:, k * grid.key_tile : (k + 1) * grid.key_tile].any()


def test_tiles_are_whole_pages() -> None:
    pages = jnp.zeros((5, 2, 48, 64))
    kv = jax_tkg.Paged(pages, pages, page_indices=jnp.zeros((1, 8), jnp.int32))
    described = prepare(jnp.zeros((1, 200, 4, 64)), kv, op=Op.CTE).problem
    made = divided(
        described, Form.ROWS, query_tile=64, key_tile=100, dtype=np.dtype(np.float32), reason=""
    )
    assert made.cached.key_tile == 144


def test_explained() -> None:
    text = str(
        jax_tkg.explain(
            *(jax.ShapeDtypeStruct((1, 8192, n, 64), jnp.float32) for n in (8, 2, 2)),
            op="attention_cte", normalize=False, platform="cpu",
            alibi_slopes=jnp.ones(8), key_bounds=jnp.zeros((1, 8192, 2), jnp.int32),
        )
    )  # fmt: skip
    for words in ("key bounds", "ALiBi", "unnormalised", "4160 of 8192 tiles", "64 queries x 128"):
        assert words in text
