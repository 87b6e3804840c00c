"""Statistics and search in each partition: `bn_stats`, `bn_aggr`, the eight largest values."""

from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.isa.operands import check_free_size, cycles, number
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

BN_STATS_MAX = 512  # elements a partition; [I]
SEARCH_MIN, SEARCH_MAX = 8, 16384  # elements a partition; [I]
EIGHT = 8


def _pair(step: Step, role: str, dst: NkiTensor, data: NkiTensor) -> tuple[NkiTensor, NkiTensor]:
    dst, data = step.tile("dst", dst), step.tile(role, data)
    if dst.shape[0] != data.shape[0]:
        step.refuse("shape", f"dst {dst!r}, {role} {data!r}: must have as many partitions.")
    return dst, data


@instruction
def bn_stats(step: Step, dst: NkiTensor, data: NkiTensor) -> None:
    """Sets dst = count, mean and count * variance of the even elements, then of the odd ones."""
    dst, data = _pair(step, "data", dst, data)
    check_free_size(step, "data", data, 1, BN_STATS_MAX)
    check_free_size(step, "dst", dst, 6, 6)
    values, columns = step.float32(data), []
    for part in (values[:, 0::2], values[:, 1::2]):
        count = part.shape[1]
        with np.errstate(all="ignore"):
            mean = part.sum(axis=1) / np.float32(max(count, 1))
            spread = np.square(part - mean[:, None]).sum(axis=1)
        columns += [np.full_like(mean, count), mean, spread]
    step.put(dst, np.stack(columns, axis=1))
    step.runs_on(Engine.vector, cycles(data.free_size), data.free_size)


@instruction
def bn_aggr(step: Step, dst: NkiTensor, data: NkiTensor) -> None:
    """Sets dst = mean and variance of what any number of `bn_stats` triples count."""
    dst, data = _pair(step, "data", dst, data)
    check_free_size(step, "dst", dst, 2, 2)
    if data.free_size % 3:
        step.refuse("free-size", f"data is {data!r}: needs a multiple of 3 elements a partition.")
    triples = step.float32(data).reshape(data.shape[0], -1, 3)
    count, mean, spread = triples[..., 0], triples[..., 1], triples[..., 2]
    with np.errstate(all="ignore"):
        total = count.sum(axis=1)
        center = (count * mean).sum(axis=1) / total
        between = (count * np.square(mean - center[:, None])).sum(axis=1)
        variance = (spread.sum(axis=1) + between) / total
    step.put(dst, np.stack([center, variance], axis=1))
    step.runs_on(Engine.vector, cycles(13 * data.free_size / 3), data.free_size)


def _check_searched(step: Step, role: str, tile: NkiTensor) -> None:
    check_free_size(step, role, tile, SEARCH_MIN, SEARCH_MAX)
    if tile.ndim > 3:
        step.refuse("rank", f"{role} is {tile!r}: at most three axes.")


@instruction
def max8(step: Step, dst: NkiTensor, src: NkiTensor) -> None:
    """Sets dst = the eight largest values of each partition, largest first."""
    dst, src = _pair(step, "src", dst, src)
    _check_searched(step, "src", src)
    _check_eight(step, "dst", dst)
    largest = np.partition(step.float32(src), src.free_size - EIGHT, axis=1)[:, -EIGHT:]
    step.put(dst, np.sort(largest, axis=1)[:, ::-1])
    step.runs_on(Engine.vector, cycles(src.free_size), src.free_size)


def _check_eight(step: Step, role: str, tile: NkiTensor) -> None:
    check_free_size(step, role, tile, EIGHT, EIGHT)
    if role != "vals" and tile.ndim != 2:
        step.refuse("rank", f"{role} is {tile!r}: needs two axes.")


def _check_indices(step: Step, role: str, tile: NkiTensor, data: NkiTensor) -> None:
    _check_eight(step, role, tile)
    if tile.dtype not in ("uint16", "uint32"):
        step.refuse("index-dtype", f"{role} is {tile!r}: must be uint16 or uint32.")
    if tile.shape[0] != data.shape[0]:
        step.refuse("shape", f"{role} {tile!r}, data {data!r}: as many partitions.")


def _values(step: Step, vals: NkiTensor, data: NkiTensor) -> np.ndarray:
    vals = step.tile("vals", vals)
    _check_eight(step, "vals", vals)
    if vals.shape[0] != data.shape[0]:
        step.refuse("shape", f"vals {vals!r}, data {data!r}: as many partitions.")
    if vals.ndim > 3:
        step.refuse("rank", f"vals is {vals!r}: at most three axes.")
    return step.float32(vals)


def _match(
    data: np.ndarray, values: np.ndarray, order: range, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs each value, in this order, with its first occurrence that is not taken yet.

    Returns:
        Indices `[P, 8]`, all ones where there is none, and which elements were taken.
    """
    taken, rows = np.zeros(data.shape, bool), np.arange(len(data))
    missing = np.iinfo(dtype).max
    indices = np.full(values.shape, missing, np.int64)
    for column in order:
        matches = (data == values[:, column : column + 1]) & ~taken
        first = matches.argmax(axis=1)
        found = matches[rows, first]
        indices[found, column] = first[found]
        taken[rows[found], first[found]] = True
    return indices, taken


@instruction
def nc_find_index8(step: Step, dst: NkiTensor, data: NkiTensor, vals: NkiTensor) -> None:
    """Sets dst = where eight values are first found in data, all ones if nowhere."""
    dst, data = _pair(step, "data", dst, data)
    _check_searched(step, "data", data)
    _check_indices(step, "dst", dst, data)
    values = _values(step, vals, data)
    indices, _ = _match(step.float32(data), values, range(EIGHT), str(dst.dtype))
    step.put(dst, indices)
    step.runs_on(Engine.vector, cycles(data.free_size), data.free_size)


@instruction
def nc_match_replace8(
    step: Step,
    dst: NkiTensor,
    data: NkiTensor,
    vals: NkiTensor,
    imm: Any,
    dst_idx: NkiTensor | None = None,
) -> None:
    """Sets dst = data with the first occurrence of each of eight values replaced.

    The last of the values comes first, which matters if they repeat.
    """
    dst, data = _pair(step, "data", dst, data)
    step.same_layout(dst=dst, data=data)
    _check_searched(step, "data", data)
    if dst_idx is not None:
        dst_idx = step.tile("dst_idx", dst_idx)
        _check_indices(step, "dst_idx", dst_idx, data)
    replacement, values = number(step, "imm", imm), _values(step, vals, data)
    source = step.float32(data)
    kind = "uint32" if dst_idx is None else str(dst_idx.dtype)
    indices, taken = _match(source, values, range(EIGHT - 1, -1, -1), kind)
    step.put(dst, np.where(taken, replacement, source))
    if dst_idx is not None:
        step.put(dst_idx, indices)
    step.runs_on(Engine.vector, cycles(data.free_size), data.free_size)
