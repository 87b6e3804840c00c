"""The public op: build the problem, choose an implementation, run it. Read this file first.

public call -> Operands (arrays) + AttentionProblem (static, validated) -> plan -> implementation
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg import _compat, rotation
from jax_tkg._typing import Array, Bool, Float, Int, Num
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.cache.layouts import BSKH, KVLayout
from jax_tkg.cache.storage import Scale, head_scale
from jax_tkg.choice import Choice, choose
from jax_tkg.implementations import Implementation, candidates
from jax_tkg.online.plan import Target
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem, Op, check_host_integers, make_problem
from jax_tkg.rope import RotaryEmbedding
from jax_tkg.sharding.automatic import attend_divided, attend_undivided
from jax_tkg.sharding.division import Division, divide
from jax_tkg.sharding.placement import divide_here, sharding_of_types
from jax_tkg.sharding.spec import AttentionSharding

ImplementationLike = str | Implementation | Sequence[str | Implementation] | None
Rows = Int[Array, " B"] | Sequence[int] | np.ndarray | int | None


def attention_tkg(
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
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    rope: RotaryEmbedding | None = None,
    return_residual: bool = False,
    sharding: AttentionSharding | None = None,
    implementation: ImplementationLike = None,
) -> Any:
    """Attention of a few new tokens per sequence to a long KV cache and to themselves.

    Letters: B batch, T new tokens, S cache slots, N query heads, K KV heads (N a multiple of K), H
    head_dim, Hv value head_dim.

    Token t of a row with L tokens sits at position L - T + t (bottom-right alignment at the row's
    own length, not at S) and sees the live keys at positions up to its own. For each query
    `out = sum_s softmax_s(x_s) v_s` over the keys it sees, with
    `x_s = cap(scale * q . k_s) + bias_s` and `cap(x) = c * tanh(x / c)`; a sink adds `exp(sink)` to
    the denominator only. A row that sees no key gives 0 and LSE -inf (the sink, if it has one),
    never NaN, whatever the unseen keys and values hold. Dots accumulate in float32 and the softmax
    is float32 throughout.

    Where this differs on purpose from `jax.nn.dot_product_attention`: causal alignment is
    bottom-right, an empty row is 0 instead of the mean of V, the window is in token positions, and
    the cache's dtype need not be the query's.

    Args:
        query: `[B, T, N, H]`, float32, bfloat16 or float16. The output has its dtype.
        key: the cached keys `[B, S, K, H]`; or a layout (`jax_tkg.BKSH(...)`,
            `jax_tkg.Paged(...)`); or a `KVCache`, which also knows its lengths, starts and
            positions.
        value: the cached values `[B, S, K, Hv]`; None with a layout or a cache.
        bias: added to the logits after the soft cap, `[B|1, N|1, T|1, S']`, float; -inf masks.
            S' is S, or S + T with the new keys last when they come beside the cache.
        mask: `[B|1, N|1, T|1, S']`, bool, True where a query sees a key; combines with the rest.
        new_key: `[B, T, K, H]`, the new tokens' keys when they are not yet in the cache.
        new_value: `[B, T, K, Hv]`.
        key_value_seq_lengths: int `[B]`, tokens of each row, the T new ones included whether they
            are in the cache or beside it. By default every slot is live.
        key_value_seq_starts: int `[B]`, first live position of each row (left padding).
        query_positions: int `[B, T]`, instead of bottom-right alignment.
        key_positions: int `[B, S]`, the position of the token in each slot, negative for none (ring
            buffers). By default slot s holds position s.
        scale: factor of the logits; by default 1 / sqrt(H).
        is_causal: whether a query sees only positions up to its own.
        local_window_size: w for (w, w), or (left, right), both inclusive, in token positions: a
            query at p sees p - left to p + right. A Mistral-style window of w keys is (w - 1, 0).
        logits_soft_cap: c above.
        sinks: one logit per query head `[N]`.
        k_scale: for int8 and 8-bit float keys, `[]` or `[K]`: a key is `stored * k_scale`.
        v_scale: likewise for values.
        rope: rotates the query and `new_key` at the new tokens' positions before they are used:
            inside the kernel where it can, else in JAX; `explain` says who.
        return_residual: also return the log-sum-exp.
        sharding: how the call lies on a mesh: each device attends to its part of the batch, heads
            and slots, and parts of a row are merged. By default the cache's own. Arrays have their
            global shapes; inside a `jax.shard_map` over all axes that it names, a device's.
        implementation: None tries what fits the platform, in order; a name ("xla", "reference") or
            an `Implementation` uses that one or raises; a sequence is tried in order. See
            `explain`.

    Returns:
        The output `[B, T, N, Hv]`. If more is asked for, a tuple of the output, then with
        `return_residual` the log-sum-exp `[B, T, N]` (natural log, float32, includes scale, cap,
        bias and sink; `merge_attention` combines such results), then with `rope` the rotated new
        keys `[B, T, K, H]`, to be appended to the cache.

    Raises:
        ValueError: shapes or options that do not fit together, an unknown implementation.
        TypeError: a dtype that cannot be used.
        NotImplementedError: the implementation asked for cannot do this case; with its reason.
        ExceptionGroup: none of several can.

    Warns:
        UserWarning: if every device has the whole cache and the sharding splits it.
    """
    arguments = dict(locals())
    return_residual, tried = arguments.pop("return_residual"), candidates(implementation, Op.TKG)
    del arguments["implementation"], arguments["sharding"]
    call = prepare(**arguments)
    out, lse, *keys = run(call, tried, sharding_of(sharding, key))
    results = (out, *((lse,) * return_residual), *keys)
    return results if len(results) > 1 else out


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs an attention call on a platform, how, and why not another.

    Attributes:
        platform: as JAX names it.
        problem: what is to be computed.
        division: on a mesh, what each device does of it and how the parts are merged, as far as
            the call or types on an explicit mesh say; None otherwise.
        implementation: name of the one that runs, None if none can.
        plan: how it does it; printable.
        rotation: who rotates queries and new keys, and why; None without `rope`.
        rejected: pairs (name, reason) of those tried before.
    """

    platform: str
    problem: AttentionProblem
    division: Division | None
    implementation: str | None
    plan: object
    rotation: str | None
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """A few lines to read."""
        lines = [f"{self.problem}"]
        if self.division is not None:
            lines.append(f"{self.division}")
        lines.append(f"on {self.platform}: {self.implementation or 'none can'}")
        if self.rotation is not None:
            lines.append(f"  {self.rotation}")
        if self.plan is not None:
            lines.append(f"  {self.plan}")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


def explain(
    *args: Any,
    op: str = Op.TKG,
    platform: str | None = None,
    implementation: ImplementationLike = None,
    **kwargs: Any,
) -> Explanation:
    """Says which implementation an op runs for these arguments, without running it.

    Args:
        *args: as for the op; `jax.ShapeDtypeStruct`s will do for arrays.
        op: "attention_tkg" or "attention_cte".
        platform: what to compile for ("cpu", "gpu", "tpu", "neuron"); by default JAX's own.
        implementation: as for the op.
        **kwargs: as for the op.

    Raises:
        ValueError: as the op; for an unknown platform.
        TypeError: as the op.
    """
    op = Op(op)
    tried = candidates(implementation, op)
    platform = jax.default_backend() if platform is None else platform
    target = Target(platforms=(platform,))
    if platform not in (*PLATFORMS, jax.default_backend()):
        raise ValueError(f"unknown platform {platform!r}; JAX has {', '.join(PLATFORMS)}.")
    leaves, tree = jax.tree.flatten(_arguments_of(op, args, kwargs))
    is_array = [isinstance(x, jax.ShapeDtypeStruct | jax.Array) for x in leaves]
    found: list[tuple[AttentionProblem, Division | None]] = []

    def trace(arrays: list[Array]) -> None:
        given = iter(arrays)
        filled = [next(given) if a else x for a, x in zip(is_array, leaves, strict=True)]
        arguments = jax.tree.unflatten(tree, filled)
        arguments.pop("return_residual", None)
        sharding = sharding_of(arguments.pop("sharding", None), arguments["key"])
        call = prepare(op=op, **arguments)
        found.append((call.problem, divided(call, tried, sharding)))

    jax.eval_shape(trace, [x for a, x in zip(is_array, leaves, strict=True) if a])
    ((problem, division),) = found
    local = problem if division is None else division.local
    choice: Choice[Implementation] = choose(local, target, tried)
    chosen = choice.chosen
    if chosen is None:
        plan = who = None
    else:
        plan = chosen.plan(rotation.problem_for(chosen, local, target), target)
        who = rotation.describe(chosen, local, target)
    if problem.rope is not None and local.rope is None:
        who = ROTATED_BEFORE
    return Explanation(
        platform=platform,
        problem=problem,
        division=division,
        implementation=chosen.name if chosen else None,
        plan=plan,
        rotation=who,
        rejected=choice.rejected,
    )


PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu", "neuron")


def _arguments_of(op: Op, args: Any, kwargs: Any) -> dict[str, Any]:
    """What a call gives to the op, by name; refuses what the op would."""
    function: Any = attention_tkg
    if op is Op.CTE:
        from jax_tkg.prefill.attention import attention_cte

        function = attention_cte
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"{op.value}: {error}.") from None


ROTATED_BEFORE = (
    "queries and new keys are rotated in JAX, before they are divided: devices that have parts of "
    "one row's keys, or all KV heads, share them"
)


class Call(NamedTuple):
    """A call in canonical form: its static description and its arrays."""

    problem: AttentionProblem
    operands: Operands

    def rotated(self) -> "Call":
        """The same without `rope`: queries and new keys are rotated, in JAX."""
        return Call(*rotation.rotated(*self))


def run(
    call: Call, tried: tuple[Implementation, ...], sharding: AttentionSharding | None
) -> tuple[Array, ...]:
    """The results of a call, with the first of `tried` that can do it."""
    division = divided(call, tried, sharding)
    local = call.problem if division is None else division.local
    choose(local, Target(platforms=()), tried).require()
    if division is None:
        return attend_undivided(call.problem, tried, call.operands)
    if division.whole.rope == call.problem.rope:
        return attend_divided(division, tried, call.operands)
    call = call.rotated()
    assert call.operands.new_key is not None
    return (*attend_divided(division, tried, call.operands), call.operands.new_key)


def divided(
    call: Call, tried: tuple[Implementation, ...], sharding: AttentionSharding | None
) -> Division | None:
    """What each device does of a call, as is said or, where that is needed, as types tell.

    It is needed where slots are split, of which the compiler would gather tiles, and where none of
    `tried` lets the compiler partition it. Devices that share what is to be rotated get it rotated.
    """
    division = _divided(call, tried, sharding)
    if division is None or not (division.key_parts or division.slices_kv_heads):
        return division
    return replace(division, whole=replace(division.whole, rope=None))


def _divided(
    call: Call, tried: tuple[Implementation, ...], sharding: AttentionSharding | None
) -> Division | None:
    problem, ops = call
    if sharding is not None:
        return divide_here(call.problem, ops.kv, sharding)
    if not _compat.has_explicit_axes(ops.query):
        return None
    partitioned = Target(platforms=(), auto_partitioned=True)
    is_opaque = choose(problem, partitioned, tried).chosen is None
    found = sharding_of_types(ops)
    return None if found is None or not (found.keys or is_opaque) else divide(problem, found)


def sharding_of(given: AttentionSharding | None, key: Any) -> AttentionSharding | None:
    """The sharding given, or a cache's own."""
    return key.sharding if given is None and isinstance(key, KVCache) else given


def prepare(
    query: Array,
    key: Array | KVLayout | KVCache,
    value: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    new_key: Array | None = None,
    new_value: Array | None = None,
    key_value_seq_lengths: Rows = None,
    key_value_seq_starts: Rows = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    sinks: Array | None = None,
    key_bounds: Array | None = None,
    alibi_slopes: Array | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    rope: RotaryEmbedding | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    normalize: bool = True,
    op: Op = Op.TKG,
) -> Call:
    """Brings the arguments into canonical form and validates them."""
    query = jnp.asarray(query)
    batch, tokens = (*query.shape, 0, 0)[:2]
    beside = 0 if new_key is None else tokens
    rows = {
        "key_value_seq_lengths": key_value_seq_lengths,
        "key_value_seq_starts": key_value_seq_starts,
    }
    if isinstance(key, KVCache):
        _refuse_with("a KVCache", **rows, key_positions=key_positions, value=value)
        rows = {
            "key_value_seq_lengths": key.lengths + beside,
            "key_value_seq_starts": key.starts,
        }
        key_positions, key = key.key_positions(), key.kv
    kv = _layout(key, value, k_scale, v_scale)
    most = kv.shape.kv_len + beside if key_positions is None else None
    most_given = most if op is Op.TKG else None
    lengths, starts = (_per_row(name, given, batch, most_given) for name, given in rows.items())
    if op is Op.CTE and lengths is not None and most is not None:
        lengths = jnp.minimum(lengths, most)  # so that what causality hides is known beforehand
    ops = Operands(
        query=query,
        kv=kv,
        new_key=_array(new_key),
        new_value=_array(new_value),
        lengths=lengths,
        starts=starts,
        query_positions=_array(query_positions),
        key_positions=_array(key_positions),
        mask=_array(mask),
        bias=_array(bias),
        sinks=None if sinks is None else jnp.asarray(sinks)[None],
        key_bounds=_array(key_bounds),
        alibi_slopes=None if alibi_slopes is None else jnp.asarray(alibi_slopes)[None],
    )
    problem = make_problem(
        ops,
        op=op,
        normalize=normalize,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        local_window_size=local_window_size,
        is_causal=is_causal,
        rope=rope,
    )
    if rope is not None:
        ops = replace(ops, rotary_positions=rotation.rotary_positions(ops, tokens))
    return Call(problem, ops)


def _layout(key: Array | KVLayout, value: Array | None, k_scale: Scale, v_scale: Scale) -> KVLayout:
    if isinstance(key, KVLayout):
        _refuse_with("a layout or cache as key", value=value, k_scale=k_scale, v_scale=v_scale)
        key.check()
        return key
    if value is None:
        raise ValueError(
            "value is missing: give key and value arrays [B, S, K, H], or only a KVCache or layout."
        )
    key, value = jnp.asarray(key), jnp.asarray(value)
    dtype = np.dtype(key.dtype)
    kv = BSKH(key, value)
    kv.check()
    heads = kv.shape.num_kv_heads
    return replace(
        kv,
        k_scale=None if k_scale is None else head_scale(k_scale, dtype, heads, "k_scale"),
        v_scale=None if v_scale is None else head_scale(v_scale, dtype, heads, "v_scale"),
    )


def _array(given: Array | None) -> Array | None:
    return None if given is None else jnp.asarray(given)


def _refuse_with(what: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} was given with {what}, which has its own; leave {name} out.")


def _per_row(name: str, given: Rows, batch: int, most: int | None) -> Array | None:
    if given is None:
        return None
    if not isinstance(given, jax.Array):
        check_host_integers(name, given, most)
    array = jnp.asarray(given)
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(jnp.int32)
    return jnp.broadcast_to(array, (batch,)) if array.ndim == 0 else array
