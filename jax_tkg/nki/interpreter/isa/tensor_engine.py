"""The Tensor engine: `nc_matmul`, `nc_transpose` (which the Vector engine also does)."""

import enum
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.dtypes import FLOAT32, round_tfloat32
from jax_tkg.nki.interpreter.errors import UninitializedReadError
from jax_tkg.nki.interpreter.hardware import PSUM_BANK_BYTES
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import (
    FIXED_CYCLES,
    PSUM,
    SBUF,
    Step,
    instruction,
    is_float32,
)
from jax_tkg.nki.interpreter.tensor import NkiTensor
from jax_tkg.nki.interpreter.window import Window

OPERAND_TYPES = (
    "float8_e4m3", "float8_e5m2", "bfloat16", "float16", "tfloat32", "float32",
)  # fmt: skip
FP8_TYPES = ("float8_e4m3", "float8_e5m2", "float8_e4m3fn")
ROW_TILES = (32, 64, 128)


class matmul_perf_mode(enum.Enum):  # noqa: N801  (NKI's name)
    """Performance mode of a matmul."""

    none = "none"
    double_row = "double_row"


def _check_types(step: Step, stationary: NkiTensor, moving: NkiTensor) -> None:
    generation = step.core.target.generation
    allowed = OPERAND_TYPES + (("float8_e4m3fn",) if generation >= 4 else ())
    for role, tensor in (("stationary", stationary), ("moving", moving)):
        if tensor.dtype not in allowed:
            step.refuse("dtype", f"{role} is {tensor!r}: the type must be {', '.join(allowed)}.")
    types = {stationary.dtype, moving.dtype}
    if any(is_float32(t) for t in types) and not all(is_float32(t) for t in types):
        step.refuse(
            "mixed-float32",
            f"stationary {stationary!r} with moving {moving!r}: float32 only with float32; copy "
            "one of them into the other's type.",
        )
    if {"float8_e4m3", "float8_e4m3fn"} <= types:
        step.refuse("mixed-fp8", "float8_e4m3 and float8_e4m3fn do not mix in one matmul.")


def _check_sizes(step: Step, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor) -> None:
    target = step.core.target
    k, m, n = stationary.shape[0], stationary.free_size, moving.free_size
    if moving.shape[0] != k:
        step.refuse(
            "contraction",
            f"stationary {stationary!r} has {k} partitions, moving {moving!r} {moving.shape[0]}: "
            "both hold the contracted axis on their partitions.",
        )
    if m > target.stationary_max:
        step.refuse("stationary-free-size", f"stationary {stationary!r}: at most 128 columns.")
    narrow = target.generation >= 4 and dst.dtype.itemsize == 2
    limit = target.moving_max * 2 if narrow else target.moving_max
    if n > limit:
        step.refuse(
            "moving-free-size",
            f"moving {moving!r}: at most {limit} columns on {target.name} for dst of {dst.dtype}; "
            "tile it.",
        )
    if (dst.shape[0], dst.free_size) != (m, n):
        step.refuse("shape", f"dst {dst!r}: must be {m} partitions of {n} elements.")


def psum_destination(step: Step, dst: NkiTensor) -> Window:
    """Where a result goes: PSUM, before trn3 within one bank."""
    if dst.buffer is not PSUM:
        step.refuse("destination", f"dst {dst!r}: the Tensor engine writes PSUM only.")
    where = step.where(dst)
    base = (dst.storage.address or (0, 0))[1]
    first, last = (base + where.box.b0) // PSUM_BANK_BYTES, (base + where.box.b1 - 1)
    if first != last // PSUM_BANK_BYTES and step.core.target.generation < 4:
        step.refuse(
            "psum-bank",
            f"dst {dst!r} lies in bytes {base + where.box.b0} to {base + where.box.b1} of its "
            f"partitions, across a bank of {PSUM_BANK_BYTES}: one matmul writes one bank.",
        )
    return where


def _check_result_type(step: Step, dst: NkiTensor) -> None:
    if dst.dtype != FLOAT32 and (step.core.target.generation < 4 or dst.dtype != "bfloat16"):
        step.refuse("destination-dtype", f"dst {dst!r}: float32 (on trn3 also bfloat16).")


def _check_tiling(step: Step, position: Any, size: Any, k: int, m: int) -> None:
    if bool(position) != bool(size):
        step.refuse("tiling", "tile_position and tile_size go together.")
    if not size:
        return
    rows, columns = size
    tiles = ROW_TILES if step.core.target.generation >= 3 else ROW_TILES[1:]
    if rows not in tiles or columns not in tiles:
        step.refuse("tile-size", f"tile_size {size}: each one of {tiles}.")
    if position[0] % rows or position[1] % columns or max(position) >= 128:
        step.refuse("tile-position", f"tile_position {position}: multiples of {size} below 128.")
    if k > rows or m > columns:
        step.refuse("tile-size", f"a stationary tile of {k} x {m} in a tile of {rows} x {columns}.")


def _operand(step: Step, tensor: NkiTensor) -> np.ndarray:
    values = step.float32(tensor)
    return round_tfloat32(values) if tensor.dtype == "tfloat32" and not step.exact else values


@instruction
def nc_matmul(
    step: Step,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple[int, ...] = (),
    tile_size: tuple[int, ...] = (),
    perf_mode: matmul_perf_mode = matmul_perf_mode.none,
) -> None:
    """dst[M, N] (+)= stationary[K, M].T @ moving[K, N], in float32."""
    stationary = step.tile("stationary", stationary, regions=(SBUF,))
    moving = step.tile("moving", moving, regions=(SBUF,))
    dst = step.tile("dst", dst)
    accumulate = None if accumulate is None else bool(accumulate)
    _check_types(step, stationary, moving)
    if perf_mode is matmul_perf_mode.double_row:
        _check_double_row(step, dst, stationary, moving, tile_position, tile_size)
        _double_row(step, dst, stationary, moving, accumulate)
        return
    _check_sizes(step, dst, stationary, moving)
    where = psum_destination(step, dst)
    k, m, n = stationary.shape[0], stationary.free_size, moving.free_size
    _check_tiling(step, tile_position, tile_size, k, m)
    if is_transpose:
        if dst.dtype not in (stationary.dtype, moving.dtype):
            step.refuse("transpose-dtype", f"dst {dst!r}: a transpose keeps the type.")
    else:
        _check_result_type(step, dst)
    step.operands(dst, stationary, moving)
    left, right = _operand(step, stationary), _operand(step, moving)
    if is_transpose and step.core.target.generation >= 3 and _is_identity(right):
        product = left.T  # NaN and inf stay where they are
    else:
        with np.errstate(all="ignore"):
            product = left.T @ right
    accumulate_product(step, dst, where, product, accumulate)
    slow = (
        4 if is_float32(moving.dtype) and not (is_moving_onezero and is_stationary_onezero) else 1
    )
    step.runs_on(Engine.tensor, slow * max(n, FIXED_CYCLES), n, macs=k * m * n)


def _is_identity(matrix: np.ndarray) -> bool:
    rows, columns = matrix.shape
    return rows == columns and bool((matrix == np.eye(rows, dtype=matrix.dtype)).all())


def _check_double_row(
    step: Step,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    tile_position: Any,
    tile_size: Any,
) -> None:
    if step.core.target.generation < 3:
        step.refuse("double-row", "double_row needs trn2 or newer.")
    if tile_size and tile_size[1] != 128:
        step.refuse("double-row", "double_row does not combine with column tiles.")
    for role, tensor in (("stationary", stationary), ("moving", moving)):
        if tensor.dtype not in FP8_TYPES or tensor.ndim != 3 or tensor.shape[1] != 2:
            step.refuse("double-row", f"{role} {tensor!r}: fp8 of shape (K, 2, columns).")
    k, m, n = stationary.shape[0], stationary.shape[2], moving.shape[2]
    if moving.shape[0] != k or (dst.shape[0], dst.free_size) != (m, n) or m > 128 or n > 512:
        step.refuse(
            "double-row",
            f"dst {dst!r}, stationary {stationary!r}, moving {moving!r}: must be [M, N], "
            "[K, 2, M], [K, 2, N] with M up to 128 and N up to 512.",
        )
    _check_tiling(step, tile_position, tile_size, k, m)
    _check_result_type(step, dst)


def _double_row(
    step: Step,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    accumulate: bool | None,
) -> None:
    """Two fp8 rows a partition: contraction over partition and the first free axis of 2."""
    k, m, n = stationary.shape[0], stationary.shape[2], moving.shape[2]
    where = psum_destination(step, dst)
    step.operands(dst, stationary, moving)
    left = step.float32(stationary).reshape(k, 2, m)
    right = step.float32(moving).reshape(k, 2, n)
    accumulate_product(step, dst, where, np.einsum("krm,krn->mn", left, right), accumulate)
    step.runs_on(Engine.tensor, max(n, FIXED_CYCLES), n, macs=2 * k * m * n)


def accumulate_product(
    step: Step, dst: NkiTensor, where: Window, product: np.ndarray, accumulate: bool | None
) -> None:
    """Overwrites or adds, as told or, if not told, depending on what the location holds."""
    step.check_destination(dst)
    assert dst.contents.accumulated is not None
    holds = where.flags(dst.contents.accumulated) != 0
    if accumulate and not holds.all():
        raise UninitializedReadError(
            "nc_matmul.accumulate",
            f"nc_matmul: accumulate=True onto {dst!r}, parts of which no matmul has written (a "
            "memset or copy does not count): pass accumulate=False for the first, or None.",
            step.record.source,
        )
    target, shaped = where.array(), product.reshape(dst.shape)
    step.note_write(where, lambda: False)
    if accumulate is False or not holds.any():
        target[...] = shaped
    else:
        dst.contents.check_alive(where.box, where.flags)
        step.note_read(where)
        with np.errstate(all="ignore"):
            target[...] = np.where(holds, target + shaped, shaped)
    step.wrote(where, accumulated=True)


@instruction
def nc_transpose(
    step: Step, dst: NkiTensor, data: NkiTensor, engine: Engine = Engine.unknown
) -> None:
    """dst[F, P] = data[P, F], all free axes as one: Tensor engine, or Vector up to 32 x 32."""
    data, dst = step.tile("data", data), step.tile("dst", dst)
    p, f = data.shape[0], data.free_size
    if (dst.shape[0], dst.free_size) != (f, p):
        step.refuse("shape", f"dst {dst!r}: must be {f} partitions of {p} elements for {data!r}.")
    if dst.dtype != data.dtype and not (data.dtype in FP8_TYPES and dst.dtype.itemsize == 2):
        step.refuse("dtype", f"dst {dst!r}: must have the type of data {data!r}.")
    on_tensor = data.buffer is SBUF and dst.buffer is PSUM
    if engine is Engine.unknown:
        engine = Engine.tensor if on_tensor else Engine.vector
    step.operands(dst, data)
    if engine is Engine.tensor:
        if not on_tensor:
            step.refuse("buffer", f"the Tensor engine transposes SBUF {data!r} to PSUM {dst!r}.")
        if p > 128 or f > 128:
            step.refuse("size", f"data {data!r}: at most 128 x 128 on the Tensor engine.")
        where = psum_destination(step, dst)
        step.put(dst, step.bits(data).T)
        assert dst.contents.accumulated is not None
        where.flags(dst.contents.accumulated)[...] = 0xFF
        step.runs_on(Engine.tensor, max(p, min(FIXED_CYCLES, f)), p, macs=p * p * f)
        return
    if engine is not Engine.vector:
        step.refuse("engine", f"engine {engine.name}: tensor or vector.")
    if p > 32 or f > 32:
        step.refuse(
            "size", f"data {data!r}: at most 32 x 32 on the Vector engine; SBUF to PSUM for more."
        )
    step.put(dst, step.bits(data).T)
    step.runs_on(Engine.vector, max(FIXED_CYCLES, p), f)
