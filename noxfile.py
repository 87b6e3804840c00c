"""The version matrix: `nox -s lowest highest`. `nox -l` lists all sessions."""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]

# What must hold on every supported version of jax, flax and numpy.
CORE_TESTS = [
    "tests/test_semantics.py",
    "tests/test_semantics_of_keys.py",
    "tests/test_softmax.py",
    "tests/test_transformations.py",
    "tests/test_rope.py",
    "tests/test_packaging.py",
    "tests/neuron",
    "tests/sharding",
]
QUICK = ("-n", "2", "-m", "not slow and not model")


def interpreter(version: str) -> str:
    """Finds a Python that runs, also one that pyenv has installed but not selected.

    Args:
        version: Such as "3.12".

    Returns:
        A command or path; `version` itself if there is none, which nox then reports as missing
        (and skips the session, or fails it where the variable CI is set).
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    installed = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    return next(filter(runs, (f"python{version}", *map(str, installed))), version)


def runs(python: str) -> bool:
    """Tells a Python from a pyenv shim of an unselected version, which exists but fails."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0


def print_versions(session: nox.Session) -> None:
    """Says what is tested: with ranges, the log is the only record."""
    names = "flax, jax, numpy"
    script = f"import {names}; print({{m.__name__: m.__version__ for m in ({names})}})"
    session.run("python", "-c", script)


@nox.session(python=interpreter("3.11"))
def lowest(session: nox.Session) -> None:
    """Core tests on the lowest versions that pyproject.toml allows."""
    session.install("-c", "constraints/lowest.txt", "-e", ".[test]")
    print_versions(session)
    session.run("python", "-m", "pytest", *QUICK, *CORE_TESTS, *session.posargs)


@nox.session(python=interpreter("3.12"))
def highest(session: nox.Session) -> None:
    """All quick tests on the newest releases that pyproject.toml allows."""
    session.install("-e", ".[models,test]")
    print_versions(session)
    session.run("python", "-m", "pytest", *QUICK, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All quick tests, and those that need the model, on the pinned versions."""
    session.install("-c", "constraints/dev.txt", "-e", ".[models,test]")
    session.run(
        "python", "-m", "pytest", "-n", "2", "-m", "not slow and not example", *session.posargs
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Lint, format and types, on the pinned versions."""
    session.install("-c", "constraints/dev.txt", "-e", ".[dev]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
