"""`nki.language`: types, memory, loops, and functions on tiles."""

from typing import Any

from jax_tkg.nki.interpreter.alu import OPS
from jax_tkg.nki.interpreter.dtypes import BY_NAME, DType
from jax_tkg.nki.interpreter.language.elementwise import (
    ceil,
    cos,
    floor,
    fmod,
    negative,
    tan,
    trunc,
    where,
)
from jax_tkg.nki.interpreter.language.memory import (
    affine_range,
    device_print,
    ds,
    hbm,
    is_hbm,
    is_on_chip,
    is_psum,
    is_sbuf,
    ndarray,
    num_programs,
    private_hbm,
    program_id,
    program_ndim,
    psum,
    sbuf,
    sequential_range,
    shared_constant,
    shared_hbm,
    shared_identity_matrix,
    static_range,
    tile_size,
)
from jax_tkg.nki.interpreter.language.reductions import (
    all,
    max,
    mean,
    min,
    prod,
    rms_norm,
    softmax,
    sum,
    var,
)
from jax_tkg.nki.interpreter.language.tiles import (
    broadcast_to,
    dropout,
    empty_like,
    expand_dims,
    full,
    gather_flattened,
    load,
    load_transpose2d,
    matmul,
    no_reorder,
    ones,
    rand,
    random_seed,
    store,
    transpose,
    zeros,
    zeros_like,
)
from jax_tkg.nki.interpreter.objects import NKIObject
from jax_tkg.nki.interpreter.registers import dynamic_range, fori_loop, while_loop
from jax_tkg.nki.interpreter.storage import MemoryRegion
from jax_tkg.nki.interpreter.tensor import NkiTensor

bool_ = BY_NAME["bool"]


def __getattr__(name: str) -> Any:
    """Types and operators by name; what is missing says so."""
    if name in BY_NAME:
        return BY_NAME[name]
    if name in OPS:
        return OPS[name]
    if name.startswith("_"):
        raise AttributeError(name)
    raise NotImplementedError(f"nki.language.{name} is not interpreted.")


__all__ = [
    "DType",
    "MemoryRegion",
    "NKIObject",
    "NkiTensor",
    "affine_range",
    "all",
    "bool_",
    "broadcast_to",
    "ceil",
    "cos",
    "device_print",
    "dropout",
    "ds",
    "dynamic_range",
    "empty_like",
    "expand_dims",
    "floor",
    "fmod",
    "fori_loop",
    "full",
    "gather_flattened",
    "hbm",
    "is_hbm",
    "is_on_chip",
    "is_psum",
    "is_sbuf",
    "load",
    "load_transpose2d",
    "matmul",
    "max",
    "mean",
    "min",
    "ndarray",
    "negative",
    "no_reorder",
    "num_programs",
    "ones",
    "private_hbm",
    "prod",
    "program_id",
    "program_ndim",
    "psum",
    "rand",
    "random_seed",
    "rms_norm",
    "sbuf",
    "sequential_range",
    "shared_constant",
    "shared_hbm",
    "shared_identity_matrix",
    "softmax",
    "static_range",
    "store",
    "sum",
    "tan",
    "tile_size",
    "transpose",
    "trunc",
    "var",
    "where",
    "while_loop",
    "zeros",
    "zeros_like",
]
