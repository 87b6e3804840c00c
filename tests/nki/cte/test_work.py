"""What a launch does is what the plan says: matmuls, loads and masks, counted."""

from typing import Any

import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.cte.count import Work, work
from jax_tkg.nki.interpreter.record import Instruction
from tests.nki.cte.problems import Case, Problem

WIDTH = 16
SIZES: dict[str, Any] = {"heads": 2, "head_dim": WIDTH, "value_head_dim": WIDTH}


def counted(run: interpreter.Run) -> Work:
    """Squares from multiply-accumulates, steps from maxima, keys from what is read of them."""
    steps = [step for program in run.programs for step in program]
    logits = [s for s in steps if s.op == "nc_matmul" and in_file(s, "logits")]
    values = [s for s in steps if s.op == "nc_matmul" and in_file(s, "pv")]
    maxima = [s for s in steps if in_file(s, "mask") and s.op == "tensor_reduce"]
    selected = [s for s in steps if s.op == "range_select"]
    loads = [s for s in steps if s.source.function == "load_slots" and "float32" in s.shapes[0]]
    square = 128 * 128 * WIDTH
    assert sum(s.macs for s in logits) == sum(s.macs for s in values)
    return Work(
        squares=sum(s.macs for s in logits) // square,
        steps=len(maxima) + len(selected),
        masked_steps=len(selected),
        keys_loaded=sum(s.transfer.bytes for s in loads if s.transfer) // (2 * WIDTH * 4),
        all_squares=0,
        emitted_steps=0,
    )


def in_file(step: Instruction, name: str) -> bool:
    return step.source.file.endswith(f"cte/{name}.py")


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize(
    "what",
    [
        {"tokens": 640, "slots": 640},
        {"tokens": 256, "slots": 1536, "causal": False},
        {"tokens": 640, "slots": 640, "window": (255, 0)},
        {"tokens": 256, "slots": 1024, "beside": True},
        {"tokens": 384, "slots": 640, "causal": False, "heads": 9, "looped": True},
        {"tokens": 1152, "slots": 1152, "heads": 4, "looped": True},
    ],
    ids=str,
)
def test_a_launch_does_what_its_plan_says(what: dict[str, Any], programs: int) -> None:
    problem = Problem(**SIZES | what, programs=programs)
    expected, found = work(problem.plan()), counted(Case(problem).run())
    assert vars(found) == vars(expected) | {"all_squares": 0, "emitted_steps": 0}


def test_causality_skips_instructions() -> None:
    both = [
        counted(Case(Problem(**SIZES, tokens=512, slots=512, causal=causal)).run())
        for causal in (True, False)
    ]
    assert both[0].squares == both[1].squares * 5 // 8  # 10 of 16 for each head
    assert both[1].masked_steps == 0


def test_a_window_makes_the_instructions_linear() -> None:
    costs = [
        sum(map(len, Case(Problem(**SIZES, tokens=t, slots=t, window=(127, 0))).run().programs))
        for t in (256, 512, 1024)
    ]
    assert costs[2] - costs[1] < 2.2 * (costs[1] - costs[0])


def test_no_instruction_masks_what_all_rows_see() -> None:
    run = Case(Problem(**SIZES, tokens=256, slots=512, causal=False)).run()
    assert counted(run).masked_steps == 0
    assert not [s for p in run.programs for s in p if "select" in s.op or "iota" in s.op]


@pytest.mark.parametrize("programs", [1, 2])
def test_short_rows_of_a_long_cache_cost_what_they_hold(programs: int) -> None:
    """Of 8 tiles of 512 slots those are visited that hold something, and the same by both."""
    changes = {"tokens": 16, "slots": 4096, "beside": True, "causal": False, "live": True}
    for lengths, tiles in (((400, 400), 1), ((1100, 16), 3), ((16, 16), 0)):
        problem = Problem(**SIZES, **changes, batch=2, lengths=lengths, programs=programs)
        run = Case(problem).run()
        found = counted(run).steps - 2  # one for the new keys of each row
        held = [-(-(length - 16) // 512) for length in lengths]
        assert found == (sum(held) if programs == 1 else 2 * tiles)
