"""`swap_linen` for Flax's own `nn.MultiHeadDotProductAttention`: any number of tokens in decode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jax_tkg._typing import Array, Float
from jax_tkg.flax_layers.drop_in import AttentionFn
from jax_tkg.flax_layers.swap.adapters.flax_mha import FLAX, ours, why_not_ours
from jax_tkg.flax_layers.swap.protocol import CacheVariables, Client, LinenCall


@dataclass(frozen=True)
class FlaxLinenMultiHeadAttention:
    """`nn.MultiHeadDotProductAttention` and `nn.MultiHeadAttention`, with their own caches.

    The module's `attention_fn` is Flax's own or an `AttentionFn`, whose options are kept.
    """

    name: str = "flax_mha_linen"
    client: Client = FLAX
    module_name: str = "flax.linen.attention"
    class_name: str = "MultiHeadDotProductAttention"

    def is_for(self, module: Any) -> str | None:
        """Other attention than dot products is left alone."""
        return why_not_ours(module.attention_fn, nn.dot_product_attention)

    def why_not(self, module: Any, arguments: Mapping[str, Any]) -> str | None:
        """What needs the weights, or other shapes than `[B, T, D]`, is refused."""
        steady = arguments["deterministic"]
        steady = module.deterministic if steady is None else steady
        fn = ours(module.attention_fn, None)
        reasons = {
            "dropout needs the attention weights: pass deterministic=True": module.dropout_rate > 0
            and not steady,
            "sow_weights needs the attention weights: call without": arguments["sow_weights"],
            "its einsum classes would be of no effect: leave them out": (
                module.qk_attn_weights_einsum_cls or module.attn_weights_value_einsum_cls
            )
            is not None,
            "its inputs must be [B, T, D], with one batch axis": arguments["inputs_q"].ndim != 3,
            "give the implementation to swap_linen, not to the AttentionFn": fn.implementation
            is not None,
            "without decode its window may have no right end: give (left, None)": _looks_right(fn)
            and not module.decode,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def notes(self, module: Any) -> Sequence[str]:
        """None."""
        del module
        return ()

    def read(self, module: Any, arguments: Mapping[str, Any]) -> LinenCall:
        """The projections, under Flax's names."""
        x, fn = arguments["inputs_q"], ours(module.attention_fn, None)
        width = (module.qkv_features or x.shape[-1]) // module.num_heads
        project = partial(
            nn.DenseGeneral,
            features=(module.num_heads, width),
            dot_general=module.qkv_dot_general,
            dot_general_cls=module.qkv_dot_general_cls,
            kernel_init=module.kernel_init,
            bias_init=module.bias_init,
            **_dense_options(module),
        )
        inputs_k, inputs_v = _other_inputs(arguments)
        query, key = project(name="query")(x), project(name="key")(inputs_k)
        value = project(name="value")(inputs_v)
        if module.normalize_qk:
            norm = partial(
                nn.LayerNorm, use_bias=False, dtype=module.dtype, param_dtype=module.param_dtype
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        cache = CacheVariables() if module.decode else None
        is_cached = cache is not None and module.has_variable(cache.collection, cache.key)
        return LinenCall(
            query,
            key,
            value,
            cache=cache,
            create_cache=not is_cached,
            bias=_bias(arguments["mask"]),
            scale=fn.scale,
            is_causal=is_cached,
            left_window=_left(fn),
            logits_soft_cap=fn.logits_soft_cap,
        )

    def finish(
        self, module: Any, arguments: Mapping[str, Any], out: Float[Array, "B T N Hv"]
    ) -> Any:
        """The output projection."""
        return nn.DenseGeneral(
            features=module.out_features or arguments["inputs_q"].shape[-1],
            axis=(-2, -1),
            dot_general=module.out_dot_general,
            dot_general_cls=module.out_dot_general_cls,
            kernel_init=module.out_kernel_init or module.kernel_init,
            bias_init=module.out_bias_init or module.bias_init,
            name="out",
            **_dense_options(module),
        )(out)


def _dense_options(module: Any) -> dict[str, Any]:
    names = ("dtype", "param_dtype", "use_bias", "precision")
    return {name: getattr(module, name) for name in names}


def _other_inputs(arguments: Mapping[str, Any]) -> tuple[Array, Array]:
    """What keys and values are made of, as Flax reads its three arguments."""
    inputs_k, inputs_v = arguments.get("inputs_k"), arguments.get("inputs_v")
    if arguments.get("inputs_kv") is not None:
        inputs_k = inputs_v = arguments["inputs_kv"]
    if inputs_k is None and inputs_v is not None:
        raise ValueError("inputs_v was given without inputs_k: give inputs_k, or both.")
    inputs_k = arguments["inputs_q"] if inputs_k is None else inputs_k
    return inputs_k, inputs_k if inputs_v is None else inputs_v


def _bias(mask: Array | None) -> Array | None:
    return None if mask is None else jnp.where(mask.astype(bool), 0.0, -jnp.inf)


def _left(fn: AttentionFn) -> int | None:
    window = fn.local_window_size
    return window[0] if isinstance(window, tuple) else window


def _looks_right(fn: AttentionFn) -> bool:
    window = fn.local_window_size
    return window is not None and (isinstance(window, int) or window[1] is not None)
