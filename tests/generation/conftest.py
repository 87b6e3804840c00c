"""What the tests of generation share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def compile_quickly() -> Iterator[None]:
    """Leaves LLVM's optimisations out: where what is computed matters, and not how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
