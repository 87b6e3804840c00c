"""A checker of the kernel language: what the NKI compiler would not accept, seen in the source.

The interpreter runs any Python; the compiler takes a small part of it. `check` reads a kernel, the
functions it calls and the classes it uses, and names each line that leaves that part. `RULES` says
for each rule how sure it is, why, and where it is written.
"""

from jax_tkg.nki.interpreter.lint.checker import check
from jax_tkg.nki.interpreter.lint.rules import RULES, Finding, Rule, Severity

__all__ = ["RULES", "Finding", "Rule", "Severity", "check"]
