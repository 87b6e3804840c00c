"""Statements and expressions that the kernel language has not."""

import ast
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from jax_tkg.nki.interpreter.lint.sources import Function


class Found(NamedTuple):
    """A rule that a node breaks, and how to mend it."""

    rule: str
    node: ast.AST
    message: str


NodeCheck: TypeAlias = Callable[[Any, Function], Iterator[Found]]

_GLOBAL = "assigns to a name outside the function: pass it as an argument and return it."
_COROUTINE = "a coroutine: write an ordinary function, `for` or `with`."
_YIELD = "yield: append to a list and return it."
_COMPREHENSION = "a comprehension: write a for loop that appends to a list."
_TRY = "try: check with an if or an assert beforehand."

# Nodes that are never accepted.
_NODES: dict[type[ast.AST], tuple[str, str]] = {
    ast.Import: ("language.import", "an import in a function: move it to the top of the file."),
    ast.ImportFrom: ("language.import", "an import in a function: move it to the top of the file."),
    ast.ClassDef: (
        "language.nested-class",
        "a class in a function: move it to the top of the file.",
    ),
    ast.AsyncFunctionDef: ("language.async", _COROUTINE),
    ast.AsyncFor: ("language.async", _COROUTINE),
    ast.AsyncWith: ("language.async", _COROUTINE),
    ast.Await: ("language.async", _COROUTINE),
    ast.Yield: ("language.yield", _YIELD),
    ast.YieldFrom: ("language.yield", _YIELD),
    ast.Match: ("language.match", "match: write if, elif, else."),
    ast.Delete: ("language.del", "del: leave the name alone, or use dict.pop or list.remove."),
    ast.Global: ("language.global", _GLOBAL),
    ast.Nonlocal: ("language.global", _GLOBAL),
    ast.Try: ("language.try", _TRY),
    ast.TryStar: ("language.try", _TRY),
    ast.Raise: ("language.raise", "raise: write `assert condition, message`."),
    ast.ListComp: ("language.comprehension", _COMPREHENSION),
    ast.SetComp: ("language.comprehension", _COMPREHENSION),
    ast.DictComp: ("language.comprehension", _COMPREHENSION),
    ast.GeneratorExp: (
        "language.generator",
        "a generator expression: write a for loop that appends to a list.",
    ),
    ast.Lambda: ("language.lambda", "a lambda: define a function with a name."),
    ast.NamedExpr: ("language.walrus", "`:=`: assign in a statement of its own."),
    ast.Set: ("language.set", "a set: use a tuple or a list."),
    ast.Starred: ("language.star-arguments", "`*` before a value: write each element out."),
}


def _with(node: ast.With, function: Function) -> Iterator[Found]:
    for item in node.items:
        if not function.called(item.context_expr, "no_reorder"):
            what = ast.unparse(item.context_expr)
            yield Found("language.with", node, f"with {what}: call its functions one by one.")


def _loop_else(node: ast.For | ast.While, _: Function) -> Iterator[Found]:
    if node.orelse:
        message = "the else of a loop: keep a bool and test it after the loop."
        yield Found("language.loop-else", node.orelse[0], message)


def _format(node: ast.FormattedValue, _: Function) -> Iterator[Found]:
    if node.format_spec is not None:
        value, spec = ast.unparse(node.value), ast.unparse(node.format_spec).strip("f'\"")
        message = f"the format {spec!r} in an f-string: write {{{value}}} alone."
        yield Found("language.fstring-format", node, message)


def _constant(node: ast.Constant, _: Function) -> Iterator[Found]:
    if isinstance(node.value, bytes | complex):
        kind = type(node.value).__name__
        yield Found("language.value", node, f"{node.value!r} is {kind}: use numbers and strings.")
    elif type(node.value) is int and not -(2**31) <= node.value < 2**32:
        message = f"{node.value} has more than 32 bits: compute with smaller integers."
        yield Found("language.value", node, message)


def _dict(node: ast.Dict, _: Function) -> Iterator[Found]:
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            message = "`**` in a dict: set its keys one by one."
            yield Found("language.star-arguments", value, message)
        elif isinstance(key, ast.Constant | ast.Tuple) and not _is_string(key):
            message = f"the key {ast.unparse(key)}: dicts have string keys; use str() or a list."
            yield Found("language.dict-key", key, message)


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


_CHECKS: dict[type[ast.AST], NodeCheck] = {
    ast.With: _with,
    ast.For: _loop_else,
    ast.While: _loop_else,
    ast.FormattedValue: _format,
    ast.Constant: _constant,
    ast.Dict: _dict,
}


def check_constructs(function: Function) -> Iterator[Found]:
    """What a function's body is written with."""
    for node in [function.node, *function.nodes]:
        if type(node) in _NODES:
            rule, message = _NODES[type(node)]
            yield Found(rule, node, message)
        if type(node) in _CHECKS:
            yield from _CHECKS[type(node)](node, function)
