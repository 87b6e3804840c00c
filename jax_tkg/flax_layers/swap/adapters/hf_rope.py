"""The rotation that the config of a Flax model of transformers asks for."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from flax import linen as nn

from jax_tkg.flax_layers.swap.trace_key import trace_key
from jax_tkg.rope import RotaryEmbedding

_MODULES = {
    "transformers.models.llama.modeling_flax_llama": "FlaxLlamaRotaryEmbedding",
    "transformers.models.mistral.modeling_flax_mistral": "FlaxMistralRotaryEmbedding",
}

_traced_for = trace_key()
_active = ContextVar("rope_of_config", default=False)


@contextlib.contextmanager
def rope_of_config() -> Iterator[None]:
    """Makes FlaxLlama and FlaxMistral rotate with their config's `rope_theta`.

    Their own tables are made with base 10000 always. Independent of a swap: put it around the
    model, swapped or not.

    Raises:
        NotImplementedError: from a model whose config also scales its frequencies.
    """
    token = _active.set(True)
    try:
        with nn.intercept_methods(_rotate), _traced_for("rope_of_config"):
            yield
    finally:
        _active.reset(token)


def follows_config() -> bool:
    """Whether `rope_of_config` is active here."""
    return _active.get()


def _rotate(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    wanted = _MODULES.get(type(module).__module__)
    if type(module).__name__ != wanted or context.method_name != "__call__":
        return call(*args, **kwargs)
    if module.config.rope_scaling is not None:
        raise NotImplementedError(
            f"rope_of_config knows rope_theta, not rope_scaling={module.config.rope_scaling}."
        )
    return rotated(module, *args, **kwargs)


def rotated(module: Any, key: Any, query: Any, position_ids: Any) -> tuple[Any, Any]:
    """Keys and queries `[B, T, heads, H]` as its `__call__` takes and returns them."""
    rope = RotaryEmbedding(base=module.config.rope_theta)
    angles = rope.cos_sin(position_ids, query.shape[-1])
    return tuple(rope.rotate(x, *angles).astype(module.dtype) for x in (key, query))  # type: ignore[return-value]
