"""Loops that run on the device: what may be in them, and what may leave them."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jax_tkg.nki.interpreter.lint.constructs import Found
from jax_tkg.nki.interpreter.lint.registers import argument, runtime_body
from jax_tkg.nki.interpreter.lint.sources import Function, own_nodes
from jax_tkg.nki.interpreter.lint.tensors import declared_in, viewed

_KEEPING = ("append", "extend", "insert", "setdefault", "update")


@dataclass(frozen=True)
class _Loop:
    """A runtime loop: where it stands in `function`, and the statements it repeats."""

    node: ast.For | ast.While | ast.Call
    kind: str
    function: Function
    inner: Function
    body: Sequence[ast.stmt]


def check_loops(function: Function) -> Iterator[Found]:
    """The runtime loops of a function."""
    for loop in _runtime_loops(function, function.nodes):
        yield from _deprecated(loop)
        yield from _step(loop)
        yield from _returns(loop)
        yield from _escapes(loop)
    for node in function.nodes:
        if isinstance(node, ast.With) and _is_no_reorder(node, function):
            inside = [n for statement in node.body for n in own_nodes(statement)]
            for loop in _runtime_loops(function, inside):
                message = f"{loop.kind} inside nl.no_reorder(): put no_reorder inside the loop."
                yield Found("loop.no-reorder", loop.node, message)


def _is_no_reorder(node: ast.With, function: Function) -> bool:
    return any(function.called(item.context_expr, "no_reorder") for item in node.items)


def _runtime_loops(function: Function, nodes: Sequence[ast.AST]) -> Iterator[_Loop]:
    for node in nodes:
        if isinstance(node, ast.For) and function.called(node.iter, "dynamic_range"):
            yield _Loop(node, "dynamic_range", function, function, node.body)
        elif isinstance(node, ast.While) and _is_register(node.test, function):
            yield _Loop(node, "while", function, function, node.body)
        elif isinstance(node, ast.Call) and function.called(node, "fori_loop", "while_loop"):
            kind = ast.unparse(node.func).split(".")[-1]
            body = runtime_body(node, function)
            yield _Loop(node, kind, function, body or function, body.node.body if body else [])


def _is_register(node: ast.expr, function: Function) -> bool:
    values = function.assignments.get(node.id, []) if isinstance(node, ast.Name) else []
    return any(v is not None and function.called(v, "register_alloc") for v in values)


def _deprecated(loop: _Loop) -> Iterator[Found]:
    instead = {"dynamic_range": "nl.fori_loop", "while": "nl.while_loop"}.get(loop.kind)
    if instead:
        what = "dynamic_range" if loop.kind == "dynamic_range" else "while on a register"
        message = f"{what}: make the body a function and call {instead}."
        yield Found("loop.deprecated", loop.node, message)


def _step(loop: _Loop) -> Iterator[Found]:
    place = {"dynamic_range": 2, "fori_loop": 3}.get(loop.kind)
    call = loop.node.iter if isinstance(loop.node, ast.For) else loop.node
    if place is None or not isinstance(call, ast.Call):
        return
    step = argument(call, place, "step")
    if step is None:
        return
    number = step.operand if isinstance(step, ast.UnaryOp) else step
    is_bad_constant = isinstance(number, ast.Constant) and (
        isinstance(step, ast.UnaryOp) or type(number.value) is not int or number.value < 1
    )
    if is_bad_constant or _is_register(step, loop.function):
        message = f"step {ast.unparse(step)}: needs a positive int; count up and compute in SBUF."
        yield Found("loop.step", step, message)


def _returns(loop: _Loop) -> Iterator[Found]:
    if loop.inner is loop.function:
        return
    name = loop.inner.node.name
    returns = [n for n in loop.inner.nodes if isinstance(n, ast.Return)]
    values = [n for n in returns if n.value is not None and not _is_none(n.value)]
    if loop.kind == "fori_loop":
        for node in values:
            message = f"{name}, the body of a fori_loop, returns {ast.unparse(node.value or node)}"
            yield Found(
                "loop.body-returns", node, f"{message}: write it to a tensor declared outside."
            )
    elif not values:
        message = f"{name}, the body of a while_loop, returns nothing: return the next condition."
        yield Found("loop.condition", loop.inner.node, message)
    for node in values if loop.kind == "while_loop" else []:
        if isinstance(node.value, ast.Tuple | ast.List | ast.Constant | ast.Compare):
            given = ast.unparse(node.value)
            message = f"{name}, the body of a while_loop, returns {given}: return one register."
            yield Found("loop.condition", node, message)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _escapes(loop: _Loop) -> Iterator[Found]:
    """Tensors of the body that are used after the loop, by name or through what keeps them."""
    tensors = _tensors_of(loop)
    lines = {name: declared.lineno for name, declared in tensors.items()}
    outside = {n: line for n, line in lines.items() if loop.inner is loop.function}
    outside |= _kept(loop, lines)
    for name, line in outside.items():
        used = _used_after(name, loop)
        if used is not None:
            message = (
                f"{name} is used after the {loop.kind} of line {loop.node.lineno}, but holds a "
                f"tensor that line {line} declares in its body: declare the tensor before the loop."
            )
            yield Found("loop.tensor-escapes", used, message)


def _tensors_of(loop: _Loop) -> dict[str, ast.expr]:
    """The names the body binds to tensors it declares, each with the expression."""
    found: dict[str, ast.expr] = {}
    for node in _nodes(loop.body):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value = node.value
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if value is not None and (_makes(value, loop.inner) or viewed(value) in found):
                found |= {t.id: value for t in targets if isinstance(t, ast.Name)}
    return found


def _makes(value: ast.expr, function: Function) -> bool:
    """Whether it declares a tensor, rather than looking at one."""
    is_new = isinstance(value, ast.Call) and viewed(value) is None
    return is_new and bool(declared_in(value, function))


def _kept(loop: _Loop, lines: dict[str, int]) -> dict[str, int]:
    """Names from outside the body in which it keeps its tensors, each with the tensor's line."""
    kept: dict[str, int] = {}
    for node in _nodes(loop.body):
        holder: str | None = None
        values: list[ast.expr] = []
        if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name):
            holder, values = _root(node.targets[0]), [node.value]
        elif isinstance(node, ast.Call) and _keeps(node.func):
            holder, values = _root(node.func), node.args
        for name in [viewed(part) for value in values for part in _elements(value)]:
            if name in lines and holder is not None and holder not in _bound_in(loop.body):
                kept[holder] = lines[name]
    return kept


def _elements(value: ast.expr) -> list[ast.expr]:
    return value.elts if isinstance(value, ast.Tuple | ast.List) else [value]


def _root(node: ast.expr) -> str | None:
    """`c` for `c.tiles[0]`."""
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _keeps(method: ast.expr) -> bool:
    return isinstance(method, ast.Attribute) and method.attr in _KEEPING


def _bound_in(body: Sequence[ast.stmt]) -> set[str]:
    names = [n for n in _nodes(body) if isinstance(n, ast.Name)]
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def _used_after(name: str, loop: _Loop) -> ast.Name | None:
    """The first use of a name after the loop, unless it is bound anew before."""
    end = (loop.node.end_lineno or 0, loop.node.end_col_offset or 0)
    rebound = (10**9, 0)
    for node in loop.function.nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.For) and name in _stores(node):
            # What a statement reads, it reads before it binds.
            place = (node.end_lineno or 0, node.end_col_offset or 0)
            if isinstance(node, ast.For):
                place = (node.lineno, node.col_offset)
            rebound = min(rebound, place) if (node.lineno, node.col_offset) > end else rebound
    uses = [n for n in loop.function.nodes if isinstance(n, ast.Name) and n.id == name]
    after = [n for n in uses if isinstance(n.ctx, ast.Load) and end < _place(n) < rebound]
    return min(after, key=_place, default=None)


def _stores(node: ast.Assign | ast.AnnAssign | ast.For) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def _place(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _nodes(statements: Sequence[ast.stmt]) -> Iterator[ast.AST]:
    for statement in statements:
        yield from own_nodes(statement)
