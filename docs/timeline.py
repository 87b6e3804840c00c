"""Draws the modelled timeline of a small kernel on two cores: `make docs`."""

from pathlib import Path

import ml_dtypes
import numpy as np

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.report import draw_timeline, summary

FIGURES = Path(__file__).parent / "figures"
TILE = 512  # keys at a time


def weigh(queries, keys):
    """Rows of exp(queries @ keys) add up over all keys, of which each core has half.

    Args:
        queries: `[128, N]`, the head's dimension first.
        keys: `[2, 128, S]`: the half of each core, the head's dimension before the keys.

    Returns:
        Sums `[N, 1]`.
    """
    core, n, length = nl.program_id(0), queries.shape[1], keys.shape[2]
    result = nl.ndarray((2, n, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    query = nl.ndarray(queries.shape, dtype=queries.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=query, src=queries)
    parts = nl.ndarray((n, length // TILE), dtype=nl.float32, buffer=nl.sbuf)
    for i in range(length // TILE):
        key = nl.ndarray((128, TILE), dtype=keys.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=key, src=keys[core, :, i * TILE : (i + 1) * TILE])
        logits = nl.ndarray((n, TILE), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=logits, stationary=query, moving=key)
        weights = nl.ndarray((n, TILE), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.activation_reduce(
            dst=weights, op=nl.exp, data=logits, reduce_op=nl.add, reduce_res=parts[:, i : i + 1]
        )
    mine = nl.ndarray((n, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=mine, op=nl.add, data=parts, axis=1)
    theirs = nl.ndarray((n, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.sendrecv(
        src=mine, dst=theirs, send_to_rank=1 - core, recv_from_rank=1 - core, pipe_id=0,
        dma_engine=nisa.dma_engine.gpsimd_dma,
    )  # fmt: skip
    total = nl.ndarray((n, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=total, data1=mine, data2=theirs, op=nl.add)
    nisa.dma_copy(dst=result[core], src=total)
    return result


def run() -> interpreter.Run:
    """One launch on two cores, compared with NumPy."""
    random = np.random.default_rng(0)
    queries = (random.normal(size=(128, 64)) / 16).astype(ml_dtypes.bfloat16)
    keys = random.normal(size=(2, 128, 8 * TILE)).astype(ml_dtypes.bfloat16)
    done = interpreter.run(weigh, queries, keys, programs=2)
    want = sum(np.exp(queries.T.astype(np.float64) @ k.astype(np.float64)).sum(1) for k in keys)
    for core in range(2):
        np.testing.assert_allclose(done.outputs[core, :, 0], want, rtol=1e-3)
    return done


def main() -> None:
    """Writes docs/figures/timeline.png and prints the summary."""
    FIGURES.mkdir(exist_ok=True)
    done = run()
    print(summary(done))
    print(draw_timeline(done, FIGURES / "timeline.png").name)


if __name__ == "__main__":
    main()
