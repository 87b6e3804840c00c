"""FlaxGPT2 of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jax_tkg._typing import Array, Float
from jax_tkg.flax_layers.swap.adapters import hf_transformers as hf
from jax_tkg.flax_layers.swap.protocol import (
    CacheVariables,
    Client,
    LinenAdapter,
    LinenCall,
)


@dataclass(frozen=True)
class HFGPT2(LinenAdapter):
    """`FlaxGPT2Attention`: one projection for query, key and value, learned positions."""

    name: str = "hf_gpt2"
    client: Client = hf.TRANSFORMERS
    module_name: str = "transformers.models.gpt2.modeling_flax_gpt2"
    class_name: str = "FlaxGPT2Attention"

    def is_for(self, module: Any) -> str | None:
        """See `LinenAdapter.is_for`."""
        if module.is_cross_attention or not module.causal:
            return "cross-attention has no growing cache; the client's own runs"
        return None

    def why_not(self, module: Any, arguments: Mapping[str, Any]) -> str | None:
        """See `LinenAdapter.why_not`."""
        return hf.why_not(arguments, module.config.attn_pdrop)

    def read(self, module: Any, arguments: Mapping[str, Any]) -> LinenCall:
        """See `LinenAdapter.read`."""
        heads = jnp.split(module.c_attn(arguments["hidden_states"]), 3, axis=2)
        query, key, value = (module._split_heads(x) for x in heads)
        return LinenCall(
            query,
            key,
            value,
            cache=CacheVariables(),
            create_cache=arguments["init_cache"],
            key_mask=hf.key_mask(arguments["attention_mask"]),
        )

    def finish(
        self, module: Any, arguments: Mapping[str, Any], out: Float[Array, "B T N H"]
    ) -> Any:
        """See `LinenAdapter.finish`."""
        out = module.c_proj(hf.merged(out))
        return (module.resid_dropout(out, deterministic=arguments["deterministic"]),)
