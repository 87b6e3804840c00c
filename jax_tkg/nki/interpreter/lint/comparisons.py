"""Comparisons: identity, membership, and what may be asked of an Enum member."""

import ast
from collections.abc import Iterator

from jax_tkg.nki.interpreter.lint.constructs import Found
from jax_tkg.nki.interpreter.lint.sources import Class, Function, parameters

_EQUALITY = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)


def check_comparisons(function: Function) -> Iterator[Found]:
    """All comparisons and operators of a function."""
    for node in function.nodes:
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
                yield from _identity(node, left, operator, right)
                yield from _membership(node, operator, right, function)
                if not isinstance(operator, _EQUALITY):
                    yield from _enum_operator(node, (left, right), function)
        elif isinstance(node, ast.BinOp):
            yield from _enum_operator(node, (node.left, node.right), function)


def _identity(
    node: ast.Compare, left: ast.expr, operator: ast.cmpop, right: ast.expr
) -> Iterator[Found]:
    if isinstance(operator, ast.Is | ast.IsNot):
        with_none = any(isinstance(e, ast.Constant) and e.value is None for e in (left, right))
        word, sign = ("is", "==") if isinstance(operator, ast.Is) else ("is not", "!=")
        given = f"{ast.unparse(left)} {word} {ast.unparse(right)}"
        needed = f"{ast.unparse(left)} {sign} {ast.unparse(right)}"
        rule = "language.is-none" if with_none else "language.is"
        yield Found(rule, node, f"`{given}`: write `{needed}`.")


def _membership(
    node: ast.Compare, operator: ast.cmpop, right: ast.expr, function: Function
) -> Iterator[Found]:
    if not isinstance(operator, ast.In | ast.NotIn):
        return
    found = function.resolve(right) if isinstance(right, ast.Name | ast.Attribute) else None
    if isinstance(found, Class) and found.is_enum:
        message = f"`in {ast.unparse(right)}`, an Enum class: list its members in a tuple."
        yield Found("language.membership", node, message)
    elif _is_dict_or_set(right, function):
        message = f"`in {ast.unparse(right)}`, a dict or a set: use get() or setdefault(), or keep "
        yield Found("language.membership", node, f"{message}the keys in a list.")


def _is_dict_or_set(node: ast.expr, function: Function) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr == "keys"
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("dict", "set", "frozenset")
    if isinstance(node, ast.Name):
        local = function.assignments.get(node.id)
        values = [function.module.names.get(node.id)] if local is None else local
        return all(
            isinstance(value, ast.expr)
            and not isinstance(value, ast.Name)
            and _is_dict_or_set(value, function)
            for value in values
        )
    return isinstance(node, ast.Dict | ast.Set | ast.DictComp | ast.SetComp)


def _enum_operator(
    node: ast.Compare | ast.BinOp, operands: tuple[ast.expr, ast.expr], function: Function
) -> Iterator[Found]:
    for operand in operands:
        if _is_member(operand, function):
            message = f"`{ast.unparse(node)}` with {ast.unparse(operand)}, an Enum member: "
            yield Found("language.enum-operator", node, f"{message}use == or !=, or its .value.")
            return


def _is_member(node: ast.expr, function: Function) -> bool:
    if isinstance(node, ast.Attribute):
        found = function.resolve(node.value)
        return isinstance(found, Class) and found.is_enum
    if isinstance(node, ast.Name):
        for argument in parameters(function.node):
            if argument.arg == node.id and argument.annotation is not None:
                found = function.resolve(argument.annotation)
                return isinstance(found, Class) and found.is_enum
    return False
