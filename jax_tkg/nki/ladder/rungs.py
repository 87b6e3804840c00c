"""The rungs in order: what each computes, in float64 and naively, and how it is launched.

A rung is right if it is off from float64 by at most twice what the same formula is when written
down in the dtype of its inputs: every intermediate rounded to it, sums taken term by term.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jax_tkg.nki.interpreter import Run, run
from jax_tkg.nki.ladder import flash, pipelined, reductions

Array = npt.NDArray[Any]
Outputs = tuple[Array, ...]


@dataclass(frozen=True)
class Inputs:
    """What the rungs are run on: queries `[M, H]`, keys `[S, H]`, values `[S, Hv]`, one dtype."""

    query: Array
    key: Array
    value: Array

    @property
    def scale(self) -> float:
        """Of the logits: 1 / sqrt(H)."""
        return float(self.query.shape[1] ** -0.5)

    def one_tile(self) -> "Inputs":
        """The first 512 keys: the lower rungs take no more."""
        return Inputs(self.query, self.key[:512], self.value[:512])


def make_inputs(rows: int, keys: int, width: int, dtype: npt.DTypeLike) -> Inputs:
    """Inputs with keys whose norms grow along the context, so that running maxima move."""
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(n, width)) for n in (rows, keys, keys))
    key *= 1 + 3 * np.arange(keys)[:, None] / keys
    return Inputs(*(x.astype(dtype) for x in (query, key, value)))


@dataclass(frozen=True)
class Formula:
    """Dense attention and its parts in one dtype; float64 is the truth.

    Attributes:
        inputs: of any dtype.
        dtype: every intermediate is rounded to it.
    """

    inputs: Inputs
    dtype: npt.DTypeLike

    def logits(self, scale: float = 1.0) -> Array:
        """Query times key `[M, S]`, channel by channel."""
        query, key = self.wide(self.inputs.query), self.wide(self.inputs.key)
        return self.rounded(self.product(query, key.T) * scale)

    def maxima(self, scores: Array) -> Array:
        """`[M, 1]`."""
        return scores.max(axis=1, keepdims=True)

    def sums(self, scores: Array) -> Array:
        """`[M, 1]`, term by term."""
        return self.rounded(np.cumsum(self.wide(scores), axis=1)[:, -1:])

    def weights(self, maxima: Array) -> Array:
        """exp(logits - maxima)."""
        logits = self.wide(self.logits(self.inputs.scale))
        return self.rounded(np.exp(self.rounded(logits - self.wide(maxima)).astype(logits.dtype)))

    def softmax_parts(self) -> Outputs:
        """Weights, maxima, sums."""
        maxima = self.maxima(self.logits(self.inputs.scale))
        weights = self.weights(maxima)
        return weights, maxima, self.sums(weights)

    def attention(self) -> Outputs:
        """`[M, Hv]`."""
        weights, _, sums = map(self.wide, self.softmax_parts())
        products = self.rounded(self.product(weights, self.wide(self.inputs.value)))
        return (self.rounded(self.wide(products) / sums),)

    def product(self, left: Array, right: Array) -> Array:
        """A matrix product with a sum term by term."""
        total = np.zeros((left.shape[0], right.shape[1]), left.dtype)
        for i in range(left.shape[1]):
            total += left[:, i, None] * right[i]
        return total

    def wide(self, values: Array) -> Array:
        """As what NumPy computes in: float64 for float64, float32 for narrower types."""
        return values.astype(np.float64 if self.dtype == np.float64 else np.float32)

    def rounded(self, values: Array) -> Array:
        """As the dtype."""
        return values.astype(self.dtype)


@dataclass(frozen=True)
class Rung:
    """One rung.

    Attributes:
        name: the operators it chains.
        reported: what became of this chain in a compiler that gives a value one user only.
        launch: runs the kernels on so many programs; the last run's outputs are the result.
        formula: the same outputs by dense formulas.
        one_tile: takes up to 512 keys.
    """

    name: str
    reported: str
    launch: Callable[[Inputs, int], list[Run]]
    formula: Callable[[Formula], Outputs]
    one_tile: bool = True


@dataclass(frozen=True)
class Measured:
    """A rung that ran.

    Attributes:
        error: largest deviation from float64, of the output that is closest to its budget.
        budget: the most that is right for that output.
        instructions: of all programs, by engine.
    """

    error: float
    budget: float
    instructions: Mapping[str, int]

    @property
    def is_right(self) -> bool:
        """Within its budget; a NaN is not."""
        return self.error <= self.budget


def scores(inputs: Inputs) -> Array:
    """Logits as an input of the rungs that make none: float64 ones, rounded once."""
    return Formula(inputs, np.float64).logits().astype(inputs.query.dtype)


def given_maxima(inputs: Inputs) -> Array:
    """Row maxima as an input: float64 ones, rounded to float32."""
    exact = Formula(inputs, np.float64)
    return exact.maxima(exact.logits(inputs.scale)).astype(np.float32)


def _with_given_maxima(formula: Formula) -> Outputs:
    weights = formula.weights(given_maxima(formula.inputs))
    return weights, formula.sums(weights)


def _run(kernel: Callable[..., Any], *arguments: Any, programs: int) -> Run:
    return run(kernel, *arguments, programs=programs, refuse_uninitialized=True)


def _two_kernels(inputs: Inputs, programs: int) -> list[Run]:
    first = _run(pipelined.score_kernel, inputs.query, inputs.key, inputs.scale, programs=programs)
    weights, _, sums = first.outputs
    second = _run(pipelined.value_kernel, weights, sums, inputs.value, programs=programs)
    return [first, second]


RUNGS = (
    Rung(
        "row max", "works",
        lambda x, n: [_run(reductions.row_max, scores(x), programs=n)],
        lambda f: (f.maxima(f.rounded(scores(f.inputs))),),
    ),
    Rung(
        "row sum", "works",
        lambda x, n: [_run(reductions.row_sum, scores(x), programs=n)],
        lambda f: (f.sums(f.rounded(scores(f.inputs))),),
    ),
    Rung(
        "matmul, row max", "crashes",
        lambda x, n: [_run(reductions.matmul_row_max, x.query, x.key, programs=n)],
        lambda f: (f.maxima(f.logits()),),
    ),
    Rung(
        "matmul, subtract, exp, row sum", "crashes",
        lambda x, n: [
            _run(
                reductions.matmul_exp_row_sum, x.query, x.key, given_maxima(x), x.scale, programs=n
            )
        ],
        _with_given_maxima,
    ),
    Rung(
        "matmul, row max, subtract, exp, row sum", "crashes",
        lambda x, n: [_run(reductions.matmul_softmax_parts, x.query, x.key, x.scale, programs=n)],
        Formula.softmax_parts,
    ),
    Rung(
        "all fused, one tile of keys", "does not work",
        lambda x, n: [_run(flash.fused_tile, x.query, x.key, x.value, x.scale, programs=n)],
        Formula.attention,
    ),
    Rung(
        "all fused, flash attention", "does not work",
        lambda x, n: [_run(flash.flash_attention, x.query, x.key, x.value, x.scale, programs=n)],
        Formula.attention,
        one_tile=False,
    ),
    Rung(
        "two kernels: weights, then values", "works without maxima and sums",
        _two_kernels,
        Formula.attention,
        one_tile=False,
    ),
)  # fmt: skip
"""From the lowest to the highest."""


def largest_differences(got: Outputs, want: Outputs) -> list[float]:
    """Of each output; NaN if it holds NaN."""
    return [
        float(np.abs(g.astype(np.float64) - w.astype(np.float64)).max())
        for g, w in zip(got, want, strict=True)
    ]


def measure(rung: Rung, inputs: Inputs, programs: int = 1) -> Measured:
    """Runs a rung in the interpreter and compares it with float64."""
    mine = inputs.one_tile() if rung.one_tile else inputs
    runs = rung.launch(mine, programs)
    outputs = runs[-1].outputs
    exact = rung.formula(Formula(mine, np.float64))
    naive = rung.formula(Formula(mine, mine.query.dtype))
    errors = largest_differences(outputs if isinstance(outputs, tuple) else (outputs,), exact)
    budgets = [2 * difference for difference in largest_differences(naive, exact)]
    instructions = Counter(
        step.engine.name for r in runs for program in r.programs for step in program
    )
    error, budget = max(zip(errors, budgets, strict=True), key=_part_used)
    return Measured(error, budget, dict(instructions))


def _part_used(pair: tuple[float, float]) -> float:
    """The part of a budget that an error takes."""
    error, budget = pair
    if error == 0:
        return 0.0
    return error / budget if budget > 0 and error > 0 else np.inf  # NaN is too much
