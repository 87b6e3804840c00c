"""Shapes and strides in elements: the arithmetic of views."""

import math
from collections.abc import Sequence


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous array."""
    strides, step = list[int](), 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def complete(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """A shape with its one -1, if any, worked out."""
    known = math.prod(n for n in shape if n != -1)
    return tuple(size // known if n == -1 and known else n for n in shape)


def reshape_strides(
    shape: Sequence[int], strides: Sequence[int], new: Sequence[int]
) -> list[int] | None:
    """Strides of the same elements in the same order under another shape, if there are any."""
    runs = list[list[int]]()  # [elements, stride] of axes that can be seen as one
    for n, stride in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == n * stride:
            runs[-1] = [runs[-1][0] * n, stride]
        else:
            runs.append([n, stride])
    result, run = list[int](), 0
    left = runs[0][0] if runs else 1
    for n in new:
        if n == 1:
            result.append(0)
            continue
        if left == 1:
            run += 1
            left = runs[run][0] if run < len(runs) else 0
        if left == 0 or left % n:
            return None
        left //= n
        result.append(runs[run][1] * left)
    return result
