"""What devices exchange: the numbers written down, and never the keys or values."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

import jax_tkg
from jax_tkg.online import plan
from jax_tkg.sharding import AttentionSharding
from tests.calls import QUICKLY, assert_close
from tests.sharding.cells import (
    LETTERS,
    SPLITS,
    B,
    H,
    K,
    N,
    S,
    T,
    arrays,
    attend,
    collectives,
    gathers_of_the_cache,
    loss,
    make_mesh,
    placed,
    replicated,
    wanted,
)
from tests.sharding.golden.cases import CASES, FILE, counted, name_of, program

GOLDEN = json.loads(FILE.read_text())
QUICK = {
    ("auto", "all", "gradient"),
    ("explicit", "all", "forward"),
    ("sharding=", "all", "forward"),
}
SLOW = pytest.mark.slow(reason="each case is a program of its own; the quick ones have all splits")
NEWEST = tuple(int(n) for n in jax.__version__.split(".")[:2]) >= (0, 10)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else SLOW) for c in CASES])
def test_exchanges_of_a_case(case: Any) -> None:
    """Made anew by `python -m tests.sharding.golden.cases`."""
    text, sharding = program(*case)
    assert not gathers_of_the_cache(text, sharding)
    found, golden = counted(text), GOLDEN[name_of(*case)]
    if NEWEST:
        assert found == golden
    elif case[0] in ("sharding=", "shard_map"):  # XLA's choice: the rest, and what it joins
        bytes_of = [{n: x["bytes"] for n, x in counts.items()} for counts in (found, golden)]
        assert bytes_of[0] == bytes_of[1]


def test_golden_numbers_are_what_the_merge_needs() -> None:
    """Independently of the golden file: of each device's rows a maximum, then outputs and a sum."""
    for split, parts in SPLITS.items():
        rows = B * T * N // (4 if split == "all" else 8 if split in ("batch", "heads") else 1)
        merge = {"count": 2, "bytes": 4 * rows * (1 + H + 1)}
        for way in ("explicit", "shard_map", "sharding="):
            found = GOLDEN[name_of(way, split, "forward")]
            assert found == ({"all-reduce": merge} if "keys" in parts else {})
    assert not any("all-to-all" in found for found in GOLDEN.values())


@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_function_that_gathers_is_caught(kind: str) -> None:
    sharding = AttentionSharding(make_mesh("keys", 8), keys="sp")

    def gathering(given: dict[str, Any]) -> Any:
        return attend(given | {kind: replicated(given[kind], sharding)})

    text = jax.jit(gathering).lower(placed(sharding)).compile(QUICKLY).as_text()
    (gather,) = gathers_of_the_cache(text, sharding)
    assert gather == ("all-gather", 4 * B * S * K * H)


# The compiler's own partitioning, of long caches


def long_cache(layout: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays with keys and values in a layout, and the letters of their axes."""
    cls: Any = getattr(jax_tkg, layout)
    letters = LETTERS | {"key": cls.key_axes, "value": cls.value_axes}
    given = {
        n: np.transpose(x, [LETTERS[n].index(a) for a in letters[n]])
        if n in ("key", "value")
        else x
        for n, x in arrays().items()
    }
    return given, letters


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        pytest.param(layout, split, marks=() if layout == "BKSH" and split == "all" else SLOW)
        for layout in ("BSKH", "BKSH", "BKHS")
        for split in SPLITS
    ],
)
def test_tiles_of_a_long_cache_stay_where_they_are(
    layout: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says how the arrays lie, and the cache is too long for one tile."""
    monkeypatch.setattr(plan, "BLOCK_SCORE_BYTES", 0)
    monkeypatch.setattr(plan, "BLOCK_TILE", 3)  # the last tile of a part overlaps its neighbour
    sharding = AttentionSharding(make_mesh(split, 8), **SPLITS[split])
    given, letters = long_cache(layout)

    def forward(given: dict[str, Any]) -> Any:
        given = dict(given)
        kv = getattr(jax_tkg, layout)(
            key=given.pop("key"),
            value=given.pop("value"),
            k_scale=None,
            v_scale=None,
            dtype=np.dtype(np.float32),
        )
        return attend({**given, "key": kv})

    def gradient(given: dict[str, Any]) -> Any:
        keys = {name: given[name] for name in ("key", "value")}
        return jax.grad(lambda keys: loss(forward({**given, **keys})))(keys)

    split_arrays = {n: jax.device_put(x, sharding.named(letters[n])) for n, x in given.items()}
    for function, want in (
        (forward, wanted()[0]),
        (gradient, {n: in_letters(wanted()[1][n], letters[n]) for n in ("key", "value")}),
    ):
        compiled = jax.jit(function).lower(split_arrays).compile(QUICKLY)
        assert not gathers_of_the_cache(compiled.as_text(), sharding)
        assert_close(compiled(split_arrays), want)


def in_letters(array: Any, letters: str) -> Any:
    return np.transpose(np.asarray(array), ["BSKH".index(a) for a in letters])


def test_blocks_of_consecutive_slots_would_be_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without parts the same program gathers: what the parts are for."""
    monkeypatch.setattr(plan, "BLOCK_SCORE_BYTES", 0)
    monkeypatch.setattr(plan, "BLOCK_TILE", 8)
    monkeypatch.setattr(plan.math, "gcd", lambda *_: 1)
    sharding = AttentionSharding(make_mesh("keys", 8), keys="sp")
    text = jax.jit(attend).lower(placed(sharding)).compile(QUICKLY).as_text()
    assert gathers_of_the_cache(text, sharding)


def test_pages_are_split_by_rows_and_heads() -> None:
    """A row's pages lie in its device's part of the pool; tables number the whole pool."""
    sharding = AttentionSharding(make_mesh("all", 8), batch="dp", heads="tp", keys=None)
    page, per_row = 16, S // 16
    given = jax.tree.map(jax.numpy.asarray, arrays())
    rows = {n: np.asarray(given.pop(n)) for n in ("key", "value")}
    order = np.random.default_rng(1).permutation(B * per_row // 2)
    order = np.concatenate([order, order + len(order)])  # any order within each half
    table = np.argsort(order).astype(np.int32).reshape(B, per_row)

    def pool(x: np.ndarray) -> np.ndarray:
        pages = x.reshape(B * per_row, page, K, H).swapaxes(1, 2)
        return pages[order]

    def paged(pools: dict[str, Any], table: Any) -> Any:
        kv = jax_tkg.Paged(
            **pools, k_scale=None, v_scale=None, dtype=np.dtype(np.float32), page_indices=table
        )
        return attend({**given, "key": kv}, sharding=sharding)

    pools = {n: jax.device_put(pool(x), sharding.named("PKLH")) for n, x in rows.items()}
    compiled = (
        jax.jit(paged).lower(pools, jax.device_put(table, sharding.named("BS"))).compile(QUICKLY)
    )
    assert not collectives(compiled.as_text())
    assert_close(compiled(pools, table), wanted()[0])
