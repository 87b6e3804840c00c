"""Where a swapped linen layer keeps its keys and values, and its attention to them."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Bool, Float, Int, Num
from jax_tkg.attention import Explanation, attention_tkg, explain
from jax_tkg.cache.kv_cache import KVCache
from jax_tkg.cache.layouts import BSKH, KVLayout
from jax_tkg.cache.storage import cpu_needs_bits, stored_dtype
from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.functional import PROMPT_TOKENS
from jax_tkg.flax_layers.swap.protocol import CacheVariables, LinenCall
from jax_tkg.flax_layers.swap.report import SwapError
from jax_tkg.prefill.attention import attention_cte


@dataclass(frozen=True)
class Held:
    """Keys and values that a call attends to, its own new ones among them.

    Attributes:
        kv: all of them.
        rows: further arguments of the op, that say which are live and where the queries are.
        key_mask: bool `[B, S]`, False for those no query sees, or None.
        described: for the report.
    """

    kv: KVLayout | KVCache
    rows: dict[str, Array]
    key_mask: Bool[Array, "B S"] | None
    described: str


@runtime_checkable
class Keeper(Protocol):
    """Where swapped layers keep keys and values."""

    def hold(self, module: Any, call: LinenCall) -> Held:
        """Puts the call's keys and values to those before them."""


@dataclass(frozen=True)
class ClientVariables:
    """In the client's own variables, same names and shapes: its caches and checkpoints go on.

    The client counts one index for all rows, so a shorter prompt must be padded on the left, with
    a mask.
    """

    def hold(self, module: Any, call: LinenCall) -> Held:
        """See `Keeper.hold`."""
        names, tokens = call.cache, call.query.shape[1]
        if names is not None and module.has_variable(names.collection, names.key):
            return self._append(module, call, names)
        if names is not None and call.create_cache:
            for name, new in ((names.key, call.key), (names.value, call.value)):
                module.put_variable(names.collection, name, jnp.zeros(new.shape, new.dtype))
            module.put_variable(names.collection, names.index, jnp.zeros((), jnp.int32))
        mask = _full_mask(call.key_mask, call.query.shape[0], tokens)
        return Held(_bskh(call.key, call.value), _rows(mask, None), mask, "none")

    def _append(self, module: Any, call: LinenCall, names: CacheVariables) -> Held:
        key, value, index = (
            module.get_variable(names.collection, name)
            for name in (names.key, names.value, names.index)
        )
        batch, tokens = call.query.shape[:2]
        if key.ndim != 4 or tokens > key.shape[1]:
            raise SwapError(
                f"{tokens} new tokens do not fit into the cache {tuple(key.shape)} [B, S, K, H] of "
                f"{'/'.join(module.path)}: make it longer."
            )
        key, value = write_at(key, call.key, index), write_at(value, call.value, index)
        end = index + tokens
        for name, new in ((names.key, key), (names.value, value), (names.index, end)):
            module.put_variable(names.collection, name, new)
        mask = _full_mask(call.key_mask, batch, key.shape[1])
        lengths = jnp.full((batch,), end, jnp.int32)
        described = f"{names.key} BSKH {list(key.shape)} {key.dtype}, one index"
        return Held(_bskh(key, value), _rows(mask, lengths), mask, described)


@dataclass(frozen=True)
class OwnCaches:
    """In a `KVCache` for each layer, which knows how many tokens each row has.

    Attributes:
        counts: int32 `[B]`, how many of the T tokens of each row are real; all by default.
        collection: of the variable.
        name: of the variable.
    """

    counts: Int[Array, " B"] | None = None
    collection: str = "cache"
    name: str = "kv_cache"

    def hold(self, module: Any, call: LinenCall) -> Held:
        """See `Keeper.hold`."""
        cache = module.get_variable(self.collection, self.name)
        if cache is None:
            raise SwapError(f"{'/'.join(module.path)} was given no {self.name}.")
        steps = jnp.arange(call.query.shape[1], dtype=jnp.int32)
        positions = {"query_positions": cache.lengths[:, None] + steps}
        cache = cache.append(call.key, call.value, self.counts)
        module.put_variable(self.collection, self.name, cache)
        kv = cache.kv
        described = f"{type(cache).__name__} {kv.name} {list(kv.key.shape)} {kv.dtype}"
        return Held(cache, positions, None, described)


def attend(
    call: LinenCall, held: Held, implementation: StaticImplementation
) -> tuple[Float[Array, "B T N Hv"], Explanation]:
    """The attention of a call, and how it is computed.

    Raises:
        ValueError: for shapes that do not fit together.
        NotImplementedError: if the implementation asked for cannot do it.
    """
    slots = held.kv.capacity if isinstance(held.kv, KVCache) else held.kv.shape.kv_len
    bias = call.bias
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        bias = jnp.broadcast_to(bias, (*bias.shape[:3], slots))
    window = None if call.left_window is None else (call.left_window, None)
    arguments: dict[str, Any] = {
        "query": call.query,
        "key": held.kv,
        "bias": bias,
        "mask": None if held.key_mask is None else held.key_mask[:, None, None],
        "scale": call.scale,
        "is_causal": call.is_causal,
        "local_window_size": window,
        "logits_soft_cap": call.logits_soft_cap,
        "implementation": implementation,
        **held.rows,
    }
    is_prompt = call.query.shape[1] >= PROMPT_TOKENS
    op = attention_cte if is_prompt else attention_tkg
    named = {name: x for name, x in arguments.items() if name not in ("query", "key")}
    explanation = explain(call.query, held.kv, op=op.__name__, **named)
    return op(**arguments), explanation


def write_at(
    cache: Num[Array, "B S K H"], new: Num[Array, "B T K H"], index: Int[Array, ""]
) -> Num[Array, "B S K H"]:
    """`cache` with `new` from slot `index` on, in place where `cache` may be overwritten.

    XLA:CPU converts the whole of a bfloat16 or 8-bit float array to update a part of it. Seen as
    integers it is written as a whole all the same, but into itself and in half the time.
    """
    zero = jnp.zeros((), jnp.int32)
    starts = (zero, index.astype(jnp.int32), zero, zero)
    new, dtype = new.astype(cache.dtype), np.dtype(cache.dtype)
    if not cpu_needs_bits(dtype):
        return lax.dynamic_update_slice(cache, new, starts)
    bits = stored_dtype(dtype, as_bits=True)
    cache, new = (lax.bitcast_convert_type(x, bits) for x in (cache, new))
    return lax.bitcast_convert_type(lax.dynamic_update_slice(cache, new, starts), dtype)


def _bskh(key: Array, value: Array) -> BSKH:
    return BSKH(key, value)


def _full_mask(mask: Array | None, batch: int, slots: int) -> Array | None:
    return None if mask is None else jnp.broadcast_to(mask, (batch, slots))


def _rows(mask: Array | None, lengths: Array | None) -> dict[str, Array]:
    """Lengths, and the first slot of each row that the mask shows, so that none before is read."""
    rows = {} if lengths is None else {"key_value_seq_lengths": lengths}
    if mask is None:
        return rows
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)
    starts = jnp.min(jnp.where(mask, slots, mask.shape[1]), axis=1)
    return rows | {"key_value_seq_starts": starts}
