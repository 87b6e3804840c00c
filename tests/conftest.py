"""Test environment: CPU with several devices, strict promotion, shapes checked, no luck involved.

Settings that JAX reads from the environment are made there, before its import, so that tests which
start another Python process test under the same ones.
"""

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.compiling import FLAGS

HOST_DEVICES = 8

if "jax_tkg" in sys.modules or "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could configure it")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# Later flags win, so this one holds whatever the caller's XLA_FLAGS say.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={HOST_DEVICES}"
)
# NumPy's own threads would only wait for each other: the oracle multiplies small matrices.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# A cache that outlives the run would hide compilation failures and falsify the HLO tests.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

try:
    import beartype  # noqa: F401
    import jaxtyping
except ImportError as error:
    raise pytest.UsageError(
        f"the tests need {error.name} to check the array shapes in jax_tkg's signatures: "
        "pip install -e '.[dev]'"
    ) from error

# From here on functions of jax_tkg check their annotations when called. As in mypy, an int may
# stand where a float is asked for. Self means nothing to a checker of functions outside a class.
# Kernels and their interpreter have no array shapes to check, and make very many calls.
KERNELS = ("attention_tkg", "append", "cte", "ladder", "mask", "rope", "rows", "steps")
UNCHECKED = ("jax_tkg.nki.interpreter", *(f"jax_tkg.nki.{name}" for name in KERNELS))
PACKAGE = pathlib.Path(__file__).parents[1] / "jax_tkg"
MODULES = sorted(
    f"jax_tkg.{file.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
    for file in (*PACKAGE.glob("*"), *(PACKAGE / "nki").glob("*"))
    if file.name not in ("__init__.py", "__pycache__", "nki", "py.typed")
)
jaxtyping.install_import_hook(
    [name for name in MODULES if name not in UNCHECKED],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, hint_overrides="
    "beartype.FrozenDict({beartype.typing.Self: beartype.typing.Any})))",
)

# Its assertions are as telling as those of the test files that run it.
pytest.register_assert_rewrite("tests.conformance")

# `pytest --hypothesis-profile=explore` looks for new counterexamples.
settings.register_profile("ci", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("ci")


def quick_only(config: pytest.Config) -> bool:
    """Whether slow tests and examples are left out, as in `make test`."""
    return all(f"not {mark}" in config.option.markexpr for mark in ("slow", "example"))


def pytest_configure(config: pytest.Config) -> None:
    if quick_only(config):
        os.environ["XLA_FLAGS"] = " ".join((os.environ["XLA_FLAGS"], *FLAGS))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    import jax

    real = item.get_closest_marker("model") is not None
    jax.config.update("jax_disable_most_optimizations", quick_only(item.config) and not real)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """Frees compiled programs after each file: XLA:CPU crashes when a process maps too many."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches the annotation checks off: for tests of what users see, who run without them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
