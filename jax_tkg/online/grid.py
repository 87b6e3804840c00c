"""Which tiles of queries by keys anything can be visible in, as far as shapes and options say.

Pure Python. A query sees no key further ahead than causality or the window lets it, and none
further back than the window: pairs of tiles beyond that are neither loaded nor computed. What only
the arrays know (lengths, given positions, key bounds, a dense mask) can narrow it, never widen it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jax_tkg.problem import AttentionProblem, Op


class Reach(NamedTuple):
    """Query t sees keys from t + before to t + after, both inclusive; None is no bound."""

    before: int | None
    after: int | None


def reach(problem: AttentionProblem, *, beside: bool) -> Reach:
    """How far the queries see among the cached keys, or among the new ones beside them."""
    if problem.has_query_positions or (problem.has_positions and not beside):
        return Reach(None, None)
    window = problem.rule.window
    left, right = (None, None) if window is None else (window.left, window.right)
    if problem.rule.causal:
        right = 0
    before, after = (None if left is None else -left), right
    if beside:
        return Reach(before, after)
    # Query t is at L - T + t with a length L of at most S, or S + T: before that it sees less.
    offset = problem.kv_len - (0 if problem.has_new_kv else problem.num_tokens)
    if problem.has_lengths:
        # attention_tkg also takes the lengths of a cache that has overflowed.
        known = after is not None and problem.op is Op.CTE
        return Reach(None, offset + after if known and after is not None else None)
    return Reach(*(None if x is None else offset + x for x in (before, after)))


@dataclass(frozen=True)
class TileGrid:
    """Tiles of queries by tiles of keys; the last of each overlaps its neighbour if need be.

    Attributes:
        tokens, keys: how many queries and keys there are.
        query_tile, key_tile: how many of them a tile has.
        spans: for each tile of queries, the first tile of keys and the one behind the last.
    """

    tokens: int
    keys: int
    query_tile: int
    key_tile: int
    spans: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        """Pairs of tiles without leaving any out."""
        return len(self.spans) * -(-self.keys // self.key_tile)

    @property
    def computed(self) -> int:
        """Pairs of tiles in which something may be visible."""
        return sum(end - first for first, end in self.spans)

    def pairs(self) -> np.ndarray:
        """int32 `[computed, 2]`: tile of queries, tile of keys; sorted."""
        listed = [(q, k) for q, span in enumerate(self.spans) for k in range(*span)]
        return np.array(listed, np.int32).reshape(-1, 2)

    def __str__(self) -> str:
        """Sizes, and how much is left out."""
        share = f"{self.computed} of {self.total} tiles"
        return f"{share} of {self.query_tile} queries x {self.key_tile} keys"


def make_grid(
    problem: AttentionProblem, query_tile: int, key_tile: int, *, beside: bool
) -> TileGrid:
    """The grid over the cached keys, or over the new ones beside them.

    Args:
        problem: what is computed.
        query_tile: queries in a tile, at most T.
        key_tile: keys in a tile, at most as many as there are.
        beside: which keys.
    """
    tokens = problem.num_tokens
    keys = tokens if beside else problem.kv_len
    before, after = reach(problem, beside=beside)
    spans = []
    for tile in range(-(-tokens // query_tile)):
        start = min(tile * query_tile, tokens - query_tile)
        first = 0 if before is None else max(start + before, 0)
        end = keys if after is None else min(start + query_tile + after, keys)
        spans.append((first // key_tile, -(-end // key_tile)) if first < end else (0, 0))
    return TileGrid(tokens, keys, query_tile, key_tile, tuple(spans))
