"""What the tests of single instructions and of the detectors share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl


def some(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Normal values, or for integer types small ones of both signs where there are any."""
    generator = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        low = max(-100, int(np.iinfo(dtype).min))
        return generator.integers(low, 100, shape).astype(dtype)
    return generator.normal(size=shape).astype(np.float32).astype(dtype)


def refusal(
    rule: str, kernel: Callable[..., Any], *arguments: Any, **options: Any
) -> interpreter.NkiError:
    """The error of a kernel that must be refused under this rule."""
    with pytest.raises(interpreter.NkiError) as caught:
        interpreter.run(kernel, *arguments, **options)
    assert caught.value.rule == rule, caught.value
    return caught.value


def loaded(array: Any, dtype: Any = None) -> Any:
    """In a kernel: an HBM tensor of two or more axes as a tile in SBUF."""
    tile = nl.ndarray(array.shape, array.dtype if dtype is None else dtype)
    nisa.dma_copy(tile, array)
    return tile


def filled(shape: tuple[int, ...], dtype: Any = nl.float32, buffer: Any = nl.sbuf) -> Any:
    """In a kernel: a tile of ones."""
    tile = nl.ndarray(shape, dtype, buffer)
    nisa.memset(tile, 1)
    return tile


def stored(tile: Any, dtype: Any = None) -> Any:
    """In a kernel: an output with the contents of a tile, which may be in PSUM."""
    if tile.buffer is nl.psum:
        copy = nl.ndarray(tile.shape, tile.dtype)
        nisa.tensor_copy(copy, tile)
        tile = copy
    output = nl.ndarray(tile.shape, tile.dtype if dtype is None else dtype, nl.shared_hbm)
    nisa.dma_copy(output, tile)
    return output


def use(tile: Any) -> None:
    """In a kernel: reads a tile."""
    nisa.tensor_copy(nl.ndarray(tile.shape, tile.dtype), tile)
