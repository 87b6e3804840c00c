"""The decode kernel by itself: language, hardware rules, exchanges, long buckets, every step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki import attention_tkg as kernel_module
from jax_tkg.nki import interpreter
from jax_tkg.nki.attention_tkg import attention_tkg
from jax_tkg.nki.interpreter.lint import check
from jax_tkg.nki.plan import KernelPlan, make_plan
from jax_tkg.nki.steps import exchange, finalize, pv, qk, softmax

NAMES = (
    "positions", "page_rows", "new_key", "new_value", "new_bounds", "new_positions", "sinks",
    "hidden", "bias", "logit_scales", "value_scales",
)  # fmt: skip


def test_the_compiler_accepts_its_language() -> None:
    assert check(attention_tkg) == ()


class Case:
    """A problem with keys whose norm grows along the context, padding of NaN, and its answer."""

    def __init__(self, plan: KernelPlan, lengths: list[int], window: int | None = None) -> None:
        random = np.random.default_rng(0)
        b, t, s, n, k = plan.batch, plan.tokens, plan.slots, plan.heads, plan.kv_heads
        self.plan = plan
        self.query = random.normal(size=(b, t, n, plan.head_dim)).astype(np.float32)
        self.key = random.normal(size=(b, k, s, plan.head_dim)).astype(np.float32)
        self.key *= 1 + 3 * np.arange(s, dtype=np.float32)[:, None] / max(lengths)
        self.value = random.normal(size=(b, k, s, plan.value_head_dim)).astype(np.float32)
        position = np.array(lengths)[:, None] - t + np.arange(t)
        low = np.zeros((b, t)) if window is None else np.maximum(0, position - window + 1)
        self.bounds = np.stack([low, np.clip(position + 1, 0, None)]).astype(np.float32)
        for row, length in enumerate(lengths):
            self.key[row, :, length:] = self.value[row, :, length:] = np.nan
        self.extra: dict[str, np.ndarray] = {}
        if plan.has_sinks:
            self.extra["sinks"] = random.normal(size=b * n * t).astype(np.float32)
        if plan.has_new_keys:
            shape = (b, t, k)
            self.extra["new_key"] = random.normal(size=(*shape, plan.head_dim)).astype(np.float32)
            self.extra["new_value"] = random.normal(size=(*shape, plan.value_head_dim)).astype(
                np.float32
            )
            self.extra["new_positions"] = position.astype(np.int32) + t
            self.extra["new_bounds"] = np.stack([low, position + t + 1]).astype(np.float32)

    def run(self, **options: Any) -> interpreter.Run:
        given = dict.fromkeys(NAMES) | self.extra
        return interpreter.run(
            attention_tkg, self.query, self.key, self.value, self.bounds, *given.values(),
            self.plan, programs=self.plan.programs, **options,
        )  # fmt: skip

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp in float64, one row at a time."""
        plan = self.plan
        out = np.zeros((plan.batch, plan.tokens, plan.heads, plan.value_head_dim))
        lse = np.full(out.shape[:3], -np.inf)
        sinks = self.extra.get("sinks")
        for b, t, n in np.ndindex(lse.shape):
            k = n // plan.group
            first, end = self.bounds[:, b, t].astype(int)
            keys, values = self.key[b, k, first:end], self.value[b, k, first:end]
            if plan.has_new_keys:
                keys = np.concatenate([keys, self.extra["new_key"][b, : t + 1, k]])
                values = np.concatenate([values, self.extra["new_value"][b, : t + 1, k]])
            logits = keys.astype(np.float64) @ self.query[b, t, n] * plan.scale
            if plan.soft_cap is not None:
                logits = plan.soft_cap * np.tanh(logits / plan.soft_cap)
            sink = [] if sinks is None else [sinks.reshape(plan.batch, plan.heads, -1)[b, n, t]]
            if len(logits) + len(sink) == 0:
                continue
            top = max([*logits, *sink])
            total = np.exp(logits - top).sum() + np.exp(np.array(sink) - top).sum()
            out[b, t, n] = np.exp(logits - top) @ values / total
            lse[b, t, n] = top + np.log(total)
        return out, lse

    def error(self, **options: Any) -> float:
        """Largest deviation of output and log-sum-exp; inf for a NaN or a wrong empty row."""
        (out, lse), (want_out, want_lse) = self.run(**options).outputs, self.answer()
        seen = np.isfinite(want_lse)
        if np.isnan(out).any() or not np.array_equal(np.isneginf(lse), ~seen):
            return np.inf
        differences = out - want_out, lse[seen] - want_lse[seen]
        return float(max(np.abs(d).max(initial=0) for d in differences))


def planned(**changes: Any) -> KernelPlan:
    sizes: dict[str, Any] = {
        "batch": 2, "tokens": 2, "slots": 900, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "value_head_dim": 32, "layout": "BKSH", "scale": 0.125, "subtiles": 2,
    }  # fmt: skip
    return make_plan(**(sizes | changes))


CLOSE = 5e-6
"""Float32 against float64: about ten roundings of numbers up to 5."""

FEATURES: dict[str, Any] = {"has_sinks": True, "has_new_keys": True, "soft_cap": 8.0}


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("exchange_mode", ["deferred", "every tile"])
def test_two_programs_that_share_a_sequence(exchange_mode: str, seed: int | None) -> None:
    case = Case(planned(programs=2, exchange=exchange_mode, **FEATURES), [900, 333])
    assert case.plan.sharding == "sequence"
    assert case.error(seed=seed, refuse_uninitialized=True) < CLOSE


def test_empty_rows_are_zero_and_minus_infinity() -> None:
    case = Case(planned(), [0, 1])
    assert np.isneginf(case.answer()[1]).any()
    assert case.error(refuse_uninitialized=True) < CLOSE


@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
@pytest.mark.parametrize("exchange_mode", ["deferred", "every tile"])
def test_number_of_exchanges(exchange_mode: str, tiles: int) -> None:
    case = Case(planned(programs=2, exchange=exchange_mode, slots=512 * tiles), [512 * tiles, 77])
    assert [len(s.tiles) for s in case.plan.shares] == [tiles, tiles]
    done = case.run()
    for program in done.programs:
        count = sum(step.op == "sendrecv" for step in program)
        assert count == (3 if exchange_mode == "deferred" else 2 * tiles + 1)
        assert {s.exchange for s in program if s.op == "sendrecv"} == {"gpsimd_dma"}


@pytest.mark.parametrize("exchange_mode", ["deferred", "every tile"])
def test_both_programs_hold_the_same_bits(
    exchange_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def spy(bufs: Any, *rest: Any) -> Any:
        from jax_tkg.nki.interpreter import language as nl
        from jax_tkg.nki.interpreter.window import window

        for tile in (bufs.max, bufs.sum, *bufs.output):
            stored[nl.program_id()].append(window(tile).array().copy())
        return finalize.finalize_rows(bufs, *rest)

    monkeypatch.setattr(kernel_module, "finalize_rows", spy)
    Case(planned(programs=2, exchange=exchange_mode, **FEATURES), [900, 333]).run()
    assert len(stored[0]) == len(stored[1]) > 0
    for mine, theirs in zip(stored[0], stored[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_short_context_in_a_long_bucket_on_two_programs() -> None:
    sizes = {"batch": 1, "tokens": 1, "slots": 49152, "heads": 1, "kv_heads": 1}
    case = Case(planned(programs=2, subtiles=32, **sizes), [1000])
    assert case.plan.sharding == "sequence"
    assert case.error() < CLOSE  # the second program sees no key at all


def test_a_window_in_a_long_bucket_on_one_program() -> None:
    sizes = {"batch": 1, "tokens": 2, "slots": 32768, "heads": 2, "kv_heads": 1}
    case = Case(planned(subtiles=32, **sizes), [32768], window=128)
    assert case.error() < CLOSE  # all tiles but the last are masked


def nothing(*_: Any, **__: Any) -> None:
    """A step left out."""


def without(name: str, place: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(place, name, nothing)


def no_decay(patch: pytest.MonkeyPatch) -> None:
    """The running sum and output are not rescaled when the maximum moves."""
    real = softmax.update_running_max

    def update(tile_max: Any, bufs: Any, plan: Any) -> None:
        from jax_tkg.nki.interpreter import isa as nisa

        real(tile_max, bufs, plan)
        nisa.memset(bufs.decay, 1.0)

    patch.setattr(kernel_module, "update_running_max", update)


def swap_with_oneself(patch: pytest.MonkeyPatch) -> None:
    for place in (exchange, softmax):
        patch.setattr(place, "swap", lambda tile: tile)


def equal_weights(patch: pytest.MonkeyPatch) -> None:
    """Programs are merged without regard to their maxima."""
    real = exchange.weight_of
    patch.setattr(exchange, "weight_of", lambda _, top: real(top, top))


NEEDED_STEPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "decay of sum and output": no_decay,
    "exchange": swap_with_oneself,
    "merge": without("merge_programs", kernel_module),
    "weights of the merge": equal_weights,
    "sinks": without("add_sinks", kernel_module),
    "output of a tile": without("accumulate_output", kernel_module),
    "sum of a tile": without("cascaded_sum_reduction", kernel_module),
    "clearing of values": without("clear_unseen_values", pv),
    "mask": lambda patch: patch.setattr(qk, "MASKED", 0.0),
}


@pytest.mark.parametrize("exchange_mode", ["deferred", "every tile"])
@pytest.mark.parametrize("step", NEEDED_STEPS)
def test_no_step_can_be_left_out(
    step: str, exchange_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step == "weights of the merge" and exchange_mode == "every tile":
        pytest.skip("after exchanges on every tile both programs have one maximum: no weights")
    case = Case(planned(programs=2, exchange=exchange_mode, **FEATURES), [900, 333])
    NEEDED_STEPS[step](monkeypatch)
    try:
        error = case.error()
    except interpreter.NkiError:
        return  # noticed even before the numbers
    assert not error < 100 * CLOSE
