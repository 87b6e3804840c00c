"""From HBM: constants, cached keys and values."""

from typing import Any

from jax_tkg.nki.buffers import (
    BITS,
    BOTH_BYTES,
    NOWHERE,
    Constants,
    Inputs,
    KeySource,
    Pages,
    Place,
    chunks,
)
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rope import load_turns
from jax_tkg.nki.rows import (
    PARTITIONS,
    RowChunk,
    RowGroup,
    batch_of,
    kv_head_of,
)
from jax_tkg.nki.tiles import LEAST_RUN, KeyTile, Piece

GATHER_ROWS = 16
"""A gather that transposes takes a multiple of so many rows."""

PART_KEYS = 2048
"""Least that one of several DMAs for transposed keys loads: 4 KiB of 16-bit ones saturate DMA."""

TRANSPOSES = 4
"""Of keys, before they are copied out of PSUM: in float32 they fill a bank."""


def load_small(dst: Any, src: Any, by_gpsimd: bool, plan: KernelPlan) -> None:
    """A DMA of a few bytes that come before those of the cache.

    Where GpSimd makes its descriptors, the hardware comes to the cache sooner; GpSimd does not
    where it gathers pages.
    """
    is_free = by_gpsimd and plan.layout != "paged"
    mode = nisa.dge_mode.swdge if is_free else nisa.dge_mode.unknown
    nisa.dma_copy(dst=dst, src=src, dge_mode=mode)


def load_broadcast(source: Any) -> Any:
    """Float32 numbers `[n]` in HBM, in every partition: `[128, n]`.

    They are read once, a number a partition; a transpose of that column, repeated, has all of them
    in every partition, to the bit.
    """
    total = source.size
    every = nl.ndarray((PARTITIONS, total), nl.float32, buffer=nl.sbuf)
    for start, count in chunks(total):
        once = nl.ndarray((count, 1), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=once, src=source[nl.ds(start, count)].reshape_dim(0, (count, 1)))
        repeated = nl.ndarray((PARTITIONS, count), nl.float32, buffer=nl.psum)
        wide = once.broadcast(1, PARTITIONS)
        nisa.nc_transpose(dst=repeated, data=wide, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=every[:, nl.ds(start, count)], src=repeated)
    return every


def load_constants(inputs: Inputs, plan: KernelPlan) -> Constants:
    """What every step reads."""
    consts = Constants(None, None, None, None, None, None, None, None)
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
        name_constants(consts, load_broadcast(inputs.constants[nl.program_id(0)]), plan)
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


def cache_source(inputs: Inputs, pages: Any, group: RowGroup, i: int, plan: KernelPlan) -> Any:
    """The cached keys of pair i of a group, a `KeySource`; `pages` is None without pages."""
    batch, head = batch_of(group, i), kv_head_of(group, i)
    if plan.layout == "paged":
        rows = pages.rows[:, batch - group.first_batch, head - group.first_kv]
        keys, values = pool_rows(inputs.key, plan), pool_rows(inputs.value, plan)
        return KeySource(keys, values, False, plan.run, rows)
    if plan.layout == "BSKH":
        keys, values = inputs.key[batch, :, head], inputs.value[batch, :, head]
        return KeySource(keys, values, False, 0, None)
    is_transposed = plan.layout == "BKHS"
    keys, values = inputs.key[batch, head], inputs.value[batch, head]
    return KeySource(keys, values, is_transposed, 0, None)


def pool_rows(pool: Any, plan: KernelPlan) -> Any:
    """A pool of pages `[P, K, L, H]` as `[rows, n * H]`."""
    pages, heads, page_len, width = pool.shape
    return pool.reshape((pages * heads * page_len // plan.run, plan.run * width))


def find_pages(
    inputs: Inputs, tile: KeyTile, place: Place, group: RowGroup, plan: KernelPlan
) -> Any:
    """Where the pages of a tile are, `Pages`: once for the keys and values of a row group."""
    if plan.layout != "paged" or not tile.cached:
        return None
    batches, heads = group.batches, group.kv_heads
    mine = inputs.page_rows[nl.ds(group.first_batch, batches), nl.ds(group.first_kv, heads)]
    mine = mine[:, :, nl.ds(place.start, tile.keys // plan.run)]
    gathers = tile.cached_columns // plan.run
    rows = nl.ndarray((PARTITIONS, batches, heads, gathers), nl.int32, buffer=nl.sbuf)
    for piece in tile.cached:
        p, n, first = piece.partitions, piece.subtiles // plan.run, piece.column // plan.run
        if p < PARTITIONS:
            nisa.memset(dst=rows[:, :, :, nl.ds(first, n)], value=-1)
        runs = mine[:, :, nl.ds(piece.start // plan.run, p * n)].reshape_dim(2, (p, n))
        for k in range(heads):
            by_run = runs[:, k].permute((1, 0, 2))
            nisa.dma_copy(dst=rows[0:p, :, k, nl.ds(first, n)], src=by_run)
    if not (plan.features.has_holes and tile.is_masked):
        return Pages(rows, None)
    holes = nl.ndarray((PARTITIONS, gathers, batches), nl.float32, buffer=nl.sbuf)
    by_gather = rows[:, :, 0].permute((0, 2, 1))
    nisa.tensor_scalar(
        dst=holes, data=by_gather, op0=nl.less, operand0=0.0, op1=nl.multiply, operand1=NOWHERE
    )
    there = nl.ndarray(rows.shape, nl.int32, buffer=nl.sbuf)
    least = nl.ndarray(rows.shape, nl.int32, buffer=nl.sbuf)
    at_once = nisa.engine.gpsimd  # which gathers by them: behind Vector they would wait for a tile
    nisa.memset(dst=least, value=0, engine=at_once)
    nisa.tensor_tensor(dst=there, data1=rows, data2=least, op=nl.maximum, engine=at_once)
    return Pages(there, holes)


def load_keys(source: KeySource, dtype: Any, tile: KeyTile, place: Place, plan: KernelPlan) -> Any:
    """Cached keys of a tile, transposed: a tile `[h, keys]` for each chunk of H.

    Two bytes an element are transposed by DMA, others by the Tensor engine.
    """
    if loads_by_rows(source, dtype):
        return turn_keys(source, dtype, tile, place, plan)
    loaded = []
    dtype = operand_dtype(source.keys, dtype)
    for start, size in chunks(plan.head_dim):
        turned = nl.ndarray((size, tile.keys), dtype, buffer=nl.sbuf)
        channels = nl.ds(start, size)
        for first, count in parts_of(tile.keys, size):
            slots, part = nl.ds(place.start, tile.keys), nl.ds(first, count)
            if source.is_transposed:
                nisa.dma_copy(dst=turned[:, part], src=source.keys[channels, slots][:, part])
            else:
                nisa.dma_transpose(dst=turned[:, part], src=source.keys[slots, channels][part, :])
        loaded.append(turned)
    return loaded


def parts_of(keys: int, channels: int) -> list[tuple[int, int]]:
    """(first key, count) of the DMAs for transposed keys: as many as it takes to use all queues.

    A DMA uses as many of them as its partitions ask for, and so few channels are few partitions.
    """
    parts, step = [], max(PART_KEYS, -(-keys * channels // PARTITIONS))
    for first in range(0, keys, step):
        parts.append((first, min(step, keys - first)))
    return parts


def operand_dtype(stored: Any, dtype: Any) -> Any:
    """In what type cached numbers wait for a matmul whose other operand has type `dtype`.

    8-bit floats of the device stay as they are; the Tensor engine multiplies them by 16-bit ones.
    """
    is_small = stored.dtype == nl.float8_e4m3 or stored.dtype == nl.float8_e5m2
    return stored.dtype if is_small and dtype != nl.float32 else dtype


def loads_by_rows(source: KeySource, dtype: Any) -> bool:
    """Whether keys arrive as they lie in memory and are transposed on chip."""
    if source.is_transposed:
        return False
    if source.run > 0:
        return True
    return dtype == nl.float32 or source.keys.dtype != dtype


def key_column(keys: Any, piece: Piece, j: int, by_rows: bool) -> Any:
    """The keys of column j of a piece, `[h, partitions]`; see `load_keys` and `turn_keys`."""
    if by_rows:
        return keys[:, nl.ds(piece.start + j * piece.partitions, piece.partitions)]
    return keys[:, piece.start + j : piece.start + piece.keys : piece.subtiles]


def turn_keys(source: KeySource, dtype: Any, tile: KeyTile, place: Place, plan: KernelPlan) -> Any:
    """Keys by way of rows, `[h, keys]` for each chunk of H: column after column of a piece."""
    loaded = []
    for _, size in chunks(plan.head_dim):
        loaded.append(nl.ndarray((size, tile.keys), dtype, buffer=nl.sbuf))
    for k in range(len(tile.cached)):
        piece = tile.cached[k]
        if gathers_turned(source, dtype, piece):
            gather_turned(loaded, source, piece, plan)
            continue
        rows = load_rows(source.keys, source, plan.head_dim, dtype, k, place, tile)
        p = piece.partitions
        for c in range(len(loaded)):
            part = nl.ds(c * PARTITIONS, loaded[c].shape[0])
            for first in range(0, piece.subtiles, TRANSPOSES):
                count = min(TRANSPOSES, piece.subtiles - first)
                turned = nl.ndarray((loaded[c].shape[0], count * p), dtype, buffer=nl.psum)
                for j in range(count):
                    mine = rows[:, first + j, part]
                    column = turned[:, nl.ds(j * p, p)]
                    nisa.nc_transpose(dst=column, data=mine, engine=nisa.engine.tensor)
                columns = nl.ds(piece.start + first * p, count * p)
                nisa.tensor_copy(dst=loaded[c][:, columns], src=turned)
    return loaded


def gathers_turned(source: KeySource, dtype: Any, piece: Piece) -> bool:
    """Whether DMA transposes the keys that it gathers from pages: two bytes each, whole runs."""
    if source.run < LEAST_RUN or source.keys.dtype != dtype:
        return False
    return dtype != nl.float32 and piece.partitions % GATHER_ROWS == 0


def gather_turned(loaded: Any, source: KeySource, piece: Piece, plan: KernelPlan) -> None:
    """Keys of a piece from pages into `[h, keys]` tiles, column after column."""
    p, n = piece.partitions, source.run
    runs = source.keys.reshape((source.keys.shape[0], 1, n, plan.head_dim))
    for first in range(0, piece.subtiles, n):
        number = (piece.column + first) // n
        at = source.rows[0:p, number : number + 1].view(nl.uint32)
        for c in range(len(loaded)):
            size = loaded[c].shape[0]
            mine = runs[:, :, :, nl.ds(c * PARTITIONS, size)]
            columns = loaded[c][:, nl.ds(piece.start + first * p, n * p)]
            by_run = columns.reshape_dim(1, (1, n, p))
            nisa.dma_transpose(dst=by_run, src=mine.vector_select(0, at))


def load_rows(
    memory: Any,
    source: KeySource,
    width: int,
    dtype: Any,
    k: int,
    place: Place,
    tile: KeyTile,
) -> Any:
    """Keys or values of piece k of a tile, `[partitions, subtiles, width]`, as `dtype`.

    Every partition reads slots that follow each other; from a pool of pages by a gather.
    """
    piece = tile.cached[k]
    p, n = piece.partitions, piece.subtiles
    loaded = nl.ndarray((p, n, width), dtype, buffer=nl.sbuf)
    if source.run == 0:
        mine = memory[nl.ds(place.start, tile.keys), :][nl.ds(piece.start, piece.keys), :]
        nisa.dma_copy(dst=loaded, src=mine.reshape_dim(0, (p, n)))
        return loaded
    for first in range(0, n, source.run):
        number = (piece.column + first) // source.run
        rows = source.rows[0:p, number : number + 1]
        part = loaded[:, nl.ds(first, source.run), :]
        nisa.dma_copy(dst=part, src=memory.vector_select(0, rows))
    return loaded
