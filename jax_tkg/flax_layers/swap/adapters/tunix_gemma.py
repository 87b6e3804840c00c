"""`swap_nnx` for tunix's Gemma (1 and 2) and Gemma 3: soft caps and sliding windows.

A sliding layer sees the tokens less than `sliding_window_size` away. tunix counts that in slots of
the cache from where it takes the query to be, and three times not where it is: Gemma at its
position, which in a left-padded row is not its slot; Gemma 3 at the last slot that the mask shows,
which in a ring that has wrapped is the last of the cache; and Gemma 3, for several tokens at once,
at slots 0, 1, ..., also behind cached ones. Swapped layers count from the query's own token, so a
row gives the same padded, in a ring and in chunks as alone and at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_tkg._typing import Array
from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.swap.adapters.tunix_attention import (
    TUNIX,
    Logits,
    attend,
    client_module,
    describe,
)
from jax_tkg.flax_layers.swap.nnx import NnxLayer
from jax_tkg.flax_layers.swap.protocol import Client


@dataclass(frozen=True)
class TunixGemma:
    """The attention of `tunix.models.gemma`."""

    name: str = "tunix_gemma"
    client: Client = TUNIX
    module_name: str = "tunix.models.gemma.model"
    class_name: str = "Attention"

    def why_not(self, module: Any) -> str | None:
        """It can always be swapped."""
        del module
        return None

    def notes(self, module: Any) -> Sequence[str]:
        """Where its sliding windows are not where tunix has them."""
        return _window_notes(module, "left-padded rows")

    def layer(self, module: Any) -> NnxLayer:
        """Sizes, read off the projections, and options."""
        return describe(
            module, module.num_heads, module.attn_vec_einsum.w, _gemma_logits(module, None)
        )

    def methods(self, implementation: StaticImplementation) -> Mapping[str, Callable[..., Any]]:
        """`block`, which `__call__` calls, through `nnx.remat` if it is configured so."""

        def block(
            self: Any, x: Array, segment_pos: Array, cache: Any, attn_mask: Array | None
        ) -> tuple[Any, Array]:
            client = client_module(self)
            query, key, value = _projected(self, x, client.shard)
            query, key = (
                client.apply_rope(states, segment_pos, head_dim=self.head_dim)
                for states in (query, key)
            )
            logits = _gemma_logits(self, implementation)
            out, cache = attend(query, key, value, cache, attn_mask, logits)
            return cache, client.shard(self.attn_vec_einsum(out), self.shd_config.act_btd)

        return {"block": block}


@dataclass(frozen=True)
class TunixGemma3:
    """The attention of `tunix.models.gemma3`: normalised queries and keys, RoPE of two bases."""

    name: str = "tunix_gemma3"
    client: Client = TUNIX
    module_name: str = "tunix.models.gemma3.model"
    class_name: str = "Attention"

    def why_not(self, module: Any) -> str | None:
        """It can always be swapped."""
        del module
        return None

    def notes(self, module: Any) -> Sequence[str]:
        """Where its sliding windows are not where tunix has them."""
        return _window_notes(module, "chunks of several tokens behind cached ones")

    def layer(self, module: Any) -> NnxLayer:
        """Sizes, read off the projections, and options."""
        return describe(
            module, module.num_heads, module.attn_vec_einsum.w, _gemma3_logits(module, None)
        )

    def methods(self, implementation: StaticImplementation) -> Mapping[str, Callable[..., Any]]:
        """`block`, which `__call__` calls, through `nnx.remat` if it is configured so."""

        def block(
            self: Any, x: Array, segment_pos: Array, cache: Any, attn_mask: Array | None
        ) -> tuple[Any, Array]:
            client = client_module(self)
            shard = client.sharding_utils.shard
            query, key, value = _projected(self, x, shard)
            query, key = (
                client.apply_rope(
                    norm(states),
                    segment_pos,
                    head_dim=self.head_dim,
                    base_frequency=self.rope_base_frequency,
                    scale_factor=self.rope_scale_factor,
                )
                for norm, states in ((self._query_norm, query), (self._key_norm, key))
            )
            logits = _gemma3_logits(self, implementation)
            out, cache = attend(query, key, value, cache, attn_mask, logits)
            return cache, shard(self.attn_vec_einsum(out), self.shd_config.act_btd)

        return {"block": block}


def _projected(module: Any, x: Array, shard: Callable[[Array, Any], Array]) -> list[Array]:
    """Query, key and value from one matrix or from two, as the module has it."""
    if module.use_qkv_einsum:
        states = module.qkv_einsum(x)
    else:
        states = (module.q_einsum(x), *module.kv_einsum(x))
    return [shard(one, module.shd_config.act_btnh) for one in states]


def _window(module: Any) -> int | None:
    return module.sliding_window_size if module.attn_type.name == "LOCAL_SLIDING" else None


def _window_notes(module: Any, where: str) -> Sequence[str]:
    if _window(module) is None:
        return ()
    return (
        f"{type(module).__module__} misplaces sliding windows in {where} and in wrapped rings; the "
        "swap counts them from the query's own token, so there the outputs differ.",
    )


def _gemma_logits(module: Any, implementation: StaticImplementation) -> Logits:
    return Logits(
        scale=module.head_dim**-0.5,
        soft_cap=module.attn_logits_soft_cap,
        window=_window(module),
        implementation=implementation,
    )


def _gemma3_logits(module: Any, implementation: StaticImplementation) -> Logits:
    return Logits(
        scale=module.query_pre_attn_scalar,
        window=_window(module),
        implementation=implementation,
    )
