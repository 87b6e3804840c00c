"""What one of two programs does: the kernel's blocks, groups and tiles, in JAX.

The same code for every program, as on the two cores of a launch: what differs is data.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg import _compat
from jax_tkg._typing import Array, Float
from jax_tkg.cache.layouts import KVLayout
from jax_tkg.lnc.exchange import merge_programs, update_together
from jax_tkg.lnc.shares import Split, localise
from jax_tkg.online.tiles import (
    MaskTiles,
    adjust_logits,
    grouped_queries,
    without_unseen,
)
from jax_tkg.operands import Operands
from jax_tkg.problem import AttentionProblem
from jax_tkg.softmax import SoftmaxState

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan
    from jax_tkg.nki.rows import RowGroup


def run_program(
    problem: AttentionProblem,
    ops: Operands,
    plan: "KernelPlan",
    split: Split,
    axis: str,
    *,
    constant_trips: bool = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention in float32 and its log-sum-exp: of this program's rows, over every program's keys.

    Args:
        problem: of the program's slice; see `jax_tkg.lnc.shares.localise`.
        ops: its arrays.
        plan: of the whole.
        split: of the plan.
        axis: name of the mapped axis over programs.
        constant_trips: loops over live tiles make as many rounds as there can be, as Neuron needs.
    """
    rows = _Rows(problem, ops, plan, split, axis, constant_trips)
    shape = (problem.batch, problem.num_kv_heads, problem.group, problem.num_tokens)
    out = jnp.zeros((*shape, problem.value_head_dim), jnp.float32)
    lse = jnp.zeros(shape, jnp.float32)
    for block in plan.shares[0].blocks:  # the largest share; of rows, all are alike
        states = [rows.attend(group) for group in block.groups]
        state = jax.tree.map(lambda *x: jnp.concatenate(x), *map(_flat, states))
        if plan.sharding == "sequence":
            state = merge_programs(state, axis, is_together=plan.every_tile)
        for group in block.groups:
            mine = jax.tree.map(lambda x, g=group: x[g.first_row : g.first_row + g.rows], state)
            part_out, part_lse = rows.finish(mine, group)
            at = (group.first_batch, group.first_kv, group.first_query, 0)
            out = lax.dynamic_update_slice(out, part_out, (*at, 0))
            lse = lax.dynamic_update_slice(lse, part_lse, at)
    return _by_token(out), _by_token(lse)


def _by_token(rows: Array) -> Array:
    """`[B, K, G, T, ...]` as `[B, T, N, ...]`."""
    batch, kv_heads, group, tokens, *rest = rows.shape
    return jnp.moveaxis(rows, 3, 1).reshape(batch, tokens, kv_heads * group, *rest)


def _flat(state: SoftmaxState) -> SoftmaxState:
    """The rows `[B, K, M]` of a group as `[R]`, in the kernel's order."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), state)


@dataclass(frozen=True)
class _Tile:
    """Slots of the program's slice that are folded at once.

    Attributes:
        start: of what is read.
        first, end: of what counts in it.
        width: slots read.
        has_new: the new keys beside the cache are folded with them.
    """

    start: Array | int
    first: Array | int
    end: Array | int
    width: int
    has_new: bool = False


class _Rows:
    """All rows of a program, folded group by group."""

    def __init__(
        self,
        problem: AttentionProblem,
        ops: Operands,
        plan: "KernelPlan",
        split: Split,
        axis: str,
        constant_trips: bool,
    ) -> None:
        self.problem, self.ops, self.plan, self.axis = problem, ops, plan, axis
        self.constant_trips = constant_trips
        self.masks = MaskTiles.create(problem, ops)
        self.dtype = problem.compute_dtype
        query = grouped_queries(ops.query.astype(self.dtype), problem.num_kv_heads)
        split_rows = (problem.group, problem.num_tokens, problem.head_dim)
        self.query = query.reshape(*query.shape[:2], *split_rows)
        self.unit = problem.kv.slot_multiple
        self.program = lax.axis_index(axis)
        self.origin = _at(split.starts, self.program) if split.letter == "S" else 0

    def attend(self, group: "RowGroup") -> SoftmaxState:
        """The state of a group `[B, K, M]` over the program's own keys."""
        step = _Step(self, group)
        state = step.start()
        known = [[(t.start, t.start + t.keys) for t in share.tiles] for share in self.plan.shares]
        rounds = max(len(tiles) for tiles in known)
        if rounds:
            state = self._fold_known(step, known, rounds, state)
        if self.plan.live is None:
            return state
        tables = self._live_tables()
        parts = []
        for i in range(group.batches):
            mine = jax.tree.map(lambda x, i=i: x[i : i + 1], state)
            parts.append(self._fold_live(step.sequence(i), tables, group.first_batch + i, mine))
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    def _fold_known(
        self, step: "_Step", known: list[list[tuple[int, int]]], rounds: int, state: SoftmaxState
    ) -> SoftmaxState:
        """Tiles known beforehand; who has fewer takes part in the last exchanges with nothing."""
        filled = np.array([[*tiles, *((0, 0),) * (rounds - len(tiles))] for tiles in known])
        width = self._width(int((filled[:, :, 1] - filled[:, :, 0]).max()))
        mine = _at(filled, self.program) - self.origin

        def fold(i: Array | int, state: SoftmaxState, has_new: bool = False) -> SoftmaxState:
            first, end = _at(mine, i)
            return step.fold(state, _Tile(self._start(first, width), first, end, width, has_new))

        whole = rounds - self.problem.has_new_kv
        if whole:
            state = lax.fori_loop(0, whole, fold, state)
        return fold(whole, state, has_new=True) if whole < rounds else state

    def _live_tables(self) -> tuple[Array, Array]:
        from jax_tkg.nki.live_tiles import place_live_tiles

        live, run = self.plan.live, self.masks.cached
        assert live is not None
        return place_live_tiles(
            run.low, run.high, None, self.problem.kv_len, live, self.plan.programs
        )

    def _fold_live(
        self, step: "_Step", tables: tuple[Array, Array], batch: int, state: SoftmaxState
    ) -> SoftmaxState:
        """Tiles that hold live keys of one sequence, wherever they are."""
        live = self.plan.live
        assert live is not None
        keys, unit = live.full.keys, live.unit
        full, _, rounds = tables[0][0, batch, :3]  # the same in every program
        starts = _at(tables[0][:, batch, 3:], self.program)
        behind = _at(tables[1][:, batch, 1], self.program)
        width = self._width(keys)

        def fold(i: Array, state: SoftmaxState) -> SoftmaxState:
            first = unit * _at(starts, i)
            counted = jnp.minimum(keys, _at(behind, i) - first)
            end = first + jnp.where(i < full, keys, counted)
            end = jnp.where(i < rounds, end, first)
            return step.fold(state, _Tile(self._start(first, width), first, end, width))

        most = live.width if self.constant_trips else rounds
        return lax.fori_loop(0, most, fold, state)

    def _width(self, keys: int) -> int:
        """Slots to read for so many that may start anywhere; whole pages."""
        pages = -(-(keys + self.unit - 1) // self.unit) if keys else 0
        return min(pages * self.unit, self.problem.kv_len)

    def _start(self, first: Array, width: int) -> Array:
        aligned = first // self.unit * self.unit
        return jnp.clip(aligned, 0, self.problem.kv_len - width)

    def finish(self, state: SoftmaxState, group: "RowGroup") -> tuple[Array, Array]:
        """Output and log-sum-exp of a group, `[B, K, G, T, ...]`, sinks counted."""
        shape = (group.batches, group.kv_heads, group.queries, group.tokens)
        state = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), state)
        if self.ops.sinks is not None:
            split = (self.problem.num_kv_heads, self.problem.group, 1)
            state = state.add_sink(_cut(self.ops.sinks.reshape(-1, *split), group))
        return state.finalize()


def _at(table: Any, index: Array | int) -> Array:
    """An entry of the first axis; inside, so that nothing need be filled in."""
    return lax.dynamic_index_in_dim(jnp.asarray(table, jnp.int32), index, keepdims=False)


def _cut(array: Array, group: "RowGroup") -> Array:
    """A group's part of `[B|1, K|1, G|1, ...]`."""
    ranges = (
        (group.first_batch, group.batches),
        (group.first_kv, group.kv_heads),
        (group.first_query, group.queries),
    )
    for axis, (first, count) in enumerate(ranges):
        if array.shape[axis] > 1:
            array = lax.slice_in_dim(array, first, first + count, axis=axis)
    return array


def _cut_rows(masks: MaskTiles, group: "RowGroup") -> MaskTiles:
    """The masks of a group."""
    first, end = group.first_batch, group.first_batch + group.batches
    rows = (masks.query_positions, masks.cached, masks.beside)
    at, cached, beside = jax.tree.map(lambda x: x[first:end], rows)
    dense = (masks.mask, masks.bias, masks.slopes)
    mask, bias, slopes = jax.tree.map(partial(_cut, group=group), dense)
    return MaskTiles(masks.problem, at, cached, beside, mask, bias, slopes)


class _Step:
    """Folds tiles into the rows of one group: logits are `[B, K, G * T, keys]`."""

    def __init__(self, rows: _Rows, group: "RowGroup") -> None:
        self.rows, self.group = rows, group
        self.problem, self.dtype = rows.problem, rows.dtype
        self.masks = _cut_rows(rows.masks, group)
        query = _cut(rows.query, group)
        self.query = query.reshape(*query.shape[:2], -1, query.shape[-1])

    def sequence(self, i: int) -> "_Step":
        """The same for one sequence of the group."""
        group = self.group
        return _Step(self.rows, replace(group, first_batch=group.first_batch + i, batches=1))

    def start(self) -> SoftmaxState:
        """The state of rows that have seen no key."""
        state = SoftmaxState.init(self.query.shape[:3], self.problem.value_head_dim)
        leaves, tree = jax.tree.flatten(state)  # of the type that a loop's results have
        varying = _compat.agree_on_varying_axes([self.query, self.rows.program, *leaves])
        return jax.tree.unflatten(tree, varying[2:])

    def fold(self, state: SoftmaxState, tile: _Tile) -> SoftmaxState:
        """Folds a tile in one update of the state, its new keys too."""
        pieces = [self._cached(tile)] if tile.width else []
        if tile.has_new:
            pieces.append(self._new())
        logits = jnp.concatenate([logits for logits, _, _ in pieces], axis=-1)
        sizes = np.cumsum([value.shape[2] for _, value, _ in pieces])[:-1]

        def weigh(weights: Array) -> Array:
            parts = jnp.split(weights, sizes, axis=-1)
            mixed = [
                _dot(part.astype(self.dtype), value, contract=2) * scale
                for part, (_, value, scale) in zip(parts, pieces, strict=True)
            ]
            return sum(mixed[1:], mixed[0])

        if self.rows.plan.every_tile:
            return update_together(state, logits, weigh, self.rows.axis)
        return state.update(logits, weigh)

    def _cached(self, tile: _Tile) -> tuple[Array, Array, Array]:
        """Logits, values and the values' scale of slots of the cache."""
        kv, run = self.rows.ops.kv, self.masks.cached
        key, value = (self._pairs(x) for x in kv.block(tile.start, tile.width, self.dtype))
        seen, bias = self.masks.tile(run, tile.start, tile.width, tile.start)
        slots = tile.start + jnp.arange(tile.width, dtype=jnp.int32)
        seen = seen & (slots >= tile.first) & (slots < tile.end)
        return self._piece(key, value, seen, bias, kv)

    def _new(self) -> tuple[Array, Array, Array]:
        """Those of the new keys beside it."""
        ops, run = self.rows.ops, self.masks.beside
        assert ops.new_key is not None
        assert ops.new_value is not None
        assert run is not None
        key, value = (
            self._pairs(jnp.moveaxis(x.astype(self.dtype), 2, 1))
            for x in (ops.new_key, ops.new_value)
        )
        seen, bias = self.masks.tile(run, 0, run.size, 0)
        return self._piece(key, value, seen, bias, None)

    def _pairs(self, array: Array) -> Array:
        """The group's sequences and KV heads of `[B, K, keys, H]`."""
        group = self.group
        batch = slice(group.first_batch, group.first_batch + group.batches)
        return array[batch, group.first_kv : group.first_kv + group.kv_heads]

    def _piece(
        self, key: Array, value: Array, seen: Array, bias: Array | None, kv: KVLayout | None
    ) -> tuple[Array, Array, Array]:
        k_scale, v_scale = (
            jnp.ones((1, 1, 1, 1), jnp.float32)
            if scale is None
            else _cut(scale[:, :, None, None], self.group)
            for scale in ((kv.k_scale, kv.v_scale) if kv is not None else (None, None))
        )
        products = _dot(self.query, key, contract=3)
        by_query = products.reshape(
            *products.shape[:2], self.group.queries, self.group.tokens, products.shape[3]
        )
        scale = self.problem.scale * k_scale[..., None]
        logits = adjust_logits(self.problem, by_query, scale, seen, bias)
        value = without_unseen(value, jnp.any(seen, axis=(2, 3)))
        return logits.reshape(products.shape), value, v_scale


def _dot(left: Array, right: Array, *, contract: int) -> Array:
    """`left [B, K, M, x]` with `right`, whose axis `contract` is x, accumulated in float32."""
    return lax.dot_general(
        left,
        right,
        (((3,), (contract,)), ((0, 1), (0, 1))),
        precision=lax.Precision.HIGHEST if left.dtype == np.float32 else None,
        preferred_element_type=jnp.float32,
    )


def attend_slice(
    problem: AttentionProblem,
    plan: "KernelPlan",
    split: Split,
    axis: str,
    ops: Operands,
    *,
    constant_trips: bool = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """`run_program` of a program's slice, made a problem of its own."""
    mine, ops = localise(problem, ops, plan, split, axis)
    return run_program(mine, ops, plan, split, axis, constant_trips=constant_trips)
