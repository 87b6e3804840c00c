"""FlaxLlama of transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_tkg._typing import Array, Float
from jax_tkg.flax_layers.swap.adapters import hf_transformers as hf
from jax_tkg.flax_layers.swap.protocol import (
    CacheVariables,
    Client,
    LinenAdapter,
    LinenCall,
)


@dataclass(frozen=True)
class HFLlama(LinenAdapter):
    """`FlaxLlamaAttention`: grouped heads, half-split rotation by its own tables."""

    name: str = "hf_llama"
    client: Client = hf.TRANSFORMERS
    module_name: str = "transformers.models.llama.modeling_flax_llama"
    class_name: str = "FlaxLlamaAttention"

    def why_not(self, module: Any, arguments: Mapping[str, Any]) -> str | None:
        """See `LinenAdapter.why_not`."""
        return hf.why_not(arguments, module.config.attention_dropout)

    def notes(self, module: Any) -> Sequence[str]:
        """See `LinenAdapter.notes`."""
        return hf.theta_note("FlaxLlama", module.config)

    def read(self, module: Any, arguments: Mapping[str, Any]) -> LinenCall:
        """See `LinenAdapter.read`."""
        x = arguments["hidden_states"]
        query = module._split_heads(module.q_proj(x), module.num_heads)
        key, value = (
            module._split_heads(project(x), module.num_key_value_heads)
            for project in (module.k_proj, module.v_proj)
        )
        key, query = module.rotary_emb(key, query, arguments["position_ids"])
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
        del arguments
        return (module.o_proj(hf.merged(out)),)
