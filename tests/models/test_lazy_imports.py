"""The public names of `jax_tkg.models` load on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jax_tkg.models

EXTRAS = ("gguf", "tokenizers", "jinja2")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_importing_the_package_loads_no_extra() -> None:
    code = (
        "from jax_tkg.models import LlamaConfig, TokenizerMetadata, smollm2_path\n"
        f"print('loaded', [name for name in {EXTRAS} if name in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "loaded []"


@pytest.mark.parametrize(
    ("extra", "name"),
    [("gguf", "read_gguf"), ("tokenizers", "Tokenizer"), ("jinja2", "StreamDecoder")],
)
def test_a_missing_extra_is_explained(extra: str, name: str) -> None:
    printed = run(f"sys.modules[{extra!r}] = None\nfrom jax_tkg.models import {name}")
    assert f"ImportError: jax_tkg.models.{name} needs the package {extra!r}" in printed
    assert "pip install 'jax_tkg[models]'" in printed


def test_every_public_name_exists() -> None:
    for name in jax_tkg.models.__all__:
        assert getattr(jax_tkg.models, name).__name__ == name
    assert dir(jax_tkg.models) == sorted(jax_tkg.models.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'read_onnx'"):
        _ = jax_tkg.models.read_onnx
