"""Makes what is active while JAX traces a part of the key of what it compiles."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

Enter = Callable[[Any], contextlib.AbstractContextManager[Any]]


def trace_key() -> Enter:
    """A context manager that takes a hashable value.

    What was compiled under one value, or under none, is traced again under another, `jax.jit` and
    `flax.linen.jit` alike. Versions of JAX without `jax.make_user_context` have nothing like it:
    there it does nothing, and an earlier trace is used again.
    """
    if hasattr(jax, "make_user_context"):
        enter: Enter = jax.make_user_context(None)
        return enter
    return lambda _: contextlib.nullcontext()
