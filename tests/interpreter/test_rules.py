"""No detector without a test: every rule in the sources is named by a test of this directory."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from jax_tkg.nki import interpreter

SOURCES = Path(interpreter.__file__).parent
TESTS = {f.name: f.read_text() for f in Path(__file__).parent.glob("test_*.py")}
del TESTS[Path(__file__).name]
ERRORS = {name for name in dir(interpreter) if name.endswith("Error")}
LETTERS = r"[\w{}.]+"  # what an f-string fills in, or the braces of one


def text_of(node: ast.expr) -> str | None:
    """A string, with "*" for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else "*" for p in node.values)
        return "".join(map(str, parts))
    return None


def instructions_in(module: ast.Module) -> list[str]:
    """The functions that are instructions: `Step.refuse` puts their name before the rule."""
    return [
        node.name
        for node in module.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "instruction" for d in node.decorator_list)
    ]


def rules_in(module: ast.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """Rules that a source file can raise, and the operations that may stand before them."""
    operations = tuple(instructions_in(module)) or ("*",)
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        called = node.func.id if isinstance(node.func, ast.Name) else called
        texts = [text_of(argument) for argument in node.args]
        if called in ERRORS and texts and texts[0]:
            operation, _, rule = texts[0].partition(".")
            if rule and not set(rule) <= {"*"}:
                yield operations if operation == "*" else (operation,), rule
        elif called == "refuse" and len(texts) == 3 and texts[1]:  # of nki.language
            yield (texts[0] or "*",), texts[1]
        elif called in ("refuse", "_refuse") and len(texts) == 2 and texts[0]:
            yield ("view",) if called == "_refuse" else operations, texts[0]


def is_named(operation: str, rule: str, text: str) -> bool:
    """A test file names the whole rule, or the rule and the operation each by itself."""
    name, word = (re.escape(x).replace(r"\*", LETTERS) for x in (rule, operation))
    whole = re.search(rf"{word}\.{name}[\"']", text)
    apart = re.search(rf"[\"']{name}[\"']", text) and re.search(rf"\b{word}\b", text)
    return bool(whole or apart)


def all_rules() -> dict[tuple[tuple[str, ...], str], str]:
    return {
        rule: str(file.relative_to(SOURCES))
        for file in sorted(SOURCES.rglob("*.py"))
        if "lint" not in file.parts
        for rule in rules_in(ast.parse(file.read_text()))
    }


def test_every_rule_is_tested() -> None:
    untested = {
        f"{'|'.join(operations)}.{rule}": file
        for (operations, rule), file in all_rules().items()
        if not any(is_named(o, rule, text) for o in operations for text in TESTS.values())
    }
    assert not untested, f"rules that no test in {Path(__file__).parent} names: {untested}"


def test_the_search_finds_rules() -> None:
    rules = all_rules()
    assert len(rules) > 80
    assert (("memory",), "dead-tensor") in rules
    assert (("dma_copy", "dma_transpose"), "run-time-index") in rules
    assert (("view",), "permute") in rules
    assert (("*",), "start-partition") in rules
    assert not any(is_named("dma_copy", "no-such-rule", text) for text in TESTS.values())
