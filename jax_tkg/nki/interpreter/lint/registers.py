"""Where registers go, and what a kernel does with them that only the device could.

A register is followed through assignments, into the functions it is passed to and into the bodies
of loops; one pass over each function for each way it is called.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from jax_tkg.nki.interpreter.lint.constructs import Found
from jax_tkg.nki.interpreter.lint.sources import Function

_NUMERIC = ("abs", "bool", "divmod", "float", "int", "max", "min", "range", "round")


@dataclass(frozen=True)
class Register:
    """A register: where it comes from, and whether a loop owns it."""

    origin: str
    of_loop: bool


Registers: TypeAlias = dict[str, Register]


def check_registers(kernel: Function) -> Iterator[tuple[Function, Found]]:
    """What a kernel and the functions it calls do with registers."""
    waiting: list[tuple[Function, Registers]] = [(kernel, {})]
    done: set[tuple[Function, frozenset[tuple[str, Register]]]] = set()
    while waiting:
        function, registers = waiting.pop()
        key = (function, frozenset(registers.items()))
        if key not in done:
            done.add(key)
            flow = _Flow(function, dict(registers))
            flow.block(function.node.body)
            yield from ((function, found) for found in flow.found)
            waiting += flow.calls


@dataclass
class _Flow:
    """A pass over the statements of one function, in order."""

    function: Function
    registers: Registers
    found: list[Found] = field(default_factory=list)
    calls: list[tuple[Function, Registers]] = field(default_factory=list)

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            self.expression(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.bind(target, self.register(node.value))
        elif isinstance(node, ast.AugAssign):
            self.refuse_in(node, node.target, node.value)
            self.expression(node.value)
        elif isinstance(node, ast.For):
            self.loop(node)
        elif isinstance(node, ast.While):
            if not isinstance(node.test, ast.Name):
                self.expression(node.test)
            self.branches([node.body, node.orelse])
        elif isinstance(node, ast.If):
            self.refuse_in(node.test, node.test)
            self.expression(node.test)
            self.branches([node.body, node.orelse])
        elif isinstance(node, ast.With):
            for item in node.items:
                self.expression(item.context_expr)
            self.block(node.body)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.expression(child)

    def loop(self, node: ast.For) -> None:
        register = None
        if self.function.called(node.iter, "dynamic_range"):
            register = Register(f"the dynamic_range of line {node.lineno}", True)
        self.expression(node.iter)
        self.bind(node.target, register)
        self.branches([node.body, node.orelse])

    def branches(self, bodies: list[list[ast.stmt]]) -> None:
        """Blocks of which any may run: afterwards a name may hold what any of them left."""
        before, after = self.registers, dict(self.registers)
        for body in bodies:
            self.registers = dict(before)
            self.block(body)
            after |= self.registers
        self.registers = after

    def bind(self, target: ast.expr, register: Register | None) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                self.registers.pop(name.id, None)
        if isinstance(target, ast.Name) and register is not None:
            self.registers[target.id] = register

    def register(self, node: ast.expr | None) -> Register | None:
        """The register an expression stands for, if any."""
        if isinstance(node, ast.Name):
            return self.registers.get(node.id)
        if node is not None and self.function.called(node, "register_alloc"):
            return Register(f"the register_alloc of line {node.lineno}", False)
        return None

    def expression(self, node: ast.expr | None) -> None:
        for part in ast.walk(node) if node is not None else ():
            if isinstance(part, ast.BinOp):
                self.refuse_in(part, part.left, part.right)
            elif isinstance(part, ast.UnaryOp):
                self.refuse_in(part, part.operand)
            elif isinstance(part, ast.BoolOp):
                self.refuse_in(part, *part.values)
            elif isinstance(part, ast.IfExp):
                self.refuse_in(part, part.test)
            elif isinstance(part, ast.Compare) and not _with_none(part):
                self.refuse_in(part, part.left, *part.comparators)
            elif isinstance(part, ast.Call):
                self.call(part)

    def refuse_in(self, node: ast.AST, *operands: ast.expr) -> None:
        for operand in operands:
            register = self.register(operand)
            if register is not None:
                message = (
                    f"`{ast.unparse(node)}` computes with the register {ast.unparse(operand)} of "
                    f"{register.origin}: compute in SBUF and register_load, or use the register "
                    "as a scalar_offset or an index."
                )
                self.found.append(Found("register.arithmetic", node, message))
                return

    def call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _NUMERIC:
            self.refuse_in(node, *node.args)
        elif self.function.called(node, "register_move", "register_load"):
            self.write(node)
        elif self.function.called(node, "fori_loop", "while_loop"):
            body = runtime_body(node, self.function)
            arguments = body.node.args.args if body else []
            if body is not None and arguments:
                what = ast.unparse(node.func).split(".")[-1]
                register = Register(f"the {what} of line {node.lineno}", what == "fori_loop")
                self.enter(body, {arguments[0].arg: register})
        else:
            called = self.function.resolve(node.func)
            if isinstance(called, Function):
                self.enter(called, self.arguments(node, called))

    def write(self, node: ast.Call) -> None:
        target = argument(node, 0, "dst")
        register = self.register(target)
        if target is not None and register is not None and register.of_loop:
            message = (
                f"writes to {ast.unparse(target)}, the register of {register.origin}: use one made "
                "by register_alloc."
            )
            self.found.append(Found("register.induction", node, message))

    def arguments(self, node: ast.Call, called: Function) -> Registers:
        """The callee's parameters that receive registers."""
        names = [a.arg for a in called.node.args.args]
        given = list(zip(names, node.args, strict=False))
        given += [(k.arg, k.value) for k in node.keywords if k.arg is not None]
        found = {name: self.register(value) for name, value in given}
        return {name: register for name, register in found.items() if register is not None}

    def enter(self, called: Function, registers: Registers) -> None:
        """A call; a nested function sees the caller's registers too, unless it hides them."""
        seen = {}
        if called.outer is self.function:
            seen = {n: r for n, r in self.registers.items() if n not in called.assignments}
        self.calls.append((called, seen | registers))


def runtime_body(node: ast.Call, function: Function) -> Function | None:
    """The function that a fori_loop or while_loop runs."""
    position = 2 if function.called(node, "fori_loop") else 1
    body = argument(node, position, "body_fun")
    found = function.resolve(body) if body is not None else None
    return found if isinstance(found, Function) else None


def argument(node: ast.Call, position: int, name: str) -> ast.expr | None:
    """An argument of a call, given by place or by name."""
    if len(node.args) > position:
        return node.args[position]
    return next((k.value for k in node.keywords if k.arg == name), None)


def _with_none(node: ast.Compare) -> bool:
    sides = (node.left, *node.comparators)
    return any(isinstance(side, ast.Constant) and side.value is None for side in sides)
