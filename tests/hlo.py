"""Reads compiled programs: does anything of a cache's size happen to the caches but updates?"""

from __future__ import annotations

import math
import re
from typing import Any

import jax

# What moves no data, or (dynamic-update-slice) only the slice. The instructions inside a fusion or
# a called computation are in the text as well and are judged on their own.
IN_PLACE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "dynamic-update-slice"),
    *("while", "fusion", "call"),
}

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][a-z0-9-]*)\(", re.MULTILINE)
_SHAPE = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")


def operations_of_size(text: str, elements: int) -> set[str]:
    """Opcodes of a compiled program's instructions that produce an array of that size or more."""
    found = set()
    for result, opcode in _INSTRUCTION.findall(text):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in _SHAPE.findall(result)]
        if max(sizes, default=0) >= elements:
            found.add(opcode)
    return found


def cache_copies(compiled: Any, caches: Any) -> list[str]:
    """Why a compiled program does not update these caches in place; empty if it does.

    A fusion around an update that is not in place shows no copy in the text, but needs memory: so
    both are looked at.
    """
    arrays = [x for x in jax.tree.leaves(caches) if len(x.shape) >= 3]
    smallest = min(math.prod(x.shape) for x in arrays)
    reasons = sorted(operations_of_size(compiled.as_text(), smallest) - IN_PLACE)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    array_bytes = min(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    if temporary > array_bytes // 2:
        reasons.append(f"{temporary} temporary bytes beside caches of {array_bytes}")
    return reasons
