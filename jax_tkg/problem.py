"""The validated description of one attention call: shapes, dtypes, mask rules. No arrays.

Every error a user can cause is raised here, before anything is traced or compiled. A problem is
frozen and hashable: it is the static part of a call, and all that a plan may depend on.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg.cache.layouts import LayoutTraits
from jax_tkg.cache.storage import CACHE_DTYPES, is_quantised, stored_dtype
from jax_tkg.masks import PositionRule, Window
from jax_tkg.operands import Operands
from jax_tkg.rope import RotaryEmbedding

QUERY_DTYPES: tuple[np.dtype, ...] = tuple(
    np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)
)

Shape = tuple[int, ...]


class Op(enum.StrEnum):
    """The public op that asks: each has its own implementations."""

    TKG = "attention_tkg"
    CTE = "attention_cte"


@dataclass(frozen=True)
class AttentionProblem:
    """What is to be computed.

    Letters: B batch, T new tokens, S cache slots, N query heads, K KV heads, G = N / K, H head_dim,
    Hv value head_dim.

    Attributes:
        op: the public op.
        batch, num_tokens, kv_len, num_heads, num_kv_heads, head_dim, value_head_dim: B T S N K H
            Hv.
        query_dtype: dtype of the query and of the output.
        kv: the cache's layout and dtypes.
        scale: factor of the logits, applied first.
        logits_soft_cap: c in c * tanh(logit / c), applied after the scale; None for none.
        rule: causal and window.
        has_new_kv: the new keys and values come beside the cache.
        rope: queries and new keys are still to be rotated, and rotated new keys are a last result.
        new_key_dtype: of those keys; None where there are none.
        has_lengths, has_starts: rows have their own valid range.
        has_positions: slots of the cache hold tokens at given positions.
        has_query_positions: the new tokens sit at given positions.
        mask, bias: shapes of a dense mask and bias, or None.
        has_sinks: each head has a sink logit.
        has_key_bounds: each query sees only a given range of positions.
        has_alibi: each head has a slope of a bias linear in the distance.
        normalize: the results are output and log-sum-exp; otherwise the output before the division,
            the reference of the exponentials and their sum (see `SoftmaxState`).
        is_part: the keys are some of those of the row: the output stays float32, to be merged.
        exchange: mapped axes whose devices have the row's other keys, and with which the running
            maximum is exchanged on every tile.
    """

    op: Op
    batch: int
    num_tokens: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    query_dtype: np.dtype
    kv: LayoutTraits
    scale: float
    logits_soft_cap: float | None
    rule: PositionRule
    has_new_kv: bool
    has_lengths: bool
    has_starts: bool
    has_positions: bool
    has_query_positions: bool
    mask: Shape | None
    bias: Shape | None
    has_sinks: bool
    has_key_bounds: bool
    has_alibi: bool
    normalize: bool
    rope: RotaryEmbedding | None = None
    new_key_dtype: np.dtype | None = None
    is_part: bool = False
    exchange: tuple[str, ...] = ()

    @property
    def out_dtype(self) -> np.dtype:
        """Dtype of the output: the query's, or float32 where it is divided or merged later."""
        is_final = self.normalize and not self.is_part
        return self.query_dtype if is_final else np.dtype(np.float32)

    @property
    def group(self) -> int:
        """G: query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rows_per_head(self) -> int:
        """G * T: logit rows of one KV head."""
        return self.group * self.num_tokens

    @property
    def compute_dtype(self) -> np.dtype:
        """The narrowest float type that holds queries and stored keys exactly."""
        holds_kv = self.kv.dtype == self.query_dtype or self.kv.dtype.itemsize == 1
        return self.query_dtype if holds_kv else np.dtype(np.float32)

    @property
    def is_padded(self) -> bool:
        """Whether some slots of the cache may be seen by no query at all."""
        return (
            self.has_lengths
            or self.has_starts
            or self.has_positions
            or (self.has_query_positions and self.rule.causal)
            or self.has_key_bounds
            or self.mask is not None
            or self.kv.has_holes
            or self.rule.window is not None
        )

    def __str__(self) -> str:
        """One line: sizes, dtypes and the features in use."""
        sizes = (
            f"B={self.batch} T={self.num_tokens} S={self.kv_len} N={self.num_heads} "
            f"K={self.num_kv_heads} H={self.head_dim}"
        )
        if self.value_head_dim != self.head_dim:
            sizes += f" Hv={self.value_head_dim}"
        features = {
            "causal": self.rule.causal,
            f"window {self.rule.window}": self.rule.window is not None,
            "lengths": self.has_lengths,
            "starts": self.has_starts,
            "positions": self.has_positions,
            "query positions": self.has_query_positions,
            "new keys beside": self.has_new_kv,
            "rope": self.rope is not None,
            "mask": self.mask is not None,
            "bias": self.bias is not None,
            "sinks": self.has_sinks,
            "key bounds": self.has_key_bounds,
            "ALiBi": self.has_alibi,
            f"soft cap {self.logits_soft_cap}": self.logits_soft_cap is not None,
            "unnormalised": not self.normalize,
            "part of a row": self.is_part,
        }
        used = ", ".join(name for name, on in features.items() if on)
        return f"{sizes} {self.query_dtype.name} on {self.kv.dtype.name} {self.kv.name}: {used}"


def make_problem(
    ops: Operands,
    *,
    op: Op,
    normalize: bool,
    scale: float | None,
    logits_soft_cap: float | None,
    local_window_size: int | Sequence[int | None] | None,
    is_causal: bool,
    rope: RotaryEmbedding | None = None,
) -> AttentionProblem:
    """Checks everything about a call that can be wrong and describes it.

    Raises:
        TypeError: for a dtype that cannot be used.
        ValueError: for shapes or options that do not fit together; the message has what was given,
            what is needed and what to do.
    """
    ops.kv.check()
    _check_dtypes(ops)
    _check_query(ops)
    _check_new_kv(ops)
    _check_rope(ops, rope)
    _check_scales(ops)
    _check_rows(ops)
    kv, query = ops.kv.shape, ops.query.shape
    keys = kv.kv_len + (query[1] if ops.new_key is not None else 0)
    for name in ("mask", "bias"):
        _check_dense(name, getattr(ops, name), (query[0], query[2], query[1], keys))
    return AttentionProblem(
        op=op,
        batch=query[0],
        num_tokens=query[1],
        kv_len=kv.kv_len,
        num_heads=query[2],
        num_kv_heads=kv.num_kv_heads,
        head_dim=query[3],
        value_head_dim=kv.value_head_dim,
        query_dtype=np.dtype(ops.query.dtype),
        kv=ops.kv.traits,
        scale=_scale(query[3] ** -0.5 if scale is None else scale),
        logits_soft_cap=_soft_cap(logits_soft_cap),
        rule=PositionRule(
            causal=_python_bool("is_causal", is_causal, "Give a traced choice as mask=."),
            window=make_window(local_window_size),
        ),
        has_new_kv=ops.new_key is not None,
        has_lengths=ops.lengths is not None,
        has_starts=ops.starts is not None,
        has_positions=ops.key_positions is not None,
        has_query_positions=ops.query_positions is not None,
        mask=None if ops.mask is None else tuple(ops.mask.shape),
        bias=None if ops.bias is None else tuple(ops.bias.shape),
        has_sinks=ops.sinks is not None,
        has_key_bounds=ops.key_bounds is not None,
        has_alibi=ops.alibi_slopes is not None,
        normalize=_python_bool("normalize", normalize, "Divide the state yourself where traced."),
        rope=rope,
        new_key_dtype=None if ops.new_key is None else np.dtype(ops.new_key.dtype),
    )


def make_window(size: int | Sequence[int | None] | None) -> Window | None:
    """Reads `local_window_size`: w means (w, w), or a pair (left, right); None is unbounded."""
    if size is None:
        return None
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        return Window(int(size), int(size))
    if isinstance(size, Sequence) and len(size) == 2:
        left, right = size
        if all(s is None or isinstance(s, (int, np.integer)) for s in (left, right)):
            return Window(*(None if s is None else int(s) for s in (left, right)))
    raise ValueError(
        f"local_window_size must be an int or a pair (left, right) of ints or None, got {size!r}. "
        "A window of w keys that ends at the query's own is (w - 1, 0)."
    )


def _check_dtypes(ops: Operands) -> None:
    if np.dtype(ops.query.dtype) not in QUERY_DTYPES:
        names = ", ".join(d.name for d in QUERY_DTYPES)
        raise TypeError(f"query must be {names}; got {ops.query.dtype}. Cast it first.")
    if ops.kv.dtype not in CACHE_DTYPES:
        names = ", ".join(d.name for d in CACHE_DTYPES)
        raise TypeError(f"key and value must be {names}; got {ops.kv.dtype}. Cast them first.")
    stored = stored_dtype(ops.kv.dtype, as_bits=True)
    if ops.kv.key.dtype not in (ops.kv.dtype, stored):
        raise TypeError(
            f"a layout of dtype {ops.kv.dtype.name} must hold arrays of {ops.kv.dtype.name}, or "
            f"its bits as {stored.name}; got {ops.kv.key.dtype}. Cast them, or correct the dtype."
        )
    for name in ("new_key", "new_value", "bias", "sinks", "alibi_slopes"):
        array = getattr(ops, name)
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be a float array, got {array.dtype}.")
    if ops.mask is not None and ops.mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be bool (True where a query sees a key), got {ops.mask.dtype}. "
            "Give numbers to add to the logits as bias=."
        )
    for name in ("lengths", "starts", "query_positions", "key_positions", "key_bounds"):
        array = getattr(ops, name)
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{_PUBLIC.get(name, name)} must be integers, got {array.dtype}.")


_PUBLIC = {"lengths": "key_value_seq_lengths", "starts": "key_value_seq_starts"}
_AXES = {
    "lengths": "[B]",
    "starts": "[B]",
    "query_positions": "[B, T]",
    "key_positions": "[B, S]",
    "key_bounds": "[B, T, 2]",
}


def _check_query(ops: Operands) -> None:
    query = ops.query.shape
    if len(query) != 4:
        raise ValueError(
            f"query must have four dimensions [B, T, N, H], T = 1 for one new token; "
            f"got {_describe(ops)}."
        )
    kv, described = ops.kv.shape, _describe(ops)
    if 0 in (*query, kv.kv_len, kv.num_kv_heads, kv.value_head_dim):
        raise ValueError(f"every dimension must be at least 1; got {described}.")
    if query[0] != kv.batch:
        raise ValueError(
            f"query has batch {query[0]} and the cache {kv.batch} ({described}). "
            "Repeat neither: use jax.vmap to share a cache between queries."
        )
    if query[3] != kv.head_dim:
        raise ValueError(f"query and key must have the same head_dim; got {described}.")
    if query[2] % kv.num_kv_heads:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of KV heads; got "
            f"N={query[2]} and K={kv.num_kv_heads} ({described})."
        )


def _check_new_kv(ops: Operands) -> None:
    if (ops.new_key is None) != (ops.new_value is None):
        missing = "new_key" if ops.new_key is None else "new_value"
        raise ValueError(
            f"new_key and new_value must be given together; {missing} is missing. "
            "Leave both out when the new tokens are already in the cache."
        )
    if ops.new_key is None or ops.new_value is None:
        return
    kv, query = ops.kv.shape, ops.query.shape
    wanted = (
        ("new_key", ops.new_key.shape, (query[0], query[1], kv.num_kv_heads, kv.head_dim)),
        (
            "new_value",
            ops.new_value.shape,
            (query[0], query[1], kv.num_kv_heads, kv.value_head_dim),
        ),
    )
    for name, given, needed in wanted:
        if given != needed:
            raise ValueError(
                f"{name} must be [B, T, K, H] = {needed}, one per query token and KV head; "
                f"got {tuple(given)} ({_describe(ops)})."
            )


def _check_rope(ops: Operands, rope: Any) -> None:
    if rope is None:
        return
    if not isinstance(rope, RotaryEmbedding):
        raise TypeError(
            f"rope must be a jax_tkg.RotaryEmbedding, got {rope!r}. Rotate queries and keys "
            "yourself if they turn in another way."
        )
    if ops.new_key is None:
        raise ValueError(
            "rope= rotates the new queries and keys, so the new keys must be beside the cache: "
            "give new_key= and new_value=, or rotate both yourself with the RotaryEmbedding."
        )
    rope.frequencies(ops.query.shape[3])  # raises if they do not fit


def _check_scales(ops: Operands) -> None:
    kv = ops.kv.shape
    for name in ("k_scale", "v_scale"):
        scale = getattr(ops.kv, name)
        if scale is None:
            continue
        if not is_quantised(ops.kv.dtype):
            raise ValueError(
                f"{name} is for int8 and 8-bit float caches; this one is {ops.kv.dtype.name}. "
                "Drop it, or multiply it into the keys."
            )
        if (
            scale.ndim != 2
            or scale.shape[0] not in (1, kv.batch)
            or scale.shape[1] != kv.num_kv_heads
        ):
            raise ValueError(
                f"{name} of a layout must be [1, K] = (1, {kv.num_kv_heads}), or [B, K] = "
                f"({kv.batch}, {kv.num_kv_heads}); got {tuple(scale.shape)} ({_describe(ops)})."
            )


def _check_rows(ops: Operands) -> None:
    batch, tokens = ops.query.shape[:2]
    slots = ops.kv.shape.kv_len
    needed = {
        "lengths": (batch,),
        "starts": (batch,),
        "query_positions": (batch, tokens),
        "key_positions": (batch, slots),
        "key_bounds": (batch, tokens, 2),
    }
    for name, shape in needed.items():
        array = getattr(ops, name)
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{_PUBLIC.get(name, name)} must be {_AXES[name]} = {shape}; "
                f"got {tuple(array.shape)} ({_describe(ops)})."
            )
    heads = ops.query.shape[2]
    for name, what in (("sinks", "logit"), ("alibi_slopes", "slope")):
        array = getattr(ops, name)
        if array is not None and (
            array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] != heads
        ):
            raise ValueError(
                f"{name} must be [N] = ({heads},), one {what} per query head; "
                f"got {tuple(array.shape[1:])} ({_describe(ops)})."
            )
    if ops.key_positions is not None and ops.lengths is None:
        raise ValueError(
            "key_positions needs key_value_seq_lengths: the number of tokens of each row says at "
            "which positions its new queries are."
        )


def _check_dense(name: str, array: jax.Array | None, full: Shape) -> None:
    if array is None:
        return
    fits = array.ndim == 4 and all(
        n in (1, m) for n, m in zip(array.shape[:3], full[:3], strict=True)
    )
    if not fits or array.shape[3] != full[3]:
        raise ValueError(
            f"{name} must be [B or 1, N or 1, T or 1, keys], in full {full}; "
            f"got {tuple(array.shape)}. New keys beside the cache count, after those in it."
        )


def check_host_integers(name: str, values: Any, most: int | None) -> None:
    """Checks integers whose values are known before tracing (Python numbers, NumPy arrays).

    Raises:
        TypeError: if they are not integers.
        ValueError: if one is negative or above `most`.
    """
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}.")
    if array.size and (array.min() < 0 or (most is not None and array.max() > most)):
        top = "" if most is None else f" and at most {most}, the number of keys"
        raise ValueError(f"{name} must be at least 0{top}; got {array.tolist()}.")


def _scale(value: Any) -> float:
    if not _is_finite(value):
        raise ValueError(
            f"scale must be a finite Python number, got {value!r}. "
            "Multiply a traced scale into the query instead, with scale=1.0."
        )
    return float(value)


def _soft_cap(value: Any) -> float | None:
    if value is not None and not (_is_finite(value) and value > 0):
        raise ValueError(
            f"logits_soft_cap must be a finite positive Python number, got {value!r}. "
            "Leave it out for no cap."
        )
    return None if value is None else float(value)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer) and math.isfinite(value)


def _python_bool(name: str, value: Any, instead: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a Python bool, got {value!r}. {instead}")
    return bool(value)


def _describe(ops: Operands) -> str:
    kv = ops.kv
    return (
        f"query {tuple(ops.query.shape)}, key {tuple(kv.key.shape)}, "
        f"value {tuple(kv.value.shape)} in layout {kv.name}"
    )
