"""The rules of the kernel language: what each refuses, why, and where that is written."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Severity(Enum):
    """How sure it is that the compiler does not take it."""

    REFUSED = "refused"
    """The documents say so, or it is no part of the language they define."""
    UNPROVEN = "unproven"
    """No document and no public kernel shows it, or the two disagree."""
    DEPRECATED = "deprecated"
    """Accepted today; the documents announce its end."""


class Rule(NamedTuple):
    """One row of `RULES`."""

    severity: Severity
    reason: str
    source: str


@dataclass(frozen=True, order=True)
class Finding:
    """One place that breaks a rule.

    Attributes:
        file: where it is.
        line: from 1.
        column: from 1.
        rule: a key of `RULES`.
        message: what was found, and what to write instead.
    """

    file: str
    line: int
    column: int
    rule: str
    message: str

    @property
    def severity(self) -> Severity:
        """The severity of its rule."""
        return RULES[self.rule].severity

    def __str__(self) -> str:
        """`kernel.py:12:5: refused: message [rule]`."""
        where = f"{self.file}:{self.line}:{self.column}"
        return f"{where}: {self.severity.value}: {self.message} [{self.rule}]"


_GUIDE = "NKI language guide"
_MIGRATION_3 = "migration guide, 0.2 to 0.3"
_MIGRATION_6 = "migration guide, 0.5 to 0.6"
_ABSENT = "in neither the NKI language guide nor a kernel of nki-library of 2026-04-13"

_R, _U, _D = Severity.REFUSED, Severity.UNPROVEN, Severity.DEPRECATED

RULES: dict[str, Rule] = {
    # Signatures
    "language.keyword-only": Rule(_R, "No keyword-only parameters.", _MIGRATION_3),
    "language.positional-only": Rule(_U, "No public kernel has a `/` in its signature.", _ABSENT),
    "language.list-argument": Rule(_R, "Lists are no kernel arguments.", _MIGRATION_3),
    "language.star-arguments": Rule(
        _U,
        "Public kernels write every parameter and argument out.",
        "nki-library of 2026-04-13: only in its host-side launch wrappers",
    ),
    "language.decorator": Rule(
        _U,
        "Public kernels decorate functions with nki.jit and staticmethod only.",
        "nki-library of 2026-04-13: 54 nki.jit, 18 staticmethod, no other inside a kernel",
    ),
    # Comparisons
    "language.is": Rule(_R, "Object identity means nothing to the compiler.", _MIGRATION_3),
    "language.is-none": Rule(
        _U,
        "The documents refuse `is` without exception; the kernels published with them use it, "
        "with None only.",
        f"{_MIGRATION_3}, against 318 uses in nki-library of 2026-04-13, all with None",
    ),
    "language.enum-operator": Rule(_R, "Enum members have == and != only.", _GUIDE),
    "language.membership": Rule(
        _U,
        "`in` is proven for tuples, lists and strings only.",
        "nki-library of 2026-04-13: 71 uses, in kernels none on a dict, a set or an Enum class",
    ),
    # Values
    "language.value": Rule(
        _R, "Values are None, bool, 32-bit int, 32-bit float, str and tensors.", _GUIDE
    ),
    "language.dict-key": Rule(_R, "The keys of a dict are strings.", _GUIDE),
    "language.set": Rule(_U, "The guide's containers are tuple, list and dict.", _ABSENT),
    "language.fstring-format": Rule(
        _U,
        "No public f-string has a format specification.",
        "nki-library of 2026-04-13: 962 f-strings, none with one",
    ),
    # Expressions
    "language.comprehension": Rule(_U, "No public kernel has a comprehension.", _ABSENT),
    "language.generator": Rule(_U, "No public kernel has a generator expression.", _ABSENT),
    "language.lambda": Rule(_U, "No public kernel has a lambda.", _ABSENT),
    "language.walrus": Rule(_U, "No public kernel has a `:=`.", _ABSENT),
    "language.builtin": Rule(
        _U,
        "Public kernels call dict, divmod, float, int, isinstance, len, list, max, min, print, "
        "range, str and tuple.",
        _ABSENT,
    ),
    "language.library": Rule(
        _U,
        "Public kernels call nki, math and their own package.",
        "NKI language guide: not all libraries are supported; nki-library uses math alone",
    ),
    # Statements
    "language.import": Rule(_R, "Imports belong to the module.", _ABSENT),
    "language.nested-class": Rule(_R, "Classes belong to the module.", _ABSENT),
    "language.async": Rule(_R, "There are no coroutines.", _ABSENT),
    "language.yield": Rule(_R, "There are no generators: calls are inlined.", _ABSENT),
    "language.match": Rule(_R, "Branches are written with if.", _ABSENT),
    "language.del": Rule(_R, "Names are not deleted.", _ABSENT),
    "language.global": Rule(
        _U, "Kernels are pure functions of their arguments.", f"{_GUIDE}, kernel caching"
    ),
    "language.with": Rule(_U, "The one documented context is nl.no_reorder().", "API, no_reorder"),
    "language.try": Rule(_U, "Nothing is raised or caught at run time.", _ABSENT),
    "language.raise": Rule(_U, "Public kernels assert.", _ABSENT),
    "language.loop-else": Rule(_U, "No public loop has an else.", _ABSENT),
    # Classes
    "language.class-base": Rule(
        _R, "Classes inherit NKIObject and nothing else, or are simple Enums.", _GUIDE
    ),
    # The interface
    "language.output": Rule(_R, "Outputs are declared in shared_hbm.", _MIGRATION_3),
    "language.string-buffer": Rule(_R, "Buffers are objects, not names.", _MIGRATION_3),
    "language.integer-enum": Rule(_R, "Enum parameters take members, not numbers.", _MIGRATION_3),
    "language.old-namespace": Rule(
        _R, "neuronxcc.nki does not compile any more.", "migration guide, 0.3 to 0.4"
    ),
    # Loops that run on the device
    "register.arithmetic": Rule(
        _R, "A register has no value while the kernel is compiled.", _MIGRATION_6
    ),
    "register.induction": Rule(_R, "The register of a loop is read-only.", _MIGRATION_6),
    "loop.tensor-escapes": Rule(
        _R, "A tensor declared in the body of a runtime loop ends with it.", _MIGRATION_6
    ),
    "loop.body-returns": Rule(_R, "The body of a fori_loop returns nothing.", _MIGRATION_6),
    "loop.condition": Rule(
        _R, "The body of a while_loop returns the next condition register.", _MIGRATION_6
    ),
    "loop.step": Rule(_R, "The step of a loop is a positive int.", _MIGRATION_6),
    "loop.no-reorder": Rule(_R, "No runtime loop inside nl.no_reorder().", _MIGRATION_6),
    "loop.deprecated": Rule(
        _D, "dynamic_range and `while register:` are going away.", _MIGRATION_6
    ),
}
