"""Calls: builtins and libraries, stars, and arguments that are named objects of nki."""

import ast
import builtins
from collections.abc import Iterator

from jax_tkg.nki.interpreter.lint.constructs import Found
from jax_tkg.nki.interpreter.lint.sources import External, Function

# `super` and the classes of exceptions are dealt with by other rules.
_PROVEN = {"dict", "divmod", "float", "frozenset", "int", "isinstance", "len", "list", "max"}
_PROVEN |= {"min", "print", "range", "set", "str", "tuple"}
_BUILTINS = {n for n in dir(builtins) if n.islower() and callable(getattr(builtins, n))} - _PROVEN
_INSTEAD = {
    "sum": "add in a for loop",
    "any": "use a for loop",
    "all": "use a for loop",
    "abs": "use an if expression",
    "enumerate": "use range(len(...))",
    "zip": "use range(len(...))",
    "reversed": "use range with a negative step",
    "sorted": "sort before the launch",
    "bool": "compare",
}
_LIBRARIES = ("math", "enum", "dataclasses", "typing")
_MEMBERS = {"dge_mode", "oob_mode", "reduce_cmd", "engine", "dma_engine"}


def check_calls(function: Function) -> Iterator[Found]:
    """All calls of a function, and names of the old namespace."""
    for node in function.nodes:
        if isinstance(node, ast.Call):
            yield from _builtin(node, function)
            yield from _library(node, function)
            yield from _keywords(node)
        elif isinstance(node, ast.Name):
            found = function.resolve(node)
            if isinstance(found, External) and found.name.startswith("neuronxcc"):
                message = f"{node.id} is {found.name}: import it from nki."
                yield Found("language.old-namespace", node, message)


def _builtin(node: ast.Call, function: Function) -> Iterator[Found]:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in function.assignments or name in function.module.names or name in function.nested:
        return
    if name in ("set", "frozenset"):
        yield Found("language.set", node, f"{name}(): use a tuple or a list.")
    elif name in _BUILTINS:
        instead = _INSTEAD.get(name, "do without")
        yield Found("language.builtin", node, f"{name}() is in no public kernel: {instead}.")


def _library(node: ast.Call, function: Function) -> Iterator[Found]:
    found = function.resolve(node.func)
    if isinstance(found, External) and function.api(node.func) is None:
        library = found.name.split(".")[0]
        if library not in (*_LIBRARIES, "neuronxcc"):
            message = f"calls {found.name}: compute it before the launch, or with nki and math."
            yield Found("language.library", node, message)


def _keywords(node: ast.Call) -> Iterator[Found]:
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg is None:
            message = "`**` in a call: write the keyword arguments out."
            yield Found("language.star-arguments", keyword.value, message)
        elif keyword.arg == "buffer" and isinstance(value, str):
            message = f"buffer={value!r}: write buffer=nl.{value}."
            yield Found("language.string-buffer", keyword.value, message)
        elif keyword.arg in _MEMBERS and type(value) is int:
            message = f"{keyword.arg}={value}: write a member such as nisa.{keyword.arg}.<name>."
            yield Found("language.integer-enum", keyword.value, message)
