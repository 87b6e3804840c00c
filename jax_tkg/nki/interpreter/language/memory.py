"""Tensors, loops, where a program is: the part of `nki.language` that computes nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.dtypes import as_dtype
from jax_tkg.nki.interpreter.errors import NkiValidationError
from jax_tkg.nki.interpreter.hardware import (
    NUM_PARTITIONS,
    PSUM_BANK_BYTES,
    PSUM_BANKS,
)
from jax_tkg.nki.interpreter.machine import current_core
from jax_tkg.nki.interpreter.objects import NKIObject
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.tensor import DynamicSlice, NkiTensor

sbuf, psum = MemoryRegion.sbuf, MemoryRegion.psum
private_hbm, shared_hbm = MemoryRegion.private_hbm, MemoryRegion.shared_hbm
hbm = private_hbm


def is_hbm(buffer: Any) -> bool:
    """Any HBM."""
    return not buffer.is_on_chip


def is_on_chip(buffer: Any) -> bool:
    """SBUF or PSUM."""
    return bool(buffer.is_on_chip)


def is_psum(buffer: Any) -> bool:
    """PSUM."""
    return buffer is psum


def is_sbuf(buffer: Any) -> bool:
    """SBUF."""
    return buffer is sbuf


def ndarray(
    shape: Sequence[int],
    dtype: Any,
    buffer: MemoryRegion = sbuf,
    name: str = "",
    address: tuple[int, int] | None = None,
) -> NkiTensor:
    """Declares a tensor. It holds nothing until written.

    Args:
        shape: sizes; on chip the first is the number of partitions.
        dtype: of its elements.
        buffer: where.
        name: unique, or "".
        address: (partition, byte) on chip; None lets the compiler choose.
    """
    if not isinstance(buffer, MemoryRegion):
        raise NkiValidationError("ndarray.buffer", f"buffer {buffer!r}: nl.sbuf, nl.psum, nl.hbm.")
    if address is not None and not buffer.is_on_chip:
        raise NkiValidationError("ndarray.address", f"address {address} in {buffer.value}.")
    return current_core().allocate(shape, dtype, buffer, name or "", address)


def ds(start: Any, size: int) -> DynamicSlice:
    """`size` elements from `start`."""
    return DynamicSlice(start, size)


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """A loop unrolled by the compiler."""
    return range(start) if stop is None else range(start, stop, step)


affine_range = sequential_range = static_range


def program_id(axis: int = 0) -> int:
    """The index of this program."""
    if axis != 0:
        raise NkiValidationError("program_id.axis", f"axis {axis}: a launch has one axis.")
    return current_core().index


def num_programs(axes: Any = 0) -> int:
    """How many programs the launch has."""
    return current_core().machine.num_programs


def program_ndim() -> int:
    """Axes of the launch: 1 for two programs, else 0."""
    return 1 if current_core().machine.num_programs > 1 else 0


def shared_constant(constant: Any) -> NkiTensor:
    """A tensor in shared HBM with constant contents: a NumPy array, or the path of an .npy file."""
    from jax_tkg.nki.interpreter.window import window

    array = np.load(constant) if isinstance(constant, str) else np.asarray(constant)
    tensor = current_core().allocate(array.shape, as_dtype(array.dtype), shared_hbm)
    where = window(tensor)
    where.array()[...] = array
    where.mark_written()
    return tensor


def shared_identity_matrix(n: int, dtype: Any = "uint8", dst: NkiTensor | None = None) -> NkiTensor:
    """The identity matrix `[n, n]` in SBUF: `dst`, or a new tile."""
    from jax_tkg.nki.interpreter.isa.dma import dma_copy

    constant = shared_constant(np.eye(n, dtype=as_dtype(dtype).numpy))
    dst = ndarray((n, n), dtype) if dst is None else dst
    dma_copy(dst, constant)
    return dst


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    """Prints a tensor as the device would while it runs."""
    from jax_tkg.nki.interpreter.window import scalar_shift, window

    core = current_core()
    found = window(tensor, scalar_shift(tensor)).array().astype(np.float64)
    core.machine.options.print(f"[program {core.index}] {print_prefix} {tensor!r}\n{found}")


class TileSize(NKIObject):
    """`nl.tile_size`: limits of tiles, for the target of the running kernel where it matters."""

    pmax = NUM_PARTITIONS
    psum_bank_fmax = psum_fmax = PSUM_BANK_BYTES // 4
    psum_bank_fmax_bytes = PSUM_BANK_BYTES
    gemm_stationary_fmax = 128
    gemm_moving_fmax = 512
    bn_stats_fmax = 512
    psum_min_align = 4
    sbuf_min_align = 1
    psum_num_banks = PSUM_BANKS

    @property
    def sbuf_fmax_bytes(self) -> int:
        """Usable bytes of an SBUF partition."""
        return current_core().target.sbuf_usable_bytes

    total_available_sbuf_size = sbuf_fmax_bytes

    @property
    def sbuf_fmax(self) -> int:
        """The same in float32 elements."""
        return self.sbuf_fmax_bytes // 4

    @property
    def sbuf_size_bytes(self) -> int:
        """All of SBUF."""
        return current_core().target.sbuf_bytes * NUM_PARTITIONS


tile_size = TileSize()
