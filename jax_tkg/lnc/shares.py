"""Who has what: the plan's split as slices of a call's operands, equally large for every program.

On one device the programs' slices lie side by side in one array, over which `jax.vmap` runs them;
on two each device holds its own. What a program cannot know of its slice alone (where it begins,
whether it counts the new keys) follows from its number, `lax.axis_index`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_tkg._typing import Array
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan

_LETTERS = {
    "query": "BTNH", "new_key": "BTKH", "new_value": "BTKH", "lengths": "B", "starts": "B",
    "query_positions": "BT", "key_positions": "BS", "mask": "BNTX", "bias": "BNTX", "sinks": "BN",
    "new_seen": "B",
}  # fmt: skip
"""Axes of the operands; X is S, and T behind it where new keys come beside the cache."""


@dataclass(frozen=True)
class Split:
    """How an axis is split between programs.

    Attributes:
        letter: B, K or S; "" where every program has everything.
        parts: of each program, (first, end).
        starts: where each program's slice begins; slices may overlap, parts do not.
        width: of every slice.
    """

    letter: str
    parts: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    width: int


def split_of(plan: "KernelPlan", unit: int = 1) -> Split:
    """What a plan splits; slices begin and end at multiples of `unit`, for whole pages."""
    from jax_tkg.nki.programs import pairs_of, slots_of

    programs = range(plan.programs)
    if plan.sharding == "batch":
        pairs = [pairs_of(plan.sharding, p, plan.batch, plan.kv_heads) for p in programs]
        letter, i, size = ("B", 0, plan.batch) if plan.batch > 1 else ("K", 1, plan.kv_heads)
        return _split(letter, tuple(pair[i] for pair in pairs), size, 1)
    if plan.sharding == "sequence" and plan.live is None:
        parts = [slots_of(plan.sharding, p, plan.slots, plan.runs.long or 1) for p in programs]
        return _split("S", tuple(parts), plan.slots, unit)
    return Split("", ((0, 0),) * plan.programs, (0,) * plan.programs, 0)


def _split(letter: str, parts: tuple[tuple[int, int], ...], size: int, unit: int) -> Split:
    firsts = [first // unit * unit for first, _ in parts]
    ends = [-(-end // unit) * unit for _, end in parts]
    width = max(end - first for first, end in zip(firsts, ends, strict=True))
    return Split(letter, parts, tuple(min(first, size - width) for first in firsts), width)


def local_problem(problem: AttentionProblem, split: Split) -> AttentionProblem:
    """The problem of one program, as large for every one; the masks' shapes are not changed."""
    if split.letter == "B":
        return replace(problem, batch=split.width)
    if split.letter == "K":
        return replace(problem, num_kv_heads=split.width, num_heads=split.width * problem.group)
    if split.letter == "S":
        return replace(problem, kv_len=split.width)
    return problem


# --- slices of all programs, for one device


def deal(problem: AttentionProblem, ops: Operands, split: Split) -> tuple[Operands, Operands]:
    """Every program's slices of all operands, and per array the axis over programs or None."""
    deal_one = _Dealer(problem, split)
    kv, kv_axes = deal_one.layout(ops.kv)
    dealt: dict[str, Any] = {"kv": kv}
    axes: dict[str, Any] = {"kv": kv_axes}
    for name, letters in _LETTERS.items():
        dealt[name], axes[name] = deal_one.array(getattr(ops, name), letters)
    return replace(ops, **dealt), replace(ops, **axes)


class _Dealer:
    """Slices arrays whose axes have letters."""

    def __init__(self, problem: AttentionProblem, split: Split) -> None:
        self.split = split
        self.sizes = {"B": problem.batch, "K": problem.num_kv_heads, "S": problem.kv_len}
        self.group, self.slots = problem.group, problem.kv_len

    def layout(self, kv: KVLayout) -> tuple[KVLayout, KVLayout]:
        """A cache's; a pool of pages is every program's."""
        arrays, tree = jax.tree.flatten(kv)
        letters = tree.flatten_up_to(kv.letters())  # type: ignore[attr-defined]
        found = [self.array(x, axes) for x, axes in zip(arrays, letters, strict=True)]
        sliced, axes = zip(*found, strict=True)
        return jax.tree.unflatten(tree, sliced), jax.tree.unflatten(tree, axes)

    def array(self, array: Any, letters: str) -> tuple[Any, int | None]:
        """The slices, and the axis over programs."""
        letter = self.split.letter
        if array is None or not letter:
            return array, None
        if letter == "S" and "X" in letters:
            return self._dense(array), 0
        at = letters.find(letter)
        starts, width = list(self.split.starts), self.split.width
        if letter == "S" and at >= 0:  # a page of a page table stands for several slots
            unit = self.slots // array.shape[at]
            starts, width = [s // unit for s in starts], width // unit
        if letter == "K" and "N" in letters:
            at = letters.index("N")
            starts, width = [s * self.group for s in starts], width * self.group
        if at < 0 or array.shape[at] < starts[-1] + width:  # one for all
            return array, None
        if starts == [i * width for i in range(len(starts))]:
            rest = array.shape[at + 1 :]
            return array.reshape(*array.shape[:at], len(starts), width, *rest), at
        return jnp.stack([lax.slice_in_dim(array, s, s + width, axis=at) for s in starts]), 0

    def _dense(self, array: Array) -> Array:
        """A mask's or bias's: of the slots a slice, of the new keys beside them all."""
        beside = array[..., self.slots :]
        width = self.split.width
        return jnp.stack(
            [jnp.concatenate([array[..., s : s + width], beside], -1) for s in self.split.starts]
        )


def collect(results: Array, split: Split, axis: int) -> Array:
    """Results `[programs, ...]` of all programs as one: parts beside each other on `axis`.

    Where programs share every row they all have it: that of the first is taken.
    """
    if split.letter not in ("B", "K"):
        return results[0]
    per = results.shape[axis + 1] // split.width
    parts = [
        lax.slice_in_dim(mine, (first - start) * per, (end - start) * per, axis=axis)
        for mine, (first, end), start in zip(results, split.parts, split.starts, strict=True)
    ]
    return jnp.concatenate(parts, axis)


# --- what a program knows by its number


def localise(
    problem: AttentionProblem, ops: Operands, plan: "KernelPlan", split: Split, axis: str
) -> tuple[AttentionProblem, Operands]:
    """A program's slice as a problem of its own: positions, lengths and new keys of the whole.

    Args:
        problem: of the slice.
        ops: slices of this program.
        plan: of the whole.
        split: of the plan.
        axis: name of the axis over programs.
    """
    mask, bias = (None if x is None else tuple(x.shape) for x in (ops.mask, ops.bias))
    problem = replace(problem, mask=mask, bias=bias)
    if plan.sharding != "sequence":
        return problem, ops
    program, rows = lax.axis_index(axis), (problem.batch,)
    found: dict[str, Any] = {}
    if ops.lengths is None:
        beside = problem.num_tokens if problem.has_new_kv else 0
        found["lengths"] = jnp.full(rows, plan.slots + beside, jnp.int32)
    if problem.has_new_kv:
        counts = jnp.broadcast_to(program == plan.programs - 1, rows)
        found["new_seen"] = counts if ops.new_seen is None else counts & ops.new_seen
    if split.letter == "S":
        start = lax.dynamic_index_in_dim(
            jnp.asarray(split.starts, jnp.int32), program, keepdims=False
        )
        positions = ops.key_positions
        if positions is None:
            positions = (start + jnp.arange(split.width, dtype=jnp.int32))[None]
        found["key_positions"] = jnp.broadcast_to(positions, (*rows, split.width))
    ops = replace(ops, **found)
    has_positions = ops.key_positions is not None
    problem = replace(problem, has_lengths=True, has_positions=has_positions)
    return problem, ops
