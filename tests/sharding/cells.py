"""The matrix of sharded calls: how the sharding is said, what is split, over how many devices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_tkg
from jax_tkg.attention import prepare
from jax_tkg.reference import attend_reference
from jax_tkg.sharding import AttentionSharding
from tests import oracle
from tests.calls import QUICKLY

B, T, N, K, H, S = 8, 2, 16, 8, 16, 64
Arrays = tuple[jax.Array, ...]
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # jax 0.7

LETTERS = {
    "query": "BTNH",
    "key": "BSKH",
    "value": "BSKH",
    "new_key": "BTKH",
    "new_value": "BTKH",
    "sinks": "N",
    "key_value_seq_lengths": "B",
    "key_value_seq_starts": "B",
}
FLOATS = tuple(LETTERS)[:6]

SPLITS: dict[str, dict[str, Any]] = {
    "batch": {"batch": "dp"},
    "heads": {"heads": "tp"},
    "keys": {"keys": "sp"},
    "all": {"batch": "dp", "heads": "tp", "keys": "sp"},
}
_SIZES = {2: (1, 1, 2), 4: (1, 2, 2), 8: (2, 2, 2)}
WAYS = ("auto", "explicit", "shard_map", "sharding=")


def make_mesh(split: str, devices: int, kind: str = "auto") -> Mesh:
    """Over some of the axes dp, tp, sp; of "all" the last ones first."""
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    names = tuple(SPLITS[split].values())
    sizes = _SIZES[devices] if split == "all" else (devices,)
    return jax.make_mesh(
        sizes, names, axis_types=(kinds[kind],) * len(names), devices=jax.devices()[:devices]
    )


@cache
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"B": B, "T": T, "N": N, "K": K, "H": H, "S": S}
    shapes = {name: [sizes[a] for a in LETTERS[name]] for name in FLOATS}
    floats = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    # One that is full, some that end inside a device's slots, some that leave devices without any.
    lengths = np.array([S + T, 40, 3, 33, T, 17, 64, 34], np.int32)
    starts = np.array([0, 0, 2, 30, 0, 16, 5, 33], np.int32)
    return {**floats, "key_value_seq_lengths": lengths, "key_value_seq_starts": starts}


def attend(given: dict[str, Any], **options: Any) -> Arrays:
    return jax_tkg.attention_tkg(**given, **options, return_residual=True)  # type: ignore[no-any-return]


def loss(results: Arrays) -> jax.Array:
    out, lse = results
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(0.5 * lse))


def with_gradient(run: Callable[[dict[str, Any]], Arrays]) -> Callable[[dict[str, Any]], Any]:
    """The results of a call and the gradients of its floats."""

    def both(given: dict[str, Any]) -> Any:
        floats = {name: given[name] for name in FLOATS}

        def total(floats: dict[str, Any]) -> Any:
            results = run({**given, **floats})
            return loss(results), results

        gradients, results = jax.grad(total, has_aux=True)(floats)
        return results, gradients

    return both


@cache
def wanted() -> Any:
    """The results in float64 and, of autodiff on one device, the gradients."""
    exact = oracle.attention(oracle.Inputs(**arrays()))
    results = exact.out.astype(np.float32), exact.lse.astype(np.float32)

    def reference(given: dict[str, Any]) -> Arrays:
        out, lse = attend_reference(*prepare(**given))
        return out, lse

    return results, jax.jit(with_gradient(reference))(arrays())[1]


def placed(sharding: AttentionSharding) -> dict[str, jax.Array]:
    """The arrays where the sharding has them."""
    return {n: jax.device_put(x, sharding.named(LETTERS[n])) for n, x in arrays().items()}


def call_of(way: str, sharding: AttentionSharding, implementation: str) -> Any:
    """The call as a function of the placed arrays, said in one of the `WAYS`."""
    if way == "sharding=":
        return lambda given: attend(given, sharding=sharding, implementation=implementation)
    if way != "shard_map":
        return lambda given: attend(given, implementation=implementation)
    # Who maps batch and heads alone need not say anything; parts of the keys have to be merged.
    told = sharding if sharding.keys else None
    return jax.shard_map(
        lambda given: attend(given, sharding=told, implementation=implementation),
        mesh=sharding.mesh,
        in_specs=({name: sharding.spec(axes) for name, axes in LETTERS.items()},),
        out_specs=(sharding.spec("BTNH"), sharding.spec("BTN")),
    )


def cell(way: str, split: str, devices: int, implementation: str) -> tuple[Any, Any, Mesh]:
    """A jitted function of results and gradients, its arguments, the mesh to be set."""
    mesh = make_mesh(split, devices, "explicit" if way == "explicit" else "auto")
    sharding = AttentionSharding(mesh, **SPLITS[split])
    function = with_gradient(call_of(way, sharding, implementation))
    return jax.jit(function, compiler_options=QUICKLY), placed(sharding), mesh


# --- what a compiled program exchanges

_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def collectives(text: str) -> list[tuple[str, int]]:
    """Of a compiled program: each exchange and the bytes of its result on a device, sorted."""
    found = []
    for result, name in _COLLECTIVE.findall(text):
        shapes = _SHAPE.findall(result)
        found.append((name, sum(_bytes(*shape) for shape in shapes)))
    return sorted(found)


def _bytes(kind: str, bits: str, dims: str) -> int:
    size = 1 if kind == "pred" else int(bits) // 8
    return size * math.prod(int(n) for n in dims.split(",") if n)


def gathers_of_the_cache(text: str, sharding: AttentionSharding) -> list[tuple[str, int]]:
    """What moves as much as a device has of the keys, or more; a sum of cotangents does not."""
    parts = math.prod(sharding.size(role) for role in ("batch", "heads", "keys"))
    of_device = 4 * B * S * K * H // parts
    return [(n, size) for n, size in collectives(text) if n != "all-reduce" and size >= of_device]


def replicated(x: Any, sharding: AttentionSharding) -> Any:
    """`x` made the same on all devices: what must be noticed if it is done to a cache."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec()))
