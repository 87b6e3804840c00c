"""Running one instruction on tiles made from arrays, for the tests of compute instructions."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.dtypes import as_dtype
from jax_tkg.nki.interpreter.errors import NkiError

F32, BF16, F16 = np.float32, ml_dtypes.bfloat16, np.float16
E4M3, E5M2 = ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2
FLOATS = (F32, BF16, F16, E4M3, E5M2)
FLOAT32_MIN = np.finfo(np.float32).min


def tile(array: Any, buffer: Any = nl.sbuf) -> Any:
    """A tile that holds what a tensor in HBM does."""
    loaded = nl.ndarray(array.shape, array.dtype)
    nisa.dma_copy(loaded, array)
    if buffer is nl.sbuf:
        return loaded
    moved = nl.ndarray(array.shape, array.dtype, buffer)
    nisa.tensor_copy(moved, loaded)
    return moved


def run(
    body: Callable[..., Any],
    *arrays: np.ndarray,
    out: Sequence[tuple[Sequence[int], Any]],
    psum: Sequence[str] = (),
    start: float = 0.0,
    **options: Any,
) -> Any:
    """What `body(dst..., tile of each array...)` leaves in its destinations.

    Args:
        body: issues instructions; its first parameters are the destinations.
        *arrays: inputs, at most four.
        out: shape and dtype of each destination.
        psum: names of the parameters of `body` that are tiles in PSUM.
        start: what destinations hold before.
        **options: of `interpreter.run`.

    Returns:
        The run; `outputs` are the destinations.
    """
    names = list(inspect.signature(body).parameters)

    def buffer(position: int) -> Any:
        return nl.psum if names[position] in psum else nl.sbuf

    def kernel(a=None, b=None, c=None, d=None):
        given = [x for x in (a, b, c, d) if x is not None]
        results = [
            nl.ndarray(shape, as_dtype(dtype), buffer(i)) for i, (shape, dtype) in enumerate(out)
        ]
        for result in results:
            nisa.memset(result, start)
        body(*results, *(tile(x, buffer(len(out) + i)) for i, x in enumerate(given)))
        stored = []
        for result in results:
            on_chip = nl.ndarray(result.shape, result.dtype)
            nisa.tensor_copy(on_chip, result)
            stored.append(nl.ndarray(result.shape, result.dtype, nl.shared_hbm))
            nisa.dma_copy(stored[-1], on_chip)
        return tuple(stored)

    return interpreter.run(kernel, *arrays, **options)


def results(body: Callable[..., Any], *arrays: np.ndarray, **kwargs: Any) -> Any:
    """The destinations of `run`; of one, itself."""
    outputs = run(body, *arrays, **kwargs).outputs
    return outputs[0] if len(outputs) == 1 else outputs


def issued(done: Any, op: str) -> Any:
    """The one instruction of this name that ran."""
    (found,) = [i for i in done.programs[0] if i.op == op]
    return found


def refused(rule: str, body: Callable[..., Any], *arrays: np.ndarray, **kwargs: Any) -> str:
    """Asserts that the run is refused by this rule; the message."""
    with pytest.raises(NkiError) as caught:
        run(body, *arrays, **kwargs)
    assert caught.value.rule == rule, caught.value
    return str(caught.value)


def normal(*shape: int, dtype: Any = F32, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    values = scale * np.random.default_rng(seed).normal(size=shape)
    return values.astype(np.float32).astype(dtype)


def integers(*shape: int, dtype: Any, seed: int = 0, low: int = 0, high: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def wide(x: np.ndarray) -> np.ndarray:
    """In float32, as engines compute."""
    return x.astype(np.float32)
