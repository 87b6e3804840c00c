"""Checks of a finished launch: do the programs agree, did everything fit."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jax_tkg.nki.interpreter.errors import CapacityError, DivergenceError
from jax_tkg.nki.interpreter.hardware import PSUM_BYTES
from jax_tkg.nki.interpreter.machine import Core
from jax_tkg.nki.interpreter.storage import MemoryRegion, Storage


def check_programs_agree(cores: Sequence[Core]) -> None:
    """The programs must declare the same shared tensors and take the same branches on the device.

    What Python decides while the kernel is built may differ (`if nl.program_id() == 0:`); what a
    register decides may not: "Logical NeuronCore", final notes, of the NKI documentation.

    Raises:
        DivergenceError: if they do not.
    """
    if len(cores) == 1:
        return
    declared = [sum(s.region is MemoryRegion.shared_hbm for s in core.storages) for core in cores]
    if declared[0] != declared[1]:
        extra = cores[0].machine.shared[min(declared)].storage
        raise DivergenceError(
            "programs.shared-tensor",
            f"program 0 declares {declared[0]} shared_hbm tensors, program 1 {declared[1]}; the "
            f"first that the other lacks is {extra.name}. All programs declare the same shared "
            "tensors in the same order.",
            extra.source,
        )
    for ours, theirs in itertools.zip_longest(*(core.decisions for core in cores)):
        if ours != theirs:
            stories = [
                f"program {i} {d.outcome} at {d.source}" if d else f"program {i} has no such loop"
                for i, d in enumerate((ours, theirs))
            ]
            raise DivergenceError(
                "programs.control-flow",
                f"{', '.join(stories)}. Loops on the device must run alike in both programs: give "
                "them the same bounds and conditions.",
                *(d.source for d in (ours, theirs) if d),
            )


@dataclass(frozen=True)
class MemoryUse:
    """How full a memory of a core was at its fullest.

    Attributes:
        region: SBUF or PSUM.
        core: which core's.
        peak_bytes: per partition, of tensors between their first write and last use.
        capacity_bytes: per partition.
        instruction: index of the instruction at the peak.
        largest: the largest tensors alive then, as text; of equals those used first.
    """

    region: MemoryRegion
    core: int
    peak_bytes: int
    capacity_bytes: int
    instruction: int
    largest: tuple[str, ...]


def memory_use(core: Core, region: MemoryRegion) -> MemoryUse:
    """The peak by liveness in program order; what a compiler that overlaps more needs is not less.

    Tensors with an address count where they lie, once for tensors that share bytes; the others
    count their bytes from first to last use.
    """
    capacity = PSUM_BYTES if region is MemoryRegion.psum else core.target.sbuf_usable_bytes
    lives = dict[Storage, list[int]]()
    for i, step in enumerate(core.program):
        for access in (*step.reads, *step.writes):
            if access.storage.region is region:
                lives.setdefault(access.storage, [i, i])[1] = i
    events = sorted(
        [(first, 1, s) for s, (first, _) in lives.items()]
        + [(last + 1, 0, s) for s, (_, last) in lives.items()],
        key=lambda e: e[:2],
    )
    alive, own, peak, at = dict[Storage, None](), 0, 0, 0
    best: list[Storage] = []
    for when, begins, storage in events:
        if begins:
            alive[storage] = None
        else:
            del alive[storage]
        if storage.address is None:
            own += storage.row_bytes if begins else -storage.row_bytes
        used = own + _union_bytes([s for s in alive if s.address is not None])
        if used > peak:
            peak, at, best = used, when, list(alive)
    best.sort(key=lambda s: -s.row_bytes)
    names = tuple(f"{s.name} {list(s.shape)} {s.dtype} from {s.source}" for s in best[:4])
    return MemoryUse(region, core.index, peak, capacity, at, names)


def _union_bytes(storages: list[Storage]) -> int:
    end = total = 0
    for box in sorted((s.box for s in storages), key=lambda b: b.b0):
        total += max(0, box.b1 - max(end, box.b0))
        end = max(end, box.b1)
    return total


def check_capacity(cores: Sequence[Core]) -> list[MemoryUse]:
    """The peaks of all memories.

    Raises:
        CapacityError: if a memory would have to hold more than it has.
    """
    uses = [
        memory_use(core, region)
        for core in cores
        for region in (MemoryRegion.sbuf, MemoryRegion.psum)
    ]
    for use in uses:
        if use.peak_bytes > use.capacity_bytes:
            step = cores[use.core].program[use.instruction]
            raise CapacityError(
                f"memory.{use.region.value}-capacity",
                f"{use.region.value} of program {use.core} would have to hold {use.peak_bytes} "
                f"bytes a partition at {step}, and has {use.capacity_bytes}. The largest tensors "
                f"alive there: {'; '.join(use.largest)}. Use smaller or fewer tiles at a time.",
                step.source,
            )
    return uses
