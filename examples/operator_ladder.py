"""From a row maximum to flash attention, one operator more at a time, in the NKI interpreter.

A compiler that allows a value only one user in a fused region cannot reduce what it also goes on
with: the row maximum of logits that are then exponentiated. The second column says what was
reported of such a compiler; the others what the same chains do here, as NKI kernels that read
their logits twice where they lie.

    python examples/operator_ladder.py
"""

import sys
from argparse import ArgumentParser

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from jax_tkg.nki.ladder.rungs import RUNGS, make_inputs, measure

ENGINES = ("tensor", "vector", "scalar", "dma")


def main(arguments: list[str] | None = None) -> int:
    """Runs every rung; 0 if all are right."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--programs", type=int, choices=(1, 2), default=1)
    given = parser.parse_args(arguments)
    dtype = np.float32 if given.dtype == "float32" else ml_dtypes.bfloat16
    inputs = make_inputs(rows=200, keys=1200, width=64, dtype=dtype)

    table = Table(title=f"200 queries, 1200 keys, 64 channels, {given.dtype}; not run on Neuron")
    for name in ("operators", "reported", "max error", "budget", *ENGINES, ""):
        table.add_column(name, justify="left" if name in ("operators", "reported") else "right")
    right = True
    for rung in RUNGS:
        found = measure(rung, inputs, given.programs)
        right &= found.is_right
        counts = [str(found.instructions.get(engine, 0)) for engine in ENGINES]
        numbers = [f"{found.error:.1e}", f"{found.budget:.1e}", *counts]
        table.add_row(rung.name, rung.reported, *numbers, "ok" if found.is_right else "WRONG")
    Console(width=140).print(table)
    print("as float64" if right else "NOT as float64")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
