"""Narrow heads in the decode kernel: a matmul takes two key columns at once.

A matmul takes as many cycles as columns move, and at least 64. Heads of 64 channels use half of the
partitions, so that where few rows move two key columns fit into one. Keys lie one below the other,
and meet queries that are 0 where the other key is. Values lie side by side; half of the products
are those of one column with the weights of the other, and nobody reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jax_tkg.nki.dialect import nl
from jax_tkg.nki.rows import BANK_ELEMENTS, PARTITIONS, RowGroup

NARROW = PARTITIONS // 2
"""Channels of heads that are packed, and the fewest cycles of a matmul."""

VECTOR_CYCLES = 2.5
"""Cycles of the Tensor engine in one of the Vector engine."""

LEAST_HALVES = 40
"""Columns from which on a tile may be loaded in halves: shorter runs of values take too long."""

NEVER = 1 << 30
"""Columns that no tile has."""


@dataclass(frozen=True)
class Packing(nl.NKIObject):
    """From how many cached columns in a tile on a matmul takes two of them.

    Attributes:
        keys_from: queries times keys.
        values_from: weights times values.
        in_halves: keys are stored transposed: those of both columns are from different halves of
            the tile.
        keys_where_masked: also keys that only some rows of a pair may see. One that is NaN would
            otherwise reach the others: 0 * NaN is NaN, in the other column.
    """

    keys_from: int
    values_from: int
    in_halves: bool
    keys_where_masked: bool


def choose_packing(
    head_dim: int,
    value_head_dim: int,
    layout: str,
    key_bytes: int,
    columns: int,
    groups: Sequence[RowGroup],
    *,
    by_slot: bool,
    sees_alike: bool,
    has_mask: bool,
) -> Packing:
    """The packing of tiles that all these groups of rows have.

    By position rows of a pair may all see the same keys, as `sees_alike` says; of a dense mask
    nothing is known.

    It is work for other engines too, which fewer columns do not make up for: queries are copied
    twice, once for all `columns` of a program, and the second half of the products is one more
    addition a tile. Not keys of pages, which gathers bring column by column, nor 8-bit ones, which
    are transposed in pairs of channels. Keys that are stored transposed come
    in halves, and values with half as long runs; not where masks or positions are loaded `by_slot`,
    of which there would be half as long ones too.
    """
    keys_from = values_from = NEVER
    in_halves = layout == "BKHS"
    is_turned = layout != "paged" and key_bytes > 1
    if head_dim == NARROW and not has_mask and (not by_slot if in_halves else is_turned):
        worth_from = max(_worth_from(g, 2 * NARROW + 2 * g.rows) for g in groups)
        if columns >= worth_from:
            keys_from = LEAST_HALVES if in_halves else 2
    if value_head_dim == NARROW:
        values_from = max(_worth_from(g, max(NARROW, g.rows)) for g in groups)
    return Packing(keys_from, values_from, in_halves, sees_alike)


def columns_of_bank(head_dim: int, rows: int) -> int:
    """Columns of logits in a bank of PSUM: even where a matmul might make two of them."""
    columns = BANK_ELEMENTS // rows
    return columns - columns % 2 if head_dim == NARROW and columns > 1 else columns


def _worth_from(group: RowGroup, cycles: int) -> int:
    """Columns that save more of the Tensor engine than so many cycles of the Vector engine."""
    rows = group.rows_per_pair
    saved = group.pairs * (2 * max(NARROW, rows) - max(NARROW, 2 * rows))
    return 2 * int(VECTOR_CYCLES * cycles // saved + 1) if saved > 0 else NEVER
