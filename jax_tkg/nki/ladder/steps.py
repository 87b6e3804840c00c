"""What the rungs are made of. Tiles have up to 128 queries (rows) and up to 512 keys."""

from typing import Any

from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS

KEYS = 512
"""Keys of a tile: their logits fill one bank of PSUM."""


def tiles_of(size: int, step: int) -> list[tuple[int, int]]:
    """(start, size) of the pieces of an axis."""
    pieces = []
    for start in range(0, size, step):
        pieces.append((start, min(step, size - start)))
    return pieces


def my_row_tiles(rows: int) -> list[tuple[int, int]]:
    """The tiles of this program's rows: two programs take half of them each."""
    first = rows * nl.program_id(0) // nl.num_programs(0)
    end = rows * (nl.program_id(0) + 1) // nl.num_programs(0)
    mine = []
    for start, size in tiles_of(end - first, PARTITIONS):
        mine.append((first + start, size))
    return mine


def column(rows: int) -> Any:
    """A float32 for each row."""
    return nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)


def load(source: Any) -> Any:
    """An HBM matrix in SBUF."""
    tile = nl.ndarray(source.shape, source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source)
    return tile


def transpose(tile: Any) -> Any:
    """A tile of up to 128 x 128 turned by the Tensor engine, in SBUF."""
    rows, columns = tile.shape
    turned = nl.ndarray((columns, rows), tile.dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=tile, engine=nisa.engine.tensor)
    copied = nl.ndarray((columns, rows), tile.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=copied, src=turned)
    return copied


def load_transposed(source: Any) -> Any:
    """Rows `[n, H]` in HBM as `[H, n]` in SBUF."""
    count, width = source.shape
    turned = nl.ndarray((width, count), source.dtype, buffer=nl.sbuf)
    for start, size in tiles_of(count, PARTITIONS):
        piece = nl.ds(start, size)
        nisa.tensor_copy(dst=turned[:, piece], src=transpose(load(source[piece, :])))
    return turned


def multiply(query_t: Any, key_t: Any) -> Any:
    """Logits `[rows, keys]` in PSUM, of `[H, rows]` and `[H, keys]`."""
    logits = nl.ndarray((query_t.shape[1], key_t.shape[1]), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=logits, stationary=query_t, moving=key_t, accumulate=False)
    return logits


def max_of_rows(scores: Any) -> Any:
    """The largest of each row, a column."""
    largest = column(scores.shape[0])
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=scores, axis=1)
    return largest


def exp_and_sum(scores: Any, maxima: Any, scale: float, dtype: Any) -> tuple[Any, Any]:
    """The weights exp(scores * scale - maxima) as `dtype`, and their row sums in float32.

    One instruction of the Scalar engine, which sums before it rounds.
    """
    rows, columns = scores.shape
    negative = column(rows)
    nisa.tensor_scalar(dst=negative, data=maxima, op0=nl.multiply, operand0=-1.0)
    weights = nl.ndarray((rows, columns), dtype, buffer=nl.sbuf)
    sums = column(rows)
    nisa.activation(
        dst=weights, op=nl.exp, data=scores, scale=scale, bias=negative,
        reduce_op=nl.add, reduce_res=sums, reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
    return weights, sums


def apply_values(weights: Any, value: Any) -> Any:
    """Weights `[rows, keys]` in SBUF times values `[keys, Hv]` in HBM: `[rows, Hv]` in PSUM.

    The product sums over partitions, so the weights are turned, 128 keys at a time.
    """
    rows, keys = weights.shape
    products = nl.ndarray((rows, value.shape[1]), nl.float32, buffer=nl.psum)
    for start, size in tiles_of(keys, PARTITIONS):
        piece = nl.ds(start, size)
        nisa.nc_matmul(
            dst=products, stationary=transpose(weights[:, piece]), moving=load(value[piece, :]),
            accumulate=start > 0,
        )  # fmt: skip
    return products


def divide_rows(dst: Any, data: Any, sums: Any) -> None:
    """Sets dst = data / sums."""
    inverse = column(sums.shape[0])
    nisa.reciprocal(dst=inverse, data=sums)
    nisa.tensor_scalar(dst=dst, data=data, op0=nl.multiply, operand0=inverse)
