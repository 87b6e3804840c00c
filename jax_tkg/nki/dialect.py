"""The one place that decides which NKI our kernels are written against.

Where AWS's `nki` package is installed it is that one; elsewhere the interpreter's modules, which
have the same names. Kernels import `nki`, `nisa` and `nl` from here and from nowhere else.
"""

import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

from jax_tkg.nki.interpreter.modules import nki_modules


def _find() -> tuple[bool, dict[str, ModuleType]]:
    if importlib.util.find_spec("nki") is None:
        return True, nki_modules()
    names = ("nki", "nki.isa", "nki.language")
    return False, {name: importlib.import_module(name) for name in names}


is_interpreted, _modules = _find()
"""Whether the kernels here are written against the interpreter."""

if TYPE_CHECKING:
    from jax_tkg.nki.interpreter import isa as nisa
    from jax_tkg.nki.interpreter import language as nl
else:
    nisa, nl = _modules["nki.isa"], _modules["nki.language"]

nki = _modules["nki"]

__all__ = ["is_interpreted", "nisa", "nki", "nl"]
