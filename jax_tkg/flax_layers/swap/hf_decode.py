"""A Flax decoder of transformers as a model that `jax_tkg.generate` drives.

model = HFDecoder.create(client, params)
result = jax_tkg.generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=8)

The client's own cache counts one index for all rows, so it can neither take in prompts of different
lengths without padding nor stop one row. The layers of a `HFDecoder` keep a `KVCache` each instead,
with the tokens of each row after one another; everything else stays the client's.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from jax_tkg._typing import Array, Float, Int
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.swap.adapters import LINEN_ADAPTERS
from jax_tkg.flax_layers.swap.linen import LinenSwap
from jax_tkg.flax_layers.swap.linen_cache import OwnCaches
from jax_tkg.flax_layers.swap.report import SwapReport
from jax_tkg.generation import last_real

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Program:
    """What is static of a decoder: compared by identity, so that it is compiled once.

    Attributes:
        module: the client's linen module.
        cache_shapes: what its own cache would be like, batch and slots 1.
        most_tokens: that it has positions for.
        vocab_size: token ids V that it has embeddings for.
        implementation: as for `swap_linen`.
        around: makes a context that is active while the module is traced.
        report: what was swapped so far.
    """

    def __init__(self, client: Any, implementation: StaticImplementation, around: Context) -> None:
        self.module = client.module
        self.cache_shapes = jax.eval_shape(lambda: client.init_cache(1, 1))
        self.most_tokens = int(client.config.max_position_embeddings)
        self.vocab_size = int(client.config.vocab_size)
        self.implementation, self.around = implementation, around
        self.report = SwapReport()

    def apply(
        self, variables: Mapping[str, Any], tokens: Array, positions: Array, counts: Array | None
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Logits and the caches, swapped."""
        swap = LinenSwap(
            LINEN_ADAPTERS,
            OwnCaches(counts),
            self.implementation,
            layers=len(_attention_layers(self.cache_shapes)),
            report=self.report,
            key=self,
        )
        with self.around(), swap:
            outputs, changed = self.module.apply(
                variables,
                tokens,
                attention_mask=None,
                position_ids=positions,
                return_dict=False,
                mutable=["cache"],
            )
        return outputs[0], changed["cache"]


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["program"])
@dataclass(frozen=True)
class HFDecoder:
    """A swapped FlaxLlama, FlaxMistral or FlaxGPT2 with caches of jax_tkg; made by `create`.

    A `DecodeModel` and a `ScoringModel` of `jax_tkg.generation`.

    Attributes:
        params: the client's, as they are.
        program: the rest.
    """

    params: Any
    program: Program

    @classmethod
    def create(
        cls,
        client: Any,
        params: Mapping[str, Any] | None = None,
        *,
        implementation: StaticImplementation = None,
        around: Context = contextlib.nullcontext,
    ) -> Self:
        """Makes one of a client's model.

        Args:
            client: a FlaxLlamaForCausalLM, FlaxMistralForCausalLM or FlaxGPT2LMHeadModel.
            params: its parameters; by default those it has.
            implementation: as for `jax_tkg.attention_tkg`.
            around: makes a context manager that is entered whenever the model is traced, such as
                `rope_of_config`.

        Raises:
            TypeError: if it is none of these.
        """
        if not hasattr(client, "init_cache") or not hasattr(client, "module"):
            raise TypeError(
                "client must be a model of transformers such as FlaxLlamaForCausalLM; got "
                f"{type(client).__name__}."
            )
        params = client.params if params is None else params
        return cls(dict(params), Program(client, implementation, around))

    @property
    def report(self) -> SwapReport:
        """What was swapped: of all calls so far."""
        return self.program.report

    @property
    def vocab_size(self) -> int:
        """Token ids V; `jax_tkg.generate` refuses others."""
        return self.program.vocab_size

    def init_caches(self, batch: int, capacity: int, **options: Any) -> Any:
        """Empty caches, nested as the client's, with a `KVCache` for each layer.

        Args:
            batch: rows.
            capacity: tokens a row can hold.
            **options: of `KVCache.create`, such as `dtype` (by default the client's) and `layout`.

        Raises:
            ValueError: if the model has no positions for so many tokens.
        """
        if capacity > self.program.most_tokens:
            raise ValueError(
                f"a capacity of {capacity} tokens, but the model has positions for "
                f"{self.program.most_tokens} (max_position_embeddings): give a smaller capacity."
            )

        def create(layer: Mapping[str, Any]) -> dict[str, KVCache]:
            key, value = layer["cached_key"], layer["cached_value"]
            _, _, heads, width = key.shape
            sizes = {"value_head_dim": value.shape[3], "dtype": key.dtype}
            return {"kv_cache": KVCache.create(batch, capacity, heads, width, **sizes | options)}

        return jax.tree.map(create, self.program.cache_shapes, is_leaf=_is_attention)

    def __call__(
        self, tokens: Int[Array, "B T"], caches: Any, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Logits after every token; see `ScoringModel.__call__`."""
        first = jax.tree.leaves(caches, is_leaf=lambda x: isinstance(x, KVCache))[0]
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = first.lengths[:, None] + steps
        variables = {"params": self.params, "cache": caches}
        return self.program.apply(variables, tokens, positions, counts)

    def next_token_logits(
        self, tokens: Int[Array, "B T"], caches: Any, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """Logits after the last real token; see `DecodeModel.next_token_logits`."""
        logits, caches = self(tokens, caches, counts)
        return last_real(logits, counts), caches


def _is_attention(layer: Any) -> bool:
    return isinstance(layer, Mapping) and "cached_key" in layer


def _attention_layers(shapes: Any) -> list[Any]:
    leaves: list[Any] = jax.tree.leaves(shapes, is_leaf=_is_attention)
    return leaves
