"""Choices of the decode kernel's plan that weigh what loads take and what is done with them."""

import math

from jax_tkg.nki.rows import GROUP_ROWS, PARTITIONS, row_groups
from jax_tkg.nki.tiles import END_ELEMENTS, columns_of

TRN2_HBM_GBPS, TENSOR_GHZ, VECTOR_GHZ, MATMUL_CYCLES = 362.0, 2.4, 0.96, 64
"""Of a core; a matmul of few columns."""

LONG_SHARE = 4096
"""Slots of a program from which on loads are worth another group of rows."""


ONE_TILE_KEYS = 2048
"""A program's part of a cache up to this size is one tile and not a loop over live ones."""


def loads_decide(rows: int, head_dim: int, value_head_dim: int, *, is_small: bool) -> bool:
    """Whether loading cached keys takes clearly longer than what so many rows do with them.

    Then nothing should delay the loads; else what the engines can do while the first keys arrive
    should come first. In ns for 128 keys and values, on trn2: the bytes of 16-bit numbers, or of
    8-bit ones if they are small; two products, and four passes over the logits.
    """
    size = 1 if is_small else 2
    loads = PARTITIONS * (head_dim + value_head_dim) * size / TRN2_HBM_GBPS
    work = 2 * MATMUL_CYCLES / TENSOR_GHZ + 4 * rows / VECTOR_GHZ
    return loads > 1.5 * work


def choose_group_rows(
    ranges: tuple[tuple[int, int], tuple[int, int]],
    group: int,
    tokens: int,
    share: int,
    max_keys: int,
    head_dim: int,
    value_head_dim: int,
) -> int:
    """Most rows of a group: of known tiles half as many where these then are as many as before.

    They are twice as large, so that a partition reads its values in runs twice as long; where
    these were long enough, that gains nothing.
    """
    found = {}
    for most in (GROUP_ROWS, GROUP_ROWS // 2):
        groups = row_groups(*ranges, group, tokens, most)
        columns = columns_of(max(g.rows for g in groups), head_dim, max_keys)
        found[most] = len(groups) * math.ceil(share / (PARTITIONS * columns)), columns
    (steps, columns), (others, _) = found.values()
    is_short = columns * value_head_dim < END_ELEMENTS and share >= LONG_SHARE
    return GROUP_ROWS // 2 if is_short and others <= steps else GROUP_ROWS
