"""Parsed modules, and what a name in a function stands for. Nothing is imported or run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

Def: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
_DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)

# The interpreter stands in for the nki package: kernels name it, the checker does not read it.
_INTERPRETER = Path(__file__).resolve().parent.parent
_NKI_MODULES = {"nki", "interpreter", "language", "nl", "isa", "nisa", "collectives", "typing"}


@dataclass(frozen=True)
class External:
    """Something outside the sources that are read, such as `nki.language.ndarray`."""

    name: str


@dataclass(frozen=True, eq=False)
class Class:
    """A class of a kernel's package."""

    node: ast.ClassDef
    module: "Module"

    def base_names(self) -> list[str]:
        """The last part of the name of each base."""
        return [ast.unparse(base).split("[")[0].split(".")[-1] for base in self.node.bases]

    @property
    def is_enum(self) -> bool:
        """Whether it inherits Enum."""
        return "Enum" in self.base_names()

    def methods(self) -> list["Function"]:
        """Its functions."""
        return [self.module.functions[n] for n in self.node.body if isinstance(n, _DEFS)]


@dataclass(frozen=True, eq=False)
class Function:
    """A function of a kernel's package, and the function it is written in, if any."""

    node: Def
    module: "Module"
    outer: "Function | None" = None

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of its body, without annotations and the insides of nested definitions."""
        return [node for statement in self.node.body for node in own_nodes(statement)]

    @cached_property
    def assignments(self) -> dict[str, list[ast.expr | None]]:
        """Each local name with all that is assigned to it; None where that is not one value."""
        bound: dict[str, list[ast.expr | None]] = {a.arg: [None] for a in parameters(self.node)}
        for node in self.nodes:
            for name, value in _bindings(node):
                bound.setdefault(name, []).append(value)
        return bound

    @cached_property
    def nested(self) -> dict[str, "Function"]:
        """The functions written in it."""
        found = [node for node in self.nodes if isinstance(node, _DEFS)]
        return {node.name: self.module.functions[node] for node in found}

    def resolve(self, expression: ast.expr) -> "Resolved":
        """What a name or dotted name in its body stands for, None if that is not visible."""
        if isinstance(expression, ast.Name):
            scope: Function | None = self
            while scope is not None:
                if expression.id in scope.nested:
                    return scope.nested[expression.id]
                if expression.id in scope.assignments:
                    return None
                scope = scope.outer
            return self.module.lookup(expression.id)
        if isinstance(expression, ast.Attribute):
            return _attribute(self.resolve(expression.value), expression.attr)
        return None

    def api(self, expression: ast.expr) -> str | None:
        """`ndarray` for `nl.ndarray`: the last part of a name that comes from nki."""
        found = self.resolve(expression)
        parts = found.name.split(".") if isinstance(found, External) else []
        from_nki = len(parts) > 1 and (parts[0] == "nki" or parts[-2] in _NKI_MODULES)
        return parts[-1] if from_nki else None

    def called(self, node: ast.AST, *names: str) -> bool:
        """Whether a node calls one of these functions of nki."""
        return isinstance(node, ast.Call) and self.api(node.func) in names


@dataclass(frozen=True, eq=False)
class Module:
    """A parsed file."""

    path: Path
    tree: ast.Module
    sources: "Sources"

    @cached_property
    def names(self) -> dict[str, ast.stmt | ast.expr | None]:
        """What the module's own statements bind: definitions, imports, values."""
        found: dict[str, ast.stmt | ast.expr | None] = {}
        for node in own_nodes(self.tree):
            if isinstance(node, (*_DEFS, ast.ClassDef)):
                found.setdefault(node.name, node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    found.setdefault(alias.asname or alias.name.split(".")[0], node)
            else:
                for name, value in _bindings(node):
                    found.setdefault(name, value)
        return found

    @cached_property
    def functions(self) -> dict[ast.AST, Function]:
        """All functions of the file by their nodes, nested ones and methods too."""
        found: dict[ast.AST, Function] = {}

        def visit(node: ast.AST, outer: Function | None) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, _DEFS):
                    found[child] = Function(child, self, outer)
                visit(child, found.get(child, outer))

        visit(self.tree, None)
        return found

    def lookup(self, name: str, seen: frozenset[str] = frozenset()) -> "Resolved":
        """What a name of the module stands for."""
        found = self.names.get(name)
        if isinstance(found, _DEFS):
            return self.functions[found]
        if isinstance(found, ast.ClassDef):
            return Class(found, self)
        if isinstance(found, ast.Import | ast.ImportFrom):
            return self._imported(found, name)
        if isinstance(found, ast.Call) and len(found.args) == 1:
            # `kernel = nki.jit(function)`
            jit = ast.unparse(found.func).split(".")[-1] == "jit"
            found = found.args[0] if jit else None
        if isinstance(found, ast.Name) and found.id not in seen:
            return self.lookup(found.id, seen | {name})
        if isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name):
            base = self.lookup(found.value.id, seen | {name}) if found.value.id != name else None
            return _attribute(base, found.attr)
        return None

    def _imported(self, node: ast.Import | ast.ImportFrom, name: str) -> "Resolved":
        alias = next(a for a in node.names if name in (a.asname, a.name.split(".")[0], a.name))
        if isinstance(node, ast.Import):
            dotted = alias.name if alias.asname else alias.name.split(".")[0]
            return self.sources.find(self.path, dotted, 0)
        base = self.sources.find(self.path, node.module or "", node.level)
        return _attribute(base, alias.name)


Resolved: TypeAlias = Function | Class | Module | External | None


@dataclass(frozen=True)
class Sources:
    """The files read so far, and where imports lead."""

    _modules: dict[Path, Module] = field(default_factory=dict)
    _imports: dict[tuple[Path, str, int], Module | External] = field(default_factory=dict)

    def open(self, path: Path, text: str | None = None) -> Module:
        """The module in a file, or in the text given for it."""
        path = path.resolve()
        if path not in self._modules:
            text = path.read_text(encoding="utf-8") if text is None else text
            self._modules[path] = Module(path, ast.parse(text, str(path)), self)
        return self._modules[path]

    def find(self, importer: Path, dotted: str, level: int) -> Module | External:
        """What a module's import names: a file of its package, or something outside it."""
        key = (importer, dotted, level)
        if key not in self._imports:
            self._imports[key] = self._find(importer, dotted, level)
        return self._imports[key]

    def _find(self, importer: Path, dotted: str, level: int) -> Module | External:
        directory = importer.parents[level - 1] if level else _root(importer)
        place = directory.joinpath(*dotted.split(".")) if dotted else directory
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            inside = dotted.split(".")[0] != "nki" and not path.is_relative_to(_INTERPRETER)
            if inside and path.exists():
                return self.open(path)
        if level:
            dotted = f"{directory.name}.{dotted}" if dotted else directory.name
        return External(dotted)


def _root(path: Path) -> Path:
    """The folder that holds a file's outermost package, or the file itself."""
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def _attribute(base: Resolved, name: str) -> Resolved:
    if isinstance(base, External):
        return External(f"{base.name}.{name}")
    if isinstance(base, Class):
        return next((m for m in base.methods() if m.node.name == name), None)
    if isinstance(base, Module):
        found = base.lookup(name)
        is_package = base.path.name == "__init__.py"
        return found if found or not is_package else base.sources.find(base.path, name, 1)
    return None


def parameters(node: Def | ast.Lambda) -> list[ast.arg]:
    """All parameters, in order."""
    a = node.args
    stars = [arg for arg in (a.vararg, a.kwarg) if arg is not None]
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *stars]


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below it, without annotations and the insides of definitions."""
    yield node
    if isinstance(node, (*_DEFS, ast.ClassDef)):
        return
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name != "annotation":
                yield from own_nodes(child)


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """The names a node binds, each with its value if that is one expression."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _targets(target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
        yield from _targets(node.target, node.value)
    elif isinstance(node, ast.For | ast.AsyncFor | ast.AugAssign | ast.comprehension):
        yield from _targets(node.target, None)
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield from _targets(node.optional_vars, None)
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name, None
    elif isinstance(node, ast.Lambda):
        for argument in parameters(node):
            yield argument.arg, None


def _targets(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, ast.expr | None]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple | ast.List):
        pairs = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
        values = value.elts if pairs else [None] * len(target.elts)  # type: ignore[union-attr]
        for element, part in zip(target.elts, values, strict=True):
            yield from _targets(element, part)
    elif isinstance(target, ast.Starred):
        yield from _targets(target.value, None)
