"""Logit rows of the decode kernel: groups that are processed at once, blocks that end at once."""

import itertools
from dataclasses import dataclass, replace

from jax_tkg.nki.dialect import nl

PARTITIONS = 128
GROUP_ROWS = 128
"""Rows of several pairs in one group: their maxima are transposed together."""

BANK_ELEMENTS = 512
"""Float32 of a partition in a bank of PSUM."""

MAX_ROWS = BANK_ELEMENTS
"""Rows of one pair: the columns that a matmul moves."""

BLOCK_ROWS = 256
"""Rows whose float32 state one fast exchange between programs takes: 1 KiB a partition."""


@dataclass(frozen=True)
class RowChunk(nl.NKIObject):
    """Rows of a group that fit into the partitions: a rectangle of sequences, heads and tokens.

    Attributes:
        first_batch, batches: sequences.
        first_head, heads: query heads.
        first_token, tokens: new tokens.
        first_row: of the group.
        rows: how many.
    """

    first_batch: int
    batches: int
    first_head: int
    heads: int
    first_token: int
    tokens: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class RowGroup(nl.NKIObject):
    """A rectangle of sequences and heads, processed side by side.

    Its rows are in the order: sequence, KV head, query head of it, token.

    Attributes:
        first_batch, batches: sequences.
        first_kv, kv_heads: KV heads.
        first_query, queries: of the G query heads of each.
        tokens: T.
        first_row: of the block.
        rows_per_pair: M, rows that share keys.
        rows_per_sequence: rows of one sequence.
        pairs: how many.
        rows: R.
        chunks: its rows in pieces of up to 128.
    """

    first_batch: int
    batches: int
    first_kv: int
    kv_heads: int
    first_query: int
    queries: int
    tokens: int
    first_row: int
    rows_per_pair: int
    rows_per_sequence: int
    pairs: int
    rows: int
    chunks: tuple[RowChunk, ...]


def row_group(
    batches: tuple[int, int],
    kv_heads: tuple[int, int],
    queries: tuple[int, int],
    tokens: int,
    group: int,
) -> RowGroup:
    """The group of ranges (first, count); of all G query heads unless it has one KV head."""
    heads = (kv_heads[0] * group + queries[0], kv_heads[1] * queries[1])
    per_pair = queries[1] * tokens
    per_sequence = kv_heads[1] * per_pair
    return RowGroup(
        *batches, *kv_heads, *queries, tokens, 0, per_pair, per_sequence,
        batches[1] * kv_heads[1], batches[1] * per_sequence, row_chunks(batches, heads, tokens),
    )  # fmt: skip


def row_chunks(
    batches: tuple[int, int], heads: tuple[int, int], tokens: int
) -> tuple[RowChunk, ...]:
    """Rows of ranges (first, count): all at once, or so many heads, or so many tokens of one."""
    (b, n), (h, count) = batches, heads
    if n * count * tokens <= PARTITIONS:
        return (RowChunk(b, n, h, count, 0, tokens, 0, n * count * tokens),)
    chunks: list[RowChunk] = []
    per_head = max(1, PARTITIONS // tokens)
    for batch, first in itertools.product(range(b, b + n), range(h, h + count, per_head)):
        together = min(per_head, h + count - first)
        for token in range(0, tokens, PARTITIONS):
            some = min(PARTITIONS, tokens - token)
            row = chunks[-1].first_row + chunks[-1].rows if chunks else 0
            chunks.append(RowChunk(batch, 1, first, together, token, some, row, together * some))
    return tuple(chunks)


def batch_of(group: RowGroup, i: int) -> int:
    """The sequence of the i-th pair of a group."""
    return group.first_batch + i // group.kv_heads


def kv_head_of(group: RowGroup, i: int) -> int:
    """The KV head of the i-th pair of a group."""
    return group.first_kv + i % group.kv_heads


@dataclass(frozen=True)
class RowBlock(nl.NKIObject):
    """Groups whose results are merged, finished and stored together.

    Attributes:
        groups: as processed where tiles of keys are known before the launch.
        sequences: the same rows in groups of one sequence each, for a loop over its live keys.
        rows: of all groups.
    """

    groups: tuple[RowGroup, ...]
    sequences: tuple[RowGroup, ...]
    rows: int


def row_groups(
    batches: tuple[int, int],
    kv_range: tuple[int, int],
    group: int,
    tokens: int,
    most: int = GROUP_ROWS,
) -> list[RowGroup]:
    """Groups of all rows of ranges (first, end) of sequences and KV heads, G query heads of each.

    Those of several pairs have up to `most` rows.

    Raises:
        ValueError: if T is more than 512.
    """
    if tokens > MAX_ROWS:
        raise ValueError(f"T = {tokens} new tokens; the kernel takes at most {MAX_ROWS}.")
    (first, end), (first_kv, end_kv) = batches, kv_range
    kv_heads = end_kv - first_kv
    queries = min(group, MAX_ROWS // tokens)
    heads = max(1, min(kv_heads, most // (group * tokens)))
    together = 1
    if heads == kv_heads:
        together = max(1, most // (kv_heads * group * tokens))
    return [
        row_group(
            (b, min(together, end - b)),
            (k, min(heads, end_kv - k)),
            (g, min(queries, group - g)),
            tokens,
            group,
        )
        for b in range(first, end, together)
        for k in range(first_kv, end_kv, heads)
        for g in range(0, group, queries)
    ]


def sequences_of(groups: list[RowGroup], group: int) -> list[RowGroup]:
    """The same rows in the same order, in groups of one sequence."""
    return [
        replace(
            row_group(
                (some.first_batch + i, 1),
                (some.first_kv, some.kv_heads),
                (some.first_query, some.queries),
                some.tokens,
                group,
            ),
            first_row=some.first_row + i * some.rows_per_sequence,
        )
        for some in groups
        for i in range(some.batches)
    ]


def blocks_of(
    groups: list[RowGroup], group: int, value_head_dim: int, *, together: bool = True
) -> tuple[RowBlock, ...]:
    """Groups one after the other, `together` in blocks of up to `BLOCK_ROWS`, or each by itself.

    Without an exchange or a loop, a group waits for no other.
    """
    most = BLOCK_ROWS // -(-value_head_dim // PARTITIONS) if together else 0
    blocks: list[list[RowGroup]] = []
    for some in groups:
        filled = blocks[-1][-1].first_row + blocks[-1][-1].rows if blocks else most
        if filled + some.rows > most:
            blocks.append([])
            filled = 0
        blocks[-1].append(replace(some, first_row=filled))
    return tuple(
        RowBlock(tuple(b), tuple(sequences_of(b, group)), b[-1].first_row + b[-1].rows)
        for b in blocks
    )
