"""From HBM: constants, tables, views of what the rows of a group need."""

from typing import Any

from jax_tkg.nki.buffers import BITS, BOTH_BYTES, Constants, Inputs, chunks
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rope import load_turns
from jax_tkg.nki.rows import PARTITIONS, RowChunk, RowGroup
from jax_tkg.nki.steps.pages import find_first_pages
from jax_tkg.nki.tiles import KeyTile, Piece

TURNED = 32
"""Most that the Vector engine transposes in each direction."""


def load_small(dst: Any, src: Any, by_gpsimd: bool, plan: KernelPlan) -> None:
    """A DMA of a few bytes that come before those of the cache.

    Where GpSimd makes its descriptors, the hardware comes to the cache sooner. GpSimd does not
    where it gathers pages, but in a loop it has time until their numbers arrive.
    """
    is_free = by_gpsimd and (plan.layout != "paged" or plan.live != None)  # noqa: E711
    mode = nisa.dge_mode.swdge if is_free else nisa.dge_mode.unknown
    nisa.dma_copy(dst=dst, src=src, dge_mode=mode)


def load_broadcast(source: Any, plan: KernelPlan) -> Any:
    """Float32 numbers `[n]` in HBM, in every partition: `[128, n]`.

    They are read once; a transpose of a column of them, repeated, has all of them in every
    partition, to the bit. Few are read as a row, which the Vector engine makes a column; of others
    each goes to a partition of its own, which takes a DMA queue as long as 256 bytes.
    """
    total, late = source.size, plan.new_keys_follow
    every = nl.ndarray((PARTITIONS, total), nl.float32, buffer=nl.sbuf)
    for start, count in chunks(total):
        once = nl.ndarray((count, 1), nl.float32, buffer=nl.sbuf)
        mine = source[nl.ds(start, count)]
        if count > TURNED:
            load_small(once, mine.reshape_dim(0, (count, 1)), late, plan)
        else:
            row = nl.ndarray((1, count), nl.float32, buffer=nl.sbuf)
            load_small(row, mine.reshape_dim(0, (1, count)), late, plan)
            nisa.nc_transpose(dst=once, data=row, engine=nisa.engine.vector)
        repeated = nl.ndarray((PARTITIONS, count), nl.float32, buffer=nl.psum)
        wide = once.broadcast(1, PARTITIONS)
        nisa.nc_transpose(dst=repeated, data=wide, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=every[:, nl.ds(start, count)], src=repeated)
    return every


def load_constants(inputs: Inputs, plan: KernelPlan) -> Constants:
    """What every step reads; before all else, where the first pages are."""
    consts = Constants(None, None, None, None, None, None, None, None, None, None, None)
    if plan.layout == "paged":
        consts.live_tiles = load_live_tiles(inputs, plan)
        consts.first_pages = find_first_pages(inputs, plan)
    features, count = plan.features, bits_of(inputs, plan)
    if count > 0:
        consts.bits = nl.ndarray((PARTITIONS, count), nl.uint16, buffer=nl.sbuf)
        nisa.memset(dst=consts.bits[:, 0:1], value=BOTH_BYTES)
        for have in (1, 2, 4):  # as many again, shifted: not by GpSimd, which has DMAs to start
            if have < count:
                more = min(have, count - have)
                nisa.tensor_scalar(
                    dst=consts.bits[:, nl.ds(have, more)],
                    data=consts.bits[:, 0:more],
                    op0=nl.left_shift,
                    operand0=have,
                )
    if plan.new_pairs > 0:
        shape = (plan.new_pairs, min(PARTITIONS, plan.value_head_dim))
        consts.ones = nl.ndarray(shape, inputs.query.dtype, buffer=nl.sbuf)
        nisa.memset(dst=consts.ones, value=1.0)
    if plan.constants:
        name_constants(consts, load_broadcast(inputs.constants[nl.program_id(0)], plan), plan)
    if features.rotary != None:  # noqa: E711  (the kernel language has no `is`)
        consts.turns = load_turns(inputs.rotary_table, PARTITIONS)
    return consts


def bits_of(inputs: Inputs, plan: KernelPlan) -> int:
    """How many bits of a byte the tables of this launch use; 0 where they have none."""
    if plan.tokens > 1 and (plan.features.has_mask or plan.features.has_new_keys):
        return min(BITS, plan.tokens)
    return BITS if plan.new_pairs > BITS or has_sequence_bits(inputs, plan) else 0


def has_sequence_bits(inputs: Inputs, plan: KernelPlan) -> bool:
    """Whether the dense mask of cached keys has a bit for each sequence: see `Inputs.hidden`."""
    return plan.features.has_mask and plan.tokens == 1 and inputs.hidden.shape[4] > 1


def name_constants(consts: Constants, every: Any, plan: KernelPlan) -> None:
    """The parts of what was loaded for every partition."""
    first = 0
    for part in plan.constants:
        tile = every[:, nl.ds(first, part.size)].reshape_dim(1, part.shape)
        first += part.size
        if part.name == "high":
            consts.high = tile
        elif part.name == "low":
            consts.low = tile
        elif part.name == "logit_scales":
            consts.logit_scales = tile
        elif part.name == "value_scales":
            consts.value_scales = tile
        else:
            consts.live_edges = tile


def chunk_view(tensor: Any, chunk: RowChunk) -> Any:
    """The rows of a chunk in `[B, T, N, ...]`, in their order: `[b, n, t, ...]`."""
    some = tensor[
        nl.ds(chunk.first_batch, chunk.batches),
        nl.ds(chunk.first_token, chunk.tokens),
        nl.ds(chunk.first_head, chunk.heads),
    ]
    return some.permute((0, 2, 1, 3)) if len(some.shape) == 4 else some.permute((0, 2, 1))


def piece_view(tensor: Any, piece: Piece, group: RowGroup) -> Any:
    """The part of `[B, T, K, ...]` that a piece and a group are about."""
    return tensor[
        nl.ds(group.first_batch, group.batches),
        nl.ds(piece.start, piece.keys),
        nl.ds(group.first_kv, group.kv_heads),
    ]


def global_rows(group: RowGroup, plan: KernelPlan) -> Any:
    """The rows of a group among all B * N * T."""
    head = group.first_kv * plan.group + group.first_query
    return nl.ds((group.first_batch * plan.heads + head) * plan.tokens, group.rows)


def count_slots(tile: KeyTile, first_slot: int) -> Any:
    """The slot of each cached key of a tile, float32 `[128, columns]`; beyond it, later ones."""
    slots = nl.ndarray((PARTITIONS, tile.cached_columns), nl.float32, buffer=nl.sbuf)
    for piece in tile.cached:
        each = piece.subtiles // piece.halves
        nisa.iota(
            dst=slots[:, nl.ds(piece.column, piece.subtiles)],
            pattern=[[1, each], [piece.keys // piece.halves, piece.halves]],
            offset=piece.start + first_slot,
            channel_multiplier=each,
        )
    return slots


def load_live_tiles(inputs: Inputs, plan: KernelPlan) -> Any:
    """Where the live tiles of this program's sequences are; None where tiles are known."""
    if plan.live == None:  # noqa: E711
        return None
    first, count = sequences_of_program(plan)
    tiles = nl.ndarray((1, count, inputs.live_tiles.shape[2]), nl.int32, buffer=nl.sbuf)
    mine = inputs.live_tiles[nl.program_id(0), nl.ds(first, count)]
    nisa.dma_copy(dst=tiles, src=mine.expand_dim(0))
    return tiles


def sequences_of_program(plan: KernelPlan) -> tuple[int, int]:
    """The first sequence of this program, and how many it has."""
    blocks = plan.shares[nl.program_id(0)].blocks
    first, last = blocks[0].sequences[0].first_batch, blocks[-1].sequences[-1].first_batch
    return first, last + 1 - first
