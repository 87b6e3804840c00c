"""What the interpreter raises: each message names the kernel's line, rule, values, way out."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_HERE = str(Path(__file__).parent) + os.sep
_CHECKERS = ("jaxtyping", "beartype")  # where they check annotations, their frames lie between


@dataclass(frozen=True)
class Source:
    """A line of a kernel."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """`kernel.py:12 in name`."""
        return f"{Path(self.file).name}:{self.line} in {self.function}"


def kernel_line() -> Source:
    """The innermost line outside the interpreter: the kernel's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_filename.startswith(_HERE)
        or str(frame.f_globals.get("__name__")).startswith(_CHECKERS)
    ):
        frame = frame.f_back
    if frame is None:
        return Source("?", 0, "?")
    return Source(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


class NkiError(Exception):
    """Anything a kernel did that the interpreter refuses.

    Attributes:
        rule: a short stable name of the rule, such as `matmul.moving-free-size`.
        sources: the lines of the kernel that are involved, the guilty one first.
    """

    def __init__(self, rule: str, message: str, *sources: Source) -> None:
        self.rule = rule
        self.sources = sources or (kernel_line(),)
        super().__init__(f"{self.sources[0]}: {message} [{rule}]")


class NkiValidationError(NkiError):
    """A shape, dtype, engine, buffer or argument that the hardware does not take."""


class OutOfBoundsError(NkiError):
    """An access pattern that leaves its tensor."""


class UninitializedReadError(NkiError):
    """A read of memory that was never written."""


class DeadTensorError(NkiError):
    """A read of a tensor whose memory another tensor has since overwritten."""


class CapacityError(NkiError):
    """More SBUF or PSUM than there is."""


class DeadlockError(NkiError):
    """Programs that wait for each other, or for one that has ended."""


class DivergenceError(NkiError):
    """Two programs of a launch whose loops on the device or shared tensors differ."""


class DataRaceError(NkiError):
    """Two programs that touch the same HBM with no barrier between, one of them writing."""
