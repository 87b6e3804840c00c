"""What lives in SBUF while the kernel runs, in groups named by what they are for."""

from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.dialect import nl
from jax_tkg.nki.plan import PARTITIONS, KernelPlan

LOWEST_MAX = -1.0e30
"""The running maximum before any key. A masked logit is far below, so that its weight is 0."""

MASKED = -3.0e38
"""A masked logit; finite, so that no difference of two is NaN."""


@dataclass
class Inputs(nl.NKIObject):
    """The arrays of a launch, in HBM; None for what the problem does not have.

    Attributes:
        query: `[B, T, N, H]`.
        key, value: the cache in the plan's layout.
        bounds: float32 `[2, B, T]`: token t of row b sees positions bounds[0] <= p < bounds[1].
        positions: int32 `[B, S]`, position of each slot; None where slot s holds position s.
        page_rows: int32 `[B, K, S / n]`: of a paged cache, the row of every n slots in the pool
            seen as `[rows, n * H]`.
        new_key, new_value: `[B, T, K, H]` and `[B, T, K, Hv]` beside the cache.
        new_bounds, new_positions: of the new keys, float32 `[2, B, T]` and int32 `[B, T]`.
        sinks: float32 `[B * N * T]` in the order b, k, g, t.
        hidden: uint8 `[B|1, N|1, T|1, S']`, 1 where a dense mask hides a key; S' as in `bias`.
        bias: `[B|1, N|1, T|1, S']`, added to the logits; S' is S, then T if keys are beside.
        logit_scales: float32 `[B * K]`, scale of the logits of each pair, with its keys' scale.
        value_scales: float32 `[B * K]`, scale of the values of each pair.
    """

    query: Any
    key: Any
    value: Any
    bounds: Any
    positions: Any
    page_rows: Any
    new_key: Any
    new_value: Any
    new_bounds: Any
    new_positions: Any
    sinks: Any
    hidden: Any
    bias: Any
    logit_scales: Any
    value_scales: Any


@dataclass
class KeySource(nl.NKIObject):
    """Where the keys of a pair come from: the cache, or the new ones beside it.

    Attributes:
        pair: which.
        keys: `[slots, H]`, or `[H, slots]` where they are transposed, or a pool `[rows, n * H]`.
        values: `[slots, Hv]` or a pool.
        is_transposed: see `keys`.
        page_rows: int32 `[S / n]`, the row of every n slots in the pools; None without pages.
        low, high: `[128, T]`, positions that each token sees.
        positions: int32 `[slots]`, or None where slot s holds position s.
        first_column: column of slot 0 in dense masks and biases.
        logit_scale: a number, or one float32 in every partition `[128, 1]`.
        value_scale: None, or one float32 in every partition.
    """

    pair: int
    keys: Any
    values: Any
    is_transposed: bool
    page_rows: Any
    low: Any
    high: Any
    positions: Any
    first_column: int
    logit_scale: Any
    value_scale: Any


@dataclass(frozen=True)
class RowGroup(nl.NKIObject):
    """Pairs that are processed side by side: pair i has the rows i * M to (i + 1) * M of R."""

    pairs: tuple[int, ...]
    rows_per_pair: int
    rows: int


@dataclass
class RowBuffers(nl.NKIObject):
    """The queries of a row group and what was found so far.

    Attributes:
        query: one tile `[h, R]` for each chunk of 128 of H.
        max, sum: running maximum and sum `[128, R]`, the same in every partition.
        output: one tile `[hv, R]` for each chunk of 128 of Hv, not yet divided by the sum.
        decay: exp(old maximum - new maximum) of the last tile, `[128, R]`.
    """

    query: Any
    max: Any
    sum: Any
    output: Any
    decay: Any


@dataclass
class Constants(nl.NKIObject):
    """Tiles that no step changes.

    Attributes:
        ones: `[128, 128]` float32: a matmul with it adds over partitions and broadcasts.
        low, high: bounds of visible positions `[128, B, T]`, the same in every partition.
        new_low, new_high: of the new keys beside the cache, or None.
        sinks: `[128, B * N * T]` in the order of rows, or None.
        logit_scales, value_scales: `[128, B * K]`, or None.
    """

    ones: Any
    low: Any
    high: Any
    new_low: Any
    new_high: Any
    sinks: Any
    logit_scales: Any
    value_scales: Any


def chunks(size: int) -> list[tuple[int, int]]:
    """(start, size) of the pieces of an axis that fit into the partitions."""
    pieces = []
    for start in range(0, size, PARTITIONS):
        pieces.append((start, min(PARTITIONS, size - start)))
    return pieces


def batch_of(plan: KernelPlan, pair: int) -> int:
    """The sequence of a pair."""
    return pair // plan.kv_heads


def kv_head_of(plan: KernelPlan, pair: int) -> int:
    """The KV head of a pair."""
    return pair % plan.kv_heads
