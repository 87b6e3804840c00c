"""Cached keys and values from HBM: keys transposed, values as they lie."""

from typing import Any

from jax_tkg.nki.buffers import Inputs, KeySource, Place, chunks
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowGroup, batch_of, kv_head_of
from jax_tkg.nki.tiles import KeyTile, Piece, column_of

PART_KEYS = 2048
"""Least that one of several DMAs for transposed keys loads: 4 KiB of 16-bit ones saturate DMA."""

TRANSPOSES = 4
"""Of keys, before they are copied out of PSUM: in float32 they fill a bank."""


def cache_source(inputs: Inputs, pages: Any, group: RowGroup, i: int, plan: KernelPlan) -> Any:
    """The cached keys of pair i of a group, a `KeySource`; `pages` is None without pages."""
    batch, head = batch_of(group, i), kv_head_of(group, i)
    in_pairs = turns_pairs(inputs, plan)
    if plan.layout == "paged":
        rows = pages.rows[:, :, batch - group.first_batch, head - group.first_kv]
        keys, values = pool_slots(inputs.key), pool_slots(inputs.value)
        return KeySource(keys, values, False, in_pairs, rows)
    if plan.layout == "BSKH":
        keys, values = inputs.key[batch, :, head], inputs.value[batch, :, head]
        return KeySource(keys, values, False, in_pairs, None)
    is_transposed = plan.layout == "BKHS"
    keys, values = inputs.key[batch, head], inputs.value[batch, head]
    return KeySource(keys, values, is_transposed, in_pairs, None)


def pool_slots(pool: Any) -> Any:
    """A pool of pages `[P, K, L, H]` as `[slots, H]`."""
    pages, heads, page_len, width = pool.shape
    return pool.reshape((pages * heads * page_len, width))


def pool_rows(slots: Any, run: int) -> Any:
    """The slots of a pool `[slots, H]` in rows of a run, `[rows, n, H]`."""
    return slots.reshape((slots.shape[0] // run, run, slots.shape[1]))


def load_keys(source: KeySource, dtype: Any, tile: KeyTile, place: Place, plan: KernelPlan) -> Any:
    """Cached keys of a tile, transposed: a tile `[h, keys]` for each of `channel_parts`.

    Two bytes at once are transposed by DMA, other elements by the Tensor engine. Those of two
    columns that share a matmul lie one below the other, `[2 * h, keys / 2]`.
    """
    if loads_by_rows(source, dtype):
        return turn_keys(source, dtype, tile, place, plan)
    memory, stored = source.keys, operand_dtype(source.keys, dtype)
    if source.in_pairs:
        memory, stored = source.keys.view(nl.uint16), nl.uint16
    loaded = []
    if tile.key_columns > 1:
        return [load_key_pairs(source, stored, tile, place, plan)]
    for start, size in chunks(memory.shape[0] if source.is_transposed else memory.shape[1]):
        turned = nl.ndarray((size, keys_held(tile)), stored, buffer=nl.sbuf)
        channels = nl.ds(start, size)
        if source.rows != None:  # noqa: E711  (the kernel language has no `is`)
            for piece in tile.cached:
                gather_turned(turned, memory, channels, source, piece)
        else:
            slots = nl.ds(place.start, tile.keys)
            for first, count in parts_of(tile.keys, size):
                part = nl.ds(first, count)
                if source.is_transposed:
                    nisa.dma_copy(dst=turned[:, part], src=memory[channels, slots][:, part])
                else:
                    nisa.dma_transpose(dst=turned[:, part], src=memory[slots, channels][part, :])
        loaded.append(turned)
    return apart(loaded, source.keys.dtype) if source.in_pairs else loaded


def keys_held(tile: KeyTile) -> int:
    """Columns of a tile of transposed keys: all, and what gathers take beside the last ones."""
    last = tile.cached[-1]
    return last.start + last.stride * last.subtiles


def apart(loaded: Any, dtype: Any) -> Any:
    """Of tiles of pairs of channels, a tile of the first ones of each and one of the others."""
    tiles = []
    for turned in loaded:
        pairs = turned.view(dtype).reshape_dim(1, (turned.shape[1], 2))
        tiles.append(pairs[:, :, 0])
        tiles.append(pairs[:, :, 1])
    return tiles


def load_key_pairs(
    source: KeySource, dtype: Any, tile: KeyTile, place: Place, plan: KernelPlan
) -> Any:
    """Cached keys of narrow heads, `[2 * h, keys / 2]`: of every two slots one below the other.

    Where heads do not take turns in memory, two slots are one row of twice the width. Keys that are
    stored transposed come with the second half of the slots below the first.
    """
    size, pairs = plan.head_dim, tile.keys // 2
    turned = nl.ndarray((2 * size, pairs), dtype, buffer=nl.sbuf)
    if source.is_transposed:
        halves = source.keys[:, nl.ds(place.start, tile.keys)].reshape_dim(1, (2, pairs))
        nisa.dma_copy(dst=turned, src=halves.permute((1, 0, 2)))
        return turned
    mine = source.keys[nl.ds(place.start, tile.keys), :].reshape_dim(0, (pairs, 2))
    if plan.layout == "BKSH" or plan.kv_heads == 1:
        nisa.dma_transpose(dst=turned, src=mine.flatten_dims(1, 2))
        return turned
    for i in range(2):
        nisa.dma_transpose(dst=turned[nl.ds(i * size, size), :], src=mine[:, i, :])
    return turned


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
    return stored.dtype if is_small_float(stored) and dtype != nl.float32 else dtype


def is_small_float(stored: Any) -> bool:
    """Whether these are 8-bit floats of the device."""
    return stored.dtype == nl.float8_e4m3 or stored.dtype == nl.float8_e5m2


def turns_pairs(inputs: Inputs, plan: KernelPlan) -> bool:
    """Whether DMA transposes 8-bit keys as pairs of channels, in words of two bytes.

    The queries are then taken apart as well, which those in SBUF cannot be.
    """
    query, key = inputs.query, inputs.key
    if plan.layout == "BKHS" or plan.head_dim % 2 > 0 or query.buffer == nl.sbuf:
        return False
    return is_small_float(key) and query.dtype != nl.float32


def channel_parts(inputs: Inputs, plan: KernelPlan) -> list[tuple[int, int, int]]:
    """(first, step, count): which channels of queries and keys a matmul takes together."""
    parts, width = [], plan.head_dim
    if turns_pairs(inputs, plan):
        for start, size in chunks(width // 2):
            parts.append((2 * start, 2, size))
            parts.append((2 * start + 1, 2, size))
        return parts
    return whole_parts(width)


def whole_parts(width: int) -> list[tuple[int, int, int]]:
    """The same of all channels in their order."""
    parts = []
    for start, size in chunks(width):
        parts.append((start, 1, size))
    return parts


def loads_by_rows(source: KeySource, dtype: Any) -> bool:
    """Whether keys arrive as they lie in memory and are transposed on chip."""
    if source.is_transposed or source.in_pairs:
        return False
    return dtype == nl.float32 or source.keys.dtype != dtype


def key_column(keys: Any, piece: Piece, j: int, by_column: bool, together: int) -> Any:
    """The keys of column j of a piece, `[h, partitions]`; see `load_keys` and `turn_keys`.

    Or of several columns from j on, one below the other.
    """
    start, number = piece.start // together, j // together
    if by_column:
        first = start + column_of(piece, j) * piece.stride // together
        return keys[:, nl.ds(first, piece.partitions)]
    return keys[:, start + number : start + piece.keys // together : piece.subtiles // together]


def turn_keys(source: KeySource, dtype: Any, tile: KeyTile, place: Place, plan: KernelPlan) -> Any:
    """Keys by way of rows, `[h, keys]` for each chunk of H: column after column of a piece.

    Or two columns after two, one below the other: see `load_keys`.
    """
    loaded, together = [], tile.key_columns
    for _, size in chunks(plan.head_dim):
        shape = (together * size, keys_held(tile) // together)
        loaded.append(nl.ndarray(shape, dtype, buffer=nl.sbuf))
    for k in range(len(tile.cached)):
        piece = tile.cached[k]
        rows = load_rows(source.keys, source, plan.head_dim, dtype, k, 0, place, tile)
        p, n = piece.partitions, piece.subtiles // together
        most = TRANSPOSES if piece.together == 1 else 1
        for c in range(len(loaded)):
            part = nl.ds(c * PARTITIONS, loaded[c].shape[0] // together)
            for first in range(0, n, most):
                count = min(most, n - first)
                turned = nl.ndarray((loaded[c].shape[0], count, p), dtype, buffer=nl.psum)
                for j in range(count):
                    mine = rows[:, nl.ds((first + j) * together, together), part]
                    nisa.nc_transpose(dst=turned[:, j], data=mine, engine=nisa.engine.tensor)
                at = piece.start + column_of(piece, first * together) * piece.stride
                columns = loaded[c][:, nl.ds(at // together, count * piece.stride)]
                by_column = columns.reshape_dim(1, (count, piece.stride))
                nisa.tensor_copy(dst=by_column[:, :, 0:p], src=turned)
    return loaded


def gather_turned(turned: Any, memory: Any, channels: Any, source: KeySource, piece: Piece) -> None:
    """Some channels of the keys of a piece from pages into `[h, keys]`, column after column."""
    n, stride = piece.run, piece.stride
    runs = pool_rows(memory, n).expand_dim(1)[:, :, :, channels]
    for first in range(0, piece.gathers, piece.together):
        count = min(piece.together, piece.gathers - first)
        at = source.rows[0:stride, nl.ds(piece.gather + first, count)].view(nl.uint32)
        columns = turned[:, nl.ds(piece.start + first * n * stride, count * n * stride)]
        by_run = columns.reshape_dim(1, (1, n, count * stride))
        mine = runs.vector_select(0, at)
        if count > 1:  # the columns of `at` one after the other: so many rows
            row, slot = n * memory.shape[1], memory.shape[1]
            pattern = ((row, count * stride), (row, 1), (slot, n), (1, turned.shape[0]))
            mine = runs.ap(pattern=pattern, vector_offset=at)
        nisa.dma_transpose(dst=by_run, src=mine)


def load_rows(
    memory: Any,
    source: KeySource,
    width: int,
    dtype: Any,
    k: int,
    apart: int,
    place: Place,
    tile: KeyTile,
) -> Any:
    """Keys or values of piece k of a tile, `[partitions, subtiles, width]`, as `dtype`.

    Every partition reads slots that follow each other, of its last columns so many `apart` from
    the others, or of each half; from a pool of pages by a gather. Halves lie one after the other.
    """
    piece = tile.cached[k]
    p, n = piece.partitions, piece.subtiles
    loaded = nl.ndarray((p, n, width), dtype, buffer=nl.sbuf)
    if piece.run == 0:
        mine = memory[nl.ds(place.start, tile.keys), :][nl.ds(piece.start, piece.keys), :]
        if piece.halves > 1:
            by_half = mine.reshape_dim(0, (piece.halves, p, n // piece.halves))
            nisa.dma_copy(dst=loaded, src=by_half.permute((1, 0, 2, 3)))
            return loaded
        by_partition = mine.reshape_dim(0, (p, n))
        for first, count in ((0, n - apart), (n - apart, apart)):
            if count > 0:
                columns = nl.ds(first, count)
                nisa.dma_copy(dst=loaded[:, columns], src=by_partition[:, columns])
        return loaded
    runs = pool_rows(memory, piece.run)
    for i in range(piece.gathers):
        number = piece.gather + i
        rows = source.rows[0:p, number : number + 1]
        part = loaded[:, nl.ds(i * piece.run, piece.run), :]
        nisa.dma_copy(dst=part, src=runs.vector_select(0, rows))
    return loaded
