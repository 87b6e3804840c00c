"""Text generation: chunked prefill and a compiled decode loop over any model with KV caches.

`generate` returns all tokens, `stream` hands them out as they come, `show` prints a stream with its
speed. `prefill_chunk`, `decode` and `decode_step` are the compiled parts they are made of.
"""

from typing import TYPE_CHECKING, Any

from jax_tkg.generation.api import Generated, generate, stream
from jax_tkg.generation.loop import (
    DecodeState,
    TokenPolicy,
    decode,
    decode_step,
    portable_key,
    prefill,
    prefill_chunk,
)
from jax_tkg.generation.model import DecodeModel, as_pytree

if TYPE_CHECKING:
    from jax_tkg.generation.display import Speed, show

__all__ = [
    "DecodeModel",
    "DecodeState",
    "Generated",
    "Speed",
    "TokenPolicy",
    "as_pytree",
    "decode",
    "decode_step",
    "generate",
    "portable_key",
    "prefill",
    "prefill_chunk",
    "show",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Imports the display, and with it rich, when it is first asked for."""
    if name not in ("Speed", "show"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jax_tkg.generation import display

    return getattr(display, name)
