"""The rotary kernel and its steps: exact at positions up to 2^20, where float32 is lost."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki import rope as rope_module
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.interpreter.lint import check
from jax_tkg.nki.rope import RopePlan, cos_sin_rows, load_turns, rope, rotate_rows
from jax_tkg.nki.rope_call import rotary_table, rotate
from jax_tkg.rope import LinearScaling, Llama3Scaling, RotaryEmbedding

LIMIT = 2**20
BOUND = 2.0**-22
"""What `cos_sin_rows` promises of a cosine or sine."""

LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
ROTARIES = [
    RotaryEmbedding(),
    RotaryEmbedding(base=500000.0, interleaved=True, scaling=LLAMA3),
    RotaryEmbedding(base=3.0, rotary_dim=6, scaling=LinearScaling(0.01)),  # many turns a token
]


def test_the_compiler_accepts_its_language() -> None:
    assert check(rope) == ()


def some_positions(*shape: int) -> np.ndarray:
    """Anywhere in the range, with its ends and what lies beside the digits' borders."""
    positions = np.random.default_rng(0).integers(-LIMIT, LIMIT, shape, np.int32, endpoint=True)
    special = [LIMIT, -LIMIT, 0, 1, -1, 2047, 2048, -2048, -2049, LIMIT - 1, 2**19]
    positions.reshape(-1)[: len(special)] = special
    return positions


def exact_cos_sin(rotary: RotaryEmbedding, positions: np.ndarray, width: int) -> np.ndarray:
    """Float64 `[..., 2, pairs]`: an angle of 10^8 radians is good to 10^-8 there."""
    angle = positions[..., None].astype(np.float64) * rotary.frequencies(width)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-2)


def exact_rotation(rotary: RotaryEmbedding, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Float64, one channel pair at a time."""
    result = x.astype(np.float64)
    cos_sin = exact_cos_sin(rotary, positions, x.shape[-1])[:, :, None]
    pairs = cos_sin.shape[-1]
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + pairs)
        first, second = x[..., a].astype(np.float64), x[..., b].astype(np.float64)
        cos, sin = cos_sin[..., 0, i], cos_sin[..., 1, i]
        result[..., a], result[..., b] = first * cos - second * sin, second * cos + first * sin
    return result


def cos_sin_kernel(positions: Any, table: Any) -> Any:
    """Only the step, of a column of positions of any type."""
    rows = positions.shape[0]
    turns = load_turns(table, 128)
    at = nl.ndarray((rows, 1), positions.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=at, src=positions)
    cos_sin = cos_sin_rows(at, turns)
    out = nl.ndarray(cos_sin.shape, nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=cos_sin)
    return out


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("rotary", ROTARIES)
def test_angles_are_exact_up_to_a_million(rotary: RotaryEmbedding, dtype: Any) -> None:
    worst = 0.0
    for positions in some_positions(8, 100, 1):
        run = interpreter.run(
            cos_sin_kernel, positions.astype(dtype), rotary_table(rotary, 128),
            refuse_uninitialized=True,
        )  # fmt: skip
        error = run.outputs - exact_cos_sin(rotary, positions[:, 0], 128)
        worst = max(worst, float(np.abs(error).max()))
    assert 2.0**-25 < worst < BOUND


def test_a_float32_product_would_not_do() -> None:
    positions = some_positions(100)
    angle = positions[:, None].astype(np.float32) * ROTARIES[0].frequencies(128).astype(np.float32)
    error = np.cos(angle.astype(np.float64)) - exact_cos_sin(ROTARIES[0], positions, 128)[:, 0]
    assert np.abs(error).max() > 1e4 * BOUND


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("rotary", ROTARIES)
def test_rotation(rotary: RotaryEmbedding, dtype: Any, programs: int) -> None:
    x = np.random.default_rng(1).normal(size=(3, 50, 3, 16)).astype(dtype)
    positions = some_positions(3, 50)
    run = interpreter.run(
        rope, x, positions, rotary_table(rotary, 16), RopePlan(rotary.interleaved),
        programs=programs, refuse_uninitialized=True,
    )  # fmt: skip
    want = exact_rotation(rotary, x, positions)
    rotated = 2 * len(rotary.frequencies(16))
    np.testing.assert_array_equal(run.outputs[..., rotated:], x[..., rotated:])
    # Two products of numbers up to 4.5, a sum of them in float32, and one rounding to the dtype.
    budget = 9 * (BOUND + 2.0**-23) + np.abs(want) * float(ml_dtypes.finfo(dtype).eps) / 2
    assert (np.abs(run.outputs.astype(np.float64) - want) <= budget).all()
    assert run.outputs.dtype == dtype


def test_programs_share_the_tiles_and_many_heads_take_several_loads() -> None:
    x = np.random.default_rng(1).normal(size=(1, 256, 40, 128)).astype(np.float32)
    positions = some_positions(1, 256)
    table, plan = rotary_table(ROTARIES[0], 128), RopePlan(is_interleaved=False)
    one, two = (interpreter.run(rope, x, positions, table, plan, programs=p) for p in (1, 2))
    np.testing.assert_array_equal(one.outputs, two.outputs)
    assert len(two.programs[0]) == len(two.programs[1]) < len(one.programs[0])


def out_of_place_kernel(x: Any, positions: Any, table: Any, dtype: Any) -> Any:
    """Rows `[rows, H]` into a tile of another type."""
    rows, width = x.shape
    at = nl.ndarray((rows, 1), nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=at, src=positions)
    tile = nl.ndarray((rows, width), x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    turned = nl.ndarray((rows, width), dtype, buffer=nl.sbuf)
    rotate_rows(turned, tile, cos_sin_rows(at, load_turns(table, rows)), False)
    out = nl.ndarray((rows, width), dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=turned)
    return out


def test_the_step_fills_a_tile_of_another_type() -> None:
    x = np.random.default_rng(1).normal(size=(7, 10)).astype(np.float32)
    positions = some_positions(11, 1)[:7]
    table = rotary_table(ROTARIES[2], 10)
    got, exact = (
        interpreter.run(
            out_of_place_kernel, x, positions, table, dtype, refuse_uninitialized=True
        ).outputs
        for dtype in (nl.bfloat16, nl.float32)
    )
    np.testing.assert_array_equal(got, exact.astype(ml_dtypes.bfloat16))
    want = exact_rotation(ROTARIES[2], x[None, :, None], positions.T)[0, :, 0]
    np.testing.assert_allclose(exact, want, atol=9 * (BOUND + 2.0**-23))


def without_upper(positions: Any) -> Any:
    lower, upper = SPLIT(positions)
    nisa.memset(dst=upper, value=0.0)
    return lower, upper


SPLIT = rope_module.split_positions


def test_upper_bits_of_positions_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope_module, "split_positions", without_upper)
    with pytest.raises(AssertionError):
        test_angles_are_exact_up_to_a_million(ROTARIES[0], np.int32)


@pytest.mark.parametrize("rotary", ROTARIES)
def test_from_jax(rotary: RotaryEmbedding) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, 16)), jnp.float32)
    positions = jnp.asarray(some_positions(2, 6)[:, 1:])
    got = jax.jit(lambda x, p: rotate(rotary, x, p))(x, positions)
    np.testing.assert_allclose(got, rotary(x, positions), atol=2 * 9 * BOUND)
    mapped = jax.vmap(lambda x, p: rotate(rotary, x[None], p[None])[0])(x, positions)
    np.testing.assert_array_equal(mapped, got)


@pytest.mark.parametrize(
    ("shape", "positions", "error", "message"),
    [
        ((2, 5, 3, 16), jnp.zeros((2, 4), jnp.int32), ValueError, "same B and T"),
        ((2, 5, 3, 16), jnp.zeros((2, 5)), TypeError, "positions must be integers"),
        ((2, 5, 3, 15), jnp.zeros((2, 5), jnp.int32), ValueError, "must be even"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_refused(shape: Any, positions: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        rotate(ROTARIES[0], jnp.zeros(shape), positions)
