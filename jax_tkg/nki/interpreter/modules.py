"""`installed()`: for a block, `import nki` finds the interpreter."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any


def nki_modules() -> dict[str, types.ModuleType]:
    """The modules that stand in for NKI's, by the names kernels import."""
    from jax_tkg.nki.interpreter import launch

    isa = importlib.import_module("jax_tkg.nki.interpreter.isa")
    language = importlib.import_module("jax_tkg.nki.interpreter.language")
    package = types.ModuleType("nki", "NKI, interpreted by jax_tkg.")
    package.__path__ = []
    package.__spec__ = importlib.machinery.ModuleSpec("nki", None, is_package=True)
    collectives = types.ModuleType("nki.collectives", "Not interpreted.")

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"nki.collectives.{name} is not interpreted.")

    collectives.__getattr__ = missing  # type: ignore[method-assign]
    for name, value in {
        "jit": launch.jit,
        "simulate": simulate,
        "isa": isa,
        "language": language,
        "collectives": collectives,
        "Kernel": launch.Kernel,
    }.items():
        setattr(package, name, value)
    return {
        "nki": package,
        "nki.isa": isa,
        "nki.language": language,
        "nki.collectives": collectives,
    }


def simulate(kernel: Any) -> Any:
    """`nki.simulate`: a callable that runs the kernel in the interpreter."""
    from jax_tkg.nki.interpreter.launch import Kernel

    return kernel if isinstance(kernel, Kernel) else Kernel(kernel)


@contextlib.contextmanager
def installed(*, over_real: bool = False) -> Iterator[None]:
    """Makes `import nki` (`nki.isa`, `nki.language`) find the interpreter within the block.

    Kernel modules imported in the block keep what they imported when it ends.

    Args:
        over_real: also when the real package is installed.

    Raises:
        RuntimeError: if the real `nki` is installed and `over_real` is not set.
    """
    if not over_real and _is_real_installed():
        raise RuntimeError(
            "the real nki is installed: pass over_real=True to interpret kernels all the same."
        )
    before = _imported()
    for name in before:
        del sys.modules[name]
    sys.modules.update(nki_modules())
    try:
        yield
    finally:
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(before)


def _imported() -> dict[str, types.ModuleType]:
    """The modules of whatever nki is imported."""
    return {n: m for n, m in sys.modules.items() if n == "nki" or n.startswith("nki.")}


def _is_real_installed() -> bool:
    from jax_tkg.nki.interpreter import launch

    if "nki" in sys.modules:
        return getattr(sys.modules["nki"], "Kernel", None) is not launch.Kernel
    return importlib.util.find_spec("nki") is not None
