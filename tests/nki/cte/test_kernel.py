"""The prefill kernel by itself: language, hardware rules, numbers."""

from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.cte.kernel import attention_cte
from jax_tkg.nki.interpreter.lint import check
from jax_tkg.rope import RotaryEmbedding
from tests.nki.cte.problems import Case, Problem, excess

STRICT: dict[str, Any] = {"refuse_uninitialized": True}
PAGED: dict[str, Any] = {"layout": "paged", "batch": 2, "heads": 4, "kv_heads": 2, "tokens": 60}
LIVE: dict[str, Any] = {
    "live": True, "tokens": 30, "slots": 1100, "batch": 2, "lengths": (600, 40), "causal": False,
}  # fmt: skip

INTERLEAVED = RotaryEmbedding(base=5000.0, interleaved=True, rotary_dim=24)

LOOPED: dict[str, Any] = {
    "looped": True, "heads": 9, "head_dim": 8, "value_head_dim": 8, "tokens": 300, "slots": 600,
}  # fmt: skip

CAUSAL_LOOPS: dict[str, Any] = {
    "looped": True, "heads": 4, "head_dim": 8, "value_head_dim": 8, "tokens": 1060, "slots": 1060,
}  # fmt: skip

FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"causal": False},
    "a chunk after others": {"tokens": 140, "slots": 400},
    "more queries than keys": {"tokens": 240, "slots": 100},
    "short": {"tokens": 5, "slots": 37, "heads": 6, "kv_heads": 2, "batch": 2},
    "ragged": {"tokens": 200, "slots": 333, "heads": 3},
    "several tiles": {"tokens": 130, "slots": 1100, "heads": 1},
    "window": {"tokens": 280, "slots": 280, "window": (50, 0)},
    "window on both sides": {"causal": False, "window": (70, 30), "tokens": 200, "slots": 333},
    "lengths": {"batch": 3, "lengths": (144, 60, 0)},
    "lengths and window": {"batch": 2, "lengths": (130, 99), "window": (40, 0)},
    "packed": {"packed": (60, 14, 70)},
    "packed, not causal": {"packed": (60, 14, 70), "causal": False},
    "beside": {"beside": True, "slots": 200},
    "beside, with window": {"beside": True, "slots": 200, "window": (90, 0)},
    "beside, with lengths": {"beside": True, "batch": 3, "lengths": (300, 150, 77), "slots": 160},
    "ring": {"ring": True, "batch": 2, "window": (70, 0)},
    "sinks": {"sinks": True},
    "sinks, nothing seen": {"sinks": True, "batch": 2, "lengths": (144, 0)},
    "soft cap": {"cap": 3.0},
    "bias": {"bias": (1, 2, 144), "batch": 2},
    "bias of keys": {"bias": (2, 1, 1), "batch": 2},
    "ALiBi": {"alibi": True},
    "ALiBi, not causal": {"alibi": True, "causal": False},
    "ALiBi beside a ring": {"alibi": True, "ring": True, "cap": 4.0},
    "mask": {"mask": (1, 2, 144)},
    "mask of keys": {"mask": (1, 1, 1)},
    "negative scale": {"scale": -0.1},
    "no scale": {"scale": 0.0},
    "unnormalised": {"normalize": False},
    "unnormalised, nothing seen": {"normalize": False, "batch": 2, "lengths": (99, 0)},
    "BSKH": {"layout": "BSKH", "heads": 4, "kv_heads": 2},
    "BKHS": {"layout": "BKHS"},
    "pages of 16": PAGED | {"page_len": 16},
    "holes": {"holes": True, "window": (60, 0), "tokens": 300, "slots": 300, "heads": 1},
    "missing pages": PAGED | {"page_len": 16, "holes": True, "cap": 5.0},
    "pages of 48 beside": PAGED
    | {"page_len": 48, "slots": 288, "beside": True, "lengths": (300, 348)},
    "bf16": {"dtype": "bfloat16", "tokens": 140, "slots": 1400, "head_dim": 128},
    "f16": {"dtype": "float16", "value_head_dim": 96},
    "wide": {"dtype": "float16", "head_dim": 256, "value_head_dim": 192},
    "fp8": {"stored": "float8_e4m3", "dtype": "bfloat16"},
    "fp8, other type": {"stored": "float8_e5m2"},
    "int8": {"stored": "int8", "beside": True, "dtype": "bfloat16"},
    "int8, soft cap": {"stored": "int8", "cap": 4.0, "layout": "BSKH"},
    "live": LIVE | {"beside": True, "sinks": True},
    "live pages": LIVE | {"layout": "paged", "page_len": 48, "slots": 1104, "holes": True},
    "live int8": LIVE | {"layout": "BKHS", "stored": "int8", "cap": 4.0},
    "live BSKH": LIVE | {"layout": "BSKH", "dtype": "bfloat16", "slots": 2100, "alibi": True},
    "live packed": {"live": True, "packed": (100, 430, 20), "tokens": 550, "slots": 550,
                    "heads": 1},
    "rotated": {"beside": True, "slots": 40, "rope": RotaryEmbedding(), "heads": 4, "kv_heads": 2},
    "rotated, some channels": {"beside": True, "slots": 33, "rope": INTERLEAVED, "tokens": 50,
                               "dtype": "bfloat16", "batch": 2, "lengths": (70, 55)},
    "looped": LOOPED | {"batch": 2},
    "looped, more to do": LOOPED | {
        "causal": False, "normalize": False, "alibi": True, "dtype": "bfloat16", "slots": 1100,
    },
    "looped beside": LOOPED | {"slots": 530, "beside": True, "rope": RotaryEmbedding(),
                               "window": (300, 0), "lengths": (700,)},
    "looped, causal": CAUSAL_LOOPS | {"batch": 2, "sinks": True},
    "looped, causal, behind others": CAUSAL_LOOPS | {"slots": 1748, "alibi": True},
    "looped, causal, beside": CAUSAL_LOOPS | {"slots": 20, "beside": True, "alibi": True},
    "looped, causal, in pages": CAUSAL_LOOPS | {
        "layout": "paged", "page_len": 20, "tokens": 300, "slots": 340, "heads": 9, "alibi": True,
        "holes": True,
    },
    "looped, causal, turned by DMA": CAUSAL_LOOPS | {
        "dtype": "bfloat16", "layout": "BSKH", "tokens": 2060, "slots": 3084, "heads": 2,
    },
    "looped, causal, transposed": CAUSAL_LOOPS | {"layout": "BKHS", "stored": "int8"},
    "looped ring": LOOPED | {"ring": True, "window": (200, 0), "slots": 520},
    "everything": {
        "beside": True, "sinks": True, "cap": 5.0, "bias": (1, 2, 144), "alibi": True,
        "mask": (1, 1, 144), "stored": "int8", "normalize": False, "window": (200, 0),
    },
    "everything in pages": PAGED | {
        "page_len": 32, "beside": True, "sinks": True, "bias": (2, 4, 1), "alibi": True,
        "mask": (1, 4, 60), "dtype": "bfloat16", "lengths": (200, 150), "slots": 160,
        "rope": INTERLEAVED,
    },
}  # fmt: skip


def test_the_compiler_accepts_its_language() -> None:
    assert check(attention_cte) == ()


@pytest.mark.parametrize("feature", FEATURES)
def test_on_one_program(feature: str) -> None:
    assert excess(Case(Problem(**FEATURES[feature])), **STRICT) <= 1


@pytest.mark.parametrize("feature", list(FEATURES)[::9])
def test_on_two_programs(feature: str) -> None:
    case = Case(Problem(**FEATURES[feature], programs=2))
    assert excess(case, seed=3, **STRICT) <= 1


@pytest.mark.parametrize("tokens", [1, 127, 129, 300])
@pytest.mark.parametrize("slots", [1, 385])
def test_sizes(tokens: int, slots: int) -> None:
    case = Case(Problem(tokens=tokens, slots=slots, head_dim=16, value_head_dim=16, heads=1))
    assert excess(case, **STRICT) <= 1


@pytest.mark.parametrize("growth", [0.01, 1.0, 100.0])
def test_running_maximum(growth: float) -> None:
    """It moves on every tile, or never."""
    case = Case(Problem(tokens=20, slots=1200, heads=1, growth=growth, scale=0.3))
    assert excess(case, **STRICT) <= 1


def test_programs_give_the_same_bits() -> None:
    """Who computes a row makes no difference to it."""
    problem = {"tokens": 400, "slots": 400, "heads": 1, "dtype": "bfloat16"}
    one, two = (Case(Problem(**problem, programs=p)).run() for p in (1, 2))
    for mine, theirs in zip(one.outputs, two.outputs, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_psum_leaves_a_bank_to_the_compiler() -> None:
    for dtype in ("bfloat16", "float32"):
        wide = {"head_dim": 128, "value_head_dim": 256, "tokens": 256, "slots": 1024}
        case = Case(Problem(**wide, dtype=dtype, causal=False, heads=1))
        peaks = {use.region.value: use.peak_bytes for use in case.run().memory}
        assert peaks["psum"] <= 14 * 1024
        assert peaks["sbuf"] <= 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_large(tokens: int, dtype: str) -> None:
    case = Case(Problem(tokens=tokens, slots=tokens, dtype=dtype, heads=1, programs=2))
    assert excess(case) <= 1


@pytest.mark.slow
def test_a_chunk_at_16k() -> None:
    case = Case(Problem(tokens=300, slots=16384, heads=1, beside=True, sinks=True))
    assert excess(case) <= 1


def test_the_launch_is_described() -> None:
    run = Case(Problem(tokens=4, slots=4)).run()
    assert isinstance(run, interpreter.Run)
    assert "sharding: pairs (2 pairs)" in str(Problem(batch=2, programs=2).plan())
