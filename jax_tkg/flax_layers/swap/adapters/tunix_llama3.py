"""`swap_nnx` for tunix's Llama3."""

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
class TunixLlama3:
    """The attention of `tunix.models.llama3`: its projections and its RoPE, our attention."""

    name: str = "tunix_llama3"
    client: Client = TUNIX
    module_name: str = "tunix.models.llama3.model"
    class_name: str = "Attention"

    def why_not(self, module: Any) -> str | None:
        """It can always be swapped."""
        del module
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
            self: Any, x: Array, segment_pos: Array, cache: Any, attn_mask: Array | None
        ) -> tuple[Any, Array]:
            client, spec = client_module(self), self.shd_config.act_btnh
            query, key, value = (
                client.shard(projection(x), spec)
                for projection in (self.q_proj, self.k_proj, self.v_proj)
            )
            query, key = (
                client.apply_rope(states, segment_pos, head_dim=self.head_dim)
                for states in (query, key)
            )
            logits = Logits(self.scale, implementation=implementation)
            out, cache = attend(query, key, value, cache, attn_mask, logits)
            return cache, client.shard(self.o_proj(out), self.shd_config.act_btd)

        return {"block": block}
