"""Which buffer an expression's tensor was declared in, where the source shows it."""

import ast
from typing import TypeAlias

from jax_tkg.nki.interpreter.lint.sources import Function

# Local names and functions already looked into.
_Seen: TypeAlias = frozenset[tuple[Function, str]]

# Functions that declare a tensor, and the place of their argument `buffer`.
_MAKERS = {"ndarray": 2, "zeros": 2, "ones": 2, "full": 3, "rand": 2}
_BUFFERS = {"sbuf", "psum", "hbm", "private_hbm", "shared_hbm"}
_VIEWS = {"ap", "broadcast", "expand_dim", "flatten_dims", "indirect", "permute", "rearrange"}
_VIEWS |= {"reshape", "reshape_dim", "select", "slice", "squeeze_dim", "vector_select", "view"}


def declared_in(
    node: ast.expr | None, function: Function, seen: _Seen = frozenset()
) -> frozenset[str]:
    """The buffers a tensor may have been declared in; empty if that is not visible."""
    if isinstance(node, ast.Subscript):
        return declared_in(node.value, function, seen)
    if isinstance(node, ast.IfExp):
        return _all([declared_in(part, function, seen) for part in (node.body, node.orelse)])
    if isinstance(node, ast.Name) and (function, node.id) not in seen:
        seen |= {(function, node.id)}
        values = function.assignments.get(node.id, [])
        return _all([declared_in(value, function, seen) for value in values])
    if isinstance(node, ast.Call):
        return _of_call(node, function, seen)
    return frozenset()


def viewed(node: ast.expr) -> str | None:
    """The name a view looks at: `t` for `t`, `t[0:4]` and `t[0:4].reshape(...)`."""
    if isinstance(node, ast.Subscript):
        return viewed(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return viewed(node.func.value) if node.func.attr in _VIEWS else None
    return node.id if isinstance(node, ast.Name) else None


def _of_call(node: ast.Call, function: Function, seen: _Seen) -> frozenset[str]:
    name = function.api(node.func)
    if name in _MAKERS:
        return _buffer(node, _MAKERS[name], function)
    if isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
        return declared_in(node.func.value, function, seen)
    called = function.resolve(node.func)
    if isinstance(called, Function) and (called, "") not in seen:
        seen |= {(called, "")}
        returned = [n.value for n in called.nodes if isinstance(n, ast.Return)]
        return _all([declared_in(value, called, seen) for value in returned])
    return frozenset()


def _buffer(node: ast.Call, position: int, function: Function) -> frozenset[str]:
    given = [k.value for k in node.keywords if k.arg == "buffer"] + node.args[position:]
    if not given:
        return frozenset({"sbuf"})
    name = function.api(given[0])
    if isinstance(given[0], ast.Constant):
        name = str(given[0].value)
    return frozenset({name}) if name in _BUFFERS else frozenset()


def _all(found: list[frozenset[str]]) -> frozenset[str]:
    """The union, if nothing is unknown."""
    return frozenset().union(*found) if found and all(found) else frozenset()
