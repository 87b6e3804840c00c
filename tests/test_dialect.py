"""Which NKI our kernels are written against is decided in one place, by what is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_tkg
from jax_tkg.nki import dialect, toolchain
from jax_tkg.nki.interpreter import language as interpreter_language

# What AWS's package is to us: modules with these names, `jit`, and NKIObject. Instructions cannot
# run on the host, so whatever runs here is interpreted.
JIT = '''
"""A stand-in for AWS's package."""
import jax

from jax_tkg.nki.interpreter.objects import NKIObject

__version__ = "{version}"
LAUNCHES = []


def jit(function):
    return Kernel(function, 1)


class Kernel:
    def __init__(self, function, grid):
        self.function, self.grid = function, grid

    def __getitem__(self, grid):
        return Kernel(self.function, grid)

    def __call__(self, *arguments):
        for x in arguments:
            assert x is None or isinstance(x, jax.Array | NKIObject), type(x)
        LAUNCHES.append((self.function.__module__, self.grid))
        query = arguments[0]
        shapes = (query.shape, query.dtype), (query.shape[:3], "float32")
        result = [jax.ShapeDtypeStruct(*x) for x in shapes]
        arrays = [x for x in arguments if isinstance(x, jax.Array)]
        return jax.ffi.ffi_call("AwsNeuronCustomNativeKernel", result)(*arrays)
'''

MODULE = """
from jax_tkg.nki.interpreter import {name} as stand_in


def of_the_device(name):
    def instruction(*args, **kwargs):
        raise RuntimeError(name + " runs on the device only")

    return instruction


def __getattr__(name):
    if name.startswith("__") or name in {lacks!r}:
        raise AttributeError(name)
    value = getattr(stand_in, name)
    is_function = callable(value) and not isinstance(value, type)
    return of_the_device(name) if is_function and {device_only} else value
"""


def install(path: Path, package: str, version: str, lacks: tuple[str, ...] = ()) -> Path:
    """A package that could be AWS's, under a path."""
    folder = path.joinpath(*package.split("."))
    for parent in (folder, *folder.parents):
        if parent != path and path in parent.parents:
            parent.mkdir(parents=True, exist_ok=True)
            (parent / "__init__.py").touch()
    (folder / "__init__.py").write_text(JIT.replace("{version}", version))
    for name, device_only in (("isa", True), ("language", False)):
        text = MODULE.format(name=name, lacks=lacks, device_only=device_only)
        (folder / f"{name}.py").write_text(text)
    return path


def look(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[toolchain.Toolchain, ...]:
    """What is found with a path in front; nothing of it stays imported."""
    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(path)
        found = toolchain.installed.__wrapped__()
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("nki", "neuronxcc"):
            del sys.modules[name]
    return found


def test_without_the_real_package_the_interpreter_stands_in() -> None:
    assert toolchain.installed() == ()
    assert dialect.is_interpreted
    assert dialect.nl is interpreter_language
    reason = str(toolchain.why_not())
    assert "written for nki 0.6 (Neuron SDK 2.32)" in reason
    assert "looked for nki and neuronxcc.nki, neither is installed" in reason


def test_a_directory_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nki" / "isa").mkdir(parents=True)
    assert look(tmp_path, monkeypatch) == ()


def test_the_newer_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "neuronxcc.nki", "2.30.1")
    install(tmp_path, "nki", "0.6.0+g1")
    assert list(map(str, look(tmp_path, monkeypatch))) == ["nki 0.6.0+g1", "neuronxcc.nki 2.30.1"]


@pytest.mark.parametrize(
    ("package", "version", "lacks", "problem"),
    [
        ("nki", "0.4.0", (), None),
        ("nki", "1.0", (), None),
        ("nki", "0.3.9", (), "older than 0.4, the first that takes their plans"),
        ("neuronxcc.nki", "2.29", (), None),
        ("nki", "0.6", ("dma_copy", "ndarray"), "lacks nki.isa.dma_copy, nki.language.ndarray"),
        ("neuronxcc.nki", "2.27", ("NKIObject",), "lacks nki.language.NKIObject"),
    ],
)
def test_whether_it_can_compile_the_kernels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    version: str,
    lacks: tuple[str, ...],
    problem: str | None,
) -> None:
    found = look(install(tmp_path, package, version, lacks), monkeypatch)
    assert found == (toolchain.Toolchain(package, version, problem),)


def test_one_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nki").mkdir()
    (tmp_path / "nki" / "__init__.py").write_text("raise OSError('no libnrt')")
    (found,) = look(tmp_path, monkeypatch)
    assert str(found.problem) == "cannot be imported (OSError('no libnrt'))"
    assert found.version == "unknown"


def test_what_was_found_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (
        toolchain.Toolchain("nki", "0.3.0", "older than 0.4"),
        toolchain.Toolchain("neuronxcc.nki", "2.29", "lacks nki.jit"),
    )
    monkeypatch.setattr(toolchain, "installed", lambda: found)
    kv = jax.ShapeDtypeStruct((1, 300, 1, 16), "float32")
    explained = jax_tkg.explain(kv.update(shape=(1, 1, 2, 16)), kv, kv, platform="neuron")
    assert explained.implementation == "xla"
    assert "nki 0.3.0: older than 0.4; neuronxcc.nki 2.29: lacks nki.jit" in str(explained)
    assert toolchain.describe().startswith("nki 0.3.0, neuronxcc.nki 2.29; the kernels are")


LAUNCH = """
import sys
sys.path.insert(0, {path!r})
import jax, jax.numpy as jnp, numpy as np, jax_tkg, {package} as package
random = np.random.default_rng(0)
query = random.standard_normal((1, 1, 2, 16), np.float32)
key, value = random.standard_normal((2, 1, 300, 1, 16), np.float32)

def attend(name):
    return jax.jit(lambda q: jax_tkg.attention_tkg(q, key, value, implementation=name))

lowered = attend(None).trace(query).lower(lowering_platforms=("neuron",))
assert lowered.as_text().count("AwsNeuronCustomNativeKernel") == 1
assert package.LAUNCHES == [("jax_tkg.nki.attention_tkg", 2)]
from jax_tkg.nki.dialect import is_interpreted, nl
assert not is_interpreted and nl.__name__ == "{package}.language"

interpreted, plain = attend("nki_interpret")(query), attend("xla")(query)
assert float(jnp.max(jnp.abs(interpreted - plain))) < 1e-5
assert len(package.LAUNCHES) == 1
"""


@pytest.mark.parametrize("package", ["nki", "neuronxcc.nki"])
def test_one_source_is_compiled_and_interpreted(tmp_path: Path, package: str) -> None:
    """Where the real package is installed it compiles the kernels, which are interpreted too."""
    install(tmp_path, package, "0.6.0")
    code = LAUNCH.format(path=str(tmp_path), package=package)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_kernels_need_of_it() -> None:
    names = set(toolchain.names_used())
    assert {"nki.jit", "nki.isa.nc_matmul", "nki.isa.sendrecv", "nki.language.NKIObject"} <= names
    assert not [name for name in names if name.count(".") > 2]
