"""Microscaling of trn3: `quantize_mx` and `nc_matmul_mx`.

An element of an x4 type packs four values of one partition. A scale belongs to 32 values: four of
each of eight partitions. Partitions 8i to 8i + 7 of a quadrant of 32 have theirs in partition i of
that quadrant, 4, 8 or 12 further down if the scale tile starts there.
"""

from typing import Any

import ml_dtypes
import numpy as np

from jax_tkg.nki.interpreter.dtypes import DType
from jax_tkg.nki.interpreter.hardware import QUADRANT
from jax_tkg.nki.interpreter.isa.operands import cycles
from jax_tkg.nki.interpreter.isa.tensor_engine import accumulate_product, psum_destination
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import SBUF, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

FP8 = {
    "float8_e5m2_x4": (np.dtype(ml_dtypes.float8_e5m2), 15),
    "float8_e4m3fn_x4": (np.dtype(ml_dtypes.float8_e4m3fn), 8),
}  # the type of one value, its largest exponent
FP4 = "float4_e2m1fn_x4"
FP4_VALUES = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)
SCALE_TYPES = ("float8_e8m0fnu", "uint8")
SCALE_BIAS = 127
SCALE_NAN = 255
GROUP_PARTITIONS = 8
SCALE_ROWS = QUADRANT // GROUP_PARTITIONS
SCALE_STARTS = (0, 4, 8, 12)  # in a quadrant
ROW_TILES = (32, 64, 128)
MAX_MOVING = {"float32": 4096, "bfloat16": 8192}


def _check_target(step: Step) -> None:
    if step.core.target.generation < 4:
        step.refuse("target", f"needs trn3, not {step.core.target.name}.")


def _data_tile(step: Step, role: str, given: Any, types: tuple[str, ...]) -> NkiTensor:
    tile = step.tile(role, given, regions=(SBUF,))
    if tile.dtype not in types:
        step.refuse("dtype", f"{role} {tile!r}: must be {', '.join(types)}.")
    if tile.shape[0] % QUADRANT:
        step.refuse("partitions", f"{role} {tile!r}: must have 32, 64, 96 or 128 partitions.")
    return tile


def _scale_rows(
    step: Step, role: str, given: Any, data: NkiTensor, columns: int
) -> list[NkiTensor]:
    """The four partitions of scales of each quadrant of the data."""
    scale = step.tensor(role, given)
    if scale.buffer is not SBUF or scale.dtype not in SCALE_TYPES:
        step.refuse("scale-dtype", f"{role} {scale!r}: must be {' or '.join(SCALE_TYPES)} in SBUF.")
    quadrant, start = divmod(scale.start_partition, QUADRANT)
    if start not in SCALE_STARTS or quadrant != data.start_partition // QUADRANT:
        step.refuse(
            "scale-partition",
            f"{role} {scale!r} starts at partition {scale.start_partition}: must be 0, 4, 8 or 12 "
            f"below partition {data.start_partition}, where the data start.",
        )
    needed = data.shape[0] - QUADRANT + SCALE_ROWS
    if scale.shape[0] < needed or scale.free_size != columns:
        step.refuse(
            "scale-shape",
            f"{role} {scale!r}: must have {columns} elements in at least {needed} partitions.",
        )
    firsts = range(0, data.shape[0], QUADRANT)
    return [scale.slice(0, first, first + SCALE_ROWS) for first in firsts]


def _factors(step: Step, rows: list[NkiTensor]) -> np.ndarray:
    """Scales as float32, `[partitions / 8, columns]`."""
    if rows[0].dtype != "uint8":
        return np.concatenate([step.float32(row) for row in rows])
    exponents = np.concatenate([step.bits(row) for row in rows])
    factors = np.exp2(exponents.astype(np.float64) - SCALE_BIAS)
    with np.errstate(over="ignore"):
        return np.where(exponents == SCALE_NAN, np.nan, factors).astype(np.float32)


def unpack(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """The values of x4 elements `[partitions, columns]` as float32, with a last axis of 4."""
    if dtype == FP4:
        nibbles = bits[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)
        return FP4_VALUES[nibbles & 0xF]
    kind = FP8[dtype][0]
    found = np.ascontiguousarray(bits).view(np.uint8).view(kind)
    return found.astype(np.float32).reshape(*bits.shape, 4)


def _dequantized(step: Step, tile: NkiTensor, rows: list[NkiTensor]) -> np.ndarray:
    """Values times scales, `[partitions * 4, columns]`."""
    values = unpack(step.bits(tile), tile.dtype)
    scaled = values * _factors(step, rows).repeat(GROUP_PARTITIONS, axis=0)[..., None]
    return scaled.transpose(0, 2, 1).reshape(-1, tile.free_size)


@instruction
def quantize_mx(step: Step, dst: NkiTensor, src: NkiTensor, dst_scale: NkiTensor) -> None:
    """Quantizes groups of 32 values to fp8 with a power of two for each group."""
    _check_target(step)
    dst = _data_tile(step, "dst", dst, tuple(FP8))
    src = _data_tile(step, "src", src, ("float16", "bfloat16"))
    if src.free_size % 4 or (dst.shape[0], 4 * dst.free_size) != (src.shape[0], src.free_size):
        step.refuse("shape", f"dst {dst!r}: must be a quarter of src {src!r}, in its partitions.")
    rows = _scale_rows(step, "dst_scale", dst_scale, dst, dst.free_size)
    kind, largest = FP8[dst.dtype]
    values = step.float32(src)
    groups = np.abs(values).reshape(-1, GROUP_PARTITIONS, dst.free_size, 4).max((1, 3))
    _, exponents = np.frexp(groups)
    # One less than OCP's sample algorithm takes: room for the largest value to round up.
    powers = np.where(groups == 0, -SCALE_BIAS, exponents - 1 - (largest - 1))
    powers = np.clip(powers, -SCALE_BIAS, SCALE_BIAS)
    divisors = np.exp2(powers.astype(np.float64)).repeat(GROUP_PARTITIONS, 0).repeat(4, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        small = (values / divisors).astype(np.float32).astype(kind)
    step.put(dst, np.ascontiguousarray(small).view(np.uint8).view(np.uint32))
    biased = (powers + SCALE_BIAS).astype(np.uint8)
    for i, row in enumerate(rows):
        part = biased[SCALE_ROWS * i : SCALE_ROWS * (i + 1)]
        step.put(row, part if row.dtype == "uint8" else part.view(row.dtype.numpy))
    step.runs_on(Engine.vector, cycles(dst.free_size), src.free_size)


@instruction
def nc_matmul_mx(
    step: Step,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    stationary_scale: NkiTensor,
    moving_scale: NkiTensor,
    tile_position: tuple[int, ...] | None = None,
    tile_size: tuple[int, ...] | None = None,
    accumulate: bool | None = None,
) -> None:
    """Adds stationary.T @ moving to dst, both dequantized, contracting all partitions hold."""
    _check_target(step)
    types = (*FP8, FP4)
    stationary = _data_tile(step, "stationary", stationary, types)
    moving = _data_tile(step, "moving", moving, types)
    dst = step.tensor("dst", dst)
    k, m, n = stationary.shape[0], stationary.free_size, moving.free_size
    _check_sizes(step, dst, stationary, moving)
    _check_tiling(step, tile_position, tile_size, k)
    left_rows = _scale_rows(step, "stationary_scale", stationary_scale, stationary, m)
    right_rows = _scale_rows(step, "moving_scale", moving_scale, moving, n)
    where = psum_destination(step, dst)
    step.operands(dst, stationary, moving, stationary_scale, moving_scale)
    with np.errstate(all="ignore"):
        left = _dequantized(step, stationary, left_rows)
        product = left.T @ _dequantized(step, moving, right_rows)
    accumulate_product(step, dst, where, product, accumulate)
    step.runs_on(Engine.tensor, cycles(n), n, macs=4 * k * m * n)


def _check_sizes(step: Step, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor) -> None:
    m, n = stationary.free_size, moving.free_size
    if moving.shape[0] != stationary.shape[0]:
        step.refuse("contraction", f"{stationary!r} and {moving!r}: must have as many partitions.")
    if m % 2 or m > 128:
        step.refuse(
            "stationary-free-size", f"stationary {stationary!r}: even, at most 128 columns."
        )
    if dst.dtype not in MAX_MOVING:
        step.refuse("destination-dtype", f"dst {dst!r}: must be float32 or bfloat16.")
    if n > MAX_MOVING[dst.dtype]:
        step.refuse("moving-free-size", f"moving {moving!r}: at most {MAX_MOVING[dst.dtype]}.")
    if (dst.shape[0], dst.free_size) != (m, n):
        step.refuse("shape", f"dst {dst!r}: must be {m} partitions of {n} elements.")


def _check_tiling(step: Step, position: Any, size: Any, k: int) -> None:
    if bool(position) != bool(size):
        step.refuse("tiling", "tile_position and tile_size go together.")
    if not size:
        return
    rows, columns = size
    if rows not in ROW_TILES or columns != 128 or k > rows:
        step.refuse("tile-size", f"tile_size {size} for {k} rows: (32, 64 or 128, 128).")
    if position[0] % rows or position[0] >= 128 or position[1] != 0:
        step.refuse("tile-position", f"tile_position {position}: a multiple of {rows}, and 0.")
