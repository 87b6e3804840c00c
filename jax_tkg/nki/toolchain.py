"""Which NKI compiler is installed, its version, and whether the kernels here can be built with it.

Two packages have held NKI: `nki`, and before it `neuronxcc.nki`. The kernels are written for the
API of `WRITTEN_FOR`; whichever package offers every name that they use may compile them.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WRITTEN_FOR = "nki 0.6 (Neuron SDK 2.32)"
OLDEST_NKI = (0, 4)
"""Before 0.4 a frozen dataclass, as plans are, could not be an argument (NKI release notes)."""

LOGICAL_CORES = "NEURON_LOGICAL_NC_CONFIG"
"""Environment variable of the Neuron runtime: physical cores in a logical one, 1 or 2."""

MOST_PROGRAMS = 2
"""Programs of a launch on a logical core of two; what is launched where nothing is set."""

_DISTRIBUTIONS = {"nki": "nki", "neuronxcc.nki": "neuronx-cc"}
"""Importable packages in order of preference, and what installs them."""


@dataclass(frozen=True)
class Toolchain:
    """A package that was found.

    Attributes:
        package: name to import.
        version: its own, or that of what installed it; "unknown" if nothing says.
        problem: why it cannot compile the kernels here, in words; None if it can.
    """

    package: str
    version: str
    problem: str | None = None

    def __str__(self) -> str:
        """Package and version."""
        return f"{self.package} {self.version}"


@cache
def installed() -> tuple[Toolchain, ...]:
    """The packages that hold NKI, the preferred one first. Looked for once in a process."""
    return tuple(_examine(package) for package in _DISTRIBUTIONS if _is_there(package))


def usable() -> Toolchain | None:
    """The package that compiles the kernels, if there is one."""
    return next((found for found in installed() if found.problem is None), None)


def why_not() -> str | None:
    """Why no kernel can be compiled here: what was looked for and what was found; None if one can.

    Returns:
        A sentence without its full stop.
    """
    if usable() is not None:
        return None
    found = [f"{each}: {each.problem}" for each in installed()]
    looked_for = " and ".join(_DISTRIBUTIONS)
    what = "; ".join(found) if found else f"looked for {looked_for}, neither is installed"
    return f"no NKI compiler for kernels written for {WRITTEN_FOR}: {what}"


def describe() -> str:
    """What is installed and what the kernels are written for, for messages."""
    found = ", ".join(map(str, installed())) or "no NKI compiler"
    return f"{found}; the kernels are written for {WRITTEN_FOR}"


def default_programs() -> int:
    """Programs of a launch: as many as the runtime's logical core has physical ones, by default 2.

    The runtime reads the setting when it starts, and so do the options of the kernels: when made.
    """
    cores = os.environ.get(LOGICAL_CORES, "")
    return int(cores) if cores in ("1", "2") else MOST_PROGRAMS


def wrong_programs(programs: int) -> str | None:
    """Why so many programs cannot be launched as the runtime is set up; None if they can."""
    cores = os.environ.get(LOGICAL_CORES)
    if cores is None or cores == str(programs):
        return None
    if cores not in ("1", "2"):
        return (
            f"{LOGICAL_CORES}={cores!r}: it must be 1 or 2, the cores of a logical core; unset it"
        )
    return (
        f"{LOGICAL_CORES}={cores}, and this launches {programs} program(s): use "
        f"jax_tkg.nki.implementation.Nki(programs={cores}), or start the process with "
        f"{LOGICAL_CORES}={programs}"
    )


def _is_there(package: str) -> bool:
    """Whether it can be imported; a directory of that name on the path is no package."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the parent
        return False
    return spec is not None and spec.origin is not None


def _examine(package: str) -> Toolchain:
    try:
        module = importlib.import_module(package)
        for name in ("isa", "language"):
            importlib.import_module(f"{package}.{name}")
    except Exception as error:  # whatever a package does that is half installed
        return Toolchain(package, _version(package), f"cannot be imported ({error!r})")
    version = str(getattr(module, "__version__", _version(package)))
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if package == "nki" and numbers and numbers < OLDEST_NKI:
        needed = ".".join(map(str, OLDEST_NKI))
        return Toolchain(package, version, f"older than {needed}, the first that takes their plans")
    missing = [name for name in names_used() if not _has(package, name)]
    if missing:
        return Toolchain(package, version, f"lacks {', '.join(missing)}")
    return Toolchain(package, version)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS[package])
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _has(package: str, name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(f"{package}{module.removeprefix('nki')}"), attribute)


_MODULES = {"nki": "nki", "nisa": "nki.isa", "nl": "nki.language"}


@cache
def names_used() -> tuple[str, ...]:
    """Every name of NKI that the kernels here use, such as "nki.isa.dma_copy", in order."""
    return tuple(sorted({name for file in _sources() for name in _names_in(file.read_text())}))


def _sources() -> list[Path]:
    here = Path(__file__).parent
    return [file for file in here.rglob("*.py") if here / "interpreter" not in file.parents]


def _names_in(source: str) -> set[str]:
    """Attributes of what a file imports from the dialect."""
    nodes = list(ast.walk(ast.parse(source)))
    modules = {
        alias.name: _MODULES[alias.name]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "jax_tkg.nki.dialect"
        for alias in node.names
        if alias.name in _MODULES
    }
    return {
        f"{modules[node.value.id]}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
    }
