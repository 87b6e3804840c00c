"""Every way to say a sharding, every split, forward and gradient: the numbers of one device."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import jax_tkg
from jax_tkg.online import plan
from jax_tkg.sharding import AttentionSharding
from tests.calls import assert_close, quickly
from tests.sharding.cells import (
    LETTERS,
    SPLITS,
    WAYS,
    arrays,
    attend,
    call_of,
    cell,
    make_mesh,
    placed,
    set_mesh,
    wanted,
    with_gradient,
)

IMPLEMENTATIONS = ("xla", "nki_interpret")
QUICK = {
    *((way, "all", 8, "xla") for way in WAYS),
    ("sharding=", "all", 8, "nki_interpret"),
    ("explicit", "keys", 2, "nki_interpret"),
}
CELLS = [
    (way, split, devices, implementation)
    for way in WAYS
    for split in SPLITS
    for devices in (2, 4, 8)
    for implementation in IMPLEMENTATIONS
]
SLOW = pytest.mark.slow(reason="each cell is a program of its own; the quick ones are the widest")


@pytest.mark.parametrize(
    ("way", "split", "devices", "implementation"),
    [pytest.param(*c, marks=() if c in QUICK else SLOW) for c in CELLS],
)
def test_cell(way: str, split: str, devices: int, implementation: str) -> None:
    function, given, mesh = cell(way, split, devices, implementation)
    with set_mesh(mesh):
        results, gradients = function(given)
    want_results, want_gradients = wanted()
    assert_close(results, want_results)
    assert_close(gradients, want_gradients)
    for name, found in gradients.items():
        assert found.sharding.is_equivalent_to(given[name].sharding, found.ndim), name


def test_eager() -> None:
    sharding = AttentionSharding(make_mesh("all", 8), **SPLITS["all"])
    found = attend(placed(sharding), sharding=sharding, implementation="nki_interpret")
    assert_close(found, wanted()[0])


@SLOW
@pytest.mark.parametrize("mapped", ["all operands", "query"])
def test_vmap(mapped: str) -> None:
    """A mapped axis beside the split ones; the cache may be shared by the copies."""
    sharding = AttentionSharding(make_mesh("all", 8), **SPLITS["all"])
    given, factors = placed(sharding), jax.numpy.asarray([1.0, -0.5], "float32")
    axes = {name: 0 if mapped == "all operands" or name == "query" else None for name in given}
    copies = {n: x if axes[n] is None else jax.numpy.stack([x, x]) for n, x in given.items()}
    copies["query"] *= factors[:, None, None, None, None]
    function = with_gradient(call_of("sharding=", sharding, "xla"))
    got = quickly(jax.vmap(function, in_axes=(axes,)))(copies)
    one_by_one = [function(given | {"query": given["query"] * x}) for x in factors]
    assert_close(got, jax.tree.map(lambda *x: jax.numpy.stack(x), *one_by_one))


@pytest.mark.parametrize("kind", ["auto", pytest.param("explicit", marks=SLOW)])
def test_inside_a_shard_map_over_other_axes(kind: str) -> None:
    """The caller maps the rows, the op the rest, of which it is told with or without the rows."""
    mesh = make_mesh("all", 8, kind)
    sharding = AttentionSharding(mesh, **SPLITS["all"])
    given = placed(sharding)
    by_rows = AttentionSharding(mesh, batch="dp")
    specs = {name: by_rows.spec(axes) for name, axes in LETTERS.items()}
    for told in (sharding, sharding.without(["dp"])):
        mapped = jax.shard_map(
            lambda given, told=told: attend(given, sharding=told),
            mesh=mesh,
            axis_names={"dp"},
            in_specs=(specs,),
            out_specs=(by_rows.spec("BTNH"), by_rows.spec("BTN")),
        )
        results, gradients = quickly(with_gradient(mapped))(given)
        assert_close(results, wanted()[0])
        assert_close(gradients, wanted()[1])


def test_maximum_exchanged_on_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_TILE", 8)  # two tiles a device
    mesh = make_mesh("all", 8)
    sharding = AttentionSharding(mesh, **SPLITS["all"], merge="every tile")
    explained = str(jax_tkg.explain(**arrays_as_jax(), sharding=sharding))
    assert "maximum exchanged over sp on each" in explained
    results, gradients = quickly(with_gradient(call_of("sharding=", sharding, "xla")))(
        placed(sharding)
    )
    assert_close(results, wanted()[0])
    assert_close(gradients, wanted()[1])


def arrays_as_jax() -> dict[str, Any]:
    return jax.tree.map(jax.numpy.asarray, arrays())


@SLOW
@pytest.mark.parametrize("merge", ["deferred", "every tile"])
def test_shard_map_without_types(merge: str) -> None:
    """The gradient of a sum over devices is then another one."""
    sharding = AttentionSharding(make_mesh("all", 8), **SPLITS["all"], merge=merge)
    mapped = jax.shard_map(
        lambda given: attend(given, sharding=sharding),
        mesh=sharding.mesh,
        in_specs=({name: sharding.spec(axes) for name, axes in LETTERS.items()},),
        out_specs=(sharding.spec("BTNH"), sharding.spec("BTN")),
        check_vma=False,
    )
    results, gradients = quickly(with_gradient(mapped))(placed(sharding))
    assert_close(results, wanted()[0])
    assert_close(gradients, wanted()[1])
