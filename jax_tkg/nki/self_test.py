"""A known answer, asked of a kernel before its first use on a device.

After an update of an SDK kernels have been seen to compile and to return zeros. A small problem of
normally distributed numbers is computed on the device and by NumPy in float64.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg.nki import toolchain

BATCH, TOKENS, SLOTS, HEADS, KV_HEADS, HEAD_DIM = 1, 2, 384, 4, 2, 64
LENGTHS = (300,)
GROWTH = 4.0
"""How much larger the last key is than the first: so that the running maximum moves."""

ALLOWED = 4 * 2.0**-8
"""Four times the rounding of bfloat16: of the largest output, and of the log-sum-exp."""


class SelfTestError(RuntimeError):
    """A kernel gives wrong numbers on a device."""


@cache
def check_device(implementation: Any, device: jax.Device) -> None:
    """Compares an implementation with a known answer on a device; once in a process for each.

    Args:
        implementation: of the op.
        device: where to run it.

    Raises:
        SelfTestError: if it is off; with the versions of the toolchain.
    """
    arrays = _inputs()
    # A thread has no mesh, no trace and no setting of whoever is compiling a program just now.
    with ThreadPoolExecutor(1) as thread:
        out, lse = thread.submit(_run, implementation, device, arrays).result()
    wanted = known_answer(*arrays)
    sizes = float(np.max(np.abs(wanted[0]))), 1.0
    for name, found, want, size in zip(("output", "LSE"), (out, lse), wanted, sizes, strict=True):
        off, allowed = _off(found, want), ALLOWED * size
        if not off <= allowed:
            raise SelfTestError(
                f"{implementation.name} gives a wrong {name} on {device}: off by {off:.3g} where "
                f"{allowed:.3g} is allowed{_zeros(found)} ({toolchain.describe()}). Use "
                'implementation="xla" with this toolchain; '
                f"{type(implementation).__name__}(self_test=False) runs the kernel all the same."
            )


@cache
def check_append(writer: Any, device: jax.Device) -> None:
    """Writes a few tokens into small caches on a device and compares their bits; once for each.

    Args:
        writer: of caches; see `jax_tkg.cache.writing`.
        device: where to run it.

    Raises:
        SelfTestError: if a bit is off; with the versions of the toolchain.
    """
    for dtype, scale in ((jnp.bfloat16, None), (np.int8, 0.03)):
        with ThreadPoolExecutor(1) as thread:
            found, wanted = thread.submit(_append, writer, device, dtype, scale).result()
        if found.tobytes() != wanted.tobytes():
            raise SelfTestError(
                f"{writer.name} writes wrong {np.dtype(dtype).name} keys into a cache on {device}"
                f'{_zeros(found)} ({toolchain.describe()}). Append with implementation="xla" '
                f"with this toolchain; {type(writer).__name__}(self_test=False) runs the kernel "
                "all the same."
            )


def _append(
    writer: Any, device: jax.Device, dtype: Any, scale: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The keys of a cache `[B, S, K, H]` after an append, and what NumPy makes of them."""
    from jax_tkg.cache.layouts import BSKH

    batch, tokens, slots, first = 2, 3, 16, (13, 15)  # the last tokens of row 1 run over the end
    new = np.random.default_rng(0).standard_normal((batch, tokens, KV_HEADS, HEAD_DIM), np.float32)
    scales = None if scale is None else np.full((1, KV_HEADS), scale, np.float32)
    before = np.full((batch, slots, KV_HEADS, HEAD_DIM), 1, dtype)
    wanted = before.copy()
    for b, t in np.ndindex(batch, tokens):
        if first[b] + t < slots:
            kept = new[b, t] if scale is None else np.rint(new[b, t] / np.float32(scale))
            wanted[b, first[b] + t] = kept.astype(dtype)
    given = jax.device_put((before, before, new, np.array(first, np.int32), scales), device)

    def write(key: Any, value: Any, new: Any, first: Any, scales: Any) -> Any:
        kv = BSKH(key=key, value=value, k_scale=scales, v_scale=scales, dtype=np.dtype(dtype))
        keep = jnp.ones((batch, tokens), bool)
        return writer.write(kv, new, new, first, keep).key

    return np.asarray(jax.jit(write)(*given)), wanted


def _run(
    implementation: Any, device: jax.Device, arrays: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp of the op on a device."""
    import jax_tkg

    query, key, value, lengths = (jax.device_put(x, device) for x in arrays)
    op = getattr(jax_tkg, implementation.op)
    results = jax.jit(op, static_argnames=("implementation", "return_residual"))(
        query,
        key,
        value,
        key_value_seq_lengths=lengths,
        return_residual=True,
        implementation=implementation,
    )
    out, lse = map(np.asarray, results)
    return out, lse


def known_answer(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Output `[B, T, N, Hv]` and log-sum-exp `[B, T, N]` in float64, one query at a time."""
    batch, tokens, heads, width = query.shape
    out, lse = np.zeros((batch, tokens, heads, value.shape[3])), np.zeros((batch, tokens, heads))
    for b, t, n in np.ndindex(batch, tokens, heads):
        head, live = n * key.shape[2] // heads, int(lengths[b]) - tokens + t + 1
        keys, values = (x[b, :live, head].astype(np.float64) for x in (key, value))
        logits = keys @ query[b, t, n].astype(np.float64) / np.sqrt(width)
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ values / weights.sum()
        lse[b, t, n] = logits.max() + np.log(weights.sum())
    return out, lse


def _inputs() -> tuple[np.ndarray, ...]:
    """Query, key, value and lengths; two programs share the sequence."""
    random = np.random.default_rng(0)
    query = random.standard_normal((BATCH, TOKENS, HEADS, HEAD_DIM))
    key, value = random.standard_normal((2, BATCH, SLOTS, KV_HEADS, HEAD_DIM))
    key *= np.linspace(1, GROWTH, SLOTS)[:, None, None]
    narrow = (x.astype(jnp.bfloat16) for x in (query, key, value))
    return (*narrow, np.array(LENGTHS, np.int32))


def _off(found: Any, want: np.ndarray) -> float:
    """Largest deviation, NaN if there is one."""
    return float(np.max(np.abs(np.asarray(found, np.float64) - want)))


def _zeros(found: Any) -> str:
    return ", all of it is zero" if not np.any(np.asarray(found, np.float64)) else ""
