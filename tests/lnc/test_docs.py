"""docs/sharding.md says what the code does; the example of the grid runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_tkg
from jax_tkg.nki.differences import markdown
from jax_tkg.nki.implementation import NkiInterpret

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "sharding.md"


def part(name: str) -> str:
    """What the page has between two marks."""
    found = re.search(f"<!-- {name} -->\n(.*?)\n<!-- end of the {name.split()[0]} -->",
                      PAGE.read_text(), re.DOTALL)  # fmt: skip
    assert found is not None
    return found[1].strip()


def load_cluster() -> Any:
    spec = importlib.util.spec_from_file_location("cluster", ROOT / "docs" / "cluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


def test_table_of_the_time_model() -> None:
    cluster = load_cluster()
    assert part("table of docs/cluster.py") == cluster.table() == cluster.table_in(PAGE.read_text())


def test_the_model_adds_up() -> None:
    """By hand: 4 MiB of keys and values in each of two programs, in runs of 16 KiB."""
    cluster = load_cluster()
    step = cluster.step_of(8, 2**15)
    dma = 1300 + 2**14 * 2 * 256 / (362 * 0.991)
    exchanges = 3 * (500 + 100 / 1.2 + 128 * 8 * 4 / 153)
    assert (step.dma, step.exchange) == pytest.approx((dma / 1e3, exchanges / 1e3), rel=1e-6)
    assert step.collective == 0
    assert cluster.step_of(16, 2**15).collective == pytest.approx(8 + 8 * 130 * 4 / 320e3)


def test_table_of_the_differences() -> None:
    assert part("differences") == markdown()


def test_the_printed_plan() -> None:
    query = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 32768, 2, 128), jnp.bfloat16)
    plan = jax_tkg.explain(query, keys, keys, implementation=NkiInterpret()).plan
    indented = "\n".join(f"    {line}" for line in str(plan).splitlines()[1:])
    assert part("plan") == indented.strip()


def test_the_examples_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), scope)
    printed = capsys.readouterr().out
    assert "('data', None, 'tensor'" in printed
    assert "2 program(s), sequence sharding" in printed
    assert printed.endswith("sequence (1, 1, 8, 64)\n")


def test_attention_grid() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "attention_grid.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "80 devices, 8 x 10; each has 2 blocks of 64 queries x 2 heads" in done.stdout
    assert re.search(r"blocks in order: .* max/mean 1\.87\n", done.stdout)
    assert re.search(r"blocks folded: .* max/mean 1\.00\n", done.stdout)
