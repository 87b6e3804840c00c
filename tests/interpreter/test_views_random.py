"""Random views, and chains of them, against NumPy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.viewing import ON_CHIP, numbers, refuses, run, view_of


@given(st.data(), st.booleans())
def test_ap_is_as_strided(data: st.DataObject, on_chip: bool) -> None:
    base = numbers(4, 30)
    first = (30, data.draw(st.integers(1, 4)))
    axes = data.draw(
        st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), min_size=1, max_size=3)
    )
    if not on_chip:
        first = (data.draw(st.integers(0, 30)), first[1])
    pattern = [list(first), *(list(a) for a in axes)]
    room = 30 if on_chip else 120
    reach = sum(s * (n - 1) for s, n in (axes if on_chip else [first, *axes]))
    start = data.draw(st.integers(0, 35))
    offset = start + 30 * (4 - first[1]) if on_chip else start

    def make(t):
        return t.ap(pattern, offset=offset)

    row_start = start % 30 if on_chip else start
    fits = row_start + reach < room and offset // 30 + (first[1] if on_chip else 0) <= 4
    if not fits:
        refuses("memory.out-of-bounds", base, make, on_chip)
        return
    expected = np.lib.stride_tricks.as_strided(
        base.ravel()[offset:], [n for _, n in pattern], [4 * s for s, _ in pattern]
    )
    np.testing.assert_array_equal(view_of(base, make, on_chip), expected)


def without_copy(a: np.ndarray, shape: tuple[int, ...], on_chip: bool) -> np.ndarray | None:
    """`a.reshape(shape)` where NumPy does it without a copy; on chip each partition by itself."""
    inner = a[0] if on_chip else a
    reshaped = inner.reshape(shape[1:] if on_chip else shape)
    if not np.may_share_memory(reshaped, inner):
        return None
    strides = (a.strides[0], *reshaped.strides) if on_chip else reshaped.strides
    return np.lib.stride_tricks.as_strided(a, shape, strides)


def step(kind: str, picks: list[int], a: np.ndarray, on_chip: bool) -> tuple[Any, Any] | None:
    """A view of a tensor shaped as `a`, and of `a` itself: None if the rules forbid it."""
    lead = 1 if on_chip else 0
    if a.ndim <= lead and kind != "expand":
        return None
    dim = lead + picks[0] % max(a.ndim - lead, 1)
    if kind == "slice":
        axis = picks[0] % a.ndim
        start = picks[1] % a.shape[axis]
        stop = start + 1 + picks[2] % (a.shape[axis] - start)
        pace = 1 if on_chip and axis == 0 else 1 + picks[3] % 3
        key = (slice(None),) * axis + (slice(start, stop, pace),)
        return (lambda t: t[key]), a[key]
    if kind == "index":
        i = picks[1] % a.shape[dim]
        if a.ndim <= lead + 1:
            return (lambda t: t.select(dim, i)), a[(slice(None),) * dim + (slice(i, i + 1),)]
        return (lambda t: t.select(dim, i)), a[(slice(None),) * dim + (i,)]
    if kind == "permute":
        order = list(range(lead, a.ndim))
        order = [
            order[i] for i in np.argsort([p * 8 + i for i, p in enumerate(picks[: len(order)])])
        ]
        dims = (*range(lead), *order)
        return (lambda t: t.permute(dims)), a.transpose(dims)
    if kind == "expand":
        if a.ndim > 5:
            return None
        at = lead + picks[0] % (a.ndim - lead + 1)
        return (lambda t: t.expand_dim(at)), np.expand_dims(a, at)
    if kind in ("broadcast", "squeeze"):
        if a.shape[dim] != 1 or (kind == "squeeze" and a.ndim <= lead + 1):
            return None
        if kind == "squeeze":
            return (lambda t: t.squeeze_dim(dim)), a.squeeze(dim)
        size = 1 + picks[1] % 3
        shape = (*a.shape[:dim], size, *a.shape[dim + 1 :])
        return (lambda t: t.broadcast(dim, size)), np.broadcast_to(a, shape)
    if kind == "split":
        factors = [f for f in range(1, a.shape[dim] + 1) if a.shape[dim] % f == 0]
        f = factors[picks[1] % len(factors)]
        shape = (*a.shape[:dim], f, a.shape[dim] // f, *a.shape[dim + 1 :])
        return (lambda t: t.reshape_dim(dim, (f, -1))), without_copy(a, shape, on_chip)
    last = dim + picks[1] % (a.ndim - dim)
    shape = (*a.shape[:dim], math.prod(a.shape[dim : last + 1]), *a.shape[last + 1 :])
    return (lambda t: t.flatten_dims(dim, last)), without_copy(a, shape, on_chip)


KINDS = ("slice", "index", "permute", "expand", "broadcast", "squeeze", "split", "flatten")
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 99), min_size=6, max_size=6)),
    min_size=1,
    max_size=6,
)


@given(STEPS, st.booleans())
def test_chains_of_views(steps: list[tuple[str, list[int]]], on_chip: bool) -> None:
    base = numbers(4, 3, 4, 6)
    model, chain = base, []
    for kind, picks in steps:
        planned = step(kind, picks, model, on_chip)
        if planned is None or math.prod(planned[1].shape if planned[1] is not None else ()) > 5000:
            continue
        make, result = planned
        chain.append(make)
        if result is None:
            refuses("view.reshape", base, lambda t: apply(t, chain), on_chip)
            return
        model = result
    np.testing.assert_array_equal(view_of(base, lambda t: apply(t, chain), on_chip), model)


def apply(tensor: Any, chain: list[Callable[[Any], Any]]) -> Any:
    for make in chain:
        tensor = make(tensor)
    return tensor


@given(STEPS)
def test_writing_through_a_view_changes_just_its_elements(
    steps: list[tuple[str, list[int]]],
) -> None:
    base = np.zeros((4, 3, 4, 6), np.int32)
    expected = base.copy()
    model, chain = expected, []
    for kind, picks in steps:
        planned = step(kind, picks, model, ON_CHIP)
        if planned is None or planned[1] is None or kind == "broadcast":
            continue
        chain.append(planned[0])
        model = planned[1]
    values = 1 + numbers(*model.shape)
    model[...] = values

    def kernel(x, y):
        tile = nl.ndarray(x.shape, x.dtype)
        nisa.dma_copy(tile, x)
        nisa.dma_copy(apply(tile, chain), y)
        out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        nisa.dma_copy(out, tile)
        return out

    np.testing.assert_array_equal(run(kernel, base, values), expected)
