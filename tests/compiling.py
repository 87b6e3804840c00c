"""How the quick tests compile: without what would take most of their time.

That is LLVM's optimisation (but the real model needs it to run), and XLA:CPU's emitters of fused
loops. The slow tests and the examples compile as users do. This file must not import JAX, which
reads the flags once.
"""

from __future__ import annotations

from importlib.metadata import version

# Later versions have one way of emitting loops. XLA does not start with a flag that it lacks.
HAS_EMITTERS = tuple(int(n) for n in version("jaxlib").split(".")[:2]) < (0, 11)

# LLVM in parallel costs more in all, and the two workers of pytest keep the cores busy anyway.
FLAGS = (
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if HAS_EMITTERS else []),
)

AS_USERS = {"xla_cpu_use_fusion_emitters": True} if HAS_EMITTERS else {}
"""Compiler options for tests of what XLA fuses, copies and allocates, which the emitters change."""
