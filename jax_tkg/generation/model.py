"""What a model must offer to be generated from, and how its weights get into compiled code.

`DecodeModel` is all that `generate` and `stream` need: empty caches, and the logits after the last
new token of each row. Speculative decoding needs `ScoringModel`: the logits after every new token,
and caches from which the last tokens can be taken back. A model of one's own:

    from dataclasses import dataclass

    import jax
    import jax.numpy as jnp
    from jax_tkg import KVCache, attention_tkg, generate
    from jax_tkg.generation import PromptLookup, last_real

    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class OneLayer:
        embed: jax.Array  # [V, D]
        qkv: jax.Array  # [D, 3 * D]

        def init_caches(self, batch, capacity, **options):
            return KVCache.create(batch, capacity, 1, self.embed.shape[1], **options)

        def next_token_logits(self, tokens, cache, counts=None):  # DecodeModel
            logits, cache = self(tokens, cache, counts)
            return last_real(logits, counts), cache

        def __call__(self, tokens, cache, counts=None):  # ScoringModel
            x = jnp.take(self.embed, tokens, axis=0, mode="clip")  # [B, T, D]
            query, key, value = jnp.split((x @ self.qkv)[:, :, None], 3, axis=-1)
            # Where the new tokens are, also in rows of which only the first `counts` are real.
            positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
            cache = cache.append(key, value, counts)
            mixed = attention_tkg(query, cache, query_positions=positions)[:, :, 0]
            return (x + mixed) @ self.embed.T, cache

    model = OneLayer(jnp.eye(8), jnp.tile(jnp.eye(8), (1, 3)))
    result = generate(model, [[1, 2, 3]], max_new_tokens=4, speculate=PromptLookup())

Caches that are no pytree of `KVCache`, `RingKVCache` or `PagedKVCache` are rolled back by a method
`truncate_caches(caches, lengths)` of the model; see `truncate_caches` below.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg._checks import described, whole_number
from jax_tkg._typing import Array, Float, Int, Num
from jax_tkg.cache.kv_cache import KVCache


@runtime_checkable
class DecodeModel(Protocol):
    """A language model with KV caches: what `generate` and `stream` ask of one.

    The model is an argument of compiled functions, so that its weights are not constants in them:
    either a `flax.nnx.Module`, or a pytree whose leaves are the weights (for example a dataclass
    registered with `jax.tree_util.register_dataclass`).

    One that has an attribute `vocab_size`, its number of token ids V, is never given another id:
    `generate` and engines then refuse prompts and `eos_ids` of another tokenizer.
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


def vocabulary_of(model: Any) -> int | None:
    """How many token ids a model says that it knows: its `vocab_size`, None if it has none."""
    size = getattr(model, "vocab_size", None)
    return None if size is None else whole_number("vocab_size of the model", size, least=1)


@runtime_checkable
class ScoringModel(DecodeModel, Protocol):
    """A `DecodeModel` that gives the logits after each of several new tokens.

    This is what speculation verifies drafts with. The tokens that are not accepted are then taken
    back by `truncate_caches`.
    """

    def __call__(
        self, tokens: Int[Array, "B T"], caches: Any, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Appends tokens to every row, as `next_token_logits` does.

        Args:
            tokens: int32 `[B, T]`, the next tokens of each row.
            caches: as `init_caches` or the last call returned them.
            counts: int32 `[B]`, how many of the T tokens of each row are real (the first ones); all
                by default. A row of count 0 must come out as it went in.

        Returns:
            Logits `[B, T, V]` of what follows each token (anything after one that is not real), and
            the new caches, of the same types and shapes as the old.
        """
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state"],
    meta_fields=["graphdef", "vocab_size"],
)
@dataclass(frozen=True)
class NnxModel:
    """An nnx module as a pytree: its variables are the leaves, its structure is static.

    Attributes:
        state: the variables.
        graphdef: the structure.
        vocab_size: the module's own; see `vocabulary_of`.
    """

    state: Any
    graphdef: Any
    vocab_size: int | None

    def init_caches(self, batch: int, capacity: int, *args: Any, **options: Any) -> Any:
        """See `DecodeModel.init_caches`."""
        return self._module().init_caches(batch, capacity, *args, **options)

    def next_token_logits(
        self, tokens: Int[Array, "B T"], caches: Any, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """See `DecodeModel.next_token_logits`."""
        logits, caches = self._module().next_token_logits(tokens, caches, counts)
        return logits, caches

    def __call__(
        self, tokens: Int[Array, "B T"], caches: Any, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T V"], Any]:
        """See `ScoringModel.__call__`."""
        logits, caches = self._module()(tokens, caches, counts)
        return logits, caches

    def truncate_caches(self, caches: Any, lengths: Int[Array, " B"]) -> Any:
        """The module's own, or that of its caches; see `truncate_caches`."""
        return truncate_caches(self._module(), caches, lengths)

    def _module(self) -> Any:
        from flax import nnx

        return nnx.merge(self.graphdef, self.state)


def is_nnx_module(model: Any) -> bool:
    """Whether it is a `flax.nnx.Module`; imports nothing."""
    nnx = sys.modules.get("flax.nnx")  # whoever has an nnx module has imported nnx
    return nnx is not None and isinstance(model, nnx.Module)


def check_methods(model: Any, *, scores: bool = False) -> None:
    """Whether a model can be generated from.

    Args:
        model: what was given.
        scores: whether several tokens at once will be asked of it, as of a `ScoringModel`.

    Raises:
        TypeError: if it lacks a method.
    """
    missing = [n for n in ("init_caches", "next_token_logits") if not hasattr(model, n)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} has no {' and no '.join(missing)}: to generate, a model needs "
            "the methods of jax_tkg.generation.DecodeModel."
        )
    if scores and not callable(model):
        raise TypeError(
            f"{type(model).__name__} cannot be called: to speculate, a model needs "
            "__call__(tokens, caches, counts) -> (logits [B, T, V], caches) of "
            "jax_tkg.generation.ScoringModel."
        )


def check_cache_options(options: Any) -> None:
    """Raises a TypeError unless they are keywords, or None."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            "cache_options must be keywords of the model's init_caches, such as {'dtype': "
            f"jnp.bfloat16}}; got {described(options)}."
        )


def as_pytree(model: DecodeModel) -> DecodeModel:
    """The model in a form that can be an argument of a compiled function.

    Raises:
        TypeError: if the model lacks a method, or is neither an nnx module nor a pytree of arrays.
    """
    check_methods(model)
    if is_nnx_module(model):
        from flax import nnx

        graphdef, state = nnx.split(model)
        return NnxModel(state, graphdef, vocabulary_of(model))
    if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(model)):
        raise TypeError(
            f"{type(model).__name__} must be a flax.nnx.Module or a pytree of arrays, so that its "
            "weights can be arguments of the compiled loop: register the class with "
            "jax.tree_util.register_dataclass, its weights as data_fields."
        )
    return model


def scoring_pytree(model: DecodeModel) -> ScoringModel:
    """As `as_pytree`, for a model that several tokens at once are asked of.

    Raises:
        TypeError: as `as_pytree`, and if the model cannot be called.
    """
    check_methods(model, scores=True)
    scoring: Any = as_pytree(model)
    return scoring


def truncate_caches(model: Any, caches: Any, lengths: Int[Array, " B"]) -> Any:
    """Takes back the last tokens of each row: those that were drafted and not accepted.

    By the model's method `truncate_caches(caches, lengths)` if it has one; else by the `truncate`
    of every jax_tkg cache in the pytree.

    Args:
        model: whose caches they are.
        caches: as the model returned them.
        lengths: int32 `[B]`, how many tokens of each row to keep, of all it was given. Never more
            than it holds; fewer by at most the tokens of the last call.

    Returns:
        The shorter caches, of the same types and shapes.

    Raises:
        TypeError: if the model has no such method and the caches have something else in them.
    """
    own = getattr(model, "truncate_caches", None)
    if own is not None:
        return own(caches, lengths)

    def shorten(cache: Any) -> Any:
        if isinstance(cache, KVCache):
            return cache.truncate(lengths)
        raise TypeError(
            f"tokens cannot be taken back from caches with a {type(cache).__name__} that is in no "
            f"jax_tkg cache: to speculate, give {type(model).__name__} a method "
            "truncate_caches(caches, lengths) that returns the caches with that many tokens a row."
        )

    return jax.tree.map(shorten, caches, is_leaf=lambda x: isinstance(x, KVCache))


def check_truncation(
    model: DecodeModel, batch: int, capacity: int, cache_options: Mapping[str, Any]
) -> None:
    """Whether tokens can be taken back from the caches of a model; makes none.

    Raises:
        TypeError: as `truncate_caches`.
    """

    def shorten() -> Any:
        caches = model.init_caches(batch, capacity, **cache_options)
        return truncate_caches(model, caches, jnp.zeros(batch, jnp.int32))

    jax.eval_shape(shorten)


def last_real(
    values: Num[Array, "B T *rest"], counts: Int[Array, " B"] | None
) -> Num[Array, "B *rest"]:
    """What belongs to each row's last real token.

    For a `next_token_logits` made from `__call__`. Where the logits cost much, take the hidden
    states of the last tokens and multiply only these by the output matrix.

    Args:
        values: `[B, T, ...]`, such as logits.
        counts: int `[B]`, real tokens of each row; by default T. For 0, the first is taken.
    """
    if counts is None:
        return values[:, -1]
    index = jnp.maximum(counts.astype(jnp.int32) - 1, 0)
    index = index.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1, mode="clip")[:, 0]
