"""`nki.isa`: the instructions. `TABLE` in the documentation lists what is there."""

from typing import NoReturn

from jax_tkg.nki.interpreter.errors import NkiValidationError
from jax_tkg.nki.interpreter.isa.accumulate import reduce_cmd
from jax_tkg.nki.interpreter.isa.copies import memset, tensor_copy, tensor_copy_predicated
from jax_tkg.nki.interpreter.isa.dma import dge_mode, dma_copy, dma_transpose, oob_mode
from jax_tkg.nki.interpreter.isa.dma_compute import dma_compute
from jax_tkg.nki.interpreter.isa.exchange import core_barrier, dma_engine, sendrecv
from jax_tkg.nki.interpreter.isa.gather import (
    local_gather,
    nc_n_gather,
    nonzero_with_count,
    sequence_bounds,
    topk,
)
from jax_tkg.nki.interpreter.isa.mx import nc_matmul_mx, quantize_mx
from jax_tkg.nki.interpreter.isa.random import (
    dropout,
    rand2,
    rand_get_state,
    rand_set_state,
    rng,
    set_rng_seed,
)
from jax_tkg.nki.interpreter.isa.reduce import (
    tensor_partition_reduce,
    tensor_reduce,
    tensor_scalar_cumulative,
    tensor_scalar_reduce,
    tensor_tensor_scan,
)
from jax_tkg.nki.interpreter.isa.scalar import activate2, activation, activation_reduce
from jax_tkg.nki.interpreter.isa.search import (
    bn_aggr,
    bn_stats,
    max8,
    nc_find_index8,
    nc_match_replace8,
)
from jax_tkg.nki.interpreter.isa.select import affine_select, iota, range_select, select_reduce
from jax_tkg.nki.interpreter.isa.shuffle import nc_stream_shuffle
from jax_tkg.nki.interpreter.isa.target import get_nc_sub_version, get_nc_version, nc_version
from jax_tkg.nki.interpreter.isa.tensor_engine import matmul_perf_mode, nc_matmul, nc_transpose
from jax_tkg.nki.interpreter.isa.vector import (
    exponential,
    reciprocal,
    scalar_tensor_tensor,
    tensor_scalar,
    tensor_tensor,
)
from jax_tkg.nki.interpreter.record import Engine as engine  # noqa: N813  (NKI's name)
from jax_tkg.nki.interpreter.record import Instruction as NkiInstruction
from jax_tkg.nki.interpreter.registers import (
    VirtualRegister,
    register_alloc,
    register_load,
    register_move,
    register_store,
)

tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown


def __getattr__(name: str) -> NoReturn:
    """An instruction that is not interpreted."""
    if name.startswith("_"):
        raise AttributeError(name)
    raise NotImplementedError(f"nki.isa.{name} is not interpreted.")


__all__ = [
    "NkiInstruction",
    "NkiValidationError",
    "VirtualRegister",
    "activate2",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "core_barrier",
    "dge_mode",
    "dma_compute",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "dropout",
    "engine",
    "exponential",
    "get_nc_sub_version",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "local_gather",
    "matmul_perf_mode",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_matmul_mx",
    "nc_n_gather",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "nonzero_with_count",
    "oob_mode",
    "quantize_mx",
    "rand2",
    "rand_get_state",
    "rand_set_state",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "rng",
    "scalar_engine",
    "scalar_tensor_tensor",
    "select_reduce",
    "sendrecv",
    "sequence_bounds",
    "set_rng_seed",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_engine",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_cumulative",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "topk",
    "unknown_engine",
    "vector_engine",
]
