"""Dataclasses as pytrees that are told apart by their class."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.tree_util import GetAttrKey


def register(cls: type, *, data_fields: Sequence[str], meta_fields: Sequence[str]) -> type:
    """As `jax.tree_util.register_dataclass`, for one of several classes with the same fields.

    JAX 0.10 and 0.12 (0.7 not) count classes that were registered there as equal if they have as
    many data fields and equal static ones. `jax.jit` may then run for one what it compiled for the
    other, silently, depending on where the classes lie in memory. Other nodes have their class in
    the comparison.

    Args:
        cls: a dataclass.
        data_fields: names of the fields that are subtrees.
        meta_fields: names of the static ones; all others.

    Returns:
        The class.
    """
    data, static = tuple(data_fields), tuple(meta_fields)
    keys = tuple(GetAttrKey(name) for name in data)

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, n) for n in data], tuple(getattr(node, n) for n in static)

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, aux = flatten(node)
        return list(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Any:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(static, aux, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
