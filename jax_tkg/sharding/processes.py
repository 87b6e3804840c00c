"""Several processes: what decoding needs beside `jax.distributed`.

Every process runs the same script, and the arrays of `jax.jit` and of this library span the devices
of all of them. Two things are easily wrong: by default a process that dies keeps the others waiting
for minutes, and NumPy cannot read an array of which other processes have a part.
"""

import inspect
from typing import Any

import jax
import numpy as np


def initialize(*args: Any, patience: int = 20, **kwargs: Any) -> None:
    """`jax.distributed.initialize` with which no process outlives another for long.

    JAX's coordinator ends a process when it has lost another: one that died or hangs. With the
    timeouts of JAX itself (100 s for a lost process, 300 s for one that does not come to an end)
    that takes minutes. The processes end with an error message and a non-zero exit code.

    Call it before anything that needs a device. On a cluster that JAX knows (Slurm, Open MPI,
    Kubernetes) no arguments are needed; else:

        initialize("10.0.0.1:1234", num_processes=2, process_id=rank)

    Args:
        *args: as for `jax.distributed.initialize`.
        patience: seconds after which a process that gives no sign of life is lost, at least 1; so
            long, too, the others wait for the slowest at the end.
        **kwargs: as for `jax.distributed.initialize`; what is given there comes first.

    Raises:
        ValueError: for a patience below 1.
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1 second; got {patience}.")
    timeouts = ("heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    known = inspect.signature(jax.distributed.initialize).parameters  # the second came later
    jax.distributed.initialize(*args, **{n: patience for n in timeouts if n in known} | kwargs)


def to_host(array: Any) -> np.ndarray:
    """A NumPy copy of the whole of an array, on every process.

    An array spread over processes is gathered: all of them must call this, in the same order.

    Args:
        array: anything that NumPy or JAX counts as one.
    """
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.array(array)
