"""How the programs of a launch of the decode kernel share its work."""

import math

from jax_tkg.nki.choices import ONE_TILE_KEYS
from jax_tkg.nki.rows import PARTITIONS

BATCH_RULE_ROWS = 128
SEQUENCE_RULE_SLOTS = 256
"""The public kernel's rule: see `choose_sharding`."""


def choose_sharding(
    programs: int, batch: int, pairs: int, rows: int, slots: int, is_loop: bool, most_live: int
) -> tuple[str, str]:
    """How two programs share the work, and why.

    The rule of the public kernel: by batch if it is even and there are more than 128 rows or fewer
    than 256 slots; else by sequence from 256 slots on. Beyond it: short caches with several pairs
    are shared by pairs also when the batch is odd. A loop over live tiles is shared by sequence:
    both programs then make equally many rounds, as they must, whatever the lengths. But where a
    window leaves each sequence a tile or so to read, sequences take equally long by themselves.
    """
    if programs == 1:
        return "none", "one program"
    if is_loop and batch % 2 == 0 and most_live <= min(ONE_TILE_KEYS, slots - 1):
        return "batch", f"a loop over at most {most_live} live keys of each, even batch"
    if is_loop:
        return "sequence", "a loop over live keys"
    if batch % 2 == 0 and (rows > BATCH_RULE_ROWS or slots < SEQUENCE_RULE_SLOTS):
        return "batch", f"even batch, {rows} rows, {slots} slots"
    if slots >= SEQUENCE_RULE_SLOTS:
        return "sequence", f"{slots} slots"
    if pairs > 1:
        return "batch", f"{pairs} pairs, only {slots} slots"
    return "same", f"one pair and only {slots} slots"


def pairs_of(
    sharding: str, program: int, batch: int, kv_heads: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sequences and the KV heads of a program, each as (first, end)."""
    if sharding != "batch":
        return (0, batch), (0, kv_heads)
    if batch > 1:
        half = (batch + 1) // 2
        return ((0, half), (half, batch))[program], (0, kv_heads)
    half = (kv_heads + 1) // 2
    return (0, 1), ((0, half), (half, kv_heads))[program]


def slots_of(sharding: str, program: int, slots: int, unit: int) -> tuple[int, int]:
    """The slots of a program, (first, end); the halves meet at a whole subtile."""
    if sharding != "sequence":
        return 0, slots
    whole = unit if unit > 1 else PARTITIONS
    half = min(math.ceil(slots / 2 / whole) * whole, slots)
    return ((0, half), (half, slots))[program]
