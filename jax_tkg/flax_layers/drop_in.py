"""`jax_tkg.attention_tkg` as the `attention_fn` of Flax's own `MultiHeadAttention` modules.

nnx.MultiHeadAttention(..., attention_fn=attention_fn)
nn.MultiHeadDotProductAttention(..., attention_fn=AttentionFn(logits_soft_cap=50.0))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jax_tkg._typing import Array, Bool, Float, Int, Num, Shaped
from jax_tkg.attention import attention_tkg
from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.functional import PROMPT_TOKENS
from jax_tkg.prefill.attention import attention_cte


@dataclass(frozen=True)
class AttentionFn:
    """A drop-in for `dot_product_attention` of Flax nnx and linen, with options fixed beforehand.

    Equal options make equal functions, so that a module that holds one is compiled once.

    In decode mode Flax hands over one query per row, the whole cache, and a mask of the slots
    written so far. Where the query is follows from the mask: at the last key it shows. Several
    tokens at once Flax refuses before it comes here; `swap_nnx` and `swap_linen` (in
    `jax_tkg.flax_layers.swap`) make its modules take them, and call `decode`. Unlike in Flax, a
    query that sees no key gives 0, not the mean of the values.

    Attributes:
        scale: factor of the logits, by default 1 / sqrt(H) as in Flax.
        local_window_size: w for (w, w), or (left, right), both inclusive, in token positions; a
            window of w keys that ends at the query's own is (w - 1, 0).
        logits_soft_cap: c in `c * tanh(logit / c)`.
        implementation: as for `attention_tkg`, a sequence as a tuple.
    """

    scale: float | None = None
    local_window_size: int | tuple[int | None, int | None] | None = None
    logits_soft_cap: float | None = None
    implementation: StaticImplementation = None

    # Flax linen passes only the keywords that it finds by name in this signature.
    def __call__(
        self,
        query: Float[Array, "*batch T N H"],
        key: Num[Array, "*batch S K H"],
        value: Num[Array, "*batch S K Hv"],
        bias: Float[Array, "..."] | None = None,
        mask: Num[Array, "..."] | Bool[Array, "..."] | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "*batch T N Hv"]:
        """Attention as Flax calls it.

        Args:
            query: `[..., T, N, H]`, not scaled.
            key: `[..., S, K, H]`; N is a multiple of K.
            value: `[..., S, K, Hv]`.
            bias: added to the logits, broadcasts to `[..., N, T, S]`.
            mask: bool or number, not zero where a query sees a key; broadcasts to `[..., N, T, S]`.
            broadcast_dropout: of no effect, as there is no dropout.
            dropout_rng: likewise.
            dropout_rate: must be 0 unless `deterministic`.
            deterministic: no dropout.
            dtype: of the computation and the result; by default that of the operands together.
            precision: any `jax.lax.Precision`; each is met, as float32 operands are multiplied at
                the highest and all products are summed in float32.
            module: must be None: attention weights are never all there, so cannot be sown.
            is_causal: a query sees only keys up to its own position. Token t of a whole sequence is
                at position t; a single query at the last key that its mask shows, or at S - 1.
            force_fp32_for_softmax: of no effect: it always is.
            qk_attn_weights_einsum: must be None.
            attn_weights_value_einsum: must be None.

        Returns:
            `[..., T, N, Hv]`.

        Raises:
            NotImplementedError: for dropout, sown weights, another einsum, a precision that is an
                algorithm.
            ValueError: as `attention_tkg`; and with a causal mask or a window for T queries among
                another number of keys, T > 1, whose positions nobody knows.
        """
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        refuse("dropout", dropout_rate > 0 and not deterministic, "pass deterministic=True")
        refuse("sowing attention weights", module is not None, "call without sow_weights")
        einsums = (qk_attn_weights_einsum, attn_weights_value_einsum)
        refuse("a custom einsum", einsums != (None, None), "leave the einsum classes out")
        _check_precision(precision)
        *batch, tokens, _, _ = query.shape
        slots = key.shape[-3]
        seen = None if mask is None else _dense(mask, batch, slots).astype(bool)
        lengths = None
        if tokens == 1 and seen is not None:
            lengths = jnp.broadcast_to(_live_length(seen), math.prod(batch))
        elif tokens not in (1, slots) and (is_causal or self.local_window_size is not None):
            raise ValueError(
                f"{tokens} queries among {slots} keys: their positions, which is_causal and "
                "local_window_size go by, are not known. Give a mask that says what each sees."
            )
        return self._attend(query, key, value, bias, seen, lengths, is_causal, dtype)

    def decode(
        self,
        query: Float[Array, "*batch T N H"],
        key: Num[Array, "*batch S K H"],
        value: Num[Array, "*batch S K Hv"],
        end: Int[Array, ""],
        mask: Num[Array, "..."] | Bool[Array, "..."] | None = None,
        dtype: Dtype | None = None,
    ) -> Float[Array, "*batch T N Hv"]:
        """Attention of T tokens that a cache has just been given, each to those up to itself.

        Args:
            query: `[..., T, N, H]`, not scaled.
            key: `[..., S, K, H]`, the cache, the new tokens in it.
            value: `[..., S, K, Hv]`.
            end: the slot behind the last new token, in all rows.
            mask: narrows what is seen, as in a call.
            dtype: of the computation and the result; by default that of the operands together.

        Returns:
            `[..., T, N, Hv]`.

        Raises:
            ValueError: as `attention_tkg`.
        """
        *batch, _, _, _ = query.shape
        seen = None if mask is None else _dense(mask, batch, key.shape[-3]).astype(bool)
        lengths = jnp.full(math.prod(batch), end, jnp.int32)
        return self._attend(query, key, value, None, seen, lengths, True, dtype)

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        seen: Array | None,
        lengths: Array | None,
        is_causal: bool,
        dtype: Dtype | None,
    ) -> Array:
        *batch, tokens, heads, width = query.shape
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        attend = attention_cte if tokens >= PROMPT_TOKENS else attention_tkg
        out: Array = attend(
            query.reshape(-1, tokens, heads, width).astype(dtype),
            key.reshape(-1, *key.shape[-3:]),
            value.reshape(-1, *value.shape[-3:]),
            bias=None if bias is None else _dense(bias, batch, key.shape[-3]),
            mask=seen,
            key_value_seq_lengths=lengths,
            scale=self.scale,
            is_causal=is_causal,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            implementation=self.implementation,
        )
        return out.reshape(*batch, tokens, heads, value.shape[-1])


attention_fn = AttentionFn()
"""`AttentionFn` with Flax's defaults."""


def refuse(what: str, asked: bool, remedy: str) -> None:
    """Raises NotImplementedError if something was asked for that needs all the weights at once."""
    if asked:
        raise NotImplementedError(
            f"{what} needs the attention weights, which this attention_fn never has all at once; "
            f"{remedy}, or keep Flax's own dot_product_attention."
        )


def _check_precision(precision: Any) -> None:
    for one in precision if isinstance(precision, tuple | list) else (precision,):
        try:
            jax.lax.Precision(one)
        except ValueError as error:
            raise NotImplementedError(
                f"precision={precision!r}: only a jax.lax.Precision is understood, and any is met "
                "by float32 accumulation. Leave it out."
            ) from error


def _dense(array: Array, batch: Sequence[int], slots: int) -> Shaped[Array, "B1 N1 T1 S"]:
    """A mask or bias that broadcasts to `[..., N, T, S]`, with one batch axis and S in full."""
    array = array.reshape((1,) * (len(batch) + 3 - array.ndim) + array.shape)
    lead = array.shape[:-3] if math.prod(array.shape[:-3]) == 1 else tuple(batch)
    full = jnp.broadcast_to(array, (*lead, *array.shape[-3:-1], slots))
    return full.reshape(-1, *full.shape[-3:])


def _live_length(seen: Bool[Array, "B1 N1 1 S"]) -> Int[Array, " B1"]:
    """Keys up to the last that any head of the one query sees: there the query is."""
    ends = jnp.arange(1, seen.shape[-1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(seen, ends, 0), axis=(1, 2, 3))
