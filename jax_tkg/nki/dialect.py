"""The one place that decides which NKI our kernels are written against.

Where a package of AWS's that can compile them is installed it is that one; elsewhere the
interpreter's modules, which have the same names. Kernels import `nki`, `nisa` and `nl` from here
and from nowhere else. `interpreted` gives a kernel written against the interpreter in any case.
"""

import builtins
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from jax_tkg.nki import toolchain
from jax_tkg.nki.interpreter.modules import nki_modules


def _find() -> tuple[bool, dict[str, ModuleType]]:
    found = toolchain.usable()
    if found is None:
        return True, nki_modules()
    names = {name: name.replace("nki", found.package, 1) for name in _NAMES.values()}
    return False, {name: importlib.import_module(real) for name, real in names.items()}


_NAMES = {"nki": "nki", "nisa": "nki.isa", "nl": "nki.language"}

is_interpreted, _modules = _find()
"""Whether the kernels here are written against the interpreter."""

if TYPE_CHECKING:
    from jax_tkg.nki.interpreter import isa as nisa
    from jax_tkg.nki.interpreter import language as nl
else:
    nisa, nl = _modules["nki.isa"], _modules["nki.language"]

nki = _modules["nki"]

__all__ = ["interpreted", "is_interpreted", "nisa", "nki", "nl"]


def interpreted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The same kernel written against the interpreter.

    Where the kernels here are written against the real package, their files are executed once more,
    beside the modules that the compiler knows, with the interpreter's modules in its place.

    Args:
        kernel: a function of a module here; anything else is returned as it is.
    """
    if is_interpreted or not isinstance(kernel, FunctionType) or not _is_ours(kernel.__module__):
        return kernel
    return getattr(_again(kernel.__module__), kernel.__name__)


@cache
def _again(name: str) -> ModuleType:
    """A module of kernels, executed once more and written against the interpreter."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = ModuleType(f"{name} (interpreted)")
    module.__file__ = spec.origin
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
    exec(spec.loader.get_code(name), vars(module))  # type: ignore[attr-defined]
    return module


@cache
def _interpreters() -> SimpleNamespace:
    modules = nki_modules()
    return SimpleNamespace(**{name: modules[real] for name, real in _NAMES.items()})


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """What `import` does in such a module: other modules of kernels are such ones as well."""
    if name == __name__:
        return _interpreters()
    if _is_ours(name):
        return _again(name)
    return builtins.__import__(name, globals, locals, fromlist or (), level)


def _is_ours(module: str) -> bool:
    """Whether kernels, or what they are made of, may be in it."""
    return module.startswith(f"{__package__}.") and "interpreter" not in module.split(".")
