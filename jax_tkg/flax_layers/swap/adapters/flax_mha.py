"""What the adapters of Flax's own attention modules share, nnx and linen."""

from dataclasses import replace
from typing import Any

from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.drop_in import AttentionFn
from jax_tkg.flax_layers.swap.protocol import Client

FLAX = Client("flax", ((0, 11), (0, 13)))


def why_not_ours(given: Any, original: Any) -> str | None:
    """Why a module's `attention_fn` cannot be replaced; None if it can."""
    if given is original or isinstance(given, AttentionFn):
        return None
    return (
        f"its attention_fn is {given!r}, which may compute anything. Give it Flax's "
        "dot_product_attention or jax_tkg's AttentionFn."
    )


def ours(given: Any, implementation: StaticImplementation) -> AttentionFn:
    """The `AttentionFn` that takes an `attention_fn`'s place."""
    fn = given if isinstance(given, AttentionFn) else AttentionFn()
    return fn if implementation is None else replace(fn, implementation=implementation)
