"""Small attention calls split into what JAX traces and what it does not, and the oracle on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_tkg
from jax_tkg.attention import prepare
from jax_tkg.problem import Op
from jax_tkg.reference import attend_reference
from tests.cases import Case, inputs
from tests.conformance import jax_arguments

STATIC = ("scale", "is_causal", "local_window_size", "logits_soft_cap", "rope")

# LLVM would take most of the time of these tests.
QUICKLY = {"xla_backend_optimization_level": 0}

Arrays = dict[str, Any]
Results = tuple[jax.Array, jax.Array]
Run = Callable[[Arrays], Results]


class Call(NamedTuple):
    """The arguments of a case that are arrays or hold them, and the op on them two ways.

    What no query sees is NaN in `arrays` and 0 in `clean`: autodiff of the oracle needs the latter.
    """

    arrays: Arrays
    clean: Arrays
    ours: Run
    oracle: Run


def make_call(case: Case, implementation: Any = None) -> Call:
    """The call that a case describes."""
    given = jax_arguments(case, inputs(case))
    static = {name: given.pop(name) for name in STATIC}
    arrays = {name: x for name, x in given.items() if x is not None}

    def ours(arrays: Arrays) -> Results:
        attend = getattr(jax_tkg, case.op)
        return attend(  # type: ignore[no-any-return]
            **arrays, **static, return_residual=True, implementation=implementation
        )

    def oracle(arrays: Arrays) -> Results:
        out, lse = attend_reference(*prepare(op=Op(case.op), **arrays, **static).rotated())
        return out.astype(arrays["query"].dtype), lse

    return Call(arrays, jax.tree.map(without_nan, arrays), ours, oracle)


def without_nan(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), jnp.zeros((), x.dtype), x) if is_float(x) else x


def is_float(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def quickly(function: Callable[..., Any]) -> Any:
    """`jax.jit` that compiles fast."""
    return jax.jit(function, compiler_options=QUICKLY)


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Trees of arrays agree to `tolerance` times the largest finite number of each wanted array."""
    got_leaves, tree = jax.tree.flatten_with_path(got)
    want_leaves = tree.flatten_up_to(want)
    assert got_leaves
    for (path, mine), other in zip(got_leaves, want_leaves, strict=True):
        assert mine.dtype == other.dtype, jax.tree_util.keystr(path)
        a, b = (np.asarray(x, np.float64) for x in (mine, other))
        size = np.max(np.abs(b), where=np.isfinite(b), initial=0.0)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * size, err_msg=jax.tree_util.keystr(path)
        )
