"""`swap_nnx` for Flax's own `nnx.MultiHeadAttention`: any number of tokens in decode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax import lax

from jax_tkg._typing import Array
from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.drop_in import AttentionFn, refuse
from jax_tkg.flax_layers.swap.adapters.flax_mha import FLAX, ours, why_not_ours
from jax_tkg.flax_layers.swap.linen_cache import write_at
from jax_tkg.flax_layers.swap.nnx import NnxLayer
from jax_tkg.flax_layers.swap.protocol import Client


@dataclass(frozen=True)
class FlaxMultiHeadAttention:
    """`nnx.MultiHeadAttention`, with its own cache, which takes T new tokens at once.

    The module's `attention_fn` is Flax's own or an `AttentionFn`, whose options are kept. Tokens
    that do not fit the cache overwrite its last ones, as in Flax: its capacity is the caller's
    affair, who knows how many tokens there have been.
    """

    name: str = "flax_mha_nnx"
    client: Client = FLAX
    module_name: str = "flax.nnx.nn.attention"
    class_name: str = "MultiHeadAttention"

    def why_not(self, module: Any) -> str | None:
        """Attention of another sort than dot products cannot be kept."""
        return why_not_ours(module.attention_fn, nnx.dot_product_attention)

    def notes(self, module: Any) -> Sequence[str]:
        """None."""
        del module
        return ()

    def layer(self, module: Any) -> NnxLayer:
        """Sizes and options; the dtype is that of the parameters."""
        fn = ours(module.attention_fn, None)
        return NnxLayer(
            num_heads=module.num_heads,
            num_kv_heads=_num_kv_heads(module),
            head_dim=module.head_dim,
            dtype=module.dtype or module.param_dtype,
            cache="its own Cache variables, BSKH, one index",
            options={
                "scale": fn.scale,
                "logits_soft_cap": fn.logits_soft_cap,
                "local_window_size": fn.local_window_size,
            },
        )

    def methods(self, implementation: StaticImplementation) -> Mapping[str, Callable[..., Any]]:
        """`__call__`, with the arguments of the original."""

        def call(
            self: Any,
            inputs_q: Array,
            inputs_k: Array | None = None,
            inputs_v: Array | None = None,
            *,
            mask: Array | None = None,
            deterministic: bool | None = None,
            rngs: Any = None,
            sow_weights: bool = False,
            decode: bool | None = None,
            is_causal: bool = False,
            **others: Any,
        ) -> Array:
            del rngs  # for dropout, which is refused
            shardings = _shardings(others)
            refuse("sowing attention weights", sow_weights, "call without sow_weights")
            steady = self.deterministic if deterministic is None else deterministic
            refuse("dropout", self.dropout_rate > 0 and not steady, "pass deterministic=True")
            decode = self.decode if decode is None else decode
            if decode is None:
                raise ValueError("give decode=True or False, here or to the module.")
            states = _projected(self, inputs_q, inputs_k, inputs_v, shardings["qkv_sharding"])
            fn = ours(self.attention_fn, implementation)
            if decode:
                mixed = _decode(self, fn, *states, mask)
            else:
                mixed = fn(*states, mask=mask, dtype=self.dtype, is_causal=is_causal)
            return _linear(self.out, mixed, shardings["out_sharding"])

        return {"__call__": call}


def _num_kv_heads(module: Any) -> int:
    return int(getattr(module, "num_kv_heads", module.num_heads))  # not in Flax 0.11


def _shardings(others: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {"out_sharding": None, "qkv_sharding": None}
    unknown = [name for name, x in others.items() if name not in known and x is not None]
    if unknown:
        raise NotImplementedError(
            f"the swapped nnx.MultiHeadAttention does not know {', '.join(unknown)}: this Flax is "
            "newer than the one it was written for. Leave it out, or do without the swap."
        )
    return known | others


def _linear(layer: Any, x: Array, sharding: Any) -> Array:
    out: Array = layer(x) if sharding is None else layer(x, out_sharding=sharding)
    return out


def _projected(
    module: Any, inputs_q: Array, inputs_k: Array | None, inputs_v: Array | None, sharding: Any
) -> tuple[Array, Array, Array]:
    """Query, key and value; missing inputs are as in Flax."""
    if inputs_k is None and inputs_v is not None:
        raise ValueError("inputs_v was given without inputs_k: give inputs_k, or both.")
    if inputs_q.shape[-1] != module.in_features:
        raise ValueError(
            f"inputs_q has {inputs_q.shape[-1]} features and the module {module.in_features}."
        )
    inputs_k = inputs_q if inputs_k is None else inputs_k
    inputs_v = inputs_k if inputs_v is None else inputs_v
    query = _linear(module.query, inputs_q, sharding)
    key = _linear(module.key, inputs_k, sharding)
    if module.normalize_qk:
        query, key = module.query_ln(query), module.key_ln(key)
    return query, key, _linear(module.value, inputs_v, sharding)


def _decode(
    module: Any, fn: AttentionFn, query: Array, key: Array, value: Array, mask: Array | None
) -> Array:
    """Puts the new tokens into the module's cache and attends to it."""
    if module.cached_key is None:
        raise ValueError("the module has no cache yet: call init_cache first.")
    old, index = module.cached_key[...], module.cache_index[...]
    slots, tokens = old.shape[-3], key.shape[-3]
    needed = (*old.shape[:-3], tokens, *old.shape[-2:])
    if key.shape != needed or tokens > slots:
        raise ValueError(
            f"the cache {tuple(old.shape)} [..., S, K, H] takes new keys of shape "
            f"{needed}, T at most S; got {tuple(key.shape)}."
        )
    module.cached_key[...] = keys = _appended(old, key, index)
    module.cached_value[...] = values = _appended(module.cached_value[...], value, index)
    module.cache_index[...] = index + tokens
    return fn.decode(query, keys, values, index + tokens, mask=mask, dtype=module.dtype)


def _appended(cache: Array, new: Array, index: Array) -> Array:
    rows = write_at(lax.collapse(cache, 0, -3), lax.collapse(new, 0, -3), index)
    return rows.reshape(cache.shape)
