"""One row of the grid through the decode kernel, under strict rules, against float64.

Made for rows of gigabytes: what is expected is computed one sequence at a time, from the slots that
it has, and the kernel is launched on the op's own arrays.
"""

import gc
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import ml_dtypes
import numpy as np

from jax_tkg.attention import Call, prepare
from jax_tkg.nki import interpreter
from jax_tkg.nki.arguments import Launch, make_launch
from jax_tkg.nki.implementation import NkiInterpret
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.problem import Op
from tests import oracle
from tests.cases import Case, inputs
from tests.conformance import Expected, _within, jax_arguments
from tests.oracle import Array, Inputs

FORMS = (NkiInterpret(programs=1), NkiInterpret(programs=2))
"""How every row is launched."""

OUT_OF_MEMORY = ("MemoryError", "RESOURCE_EXHAUSTED", "Cannot allocate memory", "bad_alloc")


@dataclass(frozen=True)
class Result:
    """What became of one launch of one row.

    Attributes:
        case: name of the row.
        form: how it was launched.
        status: "passed", "failed", "refused" (the kernel does not take it) or "skipped" (it needs
            more memory than allowed).
        message: of a failure; why not, of the others.
        seconds: of the launch.
        instructions: of all programs.
        peak_bytes: of this process so far.
    """

    case: str
    form: str
    status: str
    message: str = ""
    seconds: float = 0.0
    instructions: int = 0
    peak_bytes: int = 0


def form_name(form: NkiInterpret) -> str:
    """Of the launches of a row."""
    return "one program" if form.programs == 1 else f"two programs, exchange {form.exchange}"


def needed_bytes(case: Case) -> int:
    """About what checking a row takes at its worst.

    The cache is there twice, as NumPy array and in its layout, and a third time while that is made.
    In the end one sequence is there in float64, several times. Of a launch only the tiles in use
    and the record of the instructions are kept.
    """
    width = case.head_dim + (case.value_head_dim or case.head_dim)
    cache = case.batch * case.kv_heads * case.capacity * width * case.stored.itemsize
    longest = min(case.longest or case.capacity, case.capacity) * case.kv_heads
    return 2 * cache + max(cache, 4 * longest * width * 8) + 2**30


def expected(given: Inputs) -> Expected:
    """As the conformance tests expect it, with one sequence in memory at a time."""
    float32, dtype = np.dtype(np.float32), given.query.dtype
    parts = []
    for one in sequences(given):
        naive_out, naive_lse = oracle.naive(one, dtype)
        if dtype != float32:
            _, naive_lse = oracle.naive(one, float32)
        parts.append((*oracle.attention(one), naive_out, naive_lse))
    *exact, naive_out, naive_lse = map(np.concatenate, zip(*parts, strict=True))
    return Expected(oracle.Exact(*exact), naive_out, naive_lse)


def sequences(given: Inputs) -> Iterator[Inputs]:
    """Each sequence by itself, without the slots behind its end where lengths say where that is."""
    per_row = ("query", "new_key", "new_value", "key_value_seq_lengths", "key_value_seq_starts",
               "query_positions", "key_positions")  # fmt: skip
    for b in range(given.query.shape[0]):
        row = slice(b, b + 1)
        mine = {name: getattr(given, name) for name in per_row}
        changed = {name: array[row] for name, array in mine.items() if array is not None}
        for name in ("mask", "bias"):
            array = getattr(given, name)
            if array is not None and array.shape[0] > 1:
                changed[name] = array[row]
        slots = used_slots(given, b)
        if given.page_indices is None:
            changed |= {"key": given.key[row, :slots], "value": given.value[row, :slots]}
        else:
            changed["page_indices"] = given.page_indices[row, : -(-slots // given.key.shape[2])]
        yield replace(given, **changed)


def used_slots(given: Inputs, b: int) -> int:
    """Slots of a row up to its length, at least one; all where anything else counts slots."""
    counted = (given.key_positions, given.mask, given.bias)
    if given.key_value_seq_lengths is None or any(array is not None for array in counted):
        return given.slots
    return max(1, min(given.slots, int(given.key_value_seq_lengths[b])))


def compare(given: Inputs, wanted: Expected, out: Array, lse: Array) -> None:
    """Asserts shapes, empty rows and the error budget of the conformance tests."""
    exact = wanted.exact
    assert out.shape == exact.out.shape, f"output {out.shape}, not {exact.out.shape}"
    assert lse.shape == exact.lse.shape, f"LSE {lse.shape}, not {exact.lse.shape}"
    out = out.astype(given.query.dtype).astype(np.float64)
    lse, seen = lse.astype(np.float64), exact.lse > -np.inf
    np.testing.assert_array_equal(lse > -np.inf, seen, "rows with a finite LSE")
    np.testing.assert_array_equal(out[exact.value == 0], 0, "rows that see no key")
    assert np.isfinite(out).all(), f"{np.isnan(out).sum()} NaNs in the output"
    eps, eps32 = (float(ml_dtypes.finfo(d).eps) for d in (given.query.dtype, np.float32))
    free = np.max((eps / 2 + eps32 * exact.logit) * exact.value)
    _within("output", out - exact.out, wanted.naive_out - exact.out, free)
    free = eps32 * np.max((np.abs(exact.lse) + exact.logit)[seen] / 2, initial=1)
    _within("LSE", lse[seen] - exact.lse[seen], wanted.naive_lse[seen] - exact.lse[seen], free)


def check_row(case: Case, forms: tuple[NkiInterpret, ...] = FORMS) -> Iterator[Result]:
    """Launches a row in every form and says what became of it."""
    given = inputs(case)
    call = prepare(op=Op.TKG, **jax_arguments(case, given))
    wanted: Expected | None = None
    for form in forms:
        refused = form.why_not(call.problem, Target(("cpu",)))
        if refused is not None:
            yield Result(case.name, form_name(form), "refused", refused)
            continue
        wanted = expected(given) if wanted is None else wanted
        yield _launched(case, form, call, given, wanted)


def _launched(
    case: Case, form: NkiInterpret, call: Call, given: Inputs, wanted: Expected
) -> Result:
    gc.collect()  # the records of two programs refer to each other
    begin, status, message, instructions = time.perf_counter(), "passed", "", 0
    try:
        out, lse, instructions = run(prepared(call, form), form)
        compare(given, wanted, out, lse)
    except (AssertionError, interpreter.NkiError, ValueError) as error:
        status = "failed"
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
    seconds = round(time.perf_counter() - begin, 2)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Result(case.name, form_name(form), status, message, seconds, instructions, peak)


def prepared(call: Call, form: NkiInterpret) -> Launch:
    """The launch of a call; what JAX does for its arrays is compiled at once."""
    made: list[Launch] = []

    def arrays(operands: Operands) -> tuple[jax.Array, ...]:
        options = form.programs, form.exchange, form.unseen_values
        made.append(make_launch(call.problem, operands, *options))
        return made[0].arrays

    compiled = jax.jit(arrays, compiler_options={"xla_backend_optimization_level": 0})
    filled = compiled(call.operands)
    return replace(made[0], arrays=filled)


def run(launch: Launch, form: NkiInterpret) -> tuple[Array, Array, int]:
    """Output, log-sum-exp, number of instructions; floats that nobody wrote may not be read."""
    done = interpreter.run(
        launch.kernel,
        *map(np.asarray, launch.arrays),
        programs=form.programs,
        plan=launch.plan,
        refuse_uninitialized=True,
    )
    out, lse = done.outputs[:2]
    return out, lse, sum(map(len, done.programs))
