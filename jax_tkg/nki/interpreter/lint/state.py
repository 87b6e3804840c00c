"""State outside a kernel, which is compiled once for its arguments and must not depend on it."""

import ast
from collections.abc import Iterator

from jax_tkg.nki.interpreter.lint.constructs import Found
from jax_tkg.nki.interpreter.lint.sources import Function

_CHANGING = {"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


def check_state(function: Function) -> Iterator[Found]:
    """Changes to lists, dicts and objects of the module."""
    for node in function.nodes:
        changed: ast.expr | None = None
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed = node.func.value if node.func.attr in _CHANGING else None
        if isinstance(changed, ast.Name) and _is_module_value(changed.id, function):
            message = f"changes {changed.id}, which belongs to the module: pass it as an argument."
            yield Found("language.global", node, message)


def _is_module_value(name: str, function: Function) -> bool:
    scope: Function | None = function
    while scope is not None:
        if name in scope.assignments or name in scope.nested:
            return False
        scope = scope.outer
    return isinstance(function.module.names.get(name), ast.expr)
