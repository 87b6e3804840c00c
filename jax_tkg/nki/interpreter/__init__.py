"""An interpreter for NKI kernels: runs them on any machine, and is strict about the hardware.

`run(kernel, *arrays)` runs a kernel and keeps what happened; `installed()` makes `import nki` find
the interpreter, so that sources written for the real package run unmodified. It needs NumPy and
ml_dtypes and nothing else of this library. What it models and what not: docs/interpreter.md.
"""

from jax_tkg.nki.interpreter.errors import (
    CapacityError,
    DataRaceError,
    DeadlockError,
    DeadTensorError,
    DivergenceError,
    NkiError,
    NkiValidationError,
    OutOfBoundsError,
    UninitializedReadError,
)
from jax_tkg.nki.interpreter.hardware import TARGETS, Target
from jax_tkg.nki.interpreter.launch import Kernel, Run, jit, run
from jax_tkg.nki.interpreter.modules import installed

__all__ = [
    "TARGETS",
    "CapacityError",
    "DataRaceError",
    "DeadTensorError",
    "DeadlockError",
    "DivergenceError",
    "Kernel",
    "NkiError",
    "NkiValidationError",
    "OutOfBoundsError",
    "Run",
    "Target",
    "UninitializedReadError",
    "installed",
    "jit",
    "run",
]
