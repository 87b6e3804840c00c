"""Choosing among the implementations of an op: names, the order they are tried in, the reasons.

An implementation is an object with a `name` and `why_not(problem, target)`, which returns None or
the reason why it cannot do a problem on a target. The first of those tried that can is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from jax_tkg.online.plan import Target


@runtime_checkable
class Candidate(Protocol):
    """What can be chosen."""

    @property
    def name(self) -> str:
        """Its name in `implementation=` and in reports."""

    def why_not(self, problem: Any, target: Target) -> str | None:
        """None if it can do this problem on this target, else the reason in words."""


One = TypeVar("One", bound=Candidate)


@dataclass(frozen=True)
class Choice(Generic[One]):
    """What runs, and why what came before it did not.

    Attributes:
        chosen: the implementation, None if none can do it.
        rejected: pairs (name, reason) in the order tried.
        what: is to be done, in words.
    """

    chosen: One | None
    rejected: tuple[tuple[str, str], ...]
    what: str = "attention call"

    def require(self) -> One:
        """The chosen implementation.

        Raises:
            NotImplementedError: if the only one asked for cannot do the case; with its reason.
            ExceptionGroup: of NotImplementedErrors, if none of several can.
        """
        if self.chosen is not None:
            return self.chosen
        errors = [NotImplementedError(f"{name}: {reason}") for name, reason in self.rejected]
        if len(errors) == 1:
            raise errors[0]
        raise ExceptionGroup(f"no implementation can do this {self.what}", errors)


def choose(
    problem: Any, target: Target, tried: Sequence[One], what: str = "attention call"
) -> Choice[One]:
    """The first of `tried` that can do the problem on the target."""
    rejected: list[tuple[str, str]] = []
    for implementation in tried:
        reason = implementation.why_not(problem, target)
        if reason is None:
            return Choice(implementation, tuple(rejected), what)
        rejected.append((implementation.name, reason))
    return Choice(None, tuple(rejected), what)


def candidates(
    given: "str | One | Sequence[str | One] | None",
    named: Mapping[str, One],
    default: tuple[One, ...],
    kind: Any,
) -> tuple[One, ...]:
    """Reads `implementation=`: None, a name, an implementation, or a sequence of those.

    Args:
        given: by the caller.
        named: those that have a name.
        default: for None.
        kind: the class, or runtime-checkable protocol, of an implementation.

    Raises:
        ValueError: for an unknown name or an empty sequence.
        TypeError: for anything else.
    """
    if given is None:
        return default
    if isinstance(given, str) or not isinstance(given, Sequence):
        given = (given,)
    if not given:
        raise ValueError("implementation is an empty sequence; leave it out to try the defaults.")
    return tuple(_named(one, named, kind) for one in given)


def _named(given: "str | One", named: Mapping[str, One], kind: Any) -> One:
    if not isinstance(given, str):
        if isinstance(given, kind):
            return given
        raise TypeError(
            f"implementation must be None, a name, an {kind.__name__}, or a sequence of these; "
            f"got {given!r}."
        )
    if given not in named:
        known = ", ".join(repr(n) for n in named)
        raise ValueError(f"unknown implementation {given!r}; there are {known}.")
    return named[given]
