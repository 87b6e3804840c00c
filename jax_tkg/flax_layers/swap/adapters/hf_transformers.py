"""What the Flax decoders of transformers have in common. 4.57 is the last release with Flax."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jax_tkg._typing import Array, Bool, Float
from jax_tkg.flax_layers.swap.adapters.hf_rope import follows_config
from jax_tkg.flax_layers.swap.protocol import Client

TRANSFORMERS = Client("transformers", tested=((4, 57), (4, 58)))

ROPE_THETA = 10000.0
"""The base that the rotary tables of its Flax models are made with, whatever the config says."""


def why_not(arguments: Mapping[str, Any], dropout: float) -> str | None:
    """What its attention modules can do and this attention cannot."""
    if arguments["output_attentions"]:
        return "output_attentions=True needs the weights, which are never all there; leave it out"
    if not arguments["deterministic"] and dropout > 0:
        return "attention dropout is for training; pass train=False"
    return None


def key_mask(attention_mask: Array | None) -> Bool[Array, "B S"] | None:
    """Its 0 and 1 for each slot as bool."""
    return None if attention_mask is None else jnp.asarray(attention_mask) > 0


def theta_note(name: str, config: Any) -> tuple[str, ...]:
    """A warning where the config asks for another rotation than the model makes."""
    theta = getattr(config, "rope_theta", ROPE_THETA)
    if theta == ROPE_THETA or follows_config():
        return ()
    return (
        f"{name} rotates with base {ROPE_THETA:g} and ignores its config's rope_theta={theta:g}. "
        "The swap leaves that as it is: the text stays the same. `with rope_of_config():` around "
        "the model, swapped or not, makes it rotate as its config says.",
    )


def merged(out: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """The heads side by side."""
    return out.reshape(*out.shape[:2], -1)
