"""The mask kernel: both orientations, given and counted positions, against plain comparisons."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki import mask as mask_module
from jax_tkg.nki.interpreter.lint import check
from jax_tkg.nki.mask import make_mask_plan, mask
from jax_tkg.nki.mask_call import visibility


def test_the_compiler_accepts_its_language() -> None:
    assert check(mask) == ()


def some_bounds(batch: int, tokens: int, slots: int) -> np.ndarray:
    """Causal ends, windows of several lengths, rows that see nothing or all; `[2, B, T]`."""
    random = np.random.default_rng(0)
    end = random.integers(0, slots + 1, (batch, 1)) + np.arange(tokens) + 1
    start = end - random.integers(0, slots // 2 + 2, (batch, tokens))
    bounds = np.stack([np.maximum(start, 0), end]).astype(np.float32)
    bounds[:, 0, 0] = 0, 0
    bounds[:, -1, -1] = 0, 2**24
    return bounds


def ring_positions(batch: int, slots: int) -> np.ndarray:
    """The last positions of a ring, -1 where a slot is empty, up to 2^20."""
    last = np.array([2**20, slots // 2, *[slots + 3] * batch])[:batch, None]
    found = last - (last - np.arange(slots)) % slots
    return np.where(found >= 0, found, -1).astype(np.int32)


def expected(bounds: np.ndarray, positions: np.ndarray, *, by_key: bool) -> np.ndarray:
    low, high = bounds.astype(np.int64)[..., None]
    seen = (positions[:, None] >= low) & (positions[:, None] < high)
    return (seen.transpose(0, 2, 1) if by_key else seen).astype(np.uint8)


SHAPES = [(1, 1, 1), (2, 3, 130), (1, 130, 77), (2, 4, 1000)]


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("by_key", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks(shape: tuple[int, int, int], by_key: bool, programs: int) -> None:
    batch, _, slots = shape
    bounds, plan = some_bounds(*shape), make_mask_plan(*shape, by_key, programs)
    counted = np.broadcast_to(np.arange(slots, dtype=np.int32), (batch, slots))
    for positions in (None, ring_positions(batch, slots)):
        if positions is not None:
            bounds = np.where(bounds > 0, bounds + positions[:, :1] - 1, bounds).astype(np.float32)
        run = interpreter.run(
            mask, bounds, positions, plan, programs=programs, refuse_uninitialized=True
        )
        want = expected(bounds, counted if positions is None else positions, by_key=by_key)
        np.testing.assert_array_equal(run.outputs, want)


@pytest.mark.parametrize("by_key", [True, False])
def test_a_long_bucket_takes_several_tiles(by_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "TILE_ELEMENTS", 8)
    shape = (2, 3, 1000)
    plan = make_mask_plan(*shape, by_key, 2)
    assert min(map(len, plan.tiles)) > 1
    bounds = some_bounds(*shape)
    run = interpreter.run(mask, bounds, None, plan, programs=2)
    positions = np.broadcast_to(np.arange(1000), (2, 1000))
    np.testing.assert_array_equal(run.outputs, expected(bounds, positions, by_key=by_key))


@pytest.mark.parametrize("by_key", [True, False])
def test_from_jax(by_key: bool) -> None:
    bounds, positions = some_bounds(2, 3, 130), ring_positions(2, 130)
    made = jax.jit(lambda b, p: visibility(b, 130, p, by_key=by_key))(bounds, positions)
    np.testing.assert_array_equal(made, expected(bounds, positions, by_key=by_key))


@pytest.mark.parametrize(
    ("bounds", "positions", "message"),
    [
        (jnp.zeros((3, 1, 1)), None, "must be \\[2, B, T\\]"),
        (jnp.zeros((2, 1, 1)), jnp.zeros((1, 4), jnp.int32), "positions must be \\[B, S\\]"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_refused(bounds: Any, positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visibility(bounds, 5, positions, by_key=True)
