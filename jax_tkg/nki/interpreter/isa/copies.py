"""Moving and filling on-chip memory: `memset`, `tensor_copy`, `tensor_copy_predicated`."""

from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.dtypes import convert
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import (
    FIXED_CYCLES,
    PSUM,
    Step,
    elementwise_cycles,
    instruction,
)
from jax_tkg.nki.interpreter.tensor import NkiTensor


def pick_engine(
    step: Step, engine: Engine, allowed: tuple[Engine, ...], *tiles: NkiTensor
) -> Engine:
    """The engine asked for, or the first allowed one; GpSimd does not reach PSUM."""
    if engine is Engine.unknown:
        return allowed[0]
    if engine not in allowed:
        names = ", ".join(e.name for e in allowed)
        step.refuse("engine", f"engine {engine.name}: must be {names}.")
    if engine is Engine.gpsimd and any(t.buffer is PSUM for t in tiles):
        step.refuse("gpsimd-psum", f"GpSimd does not reach PSUM: {tiles!r}.")
    return engine


@instruction
def memset(step: Step, dst: NkiTensor, value: Any, engine: Engine = Engine.unknown) -> None:
    """Fills a tile with a constant."""
    dst = step.tile("dst", dst)
    if isinstance(value, NkiTensor):
        step.refuse("value", f"value {value!r}: must be a compile-time number.")
    if dst.dtype.is_packed and value != 0:
        step.refuse("packed", f"dst {dst!r}: packed types take 0 only.")
    if isinstance(value, int) and dst.dtype.is_integer:
        limits = np.iinfo(dst.dtype.numpy)
        if not limits.min <= value <= limits.max:
            step.refuse("range", f"value {value}: {dst.dtype} holds {limits.min} to {limits.max}.")
    kind = np.int64 if isinstance(value, int) and not dst.dtype.is_float else np.float32
    step.put(dst, np.full(dst.shape, value, kind))
    step.runs_on(
        pick_engine(step, engine, (Engine.vector, Engine.gpsimd), dst),
        elementwise_cycles(dst.free_size, dst),
        dst.free_size,
    )


@instruction
def tensor_copy(
    step: Step, dst: NkiTensor, src: NkiTensor, engine: Engine = Engine.unknown
) -> None:
    """Copies a tile, converting its type through float32 where the types differ."""
    dst, src = step.tile("dst", dst), step.tile("src", src)
    step.same_layout(dst=dst, src=src)
    if engine is Engine.scalar and step.core.target.generation < 3:
        step.refuse("scalar-copy", "the Scalar engine of trn1 copies by activation(op=nl.copy).")
    engines = (Engine.vector, Engine.scalar, Engine.gpsimd)
    step.put(dst, step.bits(src) if dst.dtype == src.dtype else step.float32(src))
    step.runs_on(
        pick_engine(step, engine, engines, dst, src),
        elementwise_cycles(dst.free_size, dst, src),
        dst.free_size,
    )


@instruction
def tensor_copy_predicated(
    step: Step, dst: NkiTensor, src: Any, predicate: NkiTensor, reverse_pred: bool = False
) -> None:
    """Copies src where the predicate is not 0 (or is 0, reversed); elsewhere dst stays."""
    dst, predicate = step.tile("dst", dst), step.tile("predicate", predicate)
    tiles = {"dst": dst, "predicate": predicate}
    if isinstance(src, NkiTensor):
        tiles["src"] = src = step.tile("src", src)
        if src.dtype != dst.dtype:
            step.refuse("dtype", f"src {src!r} and dst {dst!r}: must have one type.")
        step.not_all_psum(src=src, predicate=predicate)
    step.same_layout(**tiles)
    if predicate.dtype not in ("uint8", "uint16", "uint32"):
        step.refuse("predicate", f"predicate {predicate!r}: must be uint8, uint16 or uint32.")
    chosen = (step.bits(predicate) != 0) != reverse_pred
    where = step.where(dst)
    result = where.array().reshape(chosen.shape).copy()
    if not chosen.all():
        step.check_written(where, ~chosen)
        dst.contents.check_alive(where.box, where.flags)
        step.note_read(where)
    if isinstance(src, NkiTensor):
        np.copyto(result, step.bits(src), where=chosen)
    else:
        result[chosen] = convert(np.full(1, src, np.float32), dst.dtype, exact=step.exact)[0]
    step.put(dst, result)
    slow = 1 if predicate.buffer is PSUM or dst.buffer is PSUM else 2
    step.runs_on(Engine.vector, max(FIXED_CYCLES, slow * dst.free_size), dst.free_size)
