"""Reading what a view shows, for the tests of views."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError

ON_CHIP, HBM = True, False


def run(kernel: Callable[..., Any], *arrays: np.ndarray, **options: Any) -> Any:
    return interpreter.run(kernel, *arrays, **options).outputs


def view_of(array: np.ndarray, make: Callable[[Any], Any], on_chip: bool, **options: Any) -> Any:
    """The values of `make(tensor)`, of a tensor that holds `array`."""

    def kernel(x):
        tensor = x
        if on_chip:
            tensor = nl.ndarray(x.shape, x.dtype)
            nisa.dma_copy(tensor, x)
        view = make(tensor)
        out = nl.ndarray(view.shape, view.dtype, nl.shared_hbm)
        nisa.dma_copy(out, view)
        return out

    return run(kernel, array, **options)


def numbers(*shape: int, dtype: Any = np.int32) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


def refuses(rule: str, array: np.ndarray, make: Callable[[Any], Any], on_chip: bool) -> None:
    with pytest.raises(NkiError) as caught:
        view_of(array, make, on_chip)
    assert caught.value.rule == rule


X = numbers(8, 4, 6)
