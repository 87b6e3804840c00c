"""What a model must offer to be generated from, and how its weights get into compiled code."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jax_tkg._typing import Array, Float, Int


@runtime_checkable
class DecodeModel(Protocol):
    """A language model with KV caches: what `generate` and `stream` ask of one.

    The model is an argument of compiled functions, so that its weights are not constants in them:
    either a `flax.nnx.Module`, or a pytree whose leaves are the weights (for example a dataclass
    registered with `jax.tree_util.register_dataclass`).
    """

    def init_caches(self, batch: int, capacity: int, *args: Any, **options: Any) -> Any:
        """Empty caches, any pytree, for `batch` rows of up to `capacity` tokens."""
        ...

    def next_token_logits(
        self, tokens: Int[Array, "B T"], caches: Any, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """Appends tokens to every row.

        Args:
            tokens: int32 `[B, T]`, the next tokens of each row.
            caches: as `init_caches` or the last call returned them.
            counts: int32 `[B]`, how many of the T tokens of each row are real (the first ones); all
                by default. A row of count 0 must come out as it went in.

        Returns:
            Logits `[B, V]` of what follows the last real token of each row (anything for a row of
            count 0), and the new caches, of the same types and shapes as the old.
        """
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["graphdef"])
@dataclass(frozen=True)
class NnxModel:
    """An nnx module as a pytree: its variables are the leaves, its structure is static."""

    state: Any
    graphdef: Any

    def init_caches(self, batch: int, capacity: int, *args: Any, **options: Any) -> Any:
        """See `DecodeModel.init_caches`."""
        return self._module().init_caches(batch, capacity, *args, **options)

    def next_token_logits(
        self, tokens: Int[Array, "B T"], caches: Any, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """See `DecodeModel.next_token_logits`."""
        logits, caches = self._module().next_token_logits(tokens, caches, counts)
        return logits, caches

    def _module(self) -> Any:
        from flax import nnx

        return nnx.merge(self.graphdef, self.state)


def as_pytree(model: DecodeModel) -> DecodeModel:
    """The model in a form that can be an argument of a compiled function.

    Raises:
        TypeError: if the model lacks a method, or is neither an nnx module nor a pytree of arrays.
    """
    missing = [n for n in ("init_caches", "next_token_logits") if not hasattr(model, n)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} has no {' and no '.join(missing)}: to generate, a model needs "
            "the methods of jax_tkg.generation.DecodeModel."
        )
    nnx = sys.modules.get("flax.nnx")  # whoever has an nnx module has imported nnx
    if nnx is not None and isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        return NnxModel(state, graphdef)
    if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(model)):
        raise TypeError(
            f"{type(model).__name__} must be a flax.nnx.Module or a pytree of arrays, so that its "
            "weights can be arguments of the compiled loop: register the class with "
            "jax.tree_util.register_dataclass, its weights as data_fields."
        )
    return model
