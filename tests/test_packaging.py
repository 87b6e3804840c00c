"""What a user installs and imports, and that the test environment checks what it claims to."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]

# `import jax_tkg` leaves these to the subpackages and tools that need them.
HEAVY = ("chex", "flax", "gguf", "jinja2", "matplotlib", "optax", "rich", "tokenizers", "torch")

IMPORT_PROBE = """
import json, sys, time
import jax, jax.numpy
before, start = set(sys.modules), time.process_time()
import jax_tkg
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""

TWIN_PACKAGE = """
from __future__ import annotations
import dataclasses
from typing import Self
from jaxtyping import Array, Float

@dataclasses.dataclass(frozen=True)
class State:
    out: Float[Array, "B T"]
    lse: Float[Array, "B T"]

    def masked(self, mask: Float[Array, "B T"]) -> Self:
        return State(self.out * mask, self.lse)

def scaled(x: Float[Array, "B T"], scale: float) -> Float[Array, "B T"]:
    return x * scale

def flattened(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return x.ravel()
"""

TWIN_TESTS = """
import jax.numpy as jnp
import jax_tkg
import pytest
from jaxtyping import TypeCheckError

ONES = jnp.ones((2, 3))

def test_right_shapes_pass():
    state = jax_tkg.State(jax_tkg.scaled(ONES, 2), ONES)
    assert state.masked(ONES).out.sum() == 12

@pytest.mark.parametrize(
    "wrong",
    [
        lambda: jax_tkg.scaled(jnp.ones(3), 2.0),
        lambda: jax_tkg.scaled(ONES.astype(int), 2.0),
        lambda: jax_tkg.scaled(ONES, "2"),
        lambda: jax_tkg.flattened(ONES),
        lambda: jax_tkg.State(out=ONES, lse=ONES.T),
        lambda: jax_tkg.State(ONES, ONES).masked(2.0),
    ],
)
def test_wrong_shapes_raise(wrong):
    with pytest.raises(TypeCheckError):
        wrong()

def test_checks_can_be_switched_off(no_shape_checks):
    assert jax_tkg.flattened(ONES).shape == (6,)
"""


def run_python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def requirements(project: dict[str, Any]) -> list[Requirement]:
    """Every requirement on another project, of the package and of its extras."""
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *itertools.chain.from_iterable(extras)]
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    directory = str(tmp_path_factory.mktemp("wheel"))
    path = next(WheelBuilder(str(ROOT)).build(directory=directory, versions=["standard"]))
    with zipfile.ZipFile(path) as archive:
        yield archive


def bounds(requirement: Requirement) -> dict[str, Version]:
    return {spec.operator: Version(spec.version) for spec in requirement.specifier}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pinned}


def test_import_is_light():
    result = run_python("-c", IMPORT_PROBE)
    assert result.returncode == 0, result.stderr
    probe = json.loads(result.stdout)
    imported = {name.partition(".")[0] for name in probe["modules"]}
    assert imported.isdisjoint(HEAVY)
    # CPU time, so that a busy machine does not count. A heavy import costs more than this.
    assert probe["seconds"] < 0.75


def test_import_is_silent_and_free_of_warnings():
    result = run_python("-W", "error", "-c", "import jax_tkg")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_runtime_dependencies(project):
    names = {Requirement(line).name for line in project["dependencies"]}
    assert names == {"flax", "jax", "numpy"}


def test_extras(project):
    extras = project["optional-dependencies"]
    assert set(extras) == {"bench", "clients", "dev", "docs", "models", "neuron", "test"}


def test_every_requirement_is_a_range(requirements):
    for requirement in requirements:
        assert set(bounds(requirement)) == {">=", "<"}, requirement


def test_pinned_versions_are_in_range(project):
    """Of each extra, in the environment that it is tested in."""
    extras = {"": project["dependencies"]} | project["optional-dependencies"]
    for extra, lines in extras.items():
        pinned = pins("clients.txt" if extra == "clients" else "dev.txt")
        for requirement in map(Requirement, lines):
            # Not installable from the index of the others; and this project itself.
            if requirement.name not in ("jax-neuronx", project["name"]):
                version = pinned[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(version), requirement


def test_lowest_pins_are_the_lower_bounds(project):
    pinned = pins("lowest.txt")
    for requirement in map(Requirement, project["dependencies"]):
        assert pinned[requirement.name] == bounds(requirement)[">="], requirement


def test_version_is_the_distributions(project):
    import jax_tkg

    assert jax_tkg.__version__ == project["version"]


def test_wheel_holds_the_package_alone(wheel, project):
    names = wheel.namelist()
    top_level = {name.partition("/")[0] for name in names}
    assert top_level == {"jax_tkg", f"jax_tkg-{project['version']}.dist-info"}
    assert "jax_tkg/py.typed" in names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "jax_tkg").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_shape_annotations_are_checked(tmp_path):
    package, tests = tmp_path / "jax_tkg", tmp_path / "tests"
    package.mkdir()
    tests.mkdir()
    (package / "twin.py").write_text(TWIN_PACKAGE)
    (package / "__init__.py").write_text("from jax_tkg.twin import State, flattened, scaled\n")
    (tests / "test_twin.py").write_text(TWIN_TESTS)
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)
    result = run_python("-m", "pytest", "-q", "-p", "no:xdist", "tests", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 passed" in result.stdout


def test_tests_run_on_several_cpu_devices():
    assert jax.default_backend() == "cpu"
    assert jax.device_count() >= 2


def test_tests_use_strict_promotion():
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(1, jnp.float32) + jnp.ones(1, jnp.bfloat16)
