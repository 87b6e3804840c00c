"""Kernels with one thing wrong: what can be wrong, found in their sources, and how to make it so.

A mutation leaves out a statement (a call whose result nobody takes: an instruction or a step),
takes another operation in an instruction, or leaves out its bias or scale. The function gets new
code, so that every module that has imported it runs the mutated one.
"""

import ast
import contextlib
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

TOP = "jax_tkg.nki.attention_tkg"
NOT_OURS = ("jax_tkg.nki.interpreter", "jax_tkg.nki.dialect")

OTHER_OPERATION = {
    "add": "subtract", "subtract": "add", "multiply": "add", "maximum": "minimum",
    "minimum": "maximum", "less": "less_equal", "less_equal": "less", "greater": "greater_equal",
    "greater_equal": "greater", "equal": "not_equal", "not_equal": "equal",
    "logical_or": "logical_and", "logical_and": "logical_or", "exp": "copy", "tanh": "copy",
    "log": "copy",
}  # fmt: skip
OPERATIONS = ("op", "op0", "op1", "reduce_op", "reduce_cmd", "cmp_op", "compare_op")
OPTIONAL = ("bias", "scale")

Line = tuple[str, int]
"""File and number."""


@dataclass(frozen=True)
class Mutation:
    """One thing that can be wrong in a kernel.

    Attributes:
        module: name of the module.
        function: names from the module down to the outermost function around it.
        index: among the sites of this function.
        what: in words.
        lines: the mutated call begins on the first and ends on the last.
    """

    module: str
    function: tuple[str, ...]
    index: int
    what: str
    lines: tuple[int, int]

    def __str__(self) -> str:
        """Such as `softmax.update_running_max: without nisa.tensor_copy(...)`."""
        return f"{self.module.rpartition('.')[2]}.{'.'.join(self.function)}: {self.what}"


class Site(NamedTuple):
    """A call in a syntax tree, what would be wrong, and what makes it so."""

    call: ast.Call
    what: str
    spoil: Callable[[], None]


def kernel_modules() -> list[str]:
    """The decode kernel's top, its steps, and what else it imports that issues instructions."""
    reached, found = [TOP], [TOP]
    for name in reached:
        for value in vars(importlib.import_module(name)).values():
            home = str(getattr(value, "__module__", ""))
            if not home.startswith("jax_tkg.nki.") or home.startswith(NOT_OURS) or home in reached:
                continue
            reached.append(home)
            if ".steps." in home or hasattr(sys.modules[home], "nisa"):
                found.append(home)
    return sorted(found)


def mutations(module: str) -> list[Mutation]:
    """All that can be wrong in the functions of a module; no two read the same."""
    found: list[Mutation] = []
    for path, function in _functions(_tree(module), ()):
        texts: list[str] = []
        for index, site in enumerate(_sites(function)):
            texts.append(site.what)
            count = texts.count(site.what)
            what = f"{site.what} (no. {count})" if count > 1 else site.what
            lines = site.call.lineno, site.call.end_lineno or site.call.lineno
            found.append(Mutation(module, path, index, what, lines))
    return found


@contextlib.contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """Inside, the kernel has the mutation."""
    tree, module = _tree(mutation.module), importlib.import_module(mutation.module)
    function = dict(_functions(tree, ()))[mutation.function]
    list(_sites(function))[mutation.index].spoil()
    code = compile(tree, inspect.getfile(module), "exec", dont_inherit=True)
    for name in mutation.function:
        code = _inner(code, name)
    target = _function_of(module, mutation.function)
    before = target.__code__
    target.__code__ = code
    try:
        yield
    finally:
        target.__code__ = before


@contextlib.contextmanager
def lines_run(modules: list[str]) -> Iterator[set[Line]]:
    """Collects the lines of modules that are run inside, by any thread started there too."""
    files = {inspect.getfile(importlib.import_module(name)) for name in modules}
    seen: set[Line] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if file not in files:
            return None
        if event == "line":
            seen.add((file, frame.f_lineno))
        return trace

    before = sys.gettrace(), threading.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before[0])
        threading.settrace(before[1])


def is_run(mutation: Mutation, seen: Collection[Line]) -> bool:
    """Whether one of its lines was run."""
    file = inspect.getfile(importlib.import_module(mutation.module))
    first, last = mutation.lines
    return any((file, line) in seen for line in range(first, last + 1))


# --- syntax trees


def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def _functions(
    scope: ast.Module | ast.ClassDef, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    """Functions and methods, not those inside functions."""
    for node in scope.body:
        if isinstance(node, ast.FunctionDef):
            yield (*path, node.name), node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, (*path, node.name))


def _sites(function: ast.FunctionDef) -> Iterator[Site]:
    for node in list(ast.walk(function)):
        for name in ("body", "orelse"):
            yield from _statements(getattr(node, name, None))
        if isinstance(node, ast.Call):
            yield from _operations(node)
            yield from _options(node)


def _statements(block: Any) -> Iterator[Site]:
    for i, inner in enumerate(block if isinstance(block, list) else ()):
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            nothing = ast.copy_location(ast.Pass(), inner)

            def spoil(i: int = i, nothing: ast.stmt = nothing) -> None:
                block[i] = nothing

            yield Site(inner.value, f"without {ast.unparse(inner)}", spoil)


def _operations(call: ast.Call) -> Iterator[Site]:
    for keyword in call.keywords:
        value = keyword.value
        if keyword.arg not in OPERATIONS or not isinstance(value, ast.Attribute):
            continue
        other = OTHER_OPERATION.get(value.attr)
        if other is not None:
            what = f"{keyword.arg}={other} in {ast.unparse(call)}"
            yield Site(call, what, partial(setattr, value, "attr", other))


def _options(call: ast.Call) -> Iterator[Site]:
    for keyword in call.keywords:
        if keyword.arg in OPTIONAL:
            what = f"no {keyword.arg} in {ast.unparse(call)}"
            yield Site(call, what, partial(call.keywords.remove, keyword))


def _inner(code: CodeType, name: str) -> CodeType:
    found = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
    return found[-1]  # as the module's last definition of a name is the one that stays


def _function_of(module: ModuleType, path: tuple[str, ...]) -> FunctionType:
    found: Any = module
    for name in path:
        found = vars(found)[name]
    found = getattr(found, "function", getattr(found, "__func__", found))  # of a kernel, a method
    unwrapped = inspect.unwrap(found)
    assert isinstance(unwrapped, FunctionType)
    return unwrapped
