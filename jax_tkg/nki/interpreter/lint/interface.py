"""What a kernel takes and returns, how functions are declared, and what classes inherit."""

import ast
from collections.abc import Iterator

from jax_tkg.nki.interpreter.lint.constructs import Found
from jax_tkg.nki.interpreter.lint.sources import Class, Function
from jax_tkg.nki.interpreter.lint.tensors import declared_in

_DECORATORS = ("jit", "staticmethod")


def check_signature(function: Function) -> Iterator[Found]:
    """The parameters and decorators of any function."""
    arguments = function.node.args
    for argument in arguments.kwonlyargs:
        message = f"{argument.arg} is keyword-only: remove the `*` before it."
        yield Found("language.keyword-only", argument, message)
    for argument in arguments.posonlyargs[-1:]:
        message = f"{argument.arg} is positional-only: remove the `/` after it."
        yield Found("language.positional-only", argument, message)
    for star in (arguments.vararg, arguments.kwarg):
        if star is not None:
            message = f"takes any number of {star.arg}: write the parameters out, or take a tuple."
            yield Found("language.star-arguments", star, message)
    for decorator in function.node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = ast.unparse(called)
        if name.split(".")[-1] not in _DECORATORS:
            message = f"decorated with @{name}: write a plain function."
            yield Found("language.decorator", decorator, message)


def check_list_arguments(kernel: Function) -> Iterator[Found]:
    """Parameters of a kernel that are lists by their default or annotation."""
    arguments = kernel.node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    given = zip(
        [*positional, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], strict=True
    )
    for argument, default in given:
        if isinstance(default, ast.List) or _is_list(argument.annotation):
            message = f"the kernel's argument {argument.arg} is a list: take a tuple."
            yield Found("language.list-argument", argument, message)


def _is_list(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.BinOp):  # list[int] | None
        return _is_list(annotation.left) or _is_list(annotation.right)
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).split(".")[-1]
        if outer in ("Optional", "Union"):
            inner = annotation.slice
            options = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return any(_is_list(option) for option in options)
        return outer in ("list", "List")
    return annotation is not None and ast.unparse(annotation).split(".")[-1] in ("list", "List")


def check_outputs(kernel: Function) -> Iterator[Found]:
    """Tensors a kernel returns that are declared elsewhere than in shared HBM."""
    for node in kernel.nodes:
        if isinstance(node, ast.Return) and node.value is not None:
            for output in _leaves(node.value):
                where = declared_in(output, kernel)
                if where and "shared_hbm" not in where:
                    message = (
                        f"returns {ast.unparse(output)}, declared in {' or '.join(sorted(where))}: "
                        "declare it with buffer=nl.shared_hbm and copy into it."
                    )
                    yield Found("language.output", output, message)


def _leaves(value: ast.expr) -> Iterator[ast.expr]:
    if isinstance(value, ast.Tuple | ast.List):
        for element in value.elts:
            yield from _leaves(element)
    elif isinstance(value, ast.Dict):
        for element in value.values:
            yield from _leaves(element)
    else:
        yield value


def check_class(cls: Class) -> Iterator[Found]:
    """What a class inherits."""
    bases = cls.base_names()
    if bases not in (["NKIObject"], ["Enum"]) or cls.node.keywords:
        inherits = ", ".join([*bases, *(f"{k.arg}=..." for k in cls.node.keywords)]) or "nothing"
        message = f"class {cls.node.name} inherits {inherits}: inherit nl.NKIObject alone, or Enum."
        yield Found("language.class-base", cls.node, message)
