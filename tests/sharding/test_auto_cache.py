"""Caches of which nobody says how they lie: written and read where they are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.cache import writing
from jax_tkg.cache.axes import scatter_rows, select_rows, write_rows
from jax_tkg.neuron import check
from jax_tkg.prefill import plan as prefill_plan
from jax_tkg.sharding import AttentionSharding
from tests.calls import QUICKLY, assert_close
from tests.sharding.cells import SPLITS, B, H, K, N, S, collectives, make_mesh

SLOW = pytest.mark.slow(reason="programs of their own; the quick ones split everything")
LAYOUTS = ("BSKH", "BKSH", "BKHS")


def sharding_of(split: str) -> AttentionSharding:
    return AttentionSharding(make_mesh(split, 8), **SPLITS[split])


def floats(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def cache_of(layout: str) -> jax_tkg.KVCache:
    """Rows that are empty, end at or before the border of a part, are full or nearly so."""
    cache = jax_tkg.KVCache.create(
        B, S, num_kv_heads=K, head_dim=H, layout=layout, dtype=jnp.float32
    )
    cache = cache.prefill(floats(B, S, K, H), floats(B, S, K, H, seed=1))
    lengths = jnp.asarray([0, 5, S, S - 1, S // 2, S // 2 - 1, 7, S // 8], jnp.int32)
    return replace(cache, lengths=lengths)


def placed(tree: Any, letters: Any, sharding: AttentionSharding) -> Any:
    return jax.tree.map(lambda x, axes: jax.device_put(x, sharding.named(axes)), tree, letters)


def append(cache: jax_tkg.KVCache, key: Any, value: Any) -> jax_tkg.KVCache:
    return cache.append(key, value, jnp.asarray([2, 1, 2, 2, 2, 2, 0, 2], jnp.int32))


def appended(layout: str, split: str) -> tuple[Any, Any, Any]:
    """The program of an append to a cache that lies so, its arguments, and its sharding."""
    sharding, cache = sharding_of(split), cache_of(layout)
    new = (floats(B, 2, K, H, seed=2), floats(B, 2, K, H, seed=3))
    want = jax.tree.map(np.array, append(cache, *new))  # before anything is donated
    given = (
        placed(cache, cache.letters(), sharding),
        *(jax.device_put(x, sharding.named("BTKH")) for x in new),
    )
    program = jax.jit(lambda *x: append(*x), donate_argnums=0).lower(*given).compile(QUICKLY)
    return program, given, want


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        pytest.param(layout, split, marks=() if (layout, split) == ("BSKH", "all") else SLOW)
        for layout in LAYOUTS
        for split in SPLITS
    ],
)
def test_an_append_exchanges_nothing(layout: str, split: str) -> None:
    program, given, want = appended(layout, split)
    assert collectives(program.as_text()) == []
    lay = [x.sharding for x in jax.tree.leaves(given[0])]
    found = program(*given)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    for x, sharding in zip(jax.tree.leaves(found), lay, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_updates_of_one_row_after_another_would_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.Split, "write", writing.InPlace.write)
    program, *_ = appended("BSKH", "all")
    of_device = 4 * B * S * K * H // 8
    gathers = [(n, size) for n, size in collectives(program.as_text()) if size >= of_device]
    assert {name for name, _ in gathers} == {"all-gather"}


@pytest.mark.parametrize(
    ("write", "layout", "split"),
    [
        pytest.param(*case, marks=() if case == (select_rows, "BKHS", "all") else SLOW)
        for case in itertools.product((scatter_rows, select_rows), LAYOUTS, SPLITS)
    ],
)
def test_both_ways_to_write_are_that_of_one_device(write: Any, layout: str, split: str) -> None:
    """Also where slots lie before the first or behind the last, or tokens are not kept."""
    sharding = sharding_of(split)
    array = cache_of(layout).kv.key
    slots = jnp.asarray([0, 5, S - 1, -1, S // 2 - 1, S + 3, -4, S - 2], jnp.int32)
    keep = jnp.asarray(np.random.default_rng(4).random((B, 3)) < 0.8)
    new = floats(B, 3, K, H, seed=5)
    given = [
        jax.device_put(x, sharding.named(axes))
        for x, axes in ((array, layout), (new, "BTKH"), (slots, "B"), (keep, "BT"))
    ]
    program = jax.jit(lambda a, *rest: write(a, layout, *rest)).lower(*given).compile(QUICKLY)
    assert collectives(program.as_text()) == []
    np.testing.assert_array_equal(program(*given), write_rows(array, layout, new, slots, keep))


def test_on_neuron_no_index_reaches_beyond_the_cache() -> None:
    _, given, _ = appended("BSKH", "all")
    text = jax.jit(append).trace(*given).lower(lowering_platforms=("neuron",)).as_text()
    assert "stablehlo.scatter" not in text
    assert check(append, *given) == ()


def test_an_append_to_pages_exchanges_tokens_alone() -> None:
    """Pages split over all devices, in any order, one missing; slots in and beyond them."""
    sharding, page, per_row = sharding_of("batch"), 16, S // 16
    order = np.random.default_rng(5).permutation(B * per_row).astype(np.int32)
    table = jnp.asarray(order.reshape(B, per_row)).at[3, 2].set(-1)
    pool, new = floats(B * per_row, K, page, H), floats(B, 3, K, H, seed=6)
    slots = jnp.asarray([0, 15, S - 1, 31, 30, -2, S - 3, S + 1], jnp.int32)
    keep = jnp.asarray(np.random.default_rng(7).random((B, 3)) < 0.8)

    def write(pool: Any, *rest: Any, split: bool = True) -> Any:
        table, new, slots, keep = rest
        kv = jax_tkg.Paged(
            key=pool, value=pool + 1, k_scale=None, v_scale=None, dtype=np.dtype(np.float32),
            page_indices=table,
        )  # fmt: skip
        if not split:
            kv = kv.write(new, new, slots, keep)
        else:
            kv = kv.write_split(new, new, slots, keep, in_bounds=False)
        return kv.key, kv.value

    want = write(pool, table, new, slots, keep, split=False)
    given = [
        jax.device_put(x, sharding.named(axes))
        for x, axes in ((pool, "P"), (table, ""), (new, "B"), (slots, ""), (keep, ""))
    ]
    program = jax.jit(write).lower(*given).compile(QUICKLY)
    assert max(size for _, size in collectives(program.as_text())) == new.nbytes
    jax.tree.map(np.testing.assert_array_equal, program(*given), want)


# --- the prompt


def prompt() -> dict[str, jax.Array]:
    tokens = 24
    lengths = jnp.asarray([S, 40, 3, 33, 24, 17, S, 34], jnp.int32)
    return {
        "query": floats(B, tokens, N, H, seed=6),
        "key": floats(B, S, K, H, seed=7),
        "value": floats(B, S, K, H, seed=8),
        "sinks": floats(N, seed=9),
        "key_value_seq_lengths": lengths,
    }


OF_PROMPT = {"query": "BTNH", "key": "BSKH", "value": "BSKH", "sinks": "N"} | {
    "key_value_seq_lengths": "B"
}


def attend(given: dict[str, Any], **options: Any) -> Any:
    return jax_tkg.attention_cte(**given, return_residual=True, **options)


def of_a_prompt(split: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The program of several tiles of keys in each part, and where its arguments lie."""
    monkeypatch.setattr(prefill_plan, "BLOCK_LARGEST", 12)
    monkeypatch.setattr(prefill_plan, "BLOCK_SMALLEST", 3)
    given = placed(prompt(), OF_PROMPT, sharding_of(split))
    return jax.jit(lambda x: attend(x)).lower(given).compile(QUICKLY), given


@pytest.mark.parametrize(
    "split", [pytest.param(s, marks=() if s == "all" else SLOW) for s in SPLITS]
)
def test_a_prompt_reads_the_cache_where_it_lies(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, given = of_a_prompt(split, monkeypatch)
    found = collectives(program.as_text())
    assert {name for name, _ in found} == ({"all-reduce"} if split in ("keys", "all") else set())
    assert_close(program(given), jax.jit(lambda x: attend(x, implementation="reference"))(prompt()))


@SLOW
def test_tiles_of_consecutive_slots_would_be_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_plan.math, "gcd", lambda *_: 1)
    program, _ = of_a_prompt("keys", monkeypatch)
    assert ("all-gather", 4 * B * S * K * H) in collectives(program.as_text())
