"""What a kernel uses: the functions and classes the compiler would inline with it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from jax_tkg.nki.interpreter.lint.sources import Class, Function, Resolved, parameters


@dataclass(frozen=True)
class Reach:
    """Functions, and classes by their nodes, each once, in the order they were met."""

    functions: dict[Function, None] = field(default_factory=dict)
    classes: dict[ast.AST, Class] = field(default_factory=dict)


def reached_from(kernel: Function) -> Reach:
    """Everything of the kernel's package that it names, calls or takes as an argument."""
    reach = Reach()
    waiting: list[Resolved] = [kernel]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Function) and found not in reach.functions:
            reach.functions[found] = None
            waiting += [*found.nested.values(), *_named(found), *_annotated(found)]
        elif isinstance(found, Class) and found.node not in reach.classes:
            reach.classes[found.node] = found
            # An Enum is translated, not compiled: its methods stay in Python.
            waiting += [] if found.is_enum else found.methods()
    return reach


def _named(function: Function) -> Iterator[Resolved]:
    """Functions and classes its body names: they may be called, passed on or kept."""
    for node in function.nodes:
        if isinstance(node, ast.Name | ast.Attribute):
            yield function.resolve(node)


def _annotated(function: Function) -> Iterator[Resolved]:
    """Classes of its parameters: an instance brings its class into the kernel."""
    for argument in parameters(function.node):
        for node in ast.walk(argument.annotation) if argument.annotation else ():
            if isinstance(node, ast.Name | ast.Attribute):
                found = function.resolve(node)
                if isinstance(found, Class):
                    yield found
