"""Attention of 16 blocks of queries and 20 heads on a mesh of 8 x 10 devices, 2 x 2 tiles each.

Rows of the mesh split the queries, columns the heads: device (i, j) has two blocks of queries of
two query heads, which share a KV head, and all of that head's keys. Causal attention gives the last
block sixteen times the work of the first; so row i has blocks i and 15 - i, and every device the
same. The result is compared with all scores at once in float64.

    python examples/attention_grid.py
"""

import os
import sys
from functools import partial

ROWS, COLUMNS = 8, 10
HOST_DEVICES = f"--xla_force_host_platform_device_count={ROWS * COLUMNS}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HOST_DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402  (reads the settings)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

import jax_tkg  # noqa: E402

BLOCK = 64
"""Queries of a tile; a tile is those of one head."""

BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 2 * ROWS, 2 * COLUMNS, COLUMNS, 32
TOKENS = BLOCKS * BLOCK

FOLDED = tuple(b for i in range(ROWS) for b in (i, BLOCKS - 1 - i))
IN_ORDER = tuple(range(BLOCKS))
"""Blocks of queries, two for each row of the mesh."""


def positions_of(order: tuple[int, ...]) -> np.ndarray:
    """Token positions in the order of the mesh's rows."""
    return (np.array(order)[:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).reshape(-1)


def work_of(order: tuple[int, ...]) -> np.ndarray:
    """Pairs of query and key that each device computes, `[ROWS, COLUMNS]`."""
    of_rows = (positions_of(order) + 1).reshape(ROWS, -1).sum(axis=1)
    return np.tile(of_rows[:, None] * (HEADS // COLUMNS), (1, COLUMNS))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> jax.Array:
    """What a device does: one block of its queries after another, each to its own causal end."""
    blocks = zip(jnp.split(query, 2, axis=1), jnp.split(positions, 2, axis=1), strict=True)
    return jnp.concatenate(
        [jax_tkg.attention_cte(block, key, value, query_positions=at) for block, at in blocks],
        axis=1,
    )


def dense(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """All scores at once, one head after another, in float64."""
    hidden = np.triu(np.ones((TOKENS, TOKENS), bool), 1)
    out = np.empty(query.shape, np.float64)
    for head in range(HEADS):
        shared = head * KV_HEADS // HEADS
        scores = query[0, :, head].astype(np.float64) @ key[0, :, shared].T.astype(np.float64)
        scores = np.where(hidden, -np.inf, scores * HEAD_DIM**-0.5)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[0, :, head] = weights @ value[0, :, shared].astype(np.float64)
    return out


def main() -> int:
    """0 if the grid's result is the dense one and its work balanced."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, TOKENS, HEADS, HEAD_DIM), np.float32)
    key, value = rng.standard_normal((2, 1, TOKENS, KV_HEADS, HEAD_DIM), np.float32)

    mesh = jax.make_mesh((ROWS, COLUMNS), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    spec = partial(PartitionSpec, None)
    on_grid = jax.jit(
        jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(spec("rows", "columns"), *(spec(None, "columns"),) * 2, spec("rows")),
            out_specs=spec("rows", "columns"),
        )
    )
    positions = positions_of(FOLDED)
    found = np.empty(query.shape, np.float32)
    found[:, positions] = on_grid(query[:, positions], key, value, positions[None])

    error = float(np.abs(found - dense(query, key, value)).max())
    print(
        f"{mesh.size} devices, {ROWS} x {COLUMNS}; each has 2 blocks of {BLOCK} queries x 2 heads"
    )
    balances = {}
    for name, order in (("in order", IN_ORDER), ("folded", FOLDED)):
        work = work_of(order)
        balances[name] = work.max() / work.mean()
        print(
            f"blocks {name}: {work.min()} to {work.max()} pairs of query and key a device, "
            f"max/mean {balances[name]:.2f}"
        )
    print(f"largest difference from dense float64: {error:.1e}")
    return 0 if error < 1e-5 and balances["folded"] == 1 < balances["in order"] else 1


if __name__ == "__main__":
    sys.exit(main())
