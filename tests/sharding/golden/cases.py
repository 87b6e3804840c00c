"""What sharded calls exchange between devices, in the programs that XLA makes of them.

    python -m tests.sharding.golden.cases

writes collectives.json beside this file anew, for the newest supported JAX; read the difference
before committing it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

from jax_tkg.sharding import AttentionSharding
from tests.calls import QUICKLY
from tests.sharding.cells import (
    SPLITS,
    call_of,
    collectives,
    make_mesh,
    placed,
    set_mesh,
    with_gradient,
)

FILE = Path(__file__).with_name("collectives.json")
CASES = [
    (way, split, kind)
    for way in ("auto", "explicit", "shard_map", "sharding=")
    for split in SPLITS
    for kind in ("forward", "gradient")
]
"""All on eight devices."""


def program(way: str, split: str, kind: str) -> tuple[str, AttentionSharding]:
    """The compiled text of a case."""
    mesh = make_mesh(split, 8, "explicit" if way == "explicit" else "auto")
    sharding = AttentionSharding(mesh, **SPLITS[split])
    call = call_of(way, sharding, "xla")
    function: Any = call if kind == "forward" else with_gradient(call)
    with set_mesh(mesh):
        lowered = jax.jit(function).lower(placed(sharding))
        return str(lowered.compile(QUICKLY).as_text()), sharding


def name_of(way: str, split: str, kind: str) -> str:
    return f"{way} / {split} / {kind}"


def counted(text: str) -> dict[str, dict[str, int]]:
    """By the kind of exchange: how many, and the bytes of their results on a device."""
    found: dict[str, dict[str, int]] = {}
    for name, size in collectives(text):
        entry = found.setdefault(name, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found


def main() -> None:
    found = {name_of(*case): counted(program(*case)[0]) for case in CASES}
    FILE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
