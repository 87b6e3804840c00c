"""Real models for the decoder: get a packaged GGUF file, read its weights, tokenise text.

Needs the `models` extra (`gguf`, `tokenizers`, `jinja2`), imported when a name is first used::

    from jax_tkg.models import Tokenizer, read_gguf, smollm2_path

    model = read_gguf(smollm2_path())
    tokenizer = Tokenizer(model.tokenizer_metadata)
    ids = tokenizer.encode("The capital of France is")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_tkg.models.download import ModelDownloadError, PackagedModel, smollm2_path
    from jax_tkg.models.gguf_weights import GGUFModel, read_gguf, unpermute_rope_rows
    from jax_tkg.models.metadata import LlamaConfig, TokenizerMetadata, UnsupportedModelError
    from jax_tkg.models.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "GGUFModel",
    "LlamaConfig",
    "ModelDownloadError",
    "PackagedModel",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerMetadata",
    "UnsupportedModelError",
    "read_gguf",
    "smollm2_path",
    "unpermute_rope_rows",
]

_HOME = {
    "GGUFModel": "gguf_weights",
    "LlamaConfig": "metadata",
    "ModelDownloadError": "download",
    "PackagedModel": "download",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
    "TokenizerMetadata": "metadata",
    "UnsupportedModelError": "metadata",
    "read_gguf": "gguf_weights",
    "smollm2_path": "download",
    "unpermute_rope_rows": "gguf_weights",
}
_EXTRA = frozenset({"gguf", "jinja2", "tokenizers"})


def __getattr__(name: str) -> object:
    """Imports the module of a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ImportError(
            f"{__name__}.{name} needs the package {error.name!r}, which is not installed. "
            "Install the models extra: pip install 'jax_tkg[models]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted(__all__)
