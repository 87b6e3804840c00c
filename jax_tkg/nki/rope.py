"""Rotary embedding: steps on tiles with a token a partition, and a kernel of its own.

The decode kernel rotates its few rows where it loads them; the prefill kernel, whose queries are
many and whose keys are loaded again and again, begins with `rotate_tokens`, as the kernel here.

Pair i of a head turns by `position * frequency_i`. Only the fraction of a full turn matters, and
float32 loses it past a few thousand tokens, so it is formed from parts whose products are exact.
With a position p = upper * 2^11 + lower and f turns per token, p * f = lower * f + upper * g,
g = 2^11 f. Of f and g the table holds the fraction as two digits of 11 bits and a float32 rest:
products of a digit are integers below 2^22, sums of them stay below 2^24, and the Vector engine
carries both exactly in float32. What is rounded, the rest of up to 2^-11 turns a token, is off by
less than 2^-33 turns.

Sine and cosine are one odd polynomial on the quarter turns beside 0. Nothing rests on the Scalar
engine's sine, which is valid on half a turn either way and whose error is not documented.
"""

from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.rows import PARTITIONS

DIGIT = 2**11
UNITS_PER_QUARTER = 2**20
"""The phase counts units of 2^-22 turns, the last place of the second digit."""

SINE = (1.5707962885754154, -0.645963336777474, 0.07968838386503274, -0.004672081089047153,
        0.00015074739703990758)  # fmt: skip
"""sin(pi / 2 * y) = y * (c0 + c1 y^2 + ...), off by at most 3.5e-9 for |y| <= 1 + 2^-8.

Computed here: the least maximal error on that interval, by reweighted least squares."""

TILE_ELEMENTS = 4096
"""Channels of a token that the kernel rotates at once."""


@dataclass(frozen=True)
class RopePlan(nl.NKIObject):
    """What the kernel is built from but the arrays.

    Attributes:
        is_interleaved: pair i is channels 2i and 2i + 1; else i and i + pairs.
    """

    is_interleaved: bool


def load_turns(table: Any, partitions: int) -> Any:
    """Loads the table of `rotary_table` into every partition, once for all rows.

    Args:
        table: float32 `[2, 3, pairs]` in HBM.
        partitions: at least as many as there will be rows.

    Returns:
        float32 `[partitions, 6, pairs]`: of f the two digits and the rest, then of g.
    """
    pairs = table.shape[2]
    turns = nl.ndarray((partitions, 6, pairs), nl.float32, buffer=nl.sbuf)
    row = table.reshape((1, 6, pairs))
    nisa.dma_copy(dst=turns, src=row.broadcast(0, partitions))
    return turns


def split_positions(positions: Any) -> tuple[Any, Any]:
    """Float32 columns `lower` in [0, 2^11) and `upper` with position = upper * 2^11 + lower."""
    rows = positions.shape[0]
    whole = positions
    if positions.dtype != nl.int32:
        whole = nl.ndarray((rows, 1), nl.int32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=whole, src=positions)
    masked = nl.ndarray((rows, 1), nl.int32, buffer=nl.sbuf)
    # Of a negative position too: two's complement.
    nisa.tensor_scalar(dst=masked, data=whole, op0=nl.bitwise_and, operand0=DIGIT - 1)
    lower = nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=lower, src=masked)
    upper = nl.ndarray((rows, 1), nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=upper,
        data=whole,
        op0=nl.subtract,
        operand0=lower,
        op1=nl.multiply,
        operand1=1.0 / DIGIT,
    )
    return lower, upper


def reduce_phase(positions: Any, turns: Any) -> tuple[Any, Any]:
    """The phases of cosine and sine, as a quarter turn and a sign.

    Returns:
        float32 `[rows, 2, pairs]`, distance to the nearest half turn in units of 2^-22 turns, and
        int32 of that shape, the sign bit of a float where the number of half turns is odd.
    """
    rows, pairs = positions.shape[0], turns.shape[2]
    lower, upper = split_positions(positions)
    partial = nl.ndarray((rows, 3, pairs), nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=partial, data=turns[0:rows, 0:3, :], op0=nl.multiply, operand0=lower)
    top = nl.ndarray((rows, pairs), nl.int32, buffer=nl.sbuf)
    add_product(top, turns[0:rows, 3, :], upper, partial[:, 0, :])
    fine = nl.ndarray((rows, 2, pairs), nl.float32, buffer=nl.sbuf)
    add_product(fine, turns[0:rows, 4:6, :], upper, partial[:, 1:3, :])
    # Whole turns of the first digit's column go; what stays is shifted to the second's place.
    nisa.tensor_scalar(
        dst=top, data=top, op0=nl.bitwise_and, operand0=DIGIT - 1, op1=nl.left_shift, operand1=11
    )
    phase = nl.ndarray((rows, 2, pairs), nl.int32, buffer=nl.sbuf)
    for i in range(2):
        # A quarter more, to fold around 0; the cosine is the sine a quarter further on.
        nisa.scalar_tensor_tensor(
            dst=phase[:, i, :], data=top, op0=nl.add, operand0=float((2 - i) * UNITS_PER_QUARTER),
            op1=nl.add, operand1=fine[:, 0, :],
        )  # fmt: skip
    folded = nl.ndarray((rows, 2, pairs), nl.int32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=folded, data=phase, op0=nl.bitwise_and, operand0=2 * UNITS_PER_QUARTER - 1
    )
    nisa.tensor_scalar(
        dst=phase, data=phase, op0=nl.bitwise_and, operand0=2 * UNITS_PER_QUARTER,
        op1=nl.left_shift, operand1=10,
    )  # fmt: skip
    offset = nl.ndarray((rows, 2, pairs), nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=offset, data=folded, op0=nl.subtract, operand0=float(UNITS_PER_QUARTER),
        op1=nl.add, operand1=fine[:, 1:2, :].broadcast(1, 2),
    )  # fmt: skip
    return offset, phase


def add_product(dst: Any, factors: Any, scale: Any, summand: Any) -> None:
    """Sets dst = factors * scale + summand; the scale is a column."""
    nisa.scalar_tensor_tensor(
        dst=dst, data=factors, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=summand
    )


def cos_sin_rows(positions: Any, turns: Any) -> Any:
    """Cosine and sine of the angles of a position in each partition.

    The absolute error is below 2^-22, two ulps of 1, for positions in [-2^20, 2^20]: 1.8e-7 of
    the polynomial in float32, 0.4e-7 of the rounding of its argument.

    Args:
        positions: int32 or float32 `[rows, 1]` in SBUF, whole numbers.
        turns: of `load_turns`, in at least as many partitions.

    Returns:
        float32 `[rows, 2, pairs]` in SBUF: cosines, then sines.
    """
    offset, sign = reduce_phase(positions, turns)
    square = nl.ndarray(offset.shape, nl.float32, buffer=nl.sbuf)
    unit = 1.0 / UNITS_PER_QUARTER
    nisa.scalar_tensor_tensor(
        dst=square, data=offset, op0=nl.multiply, operand0=unit * unit,
        op1=nl.multiply, operand1=offset,
    )  # fmt: skip
    value = nl.ndarray(offset.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=value, data=square, op0=nl.multiply, operand0=unit * SINE[4])
    for power in range(3, 0, -1):
        nisa.scalar_tensor_tensor(
            dst=value, data=value, op0=nl.add, operand0=unit * SINE[power],
            op1=nl.multiply, operand1=square,
        )  # fmt: skip
    nisa.scalar_tensor_tensor(
        dst=value, data=value, op0=nl.add, operand0=unit * SINE[0],
        op1=nl.multiply, operand1=offset,
    )  # fmt: skip
    bits = value.view(nl.int32)
    nisa.tensor_tensor(dst=bits, data1=bits, data2=sign, op=nl.bitwise_xor)
    return value


def channel_pairs(tile: Any, pairs: int, is_interleaved: bool) -> Any:
    """The channels that rotate, `[rows, heads, 2, pairs]`, of a tile `[rows, heads, H]`."""
    turned = tile[:, :, 0 : 2 * pairs]
    if is_interleaved:
        return turned.reshape_dim(2, (pairs, 2)).permute((0, 1, 3, 2))
    return turned.reshape_dim(2, (2, pairs))


def rotate_rows(dst: Any, rows: Any, cos_sin: Any, is_interleaved: bool) -> None:
    """Rotates the heads of a token in each partition; channels beyond the pairs are copied.

    Computed in float32 and rounded once, to the type of `dst`.

    Args:
        dst: `[rows, H]` or `[rows, heads, H]` in SBUF; may be `rows` itself.
        rows: of the same shape, any float type.
        cos_sin: of `cos_sin_rows`, for as many rows.
        is_interleaved: see `RopePlan`.
    """
    count, pairs = cos_sin.shape[0], cos_sin.shape[2]
    width = rows.shape[len(rows.shape) - 1]
    heads = 1 if len(rows.shape) == 2 else rows.shape[1]
    source = rows.reshape((count, heads, width))
    target = dst.reshape((count, heads, width))
    data = channel_pairs(source, pairs, is_interleaved)
    result = channel_pairs(target, pairs, is_interleaved)
    factors = cos_sin.expand_dim(1).broadcast(1, heads)
    products = []
    for i in range(2):
        channel = data[:, :, i : i + 1, :].broadcast(2, 2)
        product = nl.ndarray((count, heads, 2, pairs), nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=product, data1=channel, data2=factors, op=nl.multiply)
        products.append(product)
    first, second = products
    nisa.tensor_tensor(
        dst=result[:, :, 0, :], data1=first[:, :, 0, :], data2=second[:, :, 1, :], op=nl.subtract
    )
    nisa.tensor_tensor(
        dst=result[:, :, 1, :], data1=second[:, :, 0, :], data2=first[:, :, 1, :], op=nl.add
    )
    if width > 2 * pairs:
        rest = nl.ds(2 * pairs, width - 2 * pairs)
        nisa.tensor_copy(dst=target[:, :, rest], src=source[:, :, rest])


def rotate_tokens(
    targets: Any, sources: Any, positions: Any, table: Any, is_interleaved: bool
) -> None:
    """Rotates the heads of tokens from HBM to HBM; programs take as many tokens each.

    A token's angles are made once, whatever has to be rotated by them.

    Args:
        targets: a list of arrays `[B, T, heads, H]`, to be filled.
        sources: likewise, of the same shapes and types.
        positions: int32 `[B, T]`, in [-2^20, 2^20].
        table: of `rotary_table`.
        is_interleaved: see `RopePlan`.
    """
    count = positions.size
    column = positions.reshape((count, 1))
    turns = load_turns(table, min(PARTITIONS, count))
    first_token = count * nl.program_id(0) // nl.num_programs(0)
    end = count * (nl.program_id(0) + 1) // nl.num_programs(0)
    for start in range(first_token, end, PARTITIONS):
        mine = nl.ds(start, min(PARTITIONS, end - start))
        at = nl.ndarray((min(PARTITIONS, end - start), 1), nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=at, src=column[mine, :])
        cos_sin = cos_sin_rows(at, turns)
        for i in range(len(sources)):
            rows = (count, sources[i].shape[2], sources[i].shape[3])
            source, target = sources[i].reshape(rows), targets[i].reshape(rows)
            rotate_heads(target[mine], source[mine], cos_sin, is_interleaved)


def rotate_heads(target: Any, source: Any, cos_sin: Any, is_interleaved: bool) -> None:
    """Rotates `[rows, heads, H]` in HBM, some heads at a time: see `rotate_rows`."""
    rows, heads, width = source.shape
    step = max(1, TILE_ELEMENTS // width)
    for first in range(0, heads, step):
        some = nl.ds(first, min(step, heads - first))
        tile = nl.ndarray((rows, min(step, heads - first), width), source.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=source[:, some, :])
        rotate_rows(tile, tile, cos_sin, is_interleaved)
        nisa.dma_copy(dst=target[:, some, :], src=tile)


def rope(x: Any, positions: Any, table: Any, plan: RopePlan) -> Any:
    """Rotates queries or keys; two programs take half of the tokens each.

    Args:
        x: `[B, T, N, H]`, any float type.
        positions: int32 `[B, T]`, in [-2^20, 2^20].
        table: of `rotary_table`.
        plan: which channels are pairs.

    Returns:
        Shape and dtype of `x`.
    """
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    rotate_tokens([out], [x], positions, table, plan.is_interleaved)
    return out
