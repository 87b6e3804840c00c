"""What each device of a mesh computes of a problem. Pure Python: make one, print it."""

from dataclasses import dataclass, replace
from functools import cached_property

from jax_tkg.problem import AttentionProblem, Op, Shape
from jax_tkg.sharding.spec import AttentionSharding


@dataclass(frozen=True)
class Division:
    """A problem and how it is divided between devices.

    Attributes:
        whole: the problem.
        sharding: which axes split what.
        is_mapped: the caller is in a `shard_map` over these axes, and its arrays are a device's.
        maps_idle: explicit axes that split nothing are mapped with the others.
    """

    whole: AttentionProblem
    sharding: AttentionSharding
    is_mapped: bool = False
    maps_idle: bool = False

    @property
    def key_parts(self) -> tuple[str, ...]:
        """The axes whose devices each have a part of a row's keys, to be merged."""
        return self.sharding.names("keys")

    @property
    def slices_kv_heads(self) -> bool:
        """Whether every device has all KV heads, and uses one of them."""
        return not self.sharding.splits_kv_heads(self.whole.num_kv_heads)

    @property
    def devices_per_kv_head(self) -> int:
        """Of those that hold all KV heads, how many use the same one."""
        return self.sharding.size("heads") // self.whole.num_kv_heads

    @property
    def local_slots(self) -> int:
        """S of a device."""
        return self.whole.kv_len // self.sharding.size("keys")

    @property
    def counts_from_own_slot(self) -> bool:
        """Whether positions are counted from the first slot of each device.

        So slot s of a device is at position s there too, and it stops at the length that it holds.
        Not needed where slots have given positions, or where every query sees every slot.
        """
        whole = self.whole
        return (
            bool(self.key_parts)
            and not whole.has_positions
            and (
                whole.has_lengths
                or whole.has_starts
                or whole.has_new_kv
                or whole.has_key_bounds
                or whole.has_alibi
                or whole.rule.window is not None
                or (whole.rule.causal and (whole.num_tokens > 1 or whole.has_query_positions))
            )
        )

    @cached_property
    def local(self) -> AttentionProblem:
        """The problem of each device, of which the merge takes the results."""
        local = self.differentiated
        if not self.key_parts:
            return local
        return replace(
            local,
            has_sinks=False,  # they join once, at the merge
            is_part=True,
            exchange=self.key_parts if self.sharding.merge == "every tile" else (),
        )

    @cached_property
    def differentiated(self) -> AttentionProblem:
        """The same with the results of the whole: what a device's cotangents are computed from."""
        whole, sharding = self.whole, self.sharding
        rows, heads = sharding.size("batch"), sharding.size("heads")
        kv_heads = 1 if self.slices_kv_heads else whole.num_kv_heads // heads
        shifted = self.counts_from_own_slot
        return replace(
            whole,
            batch=whole.batch // rows,
            num_heads=whole.num_heads // heads,
            num_kv_heads=kv_heads,
            kv_len=self.local_slots,
            kv=replace(whole.kv, heads_contiguous=whole.kv.heads_contiguous or kv_heads == 1),
            has_lengths=whole.has_lengths or shifted,
            # A prompt's queries are not the last of the slots that a device has.
            has_query_positions=whole.has_query_positions or (shifted and whole.op is Op.CTE),
            mask=self._dense(whole.mask),
            bias=self._dense(whole.bias),
        )

    def _dense(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        parts = (self.sharding.size("batch"), self.sharding.size("heads"))
        by_row, by_head = (1 if n == 1 else n // m for n, m in zip(shape, parts, strict=False))
        return by_row, by_head, shape[2], shape[3] - self.whole.kv_len + self.local_slots

    def __str__(self) -> str:
        """A few lines: the mesh, a device's problem, the merge."""
        lines = [f"sharded: {self.sharding}", f"  on each device: {self.local}"]
        if self.slices_kv_heads:
            kept = "all KV heads on every device"
            lines.append(f"  {kept}, of which {self.devices_per_kv_head} devices use the same one")
        if self.key_parts:
            lines.append(f"  {self._merge()}")
        else:
            lines.append("  no device needs anything of another")
        return "\n".join(lines)

    def _merge(self) -> str:
        local = self.differentiated
        rows = local.batch * local.num_tokens * local.num_heads
        parts = self.sharding.size("keys")
        bytes_max, bytes_sum = 4 * rows, 4 * rows * (local.value_head_dim + 1)
        often = " on each tile, and once more" if self.local.exchange else ""
        return (
            f"merge of {parts} parts: the maximum of {bytes_max} bytes{often}, then one sum of "
            f"{bytes_sum} bytes"
        )


def divide(
    problem: AttentionProblem, sharding: AttentionSharding, *, is_mapped: bool = False
) -> Division:
    """Divides a problem; with `is_mapped` it is that of a device, which is made whole first.

    Raises:
        ValueError: where its sizes do not divide, or the merge asked for is not of this op.
    """
    if is_mapped:
        problem = _whole(problem, sharding)
    sharding.check(
        batch=problem.batch,
        slots=problem.kv_len,
        num_kv_heads=problem.num_kv_heads,
        num_heads=problem.num_heads,
    )
    if sharding.names("keys") and sharding.merge == "every tile" and problem.op is not Op.TKG:
        raise ValueError(
            f'merge="every tile" is for {Op.TKG}: devices leave out different tiles of a prompt. '
            'Use merge="deferred".'
        )
    return Division(problem, sharding, is_mapped)


def _whole(local: AttentionProblem, sharding: AttentionSharding) -> AttentionProblem:
    rows, heads, parts = (sharding.size(role) for role in ("batch", "heads", "keys"))

    def dense(shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        keys = shape[3] + (parts - 1) * local.kv_len
        by_row, by_head = (
            1 if n == 1 else n * m for n, m in zip(shape, (rows, heads), strict=False)
        )
        return by_row, by_head, shape[2], keys

    return replace(
        local,
        batch=local.batch * rows,
        num_heads=local.num_heads * heads,
        num_kv_heads=local.num_kv_heads * heads,
        kv_len=local.kv_len * parts,
        mask=dense(local.mask),
        bias=dense(local.bias),
    )
