"""A lowered module as a tree of operations, through the functions it calls."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeAlias

from jaxlib.mlir import ir

# These differ between versions of jaxlib: a class for each operation or one, generic or not.
Operation: TypeAlias = Any
Value: TypeAlias = Any

_SOURCE_LINE = re.compile(r'"((?:[^"\\]|\\.)*)":(\d+):\d+')
_ESCAPED = re.compile(rb"\\([0-9A-Fa-f]{2}|\\)")


class Program:
    """The operations of a module, in order, with the source lines they come from."""

    def __init__(self, module: ir.Module) -> None:
        self._module = module  # MLIR frees what nobody holds
        self._functions = {
            ir.StringAttr(op.attributes["sym_name"]).value: op.operation
            for op in module.body.operations
            if op.operation.name == "func.func"
        }
        self._calls: dict[str, list[Operation]] = defaultdict(list)
        for function in self._functions.values():
            for op in nested(function):
                if (callee := called(op)) is not None:
                    self._calls[callee].append(op)

    def __iter__(self) -> Iterator[tuple[Operation, str]]:
        """Every operation that runs, with its "file:line".

        Newer versions of JAX give a function one body for all its callers, without lines: then the
        line is that of the call, and the body comes once for each.
        """
        seen: set[tuple[str, str]] = set()
        for name, function in self._functions.items():
            if name not in self._calls:
                yield from self._walk(function, "", seen)

    def _walk(
        self, op: Operation, outer: str, seen: set[tuple[str, str]]
    ) -> Iterator[tuple[Operation, str]]:
        here = _line_of(op) or outer
        yield op, here
        for inner in _children(op):
            yield from self._walk(inner, here, seen)
        callee = called(op)
        if callee in self._functions and (callee, here) not in seen:
            seen.add((callee, here))
            yield from self._walk(self._functions[callee], here, seen)

    def passed(self, function: Operation, index: int) -> list[Value]:
        """What the calls of a function pass for an argument; nothing for the program itself."""
        name = ir.StringAttr(function.attributes["sym_name"]).value
        return [call.operands[index] for call in self._calls.get(name, ())]


def nested(op: Operation) -> Iterator[Operation]:
    """An operation and all that are inside it; functions that it calls are not."""
    yield op
    for inner in _children(op):
        yield from nested(inner)


def called(op: Operation) -> str | None:
    """The name of the function that an operation calls."""
    attribute = {"func.call": "callee", "stablehlo.composite": "decomposition"}.get(op.name)
    return None if attribute is None else ir.FlatSymbolRefAttr(op.attributes[attribute]).value


def _line_of(op: Operation) -> str:
    """The innermost "file:line" that an operation comes from, or nothing."""
    if op.name == "stablehlo.constant":  # JAX's own; it is there for whoever uses it
        user = next(iter(op.results[0].uses), None)
        return "" if user is None else _line_of(user.owner)
    # The classes of locations differ between versions of jaxlib, their text does not.
    found = _SOURCE_LINE.search(str(op.location))
    if found is None:
        return ""
    name = _ESCAPED.sub(_unescape, found[1].encode()).decode(errors="replace")
    return f"{name}:{found[2]}"


def _unescape(match: re.Match[bytes]) -> bytes:
    return b"\\" if match[1] == b"\\" else bytes.fromhex(match[1].decode())


def _children(op: Operation) -> Iterator[Operation]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
