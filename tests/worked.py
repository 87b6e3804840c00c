"""The op on numbers small enough to work out by hand.

With a head size and a scale of 1 and queries of 1, a key is its own logit: keys `x`, values `v`,
output `sum softmax(x) v`. With all keys 0 the output is the mean of the values seen and the
log-sum-exp the log of their number.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg.implementations import Implementation
from tests.conformance import InTiles, run_small

RELATIVE = 8 * float(np.finfo(np.float32).eps)

in_every_implementation = pytest.mark.parametrize(
    "implementation",
    ["xla", "reference", InTiles("cpu", 3), InTiles("tpu", 3)],
    ids=str,
)


def attend(
    implementation: str | Implementation,
    logits: Any,
    values: Any,
    *,
    tokens: int = 1,
    layout: Any = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and LSE, `[B, T]` or `[T]`, of rows of logits and values `[B, S]` or `[S]`.

    Options that are lists or NumPy arrays become int32, float32 or bool arrays.
    """
    logits, values = (np.asarray(x, np.float32) for x in (logits, values))
    batch = logits.shape[0] if logits.ndim == 2 else 1
    key, value = (x.reshape(batch, -1, 1, 1) for x in (logits, values))
    kv = {"key": jnp.asarray(key), "value": jnp.asarray(value)}
    if layout is not None:
        kv = {"key": layout(key, value)}
    out, lse = run_small(
        jnp.ones((batch, tokens, 1, 1)),
        **kv,
        scale=options.pop("scale", 1.0),
        return_residual=True,
        implementation=implementation,
        **{name: _as_jax(option) for name, option in options.items()},
    )
    shape = (batch, tokens) if logits.ndim == 2 else (tokens,)
    return np.asarray(out).reshape(shape), np.asarray(lse).reshape(shape)


def _as_jax(option: Any) -> Any:
    if not isinstance(option, list | np.ndarray):
        return option
    array = np.asarray(option)
    narrow = {"i": np.int32, "f": np.float32, "b": np.bool_}[array.dtype.kind]
    return jnp.asarray(array.astype(narrow))


def assert_close(results: Any, *expected: Any) -> None:
    """Equal up to a few float32 roundings."""
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, exact, rtol=RELATIVE, atol=RELATIVE)
