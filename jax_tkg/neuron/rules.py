"""The rules: what Neuron cannot run, and where that is written."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Severity = Literal["error", "warning"]

_KNOWN_ISSUES = "AWS Neuron, JAX NeuronX known issues"


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that Neuron cannot run.

    Attributes:
        severity: "error", or "warning" where it depends on the compiler's version or on values.
        refused: What it is.
        source: Who says so; NCC_ names are those of the Neuron compiler's documented errors.
    """

    severity: Severity
    refused: str
    source: str


def _error(refused: str, source: str = _KNOWN_ISSUES) -> Rule:
    return Rule("error", refused, source)


def _warning(refused: str, source: str = _KNOWN_ISSUES) -> Rule:
    return Rule("warning", refused, source)


RULES = MappingProxyType(
    {
        # Control flow and the host.
        "conditional": _error("branches: lax.cond, lax.switch"),
        "dynamic-loop": _error("loops whose trip count is not a constant"),
        "host-callback": _error("calls of the host: callbacks, debug prints, infeed and outfeed"),
        "custom-call": _error("custom calls of targets it does not know", "NCC_EVRF015"),
        "no-lowering": _error(
            "operations that JAX lowers for other platforms only", "JAX refuses to lower them"
        ),
        # Random numbers.
        "threefry": _error("threefry keys, also where rbg keys are split"),
        "random-algorithm": _error("random bits by a named algorithm", "NCC_EVRF006"),
        # Operations.
        "multi-operand-sort": _error("sorting several arrays by one, as argsort does"),
        "sort-comparator": _error("sorting by anything but one of <, <=, >, >="),
        "float-sort": _warning("sorting floats: JAX's comparator also asks for zero and NaN"),
        "variadic-reduce": _error(
            "reductions of several arrays at once, as in argmax",
            f"{_KNOWN_ISSUES}; NCC_EVRF019",
        ),
        "fft": _error("Fourier transforms", "no such operator; NCC_EVRF001"),
        "decomposition": _error(
            "Cholesky decompositions and triangular solves", "no such operator; NCC_EVRF001"
        ),
        "reduce-precision": _error("lax.reduce_precision"),
        "narrow-shift": _error("arithmetic right shifts of other than 32 bits", "NCC_EVRF022"),
        "chlo": _warning(
            "CHLO operations, such as erf and top_k: the compiler's plugin must replace them",
            "not documented; the compiler has custom calls for erf and top_k",
        ),
        # Integers where the hardware computes in floating point.
        "integer-dot": _error("dots and convolutions of integers", f"{_KNOWN_ISSUES}; NCC_EVRF035"),
        "integer-scatter": _error(
            "scatters that combine integers or booleans; overwriting is fine",
            "NCC_EVRF016, NCC_EVRF060",
        ),
        "integer-collective": _error(
            "sums of 32 and 64-bit integers across devices", "NCC_EVRF061, NCC_EVRF063"
        ),
        "integer-top-k": _error("top_k of integers", "NCC_EVRF013"),
        # Types and shapes.
        "dynamic-shape": _error("shapes that are not constants", "NCC_EMOD025"),
        "float8": _error(
            "8-bit floats other than float8_e4m3 and float8_e5m2, and narrower ones; "
            "float8_e4m3fn from trn3 on",
            f"{_KNOWN_ISSUES}; NCC_EVRF005, NCC_EVRF051, NCC_ESPP004",
        ),
        "float64": _error("double precision", "AWS Neuron, data types"),
        "complex": _error("complex numbers", f"{_KNOWN_ISSUES}; NCC_EVRF004"),
        # Indices.
        "out-of-bounds": _error(
            "gathers and scatters whose indices are known to reach beyond the array",
            "NCC_EVRF031, NCC_EVRF056",
        ),
        "out-of-bounds-fill": _warning(
            'gathers that ask for mode="fill", as jnp.take does: an index out of bounds can stop '
            "the program",
        ),
    }
)
"""What is looked for, by the name of the rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a program that breaks a rule.

    Attributes:
        rule: A key of `RULES`.
        operation: The StableHLO operation, or the JAX primitive where lowering stops at it.
        message: What was found, and what to do instead.
        location: "file:line" of the innermost frame of the user's code; empty if not known.
    """

    rule: str
    operation: str
    message: str
    location: str

    @property
    def severity(self) -> Severity:
        """That of the rule."""
        return RULES[self.rule].severity

    def __str__(self) -> str:
        where = self.location or "<unknown>"
        return f"{where}: {self.severity}: {self.operation}: {self.message} [{self.rule}]"
