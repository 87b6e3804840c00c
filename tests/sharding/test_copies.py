"""`jax.vmap` over whole caches that are split: nothing of them moves, whatever else is split."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_tkg.online import plan
from jax_tkg.sharding import AttentionSharding
from tests.calls import QUICKLY, assert_close
from tests.sharding.cells import (
    LETTERS,
    B,
    H,
    K,
    S,
    arrays,
    attend,
    collectives,
    set_mesh,
    wanted,
    with_gradient,
)

SLOW = pytest.mark.slow(reason="each case is a program of its own; the quick ones split the most")
COPIES = 2

SPLITS: dict[str, dict[str, Any]] = {
    "slots": {"S": "sp"},
    "rows, slots": {"B": "dp", "S": "sp"},
    "copies, slots": {"V": "dp", "S": "sp"},
    "rows, heads, slots": {"B": "dp", "N": "tp", "S": "sp"},
    "copies, heads, slots": {"V": "dp", "N": "tp", "S": "sp"},
    "copies, rows, slots": {"V": "dp", "B": "tp", "S": "sp"},
}
"""Which mesh axis splits the copies V and the axes of each."""


def mesh_of(kind: str) -> Mesh:
    types = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    return jax.make_mesh((2, 2, 2), ("dp", "tp", "sp"), axis_types=(types[kind],) * 3)


@cache
def both() -> dict[str, np.ndarray]:
    """The call and one with its rows in another order."""
    of_rows = {n: "B" in letters for n, letters in LETTERS.items()}
    return {n: np.stack([x, x[::-1] if of_rows[n] else x]) for n, x in arrays().items()}


def placed(mesh: Mesh, split: str) -> dict[str, jax.Array]:
    by = SPLITS[split] | {"K": SPLITS[split].get("N")}

    def where(name: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(by.get(a) for a in "V" + LETTERS[name])))

    return {n: jax.device_put(x, where(n)) for n, x in both().items()}


def moved(text: str, split: str) -> list[tuple[str, int]]:
    """What moves a quarter of what a device has of the keys, or more, without summing it."""
    of_device = COPIES * 4 * B * S * K * H // 2 ** len(SPLITS[split])
    large = [(name, n) for name, n in collectives(text) if n >= of_device // 4]
    return [x for x in large if x[0] != "all-reduce"]


def assert_right(results: Any, gradients: Any) -> None:
    """Of the second copy the rows are those of the first, backwards; sinks are of all rows."""
    want_results, want_gradients = jax.tree.map(np.asarray, wanted())
    assert_close(results, jax.tree.map(lambda x: np.stack([x, x[::-1]]), want_results))
    for name, want in want_gradients.items():
        second = want[::-1] if "B" in LETTERS[name] else want
        assert_close(gradients[name], np.stack([want, second]))


CASES = [
    (kind, implementation, split)
    for kind in ("auto", "explicit", "sharding=")
    for implementation in ("xla", "nki_interpret")
    for split in SPLITS
]
QUICK = {
    ("auto", "xla", "copies, rows, slots"),
    ("auto", "nki_interpret", "rows, heads, slots"),
    ("explicit", "xla", "copies, heads, slots"),
}


@pytest.mark.parametrize(
    ("kind", "implementation", "split"),
    [pytest.param(*case, marks=() if case in QUICK else SLOW) for case in CASES],
)
def test_caches_stay_where_they_are(kind: str, implementation: str, split: str) -> None:
    mesh = mesh_of("explicit" if kind == "explicit" else "auto")
    by = SPLITS[split]
    told = AttentionSharding(mesh, by.get("B"), by.get("N"), by.get("S"))
    options = {"sharding": told} if kind == "sharding=" else {}
    function = with_gradient(lambda x: attend(x, implementation=implementation, **options))
    given = placed(mesh, split)
    with set_mesh(mesh):
        program = jax.jit(jax.vmap(function)).lower(given).compile(QUICKLY)
        found = program(given)
    assert moved(program.as_text(), split) == []
    assert_right(*found)


@pytest.mark.parametrize("split", [pytest.param(s, marks=SLOW) for s in SPLITS])
def test_tiles_of_long_caches(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one loop for all copies, from the first slot that any of them needs to the last."""
    monkeypatch.setattr(plan, "BLOCK_SCORE_BYTES", 0)
    monkeypatch.setattr(plan, "BLOCK_TILE", 3)
    mesh = mesh_of("auto")
    given = placed(mesh, split)
    program = jax.jit(jax.vmap(with_gradient(attend))).lower(given).compile(QUICKLY)
    assert moved(program.as_text(), split) == []
    assert_right(*program(given))


def test_copies_that_are_joined_with_the_rows_would_move() -> None:
    def joined(given: dict[str, jax.Array]) -> Any:
        """As rows of one call, which have the same sinks."""
        folded = {n: x.reshape(-1, *x.shape[2:]) for n, x in given.items() if n != "sinks"}
        return attend({**folded, "sinks": given["sinks"][0]})

    split = "rows, slots"
    text = jax.jit(joined).lower(placed(mesh_of("auto"), split)).compile(QUICKLY).as_text()
    of_device = COPIES * 4 * B * S * K * H // 4
    assert moved(text, split).count(("all-gather", 2 * of_device)) == 2


@SLOW
def test_levels_of_vmap() -> None:
    """One over whole caches, of which each has another over its queries, and the other way."""
    mesh = mesh_of("auto")
    given = placed(mesh, "rows, slots")
    factors = jnp.asarray([1.0, -0.5, 2.0], jnp.float32)

    def scaled(factor: Any, given: Any) -> Any:
        return attend({**given, "query": given["query"] * factor})

    inner = jax.vmap(jax.vmap(scaled, (0, None)), (None, 0))
    outer = jax.vmap(jax.vmap(scaled, (None, 0)), (0, None))
    whole = jax.vmap(jax.vmap(attend))
    stacked = {n: jnp.stack([x, x[::-1]]) for n, x in given.items()}
    one = jax.jit(attend)
    for i, factor in enumerate(factors):
        changed = [{n: x[c] for n, x in given.items()} for c in range(COPIES)]
        want = [one({**x, "query": x["query"] * factor}) for x in changed]
        want = jax.tree.map(lambda *x: jnp.stack(x), *want)
        assert_close(jax.tree.map(lambda x, i=i: x[:, i], jax.jit(inner)(factors, given)), want)
        assert_close(jax.tree.map(lambda x, i=i: x[i], jax.jit(outer)(factors, given)), want)
    program = jax.jit(whole).lower(stacked).compile(QUICKLY)
    assert moved(program.as_text(), "rows, slots") == []
    found = program(stacked)
    assert_close(jax.tree.map(lambda x: x[1, 1], found), wanted()[0])
