"""The cache-append kernel from JAX: which row each new key and value becomes, and the launch."""

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Int, Num
from jax_tkg.cache import storage
from jax_tkg.cache.kv_cache import KVCache, RingKVCache
from jax_tkg.cache.layouts import BKHS, DenseLayout, KVLayout
from jax_tkg.cache.paged import Paged
from jax_tkg.cache.paged_cache import PagedKVCache
from jax_tkg.nki.arguments import Launch

if TYPE_CHECKING:
    from jax_tkg.nki.append import AppendPlan
    from jax_tkg.nki.custom_call import KernelCompiler

Cache = TypeVar("Cache", bound=KVCache)
Layout = TypeVar("Layout", bound=KVLayout)

ALIASES = ((0, 0), (1, 1))
"""Operands that the kernel changes in place, and the result that each becomes."""

DROPPED = -1
"""A slot that no cache has."""


def append(
    cache: Cache,
    key: Num[Array, "B T K H"],
    value: Num[Array, "B T K Hv"],
    counts: Int[Array, " B"] | None = None,
    *,
    programs: int = 2,
    compiler: "KernelCompiler | None" = None,
) -> Cache:
    """`cache.append(key, value, counts)`, bit for bit, by the NKI kernel.

    Args:
        cache: a `KVCache`, `RingKVCache` or `PagedKVCache`.
        key: new keys, any float dtype.
        value: new values.
        counts: tokens of each row that are real; by default all.
        programs: 1, or 2 as on a logical core of two.
        compiler: by default the interpreter, on the CPU; `NkiJit()` on a Neuron device.

    Returns:
        The next cache. Tokens past the capacity of a row are dropped, however many they are.

    Raises:
        ValueError: if the shapes do not fit the cache.
    """
    counts = cache._check_append(key, value, counts)
    if isinstance(cache, PagedKVCache):
        cache = cache._with_pages_for(counts, key.shape[1])
    slots = token_slots(cache, counts, key.shape[1])
    kv = write_slots(cache.kv, key, value, slots, programs=programs, compiler=compiler)
    return replace(cache, kv=kv, lengths=cache.lengths + counts)


def token_slots(cache: KVCache, counts: Int[Array, " B"], num_tokens: int) -> Int[Array, "B T"]:
    """The slot of each new token of each row, `DROPPED` for padding.

    Of more tokens than a ring has slots only the last ones get one: no slot is written twice.
    """
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    slots = cache.lengths[:, None] + token
    keep = token < counts[:, None]
    if isinstance(cache, RingKVCache):
        keep &= token >= counts[:, None] - cache.capacity
        slots = jnp.remainder(slots, cache.capacity)
    return jnp.where(keep, slots, DROPPED)


def write_slots(
    kv: Layout,
    key: Num[Array, "B T K H"],
    value: Num[Array, "B T K Hv"],
    slots: Int[Array, "B T"],
    *,
    programs: int = 2,
    compiler: "KernelCompiler | None" = None,
) -> Layout:
    """Writes token t of row b to slot `slots[b, t]`; slots outside [0, S) are dropped.

    Args:
        kv: keys and values in BSKH, BKSH, BKHS or pages.
        key: new keys, any float dtype.
        value: new values.
        slots: integers, no slot of a row twice.
        programs: of the launch.
        compiler: see `append`.

    Raises:
        NotImplementedError: for another layout.
        ValueError: if shapes do not match, or row numbers of the cache do not fit an int32.
    """
    from jax_tkg.nki.append import append as kernel
    from jax_tkg.nki.implementation import Interpreter

    arrays, plan = append_arguments(kv, key, value, slots, programs=programs)
    result = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays[:2])
    launch = Launch(kernel, arrays, result, plan, ALIASES)
    new_key, new_value = (compiler or Interpreter()).call(launch, programs)
    return replace(kv, key=_as_stored(new_key, kv.key), value=_as_stored(new_value, kv.value))


def append_arguments(
    kv: KVLayout,
    key: Num[Array, "B T K H"],
    value: Num[Array, "B T K Hv"],
    slots: Int[Array, "B T"],
    *,
    programs: int,
) -> tuple[tuple[Array, ...], "AppendPlan"]:
    """The arrays of a launch in the kernel's order, and its plan; see `write_slots`.

    Raises:
        NotImplementedError: for another layout.
        ValueError: if shapes do not match, or row numbers of the cache do not fit an int32.
    """
    from jax_tkg.nki.append import make_append_plan

    shape = kv.shape
    rows = (shape.batch, key.shape[1], shape.num_kv_heads)
    if (key.shape, value.shape, slots.shape) != (
        (*rows, shape.head_dim), (*rows, shape.value_head_dim), rows[:2],
    ):  # fmt: skip
        raise ValueError(
            f"this cache takes key [B, T, K, H] = ({shape.batch}, T, {shape.num_kv_heads}, "
            f"{shape.head_dim}), value with Hv = {shape.value_head_dim} and slots [B, T]; got "
            f"{key.shape}, {value.shape} and {slots.shape}."
        )

    key_rows, value_rows = _rows(kv, slots)
    arrays = [
        storage.logical(kv.key, kv.dtype), storage.logical(kv.value, kv.dtype), key, value,
        key_rows.reshape(-1), value_rows.reshape(-1),
    ]  # fmt: skip
    if kv.k_scale is not None or kv.v_scale is not None:
        arrays += [_scale_of_rows(s, rows) for s in (kv.k_scale, kv.v_scale)]
    top = None
    if storage.is_quantised(kv.dtype):
        top = storage.INT8_MAX if kv.dtype == np.int8 else float(jnp.finfo(kv.dtype).max)
    step = kv.shape.kv_len if isinstance(kv, BKHS) else 1
    return tuple(arrays), make_append_plan(int(np.prod(rows)), step, top, programs)


def _as_stored(new: Array, like: Array) -> Array:
    """A bitcast, or nothing."""
    return new if new.dtype == like.dtype else lax.bitcast_convert_type(new, like.dtype)


def _scale_of_rows(scale: Array | None, shape: tuple[int, ...]) -> Array:
    """float32 `[B * T * K]` of a scale `[1 or B, K]`."""
    if scale is None:
        return jnp.ones(int(np.prod(shape)), jnp.float32)
    return jnp.broadcast_to(scale[:, None], shape).reshape(-1)


def _rows(kv: KVLayout, slots: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Where new keys and values go, `[B, T, K]` each; the number of rows where nowhere.

    See `jax_tkg.nki.append` for what a row number is.
    """
    if isinstance(kv, Paged):
        rows = _paged_rows(kv, slots)
        return rows, rows
    if not isinstance(kv, DenseLayout):
        raise NotImplementedError(f"the append kernel knows no {kv.name} caches.")
    shape = kv.shape
    batch = jnp.arange(shape.batch, dtype=jnp.int32)[:, None, None]
    head = jnp.arange(shape.num_kv_heads, dtype=jnp.int32)
    inside = (slots >= 0) & (slots < shape.kv_len)
    slot = jnp.where(inside, slots, 0)[:, :, None]

    def numbers(axes: str, width: int) -> Array:
        """Row numbers in an array of these axes; `width` elements make a row."""
        unit = 1 if axes[-1] == "S" else width
        at = {"B": batch, "K": head, "S": slot}
        sizes = {"B": shape.batch, "K": shape.num_kv_heads, "S": shape.kv_len, "H": width // unit}
        total = _checked_total(int(np.prod([sizes[a] for a in axes])))
        row = jnp.zeros((), jnp.int32)
        for axis in axes:
            row = row * sizes[axis] + at.get(axis, 0)
        return jnp.where(inside[:, :, None], row, total)

    return numbers(kv.key_axes, shape.head_dim), numbers(kv.value_axes, shape.value_head_dim)


def _paged_rows(kv: Paged, slots: Int[Array, "B T"]) -> Array:
    pages, heads, page_len, _ = kv.key.shape
    total = _checked_total(pages * heads * page_len)
    inside = (slots >= 0) & (slots < kv.shape.kv_len)
    slot = jnp.where(inside, slots, 0)
    page = jnp.take_along_axis(kv.page_indices, slot // page_len, axis=1, mode="clip")
    inside &= page >= 0
    head = jnp.arange(heads, dtype=jnp.int32)
    row = (page.astype(jnp.int32)[:, :, None] * heads + head) * page_len
    return jnp.where(inside[:, :, None], row + (slot % page_len)[:, :, None], total)


def _checked_total(rows: int) -> int:
    if rows >= 2**31:
        raise ValueError(
            f"the cache has {rows} rows (of transposed keys: elements), and a DMA indexes 2^31 - 1 "
            "of them: split it by batch or head, or use BKSH instead of BKHS."
        )
    return rows
