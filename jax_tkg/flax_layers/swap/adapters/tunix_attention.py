"""Attention over the caches of tunix decoders: what their adapters share.

A tunix layer is given `{k, v: [B, S, K, H], end_index: [B]}`, writes the new keys at
`end_index[0] mod S`, and is told by a mask `[B, T, S]` which slots its queries see. Here the mask
also says where the live slots of each row begin and end, so that the rest is not read.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from jax_tkg._typing import Array, Bool, Float, Int
from jax_tkg.attention import attention_tkg
from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.functional import PROMPT_TOKENS
from jax_tkg.flax_layers.swap.linen_cache import write_at
from jax_tkg.flax_layers.swap.nnx import NnxLayer
from jax_tkg.flax_layers.swap.protocol import Client
from jax_tkg.prefill.attention import attention_cte

TUNIX = Client("google-tunix", ((0, 1, 7), (0, 1, 8)))

RingCache = Mapping[str, Array]
"""A layer's cache as tunix has it: `k` and `v` `[B, S, K, H]`, `end_index` int32 `[B]`."""


@dataclass(frozen=True)
class Logits:
    """How a layer makes its logits; static.

    Attributes:
        scale: factor of the dot products.
        soft_cap: c in `c * tanh(logit / c)`, or None.
        window: w if a query of this layer sees only tokens less than w away from it, or None.
        implementation: as for `attention_tkg`, a sequence as a tuple.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    implementation: StaticImplementation = None

    def attend(self, query: Array, *arguments: Any, **options: Any) -> Array:
        """`attention_tkg`, or for many tokens `attention_cte`, with these options."""
        attend = attention_cte if query.shape[1] >= PROMPT_TOKENS else attention_tkg
        out: Array = attend(
            query,
            *arguments,
            scale=self.scale,
            logits_soft_cap=self.soft_cap,
            implementation=self.implementation,
            **options,
        )
        return out

    def options(self) -> dict[str, Any]:
        """As keywords of `attention_tkg`, for a report."""
        return {"scale": self.scale, "logits_soft_cap": self.soft_cap}


@runtime_checkable
class AppendAndAttend(Protocol):
    """A cache that is not tunix's own dictionary, such as `tunix_decode.LayerCache`."""

    def append_and_attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        logits: Logits,
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """The attention of the new tokens, and the cache with them in it."""
        ...


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    cache: RingCache | AppendAndAttend | None,
    mask: Bool[Array, "B T S"] | None,
    logits: Logits,
) -> tuple[Float[Array, "B T N H"], Any]:
    """What a tunix attention module does between its projections.

    Args:
        query: `[B, T, N, H]`, rotated.
        key: `[B, T, K, H]`, of the new tokens, rotated.
        value: `[B, T, K, H]`.
        cache: the layer's cache, or None to attend to the new tokens alone.
        mask: True where a query sees a slot (a new token, without a cache); None if it sees all.
        logits: how they are made.

    Returns:
        `[B, T, N, H]`, and the new cache. A query that sees nothing gives 0, where tunix gives the
        mean of all values: such are left-padding tokens, which nobody reads.
    """
    if isinstance(cache, AppendAndAttend):
        return cache.append_and_attend(query, key, value, logits)
    tokens = key.shape[1]
    if cache is None:
        seen = _in_window(mask, jnp.int32(0), tokens, tokens, logits.window)
        return logits.attend(query, key, value, is_causal=False, **_visible(seen, query)), None
    slots, before = cache["k"].shape[1], cache["end_index"][0]
    if tokens > slots:
        raise ValueError(
            f"{tokens} new tokens do not fit a cache of {slots} slots a row: make the cache larger "
            "or give the prompt in pieces."
        )
    keys = write_at(cache["k"], key, before % slots)
    values = write_at(cache["v"], value, before % slots)
    seen = _in_window(mask, before, tokens, slots, logits.window)
    out = logits.attend(query, keys, values, is_causal=False, **_visible(seen, query))
    return out, {"v": values, "k": keys, "end_index": cache["end_index"] + tokens}


def _in_window(
    mask: Array | None, before: Int[Array, ""], tokens: int, slots: int, window: int | None
) -> Array | None:
    """Narrows a mask to slots whose token is less than `window` tokens from the query's.

    Tokens are counted as they were written, padding included; `before` were before these.
    """
    if window is None:
        return mask
    queries = before + jnp.arange(tokens, dtype=jnp.int32)
    last = before + tokens - 1
    held = last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots  # token in each slot
    near = jnp.abs(queries[:, None] - held) < window
    return near[None] if mask is None else mask.astype(bool) & near


def _visible(mask: Bool[Array, "#B T S"] | None, query: Array) -> dict[str, Array]:
    """A mask as arguments of the op, with the first and last slot that each row and query sees."""
    if mask is None:
        return {}
    batch, tokens = query.shape[:2]
    mask = jnp.broadcast_to(mask.astype(bool), (batch, tokens, mask.shape[-1]))
    slots = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(mask, slots, mask.shape[-1]), axis=-1)
    behind = jnp.max(jnp.where(mask, slots + 1, 0), axis=-1)
    visible = {
        "mask": mask[:, None],
        "key_value_seq_starts": jnp.min(first, axis=1),
        "key_value_seq_lengths": jnp.max(behind, axis=1),
    }
    if tokens >= PROMPT_TOKENS:
        visible["key_bounds"] = jnp.stack([first, behind], axis=-1)
    return visible


def client_module(module: Any) -> Any:
    """The Python module of the client's class, for the functions that it uses besides methods."""
    return sys.modules[type(module).__module__]


def describe(module: Any, num_heads: int, weight: Any, logits: Logits) -> NnxLayer:
    """A tunix attention module; `weight` is one of its projections."""
    window = "" if logits.window is None else f", the last {logits.window} seen"
    return NnxLayer(
        num_heads=num_heads,
        num_kv_heads=module.num_kv_heads,
        head_dim=module.head_dim,
        dtype=weight.dtype,
        cache=f"argument, dict of k and v [B, S, K, H], ring{window}",
        options=logits.options(),
    )


def ignored_rope_base(module: Any) -> Sequence[str]:
    """A warning if the client's RoPE has another base than the configuration asks for.

    Its `apply_rope` has a default base, and the attention never passes the configured one. Whoever
    replaces `apply_rope` in the client's Python module changes the default, and is not warned.
    """
    client = client_module(module)
    used = inspect.signature(client.apply_rope).parameters["rope_theta"].default
    wanted = module.config.rope_theta
    if used == wanted:
        return ()
    return (
        f"{client.__name__} rotates with base {used} and ignores config.rope_theta, which is "
        f"{wanted}. The swap keeps that, as it changes nothing but the attention. To use the "
        f"configured base: {client.__name__}.apply_rope = functools.partial("
        f"{client.__name__}.apply_rope, rope_theta={wanted}), before the first call.",
    )
