"""What the prefill kernel reads and what it keeps in SBUF, in groups named by what they are for."""

from dataclasses import dataclass
from typing import Any

from jax_tkg.nki.cte.plan import PrefillPlan
from jax_tkg.nki.cte.tiles import KeySource, KeyTile, RowBlock, Step
from jax_tkg.nki.dialect import nl


@dataclass
class SourceArrays(nl.NKIObject):
    """Arrays of a key source, in HBM; None for what it does not have.

    Attributes:
        key, value: in the source's layout.
        bounds: float32 `[2, B, T]`: token t of row b sees low <= p < high, p a key's position if it
            has one, else its slot.
        query_at: float32 `[B, T]`, for ALiBi: where the queries are on the scale of `bounds`.
        positions: int32 `[B, S]`.
        holes: bfloat16 `[B, S]`, `MASKED` where a slot holds nothing, else 0.
        page_rows: int32 `[B, K, S / n]`: of every n slots the row in the pool seen as
            `[rows, n * H]`; n is `plan.paged_run`.
        unseen: uint8 `[B, K|1, S]`, 1 where no query sees a slot.
        logit_scales: float32 `[B * K]`, scale of the logits with that of the keys.
        value_scales: float32 `[B * K]`.
        tile_starts: float32 `[live tiles]`, first slot of each.
        live: int32 `[programs, pairs, groups, 2]`: of each pair and group of row blocks of a
            program, those of a loop round by round and then the others, the first live tile that is
            visited and the one behind the last.
        first_column: column of slot 0 in dense masks and biases.
    """

    key: Any
    value: Any
    bounds: Any
    query_at: Any
    positions: Any
    holes: Any
    page_rows: Any
    unseen: Any
    logit_scales: Any
    value_scales: Any
    tile_starts: Any
    live: Any
    first_column: int


@dataclass
class Constants(nl.NKIObject):
    """Tiles in SBUF that no step changes; None for what the problem does not have.

    Attributes:
        ones: float32 `[1, 128]`.
        short_ones: bfloat16 `[1, 128]`.
        logit_scales, value_scales: `[128, B * K]`, the same in every partition; those of logits
            divided by the soft cap, if there is one.
    """

    ones: Any
    short_ones: Any
    logit_scales: Any
    value_scales: Any


@dataclass
class Inputs(nl.NKIObject):
    """The arrays of a launch, in HBM; None for what the problem does not have.

    Attributes:
        query: `[B, T, N, H]`, rotated.
        sources: one `SourceArrays` for each source of the plan.
        sinks, slopes: float32 `[B|1, N]`.
        hidden: uint8 `[B|1, N|1, T|1, S']`, 1 where a dense mask hides a key; S' is S of the cache,
            then that of the new keys.
        bias: float32 `[B|1, N|1, T|1, S']`.
        consts: in SBUF.
    """

    query: Any
    sources: Any
    sinks: Any
    slopes: Any
    hidden: Any
    bias: Any
    consts: Constants


@dataclass
class Outputs(nl.NKIObject):
    """What the kernel returns, in HBM.

    Attributes:
        out: `[B, T, N, Hv]`, in the query's dtype, or float32 before the division.
        lse: float32 `[B, T, N]`, or None before the division.
        max, sum: float32 `[B, T, N]` before the division, or None.
    """

    out: Any
    lse: Any
    max: Any
    sum: Any


@dataclass(frozen=True)
class Pair(nl.NKIObject):
    """One KV head of one sequence."""

    index: int
    batch: int
    kv_head: int


@dataclass
class Rows(nl.NKIObject):
    """A row block: its queries and what was found so far; R rows on the partitions.

    Attributes:
        block: which rows of the pair.
        pair: which.
        query: one tile `[h, R]` for each chunk of 128 of H; None, as all below, until loaded.
        bounds: for each source `[R, 2]`, or None where nothing of it is masked.
        neg_query_at: for each source minus `query_at` `[R, 1]`, or None without ALiBi.
        slopes: minus the slopes of the heads `[R, 1]`, or None.
        neg_max: minus the running maximum `[R, 1]`.
        total: `[R, Hv + 1]`: the output, not yet divided, and the sum of the weights behind it.
    """

    block: RowBlock
    pair: Pair
    query: Any = None
    bounds: Any = None
    neg_query_at: Any = None
    slopes: Any = None
    neg_max: Any = None
    total: Any = None


@dataclass
class Keys(nl.NKIObject):
    """A key tile in SBUF.

    Attributes:
        tile: which slots.
        source: where they come from.
        arrays: of the source.
        key: one tile `[h, keys]` for each chunk of 128 of H, in the order of slots; or a view
            `[h, runs, n]` of one that is not.
        value: `[partitions, subtiles, Hv]`.
        position: float32 `[128, keys]`, the same in every partition; None where nothing needs it.
        holes: bfloat16, likewise, `MASKED` or 0, or None.
        first_slot: float32 `[128, 1]`, likewise, of a tile with an index; or None.
        logit_scale, value_scale: `[128, 1]`, the same in every partition, or None.
    """

    tile: KeyTile
    source: KeySource
    arrays: SourceArrays
    key: Any
    value: Any
    position: Any
    holes: Any
    first_slot: Any
    logit_scale: Any
    value_scale: Any


@dataclass
class Work(nl.NKIObject):
    """A step under way; what is not yet there is None.

    Attributes:
        rows: to which it adds.
        keys: the tile.
        step: which of the tile's keys.
        logits: `[R, keys]`, in PSUM or SBUF, to be multiplied by `factor`.
        factor: see above.
        weights: `[R, keys]`, exp(logit - running maximum) in the type of the values.
        decay: exp(old maximum - new maximum) `[R, 1]`.
        turned: the weights with keys on the partitions, `[128, subtiles, R]`.
        products: `[R, Hv + 1]` in PSUM: weights times values, and behind them the sum of the
            weights before they were rounded.
    """

    rows: Rows
    keys: Keys
    step: Step
    logits: Any = None
    factor: float = 1.0
    weights: Any = None
    decay: Any = None
    turned: Any = None
    products: Any = None


@dataclass
class Pipeline(nl.NKIObject):
    """Steps under way, by what was done last: logits multiplied, weights made, weights turned."""

    multiplied: Any = None
    weighted: Any = None
    resting: Any = None
    turned: Any = None


@dataclass
class Place(nl.NKIObject):
    """Where in a program's share the kernel is.

    Attributes:
        pair, group: indices among those of the share, and of the looped groups or the others.
        round: register of the loop over rounds; None outside of it.
        pipeline: of the program.
    """

    pair: int
    group: int
    round: Any
    pipeline: Pipeline


def pair_of(plan: PrefillPlan, index: int) -> Pair:
    """Pairs are numbered sequence by sequence."""
    return Pair(index, index // plan.kv_heads, index % plan.kv_heads)
