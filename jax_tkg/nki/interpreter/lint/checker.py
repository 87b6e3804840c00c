"""Reads a kernel and everything it uses, and collects what the rules find."""

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax_tkg.nki.interpreter.lint.calls import check_calls
from jax_tkg.nki.interpreter.lint.comparisons import check_comparisons
from jax_tkg.nki.interpreter.lint.constructs import Found, check_constructs
from jax_tkg.nki.interpreter.lint.interface import (
    check_class,
    check_list_arguments,
    check_outputs,
    check_signature,
)
from jax_tkg.nki.interpreter.lint.loops import check_loops
from jax_tkg.nki.interpreter.lint.reach import reached_from
from jax_tkg.nki.interpreter.lint.registers import check_registers
from jax_tkg.nki.interpreter.lint.rules import Finding
from jax_tkg.nki.interpreter.lint.sources import Function, Module, Sources
from jax_tkg.nki.interpreter.lint.state import check_state

_OF_FUNCTIONS = (
    check_signature,
    check_constructs,
    check_comparisons,
    check_calls,
    check_state,
    check_loops,
)
_OF_KERNELS = (check_list_arguments, check_outputs)


def check(
    kernel: Callable[..., Any] | str | Path, function: str | None = None
) -> tuple[Finding, ...]:
    """Reports what the NKI compiler would not accept in a kernel; reads it without running it.

    Follows the names a kernel uses into the functions and classes of its own package.

    Args:
        kernel: a function, decorated with `nki.jit` or not; or the path of a Python file.
        function: the kernel's name in that file; None checks every function decorated with
            `nki.jit` that no other of them uses.

    Returns:
        What was found, in the order of files and lines; empty for a kernel that keeps to the
        language.

    Raises:
        ValueError: if there is no such function, or the path has no kernel.
        OSError: if the source of a function is not to be had.
        SyntaxError: if a file is not Python.
    """
    return tuple(sorted(set(_findings(_kernels(kernel, function)))))


def _findings(kernels: list[Function]) -> Iterator[Finding]:
    reaches = {kernel: reached_from(kernel) for kernel in kernels}
    for kernel, reach in reaches.items():
        others = [other for root, other in reaches.items() if root is not kernel]
        if any(kernel in other.functions for other in others):
            continue
        for kernel_check in _OF_KERNELS:
            yield from _located(kernel.module, kernel_check(kernel))
        for where, found in check_registers(kernel):
            yield from _located(where.module, iter([found]))
        for each in reach.functions:
            for function_check in _OF_FUNCTIONS:
                yield from _located(each.module, function_check(each))
        for cls in reach.classes.values():
            yield from _located(cls.module, check_class(cls))


def _located(module: Module, results: Iterator[Found]) -> Iterator[Finding]:
    for rule, node, message in results:
        assert isinstance(node, ast.stmt | ast.expr | ast.arg)
        yield Finding(str(module.path), node.lineno, node.col_offset + 1, rule, message)


def _kernels(kernel: Callable[..., Any] | str | Path, name: str | None) -> list[Function]:
    if not isinstance(kernel, str | Path):
        return [_written(kernel)]
    functions = list(Sources().open(Path(kernel)).functions.values())
    if name is None:
        found = [f for f in functions if _is_kernel(f)]
    else:
        named = [f for f in functions if f.node.name == name]
        found = sorted(named, key=lambda f: f.outer is not None)[:1]
    if not found:
        what = f"no function {name}" if name else "no function decorated with nki.jit"
        names = ", ".join(f.node.name for f in functions) or "none"
        raise ValueError(f"{kernel} has {what}; its functions: {names}.")
    return found


def _is_kernel(function: Function) -> bool:
    decorators = [d.func if isinstance(d, ast.Call) else d for d in function.node.decorator_list]
    return any(ast.unparse(d).split(".")[-1] == "jit" for d in decorators)


def _written(kernel: Callable[..., Any]) -> Function:
    """The definition a function object was made from."""
    while isinstance(kernel, functools.partial):
        kernel = kernel.func
    code = inspect.unwrap(kernel).__code__
    lines, _ = inspect.findsource(code)
    module = Sources().open(Path(code.co_filename), "".join(lines))
    for function in module.functions.values():
        first = min([function.node, *function.node.decorator_list], key=lambda n: n.lineno)
        if function.node.name == code.co_name and first.lineno == code.co_firstlineno:
            return function
    raise ValueError(f"{code.co_filename} has no definition of {code.co_name}: write it with def.")
