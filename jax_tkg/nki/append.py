"""The cache-append kernel: new keys and values go to their slots, and nothing else is touched.

Every layout is a list of rows of H numbers (of transposed keys: of columns, H numbers that lie S
apart). The caller computes which row each new one becomes, see `jax_tkg.nki.append_call`; a row
number outside the cache drops it: the scatter skips it. The caches are arguments and results: a
launch that aliases them moves the new rows and their row numbers and nothing else.
"""

from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS

SPLIT = 4097.0
"""Dekker: x * 4097 - (x * 4097 - x) is x with its lower 12 bits rounded away."""

FAR = 2.0**18
"""A quotient beyond every 8-bit type's largest number; keeps products of quotients finite."""


@dataclass(frozen=True)
class AppendPlan(nl.NKIObject):
    """What the kernel is built from but the arrays.

    Attributes:
        rows: new rows B * T * K.
        key_step: elements between the channels of a stored key: 1, or S where they are transposed.
        top: the largest number of an 8-bit type, at which it saturates; None for other types.
        tiles: of each program the first row and the number of rows, at most 128, of its tiles.
    """

    rows: int
    key_step: int
    top: float | None
    tiles: tuple[tuple[tuple[int, int], ...], ...]


def make_append_plan(
    rows: int, key_step: int = 1, top: float | None = None, programs: int = 1
) -> AppendPlan:
    """Plans an append: programs share the rows evenly."""
    tiles = []
    for program in range(programs):
        first, end = rows * program // programs, rows * (program + 1) // programs
        starts = range(first, end, PARTITIONS)
        tiles.append(tuple((start, min(PARTITIONS, end - start)) for start in starts))
    return AppendPlan(rows, key_step, top, tuple(tiles))


def append(
    key: Any,
    value: Any,
    new_key: Any,
    new_value: Any,
    key_rows: Any,
    value_rows: Any,
    key_scales: Any = None,
    value_scales: Any = None,
    plan: Any = None,
) -> Any:
    """Writes new rows into the caches.

    Args:
        key: the cache of keys, in any shape.
        value: the cache of values.
        new_key: `[B, T, K, H]`, any float type.
        new_value: `[B, T, K, Hv]`.
        key_rows: int32 `[B * T * K]`: which row of `[rows, H]` each new key becomes, or, where keys
            are transposed, the index of its first element. Outside the cache: none.
        value_rows: the same for values.
        key_scales: float32 `[B * T * K]`, by which each new key is divided; None for no scale.
        value_scales: the same for values; None if `key_scales` is.
        plan: an `AppendPlan`.

    Returns:
        `key` and `value`, changed.
    """
    for tile in plan.tiles[nl.program_id(0)]:
        append_rows(key, new_key, key_rows, key_scales, plan.key_step, tile, plan)
        append_rows(value, new_value, value_rows, value_scales, 1, tile, plan)
    return key, value


def append_rows(
    cache: Any,
    new: Any,
    rows: Any,
    scales: Any,
    step: int,
    tile: tuple[int, int],
    plan: AppendPlan,
) -> None:
    """Stores one tile of new rows into one cache."""
    start, count = tile
    mine = nl.ds(start, count)
    width = new.shape[3]
    given = nl.ndarray((count, width), new.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=given, src=new.reshape((plan.rows, width))[mine, :])
    at = load_column(rows, mine, count)
    scale = None
    if scales != None:  # noqa: E711  (the kernel language has no `is`)
        scale = load_column(scales, mine, count)
    scatter_rows(cache, encode_rows(given, scale, cache.dtype, plan.top), at, step)


def scatter_rows(cache: Any, stored: Any, at: Any, step: int) -> None:
    """Writes rows to their places, and those that have none nowhere.

    Args:
        cache: in HBM, any shape.
        stored: `[count, width]` in SBUF, in the dtype of the cache.
        at: int32 `[count, 1]` in SBUF, see `append`.
        step: elements between neighbours of a row in the cache.
    """
    count, width = stored.shape
    unit = width if step == 1 else 1
    place = cache.reshape((cache.size // unit, unit)).ap(
        pattern=[[unit, count], [step, width]], vector_offset=at, indirect_dim=0
    )
    nisa.dma_copy(dst=place, src=stored, oob_mode=nisa.oob_mode.skip)


def load_column(source: Any, mine: Any, count: int) -> Any:
    """Numbers of a flat HBM tensor, one a partition: `[count, 1]`."""
    column = nl.ndarray((count, 1), source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=source[mine].reshape((count, 1)))
    return column


def encode_rows(rows: Any, scale: Any, dtype: Any, top: float | None) -> Any:
    """Numbers as a cache keeps them: divided by the scale, saturated, rounded to nearest even.

    Args:
        rows: `[count, width]` in SBUF.
        scale: float32 `[count, 1]`, or None.
        dtype: of the cache.
        top: see `AppendPlan`.

    Returns:
        The tile as `dtype`.
    """
    if scale == None and top == None and rows.dtype == dtype:  # noqa: E711
        return rows
    stored = nl.ndarray(rows.shape, dtype, buffer=nl.sbuf)
    if scale != None:  # noqa: E711
        rows = divide_rows(rows, scale)
    if top == None:  # noqa: E711
        nisa.tensor_copy(dst=stored, src=rows)
    else:
        clip_rows(stored, rows, 1.0, top)
    return stored


def clip_rows(dst: Any, data: Any, factor: Any, top: float) -> None:
    """Sets dst = data * factor, not beyond +-top."""
    scaled = nl.ndarray(data.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=scaled, data=data, op0=nl.multiply, operand0=factor, op1=nl.minimum, operand1=top
    )
    nisa.tensor_scalar(dst=dst, data=scaled, op0=nl.maximum, operand0=-top)


def divide_rows(rows: Any, scale: Any) -> Any:
    """The quotient rows / scale, rounded once, though no engine divides.

    A quotient from the reciprocal is off by up to two ulps. What it leaves of the dividend is
    computed without error (Dekker, "A floating-point technique for extending the available
    precision", 1971), and gives the correction. Quotients beyond +-2^18 are not exact.

    Args:
        rows: `[count, width]`, any float type.
        scale: float32 `[count, 1]`, positive.

    Returns:
        float32. Off by one ulp at most where the exact quotient is within 2^-20 ulps of the middle
        of two float32 numbers, rounded correctly everywhere else.
    """
    shape = rows.shape
    inverse = nl.ndarray(scale.shape, nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=scale)
    scale_high, scale_low = split(scale)
    quotient = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    clip_rows(quotient, rows, inverse, FAR)
    high, low = split(quotient)
    product = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=product, data=quotient, op0=nl.multiply, operand0=scale)
    # What the product lost by rounding: exactly the sum of these four less the product.
    lost = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    combine(lost, high, nl.multiply, scale_high, nl.subtract, product)
    combine(lost, high, nl.multiply, scale_low, nl.add, lost)
    combine(lost, low, nl.multiply, scale_high, nl.add, lost)
    combine(lost, low, nl.multiply, scale_low, nl.add, lost)
    rest = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=rest, data1=rows, data2=product, op=nl.subtract)
    nisa.tensor_tensor(dst=rest, data1=rest, data2=lost, op=nl.subtract)
    combine(quotient, rest, nl.multiply, inverse, nl.add, quotient)
    return quotient


def split(tile: Any) -> tuple[Any, Any]:
    """Two float32 tiles of half the bits each whose sum is the tile."""
    high = nl.ndarray(tile.shape, nl.float32, buffer=nl.sbuf)
    low = nl.ndarray(tile.shape, nl.float32, buffer=nl.sbuf)
    combine(low, tile, nl.multiply, SPLIT, nl.subtract, tile)
    combine(high, tile, nl.multiply, SPLIT, nl.subtract, low)
    nisa.tensor_tensor(dst=low, data1=tile, data2=high, op=nl.subtract)
    return high, low


def combine(dst: Any, data: Any, op0: Any, factor: Any, op1: Any, operand: Any) -> None:
    """Sets dst = (data op0 factor) op1 operand; the factor is a number or a column."""
    nisa.scalar_tensor_tensor(
        dst=dst, data=data, op0=op0, operand0=factor, op1=op1, operand1=operand
    )
