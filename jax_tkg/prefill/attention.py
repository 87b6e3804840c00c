"""The public op for prompts: many queries at once, the same problem and operands as decode."""

from typing import Any

from jax_tkg._typing import Array, Bool, Float, Int, Num
from jax_tkg.attention import ImplementationLike, Rows, prepare, run, sharding_of
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.cache.storage import Scale
from jax_tkg.implementations import candidates
from jax_tkg.problem import Op
from jax_tkg.rope import RotaryEmbedding
from jax_tkg.sharding.spec import AttentionSharding
from jax_tkg.softmax import SoftmaxState


def attention_cte(
    query: Float[Array, "B T N H"],
    key: Num[Array, "B S K H"] | KVLayout | KVCache,
    value: Num[Array, "B S K Hv"] | None = None,
    bias: Float[Array, "#B #N #T S2"] | None = None,
    mask: Bool[Array, "#B #N #T S2"] | None = None,
    *,
    new_key: Float[Array, "B T K H"] | None = None,
    new_value: Float[Array, "B T K Hv"] | None = None,
    key_value_seq_lengths: Rows = None,
    key_value_seq_starts: Rows = None,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    key_bounds: Int[Array, "B T 2"] | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    rope: RotaryEmbedding | None = None,
    return_residual: bool = False,
    normalize: bool = True,
    sharding: AttentionSharding | None = None,
    implementation: ImplementationLike = None,
) -> Any:
    """Attention of a prompt, or of a chunk of one, to itself and to the cache before it.

    Means the same as `attention_tkg` (positions, masks, logits, edges: docs/semantics.md) and is
    made for many queries: it walks tiles of queries by tiles of keys, leaves out the pairs that
    nothing in them is visible, and holds nothing of size T x S. What it takes beyond that op:

    - `key_bounds`, for sequences packed one after another into a row,
    - `alibi_slopes`, a bias that is generated tile by tile,
    - `normalize=False`, for merging partial results across devices.

    A whole prompt is `attention_cte(query, key, value)` with T = S. A chunk after cached tokens is
    either `attention_cte(query, cache, new_key=key, new_value=value)`, the chunk beside the cache
    (flat, ring or paged; pages may be shared with other rows), or, when it has been appended
    already, `attention_cte(query, cache)`. Prompts padded on the right need `query_positions`:
    without them the last query of a row is its last token.

    Args:
        query: `[B, T, N, H]`, float32, bfloat16 or float16. The output has its dtype.
        key: the keys `[B, S, K, H]`; or a layout (`jax_tkg.BKSH(...)`, `jax_tkg.Paged(...)`); or a
            `KVCache`, which also knows its lengths, starts and positions.
        value: the values `[B, S, K, Hv]`; None with a layout or a cache.
        bias: as in `attention_tkg`.
        mask: as in `attention_tkg`.
        new_key: `[B, T, K, H]`, the keys of the T tokens when they are not among `key`.
        new_value: `[B, T, K, Hv]`.
        key_value_seq_lengths: as in `attention_tkg`; more than there are keys counts as that many.
        key_value_seq_starts: as in `attention_tkg`.
        query_positions: as in `attention_tkg`.
        key_positions: as in `attention_tkg`.
        key_bounds: int `[B, T, 2]`, the first position that each query may see and the one behind
            the last; combines with the rest. See `segment_key_bounds` for packed sequences.
        scale: as in `attention_tkg`.
        is_causal: as in `attention_tkg`.
        local_window_size: as in `attention_tkg`.
        logits_soft_cap: as in `attention_tkg`.
        sinks: as in `attention_tkg`.
        alibi_slopes: float `[N]`; `-slope * |query position - key position|` is added to the logits
            after the soft cap (Press et al., "Train Short, Test Long", 2022; there the slopes are
            `2 ** (-8 * (n + 1) / N)` for a power of two N).
        k_scale: as in `attention_tkg`.
        v_scale: as in `attention_tkg`.
        rope: as in `attention_tkg`.
        return_residual: also return the log-sum-exp.
        normalize: False returns a `SoftmaxState` for the output: `output [B, T, N, Hv]` is
            `sum_s exp(x_s - max) v_s` and `sum [B, T, N]` is `sum_s exp(x_s - max)`, both float32;
            `max [B, T, N]` is finite, the lowest float32 where nothing is seen. States over
            different keys `merge`; `finalize` divides. Gradients pass through `output` and `sum`,
            with `max` a constant, which is exact for everything that merging and dividing give.
        sharding: as in `attention_tkg`; parts of the keys are merged "deferred".
        implementation: as in `attention_tkg`.

    Returns:
        The output `[B, T, N, Hv]` (or a `SoftmaxState`). If more is asked for, a tuple of it, then
        with `return_residual` the log-sum-exp `[B, T, N]`, then with `rope` the rotated new keys.

    Raises:
        ValueError: shapes or options that do not fit together, an unknown implementation.
        TypeError: a dtype that cannot be used.
        NotImplementedError: the implementation asked for cannot do this case; with its reason.
        ExceptionGroup: none of several can.
    """
    arguments = dict(locals())
    return_residual = arguments.pop("return_residual")
    tried = candidates(arguments.pop("implementation"), Op.CTE)
    if return_residual and not normalize:
        raise ValueError(
            "return_residual=True with normalize=False: a SoftmaxState has the log-sum-exp as "
            "max + log(sum); leave return_residual out."
        )
    del arguments["sharding"]
    call = prepare(op=Op.CTE, **arguments)
    found = run(call, tried, sharding_of(sharding, key))
    results = (
        found[0] if normalize else SoftmaxState(output=found[0], max=found[1], sum=found[2]),
        *((found[1],) * return_residual),
        *((found[-1],) * (rope is not None)),
    )
    return results if len(results) > 1 else results[0]
