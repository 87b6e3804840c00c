"""Which NKI our kernels are written against is decided in one place."""

import subprocess
import sys
from pathlib import Path

import pytest

SHOW = "from jax_tkg.nki import dialect; print(dialect.is_interpreted, dialect.nl.__name__)"
EXPLAIN = """
import jax, jax_tkg
kv = jax.ShapeDtypeStruct((1, 8, 1, 16), "float32")
print(jax_tkg.explain(kv.update(shape=(1, 1, 2, 16)), kv, kv, implementation="nki_interpret"))
"""


def run(code: str, *path: Path) -> str:
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def show(*path: Path) -> list[str]:
    return run(SHOW, *path).split()


@pytest.fixture
def real_package(tmp_path: Path) -> Path:
    """A package named nki, as AWS's wheel would install one."""
    package = tmp_path / "nki"
    (package / "isa").mkdir(parents=True)
    (package / "language").mkdir()
    for init in (package, package / "isa", package / "language"):
        (init / "__init__.py").write_text("")
    return tmp_path


def test_without_the_real_package_the_interpreter_stands_in() -> None:
    assert show() == ["True", "jax_tkg.nki.interpreter.language"]


def test_the_real_package_is_used_where_it_is_installed(real_package: Path) -> None:
    assert show(real_package) == ["False", "nki.language"]


def test_kernels_written_against_the_real_package_are_not_interpreted(real_package: Path) -> None:
    assert "on cpu: nki_interpret" in run(EXPLAIN)
    explained = run(EXPLAIN, real_package)
    assert "on cpu: none can" in explained
    assert "not nki_interpret: the nki package is installed" in explained
