"""The language checker: each rule with twins, one that breaks it and one that does not.

The twins are in kernels/lint_*.py, where `# breaks: rule` marks each line that is to be reported.
"""

import ast
import functools
import textwrap
from pathlib import Path

import pytest

from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.lint import RULES, Finding, Severity, check

TWINS = sorted((Path(__file__).parent / "kernels").glob("lint_*.py"))


def kernels(path: Path, prefix: str) -> list[str]:
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [f.name for f in functions if f.name.startswith(prefix)]


BROKEN = [(path, name) for path in TWINS for name in kernels(path, "breaks_")]


def marks(path: Path) -> set[tuple[int, str]]:
    lines = [line.partition("# breaks: ")[2] for line in path.read_text().splitlines()]
    return {(number, rule) for number, rules in enumerate(lines, 1) for rule in rules.split()}


def found_in(path: Path, name: str) -> set[tuple[int, str]]:
    return {(finding.line, finding.rule) for finding in check(path, name)}


def rule_of(name: str) -> str:
    slugs = {rule.replace(".", "_").replace("-", "_"): rule for rule in RULES}
    return slugs[name.partition("_")[2].partition("__")[0]]


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_the_marked_lines_are_reported_and_no_others(path: Path) -> None:
    names = [*kernels(path, "breaks_"), *kernels(path, "keeps_")]
    assert set().union(*(found_in(path, name) for name in names)) == marks(path)


@pytest.mark.parametrize(("path", "name"), BROKEN, ids=[name for _, name in BROKEN])
def test_a_rule_tells_its_twins_apart(path: Path, name: str) -> None:
    rule = rule_of(name)
    assert rule in {found for _, found in found_in(path, name)}
    twin = name.replace("breaks_", "keeps_")
    assert rule not in {found for _, found in found_in(path, twin)}


def test_every_rule_has_twins() -> None:
    assert {rule_of(name) for _, name in BROKEN} == set(RULES)


def test_messages_say_what_was_found_and_what_to_write() -> None:
    for path, name in BROKEN:
        for finding in check(path, name):
            assert finding.severity is RULES[finding.rule].severity
            assert ":" in finding.message
            assert finding.message.endswith(".")
            assert finding.column >= 1


HEAD = """
import math
from dataclasses import dataclass
from enum import Enum

import nki
import nki.isa as nisa
import nki.language as nl
from nki.language import NKIObject


class Mode(Enum):
    causal = 1
    full = 2
"""


def written(folder: Path, source: str, name: str = "kernel.py") -> Path:
    path = folder / name
    path.write_text(HEAD + textwrap.dedent(source))
    return path


CLEAN = """
@dataclass
class Tiling(NKIObject):
    rows: int
    columns: int = 512

    def tiles(self, size):
        return math.ceil(size / self.columns)


def scaled(tile, scale, mode: Mode):
    if mode == Mode.causal and scale != None:
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=scale)
    return tile


@nki.jit
def kernel(x, y, scale=None, mode=Mode.causal):
    '''Adds x to y, in tiles.'''
    rows, columns = x.shape
    assert rows <= nl.tile_size.pmax, f"x has {rows} rows, at most {nl.tile_size.pmax} fit."
    tiling = Tiling(rows)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm, name="out")
    acc = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    names = {"x": x, "y": y}
    loaded = []
    for i in range(tiling.tiles(columns)):
        part = nl.ds(i * tiling.columns, tiling.columns)
        for name in names.keys():
            tile = nl.ndarray((rows, tiling.columns), x.dtype, nl.sbuf, name=f"{name}_{i}")
            nisa.dma_copy(dst=tile, src=names[name][:, part])
            loaded.append(scaled(tile, scale, mode))
        nisa.tensor_tensor(dst=loaded[-1], data1=loaded[-2], data2=loaded[-1], op=nl.add)
        nisa.dma_copy(dst=out[:, part], src=loaded[-1])

    count = nisa.register_alloc(4)

    def body(i):
        seen = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=seen, src=x.ap([[columns, rows], [1, 1]], scalar_offset=i))
        nisa.tensor_tensor(dst=acc, data1=acc, data2=seen, op=nl.add)

    nl.fori_loop(0, count, body)
    nisa.dma_copy(dst=out[:, 0:1], src=acc)
    return out
"""


def test_a_realistic_kernel_is_clean(tmp_path: Path) -> None:
    assert check(written(tmp_path, CLEAN)) == ()


def test_helpers_of_the_package_are_followed(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text("from .parts.first import exported as renamed\n")
    (package / "parts" / "__init__.py").write_text("")
    first = written(
        package / "parts",
        "from . import second\n\ndef exported(x):\n    return second.Helper(x)\n",
        "first.py",
    )
    second = written(
        package / "parts",
        """
        class Helper(NKIObject):
            def method(self):
                return [n for n in self.shape]  # breaks: language.comprehension

        def unused(x):
            return lambda: x
        """,
        "second.py",
    )
    kernel = written(
        package,
        """
        from package import renamed
        import package.parts.first as whole

        def kernel(x):
            apply = renamed
            return apply(x)

        def other(x):
            return whole.exported(x)
        """,
    )
    for name in ("kernel", "other"):
        (found,) = check(kernel, name)
        assert found.file == str(second)
        assert {(found.line, found.rule)} == marks(second)
    assert check(first, "exported") == check(kernel, "kernel")


def test_a_helper_next_to_a_script_is_followed(tmp_path: Path) -> None:
    helper = written(tmp_path, "def helper(x):\n    return x is x\n", "beside.py")
    kernel = written(tmp_path, "from beside import helper\n\ndef kernel(x):\n    helper(x)\n")
    (found,) = check(kernel, "kernel")
    assert (found.rule, found.file) == ("language.is", str(helper))


def test_what_a_kernel_does_not_use_is_not_checked(tmp_path: Path) -> None:
    source = """
    def host(x):
        return [n for n in x]

    @nki.jit
    def kernel(x: "host"):
        return x
    """
    assert check(written(tmp_path, source)) == ()


def test_without_a_name_every_launched_kernel_is_checked(tmp_path: Path) -> None:
    source = """
    @nki.jit
    def part(x):
        return nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)

    @nki.jit
    def whole(x):
        tile = part(x)

    @nki.jit(mode="trace")
    def alone(x):
        return nl.ndarray(x.shape, x.dtype, buffer=nl.psum)
    """
    path = written(tmp_path, source)
    (found,) = check(path)
    assert found.rule == "language.output"
    assert "psum" in found.message
    assert "sbuf" in check(path, "part")[0].message


def test_outputs_that_may_be_shared_are_let_through(tmp_path: Path) -> None:
    source = """
    def kernel(x, in_sbuf):
        if in_sbuf:
            y = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
        else:
            y = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        return y
    """
    assert check(written(tmp_path, source), "kernel") == ()


def test_recursion_ends(tmp_path: Path) -> None:
    source = """
    def one(x, n):
        return two(x, n)

    def two(x, n):
        y = one(y, n)
        return y

    def kernel(x, n):
        for i in nl.dynamic_range(n):
            one(x, i)
        return one(x, n)
    """
    assert [f.rule for f in check(written(tmp_path, source), "kernel")] == ["loop.deprecated"]


def sample(x, flag):
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    return tile[0:64] if flag is True else tile


def test_a_function_object_is_read_from_its_file() -> None:
    @functools.wraps(sample)
    def wrapped(*args):
        return sample(*args)

    first = sample.__code__.co_firstlineno
    for kernel in (sample, wrapped, functools.partial(sample, flag=True)):
        found = check(kernel)
        assert [(f.rule, f.line) for f in found] == [
            ("language.output", first + 3),
            ("language.is", first + 3),
        ]
        assert all(f.file == __file__ for f in found)


def test_a_function_inside_a_function_is_found() -> None:
    def inner(x):
        return lambda: x

    (found,) = check(inner)
    assert found.rule == "language.lambda"
    assert found.line == inner.__code__.co_firstlineno + 1


def test_the_kernel_is_not_run(tmp_path: Path) -> None:
    source = """
    raise SystemExit

    def kernel(x):
        return x
    """
    assert check(written(tmp_path, source), "kernel") == ()


def test_a_kernel_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "def helper(x):\n    return x\n")
    with pytest.raises(ValueError, match="no function absent; its functions: helper"):
        check(path, "absent")
    with pytest.raises(ValueError, match=r"no function decorated with nki\.jit"):
        check(path)


def test_a_finding_reads_like_a_compiler_error() -> None:
    found = Finding("kernel.py", 3, 5, "language.is", "`a is b`: write `a == b`.")
    assert str(found) == "kernel.py:3:5: refused: `a is b`: write `a == b`. [language.is]"


def test_severities_say_what_is_known() -> None:
    assert RULES["language.keyword-only"].severity is Severity.REFUSED
    assert RULES["language.comprehension"].severity is Severity.UNPROVEN
    assert RULES["loop.deprecated"].severity is Severity.DEPRECATED
    assert all(rule.reason.endswith(".") and rule.source for rule in RULES.values())
