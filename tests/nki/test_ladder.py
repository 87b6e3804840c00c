"""The ladder: every rung within its budget, every step needed, the example's table."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki.dialect import nisa
from jax_tkg.nki.interpret import interpret
from jax_tkg.nki.interpreter.lint import check
from jax_tkg.nki.ladder import flash, pipelined, reductions, rungs
from jax_tkg.nki.ladder.rungs import RUNGS, Inputs, Rung, make_inputs, measure

KERNELS = (
    reductions.row_max, reductions.row_sum, reductions.matmul_row_max,
    reductions.matmul_exp_row_sum, reductions.matmul_softmax_parts, flash.fused_tile,
    flash.flash_attention, pipelined.score_kernel, pipelined.value_kernel,
)  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_compiler_accepts_its_language(kernel: Callable[..., Any]) -> None:
    assert check(kernel) == ()


@pytest.mark.parametrize(("dtype", "programs"), [(np.float32, 2), (ml_dtypes.bfloat16, 1)])
@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: r.name)
def test_every_rung_is_right(rung: Rung, dtype: Any, programs: int) -> None:
    # Rows and keys that leave the last tiles short.
    found = measure(rung, make_inputs(150, 1100, 64, dtype), programs)
    assert found.is_right, found


@pytest.mark.parametrize("sizes", [(1, 1, 1), (129, 513, 128), (3, 1024, 16)])
@pytest.mark.parametrize("rung", RUNGS[5:], ids=lambda r: r.name)
def test_other_sizes(rung: Rung, sizes: tuple[int, int, int]) -> None:
    found = measure(rung, make_inputs(*sizes, np.float32))
    assert found.is_right, found


def attention(inputs: Inputs) -> np.ndarray:
    """Dense attention in float64, for the formulas of the rungs too."""
    logits = inputs.query.astype(np.float64) @ inputs.key.T * inputs.scale
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ inputs.value


def test_the_formulas_are_attention() -> None:
    inputs = make_inputs(20, 300, 16, np.float32)
    (got,) = rungs.Formula(inputs, np.float64).attention()
    np.testing.assert_allclose(got, attention(inputs), atol=1e-13)


def test_maxima_move_from_tile_to_tile() -> None:
    inputs = make_inputs(150, 1100, 64, np.float32)
    logits = rungs.Formula(inputs, np.float64).logits(inputs.scale)
    first, second = logits[:, :512].max(1), logits[:, 512:1024].max(1)
    assert (second > first + 1).mean() > 0.5


def no_decay(maxima: Any, logits: Any, scale: float) -> Any:
    decay = flash_raise(maxima, logits, scale)
    nisa.memset(dst=decay, value=1.0)
    return decay


def nothing(*_: Any) -> None:
    """A step left out."""


def copied(dst: Any, data: Any, sums: Any) -> None:
    nisa.tensor_copy(dst=dst, src=data)


def own_maxima(scores: Any) -> Any:
    """The maximum of the first tile only."""
    return steps_max(scores[:, 0 : min(512, scores.shape[1])])


flash_raise, steps_max = flash.raise_maxima, flash.max_of_rows

NEEDED: dict[str, tuple[int, Any, str, Any]] = {
    "decay": (6, flash, "raise_maxima", no_decay),
    "running state": (6, flash, "add_decayed", nothing),
    "division": (6, flash, "divide_rows", copied),
    "maximum of all keys": (7, pipelined, "max_of_rows", own_maxima),
    "division by the second kernel": (7, pipelined, "divide_rows", copied),
}


@pytest.mark.parametrize("step", NEEDED)
def test_no_step_can_be_left_out(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number, module, name, instead = NEEDED[step]
    inputs = make_inputs(20, 1100, 64, np.float32)
    if step == "maximum of all keys":  # overflows without it
        inputs.key[600:] *= 20
    assert measure(RUNGS[number], inputs).is_right
    monkeypatch.setattr(module, name, instead)
    assert not measure(RUNGS[number], inputs).is_right


def test_the_first_kernel_hands_on_maxima_and_sums() -> None:
    inputs = make_inputs(150, 1100, 64, np.float32)
    first, second = RUNGS[7].launch(inputs, 2)
    weights, maxima, sums = first.outputs
    logits = rungs.Formula(inputs, np.float64).logits(inputs.scale)
    lse = maxima + np.log(sums)
    want = logits.max(1) + np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    np.testing.assert_allclose(lse[:, 0], want, rtol=2e-6)
    assert weights.max() == 1
    np.testing.assert_allclose(second.outputs, attention(inputs), atol=2e-5)


def test_from_jax() -> None:
    inputs = make_inputs(130, 600, 32, np.float32)
    rows, width = inputs.query.shape
    result = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    column = jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    parts = (jax.ShapeDtypeStruct((rows, 600), jnp.float32), column, column)
    static = {"scale": inputs.scale}

    @jax.jit
    def both(query: Any, key: Any, value: Any) -> Any:
        fused = interpret(
            flash.flash_attention, query, key, value, result=result, programs=2, static=static
        )
        weights, _, sums = interpret(
            pipelined.score_kernel, query, key, result=parts, programs=2, static=static
        )
        return fused, interpret(
            pipelined.value_kernel, weights, sums, value, result=result, programs=2
        )

    for got in both(inputs.query, inputs.key, inputs.value):
        np.testing.assert_allclose(got, attention(inputs), atol=1e-5)


def load_example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "operator_ladder.py"
    spec = importlib.util.spec_from_file_location("operator_ladder", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_example_prints_all_rungs(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_example().main([]) == 0
    text = capsys.readouterr().out
    assert text.endswith("as float64\n")
    lines = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = [cells for cells in lines if cells]
    assert [(r[0], r[1], r[-1]) for r in rows] == [(r.name, r.reported, "ok") for r in RUNGS]
    assert sum(r[1] == "crashes" for r in rows) == 3


def test_the_example_fails_on_a_wrong_rung(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flash, "divide_rows", copied)
    assert load_example().main(["--programs", "2"]) == 1
    assert capsys.readouterr().out.count("WRONG") == 2
