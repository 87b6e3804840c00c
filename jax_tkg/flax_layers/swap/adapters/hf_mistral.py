"""FlaxMistral of transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax_tkg.flax_layers.swap.adapters import hf_transformers as hf
from jax_tkg.flax_layers.swap.adapters.hf_llama import HFLlama
from jax_tkg.flax_layers.swap.protocol import LinenCall


@dataclass(frozen=True)
class HFMistral(HFLlama):
    """`FlaxMistralAttention`: as Llama's, with a sliding window over slots.

    A token sees its own key and `sliding_window` before it, one more than the config's name
    suggests; that is the client's, and kept.
    """

    name: str = "hf_mistral"
    module_name: str = "transformers.models.mistral.modeling_flax_mistral"
    class_name: str = "FlaxMistralAttention"

    def notes(self, module: Any) -> Sequence[str]:
        """See `LinenAdapter.notes`."""
        notes = hf.theta_note("FlaxMistral", module.config)
        if module.config.sliding_window:
            return notes
        return (
            *notes,
            f"FlaxMistral with sliding_window={module.config.sliding_window} lets every token see "
            "only itself. The swap keeps that; set it to max_position_embeddings for no window.",
        )

    def read(self, module: Any, arguments: Mapping[str, Any]) -> LinenCall:
        """See `LinenAdapter.read`."""
        call = super().read(module, arguments)
        return replace(call, left_window=module.config.sliding_window or 0)
