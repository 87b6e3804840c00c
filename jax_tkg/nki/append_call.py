"""The cache-append kernel from JAX: which row each new key and value becomes, and the launch."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Bool, Int, Num
from jax_tkg.cache import storage
from jax_tkg.cache.layouts import BKHS, DENSE_LAYOUTS, DenseLayout, KVLayout
from jax_tkg.cache.paged import Paged
from jax_tkg.nki.arguments import Launch
from jax_tkg.nki.custom_call import KernelCompiler, NkiJit
from jax_tkg.nki.implementation import Interpreter, default_device, target_limits
from jax_tkg.nki.toolchain import default_programs
from jax_tkg.online.plan import Target

if TYPE_CHECKING:
    from jax_tkg.cache.writing import WriteProblem
    from jax_tkg.nki.append import AppendPlan

Layout = TypeVar("Layout", bound=KVLayout)

ALIASES = ((0, 0), (1, 1))
"""Operands that the kernel changes in place, and the result that each becomes."""

DROPPED = -1
"""A slot that no cache has."""

MAX_ROWS = 2**31 - 1
"""Rows of a cache (of transposed keys: elements) that a DMA can index."""

_COMPILED: KernelCompiler = NkiJit()
_INTERPRETED: KernelCompiler = Interpreter()


@dataclass(frozen=True)
class NkiWriter:
    """The append kernel as a writer of caches; see `jax_tkg.cache.writing`.

    Attributes:
        programs: 2 on a logical core of two, or 1.
        compiler: what makes the launch part of the program.
        self_test: compare the kernel with a known answer before its first use on a device.
        name: in `implementation=` and in reports.
    """

    programs: int = field(default_factory=default_programs)
    compiler: KernelCompiler = _COMPILED
    self_test: bool = True
    name: str = "nki"

    def why_not(self, problem: "WriteProblem", target: Target) -> str | None:
        """What the platform, the kernel or the toolchain cannot do."""
        return (
            target_limits(self.compiler, target)
            or _kernel_limits(problem)
            or self.compiler.why_not(self.programs)
        )

    def write(
        self,
        kv: Layout,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
    ) -> Layout:
        """As `KVLayout.write`, bit for bit."""
        if self.self_test and (device := default_device(self.compiler.platform)) is not None:
            from jax_tkg.nki.self_test import check_append

            check_append(replace(self, self_test=False), device)
        slot = slots[:, None] + jnp.arange(key.shape[1], dtype=jnp.int32)
        slot = jnp.where(keep, slot, DROPPED)
        return write_slots(kv, key, value, slot, programs=self.programs, compiler=self.compiler)


NKI_WRITER = NkiWriter()
NKI_WRITER_INTERPRET = NkiWriter(compiler=_INTERPRETED, self_test=False, name="nki_interpret")


def _kernel_limits(problem: "WriteProblem") -> str | None:
    """Why the kernel cannot write into such a cache, in words; None if it can."""
    name, width = problem.layout.name, problem.shape.head_dim
    if name != Paged.name and name not in DENSE_LAYOUTS:
        return f"the append kernel knows no {name} caches"
    numbers = int(np.prod(problem.stored_shape))
    rows = numbers if name == BKHS.name else numbers // max(width, 1)
    if rows > MAX_ROWS:
        return (
            f"the cache has {rows} rows (of transposed keys: elements), and a DMA indexes "
            f"{MAX_ROWS} of them: split it by batch or head, or use BKSH instead of BKHS"
        )
    return None


def write_slots(
    kv: Layout,
    key: Num[Array, "B T K H"],
    value: Num[Array, "B T K Hv"],
    slots: Int[Array, "B T"],
    *,
    programs: int = 2,
    compiler: KernelCompiler = _INTERPRETED,
) -> Layout:
    """Writes token t of row b to slot `slots[b, t]`; slots outside [0, S) are dropped.

    Args:
        kv: keys and values in BSKH, BKSH, BKHS or pages.
        key: new keys, any float dtype.
        value: new values.
        slots: integers, no slot of a row twice.
        programs: of the launch.
        compiler: by default the interpreter, on the CPU; `NkiJit()` on a Neuron device.

    Raises:
        ValueError: if shapes do not match.
    """
    from jax_tkg.nki.append import append as kernel

    arrays, plan = append_arguments(kv, key, value, slots, programs=programs)
    result = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays[:2])
    launch = Launch(kernel, arrays, result, plan, ALIASES)
    new_key, new_value = compiler.call(launch, programs)
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
        ValueError: if shapes do not match.
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
    assert isinstance(kv, DenseLayout)
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
        total = int(np.prod([sizes[a] for a in axes]))
        row = jnp.zeros((), jnp.int32)
        for axis in axes:
            row = row * sizes[axis] + at.get(axis, 0)
        return jnp.where(inside[:, :, None], row, total)

    return numbers(kv.key_axes, shape.head_dim), numbers(kv.value_axes, shape.value_head_dim)


def _paged_rows(kv: Paged, slots: Int[Array, "B T"]) -> Array:
    pages, heads, page_len, _ = kv.key.shape
    total = pages * heads * page_len
    inside = (slots >= 0) & (slots < kv.shape.kv_len)
    slot = jnp.where(inside, slots, 0)
    page = jnp.take_along_axis(kv.page_indices, slot // page_len, axis=1, mode="clip")
    inside &= page >= 0
    head = jnp.arange(heads, dtype=jnp.int32)
    row = (page.astype(jnp.int32)[:, :, None] * heads + head) * page_len
    return jnp.where(inside[:, :, None], row + (slot % page_len)[:, :, None], total)
