"""`swap_nnx` for tunix's Qwen3: normalised queries and keys."""

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
    ignored_rope_base,
)
from jax_tkg.flax_layers.swap.nnx import NnxLayer
from jax_tkg.flax_layers.swap.protocol import Client


@dataclass(frozen=True)
class TunixQwen3:
    """The attention of `tunix.models.qwen3`.

    `segment_ids` are of no effect, as in the client without its own flash attention.
    """

    name: str = "tunix_qwen3"
    client: Client = TUNIX
    module_name: str = "tunix.models.qwen3.model"
    class_name: str = "Attention"

    def why_not(self, module: Any) -> str | None:
        """Its own flash attention, which goes by segment ids and not by the mask, must be off."""
        if module.config.use_flash_attention:
            return "config.use_flash_attention is on: make the model with it off."
        return None

    def notes(self, module: Any) -> Sequence[str]:
        """Whether the model's RoPE base is not the one its configuration has."""
        return ignored_rope_base(module)

    def layer(self, module: Any) -> NnxLayer:
        """Sizes, read off the projections."""
        heads = module.q_proj.shape[1]  # not module.num_heads, which is the model's width
        return describe(module, heads, module.q_proj.w, Logits(module.scale))

    def methods(self, implementation: StaticImplementation) -> Mapping[str, Callable[..., Any]]:
        """`block`, which `__call__` calls, through `nnx.remat` if it is configured so."""

        def block(
            self: Any,
            x: Array,
            segment_pos: Array,
            cache: Any,
            attn_mask: Array | None,
            segment_ids: Array | None = None,
        ) -> tuple[Any, Array]:
            del segment_ids
            client, spec = client_module(self), self.shd_config.act_btnh
            query, key = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
            query, key, value = (
                client.shard(states, spec) for states in (query, key, self.v_proj(x))
            )
            query, key = (
                client.apply_rope(states, segment_pos, head_dim=self.head_dim)
                for states in (query, key)
            )
            logits = Logits(self.scale, implementation=implementation)
            out, cache = attend(query, key, value, cache, attn_mask, logits)
            return cache, client.shard(self.o_proj(out), self.shd_config.act_btd)

        return {"block": block}
