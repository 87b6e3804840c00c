"""The one list of attention cases that every implementation must pass, and their inputs.

Three sources: cases written by hand for one thing each, a pairwise cover of all the options (any
two values of two options meet in some case), and the grid of real decode configurations in
`grid/tkg-grid.csv`.
"""

import csv
import itertools
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_tkg import RotaryEmbedding
from tests.oracle import Array, Inputs, visible

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "float32",
        "bfloat16",
        "float16",
        "int8",
        "float8_e4m3fn",
        "float8_e4m3",
        "float8_e5m2",
    )
}
QUANTISED = ("int8", "float8_e4m3fn", "float8_e4m3", "float8_e5m2")

DISTINCT_ROWS = 16
"""A larger batch repeats the keys and values of so many rows, to be made quickly; never the queries
or the lengths."""


@dataclass(frozen=True)
class Case:
    """One attention call.

    Attributes:
        name: unique; also the seed.
        batch, tokens, slots, heads, kv_heads, head_dim: B, T, S, N, K, H. With pages, S is rounded
            up to whole ones.
        value_head_dim: Hv, None for H.
        query_dtype, cache_dtype: by name; the cache's is None for the query's.
        scales: None, "tensor" or "head"; for 8-bit caches.
        layout: "BSKH", "BKSH", "BKHS" or "paged".
        holder: "arrays" (BSKH only), "layout", or "cache" (a KVCache, a RingKVCache for "ring").
        as_bits: the cache keeps raw bits.
        page_len: slots of a page, if paged.
        rows: which keys are live. "all"; "lengths" per row; "starts" as well; "starts only";
            "empty": a row of no token, and one with fewer than T; "mask": as "lengths", said by a
            dense mask.
        longest: tokens of the longest row; None for all that fit. A short context in a long bucket.
        positions: "slots"; "given" queries somewhere in the row; "ring": token p is in slot p mod
            S.
        beside: the new keys are not yet in the cache.
        mask, bias: None, "full" `[B, N, T, S']` or "shared" `[1, 1, T, S']`; bias also "alibi".
        sinks, cap, window, causal, scale, rope: as in `attention_tkg`.
        op: "attention_tkg" or "attention_cte"; what follows is for the latter.
        bounds: None, "packed" sequences that the queries stay in, or "random" ranges of keys.
        slopes: ALiBi from slopes.
        unnormalised: as a state, divided afterwards.
        growth: how much larger keys are at the end of the row than at its start, around 1: the
            running maximum moves with every tile. Below 1 it never does.
        peak: size of the largest keys.
        slow: belongs to the large grid.
    """

    name: str
    batch: int = 3
    tokens: int = 1
    slots: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    value_head_dim: int | None = None
    query_dtype: str = "float32"
    cache_dtype: str | None = None
    scales: str | None = None
    layout: str = "BSKH"
    holder: str = "layout"
    as_bits: bool = False
    page_len: int = 0
    rows: str = "lengths"
    longest: int | None = None
    positions: str = "slots"
    beside: bool = False
    mask: str | None = None
    bias: str | None = None
    sinks: bool = False
    cap: float | None = None
    window: int | tuple[int | None, int | None] | None = None
    causal: bool = True
    scale: float | None = None
    rope: RotaryEmbedding | None = None
    op: str = "attention_tkg"
    bounds: str | None = None
    slopes: bool = False
    unnormalised: bool = False
    growth: float = 4.0
    peak: float = 2.0
    slow: bool = False

    def __str__(self) -> str:
        """The name."""
        return self.name

    @property
    def stored(self) -> np.dtype:
        """The logical dtype of the cache."""
        return DTYPES[self.cache_dtype or self.query_dtype]

    @property
    def capacity(self) -> int:
        """S."""
        return -(-self.slots // self.page_len) * self.page_len if self.page_len else self.slots


HALF_SPLIT = RotaryEmbedding(base=10000.0)
INTERLEAVED = RotaryEmbedding(base=500000.0, interleaved=True)

BY_HAND = (
    # Heads, in the form that XLA:CPU gets in one dot (float32, nothing masked but causally).
    *(
        Case(f"{name}-T{tokens}", rows="all", tokens=tokens, heads=n, kv_heads=k, layout="BKSH")
        for name, n, k in (("mha", 4, 4), ("group3", 6, 2), ("mqa", 8, 1))
        for tokens in (1, 3)
    ),
    Case("group16", heads=32, kv_heads=2, tokens=2),
    Case("one-head", heads=1, kv_heads=1, batch=1, holder="arrays"),
    Case("plain-arrays", rows="all", holder="arrays", tokens=2),
    Case("plain-transposed", rows="all", layout="BKHS", tokens=2),
    *(Case(f"T{t}", tokens=t, beside=t % 2 == 1, heads=6) for t in range(2, 9)),
    # Lengths of the cache.
    *(Case(f"S{s}", slots=s, rows="all", tokens=min(s, 2)) for s in (1, 2, 7, 31)),
    Case("S1-beside", slots=1, tokens=3, beside=True, rows="empty"),
    Case("long", slots=4097, tokens=2),
    Case("long-bf16", slots=2100, layout="BKSH", query_dtype="bfloat16", as_bits=True),
    Case("long-wide", slots=700, head_dim=256, layout="BKHS", query_dtype="float16"),
    Case("long-mixed", slots=2100, cache_dtype="bfloat16", layout="BKSH", tokens=4),
    Case("short-in-long", slots=8192, longest=40, tokens=2, layout="BKSH"),
    Case("short-in-long-beside", slots=8192, longest=9, tokens=4, beside=True),
    Case("short-in-long-paged", slots=4096, longest=70, layout="paged", page_len=64),
    # The running maximum.
    Case("max-grows-fast", slots=1500, growth=100.0, peak=20.0),
    Case("max-at-the-start", slots=1500, growth=0.01, peak=20.0),
    Case("max-flat", slots=1500, growth=1.0, peak=0.02),
    # Pages.
    *(
        Case(f"page{n}", slots=600, layout="paged", page_len=n, tokens=2)
        for n in (8, 16, 32, 64, 128, 256)
    ),
    Case("page-bits", slots=600, layout="paged", page_len=16, cache_dtype="bfloat16", as_bits=True),
    Case("page-one", slots=8, layout="paged", page_len=8, rows="all"),
    # What the rows see.
    Case("ring", slots=33, positions="ring", holder="cache", window=(20, 0), tokens=3),
    Case("ring-beside", slots=40, positions="ring", holder="cache", window=(24, 0), beside=True),
    Case("window-both-sides", window=7, tokens=4, causal=False),
    Case("window-of-one", window=(0, 0), tokens=4),
    Case("window-far", slots=3000, window=(127, 0), tokens=2, layout="BKSH"),
    Case("rows-all-empty", rows="empty", batch=2, tokens=2),
    Case("rows-empty-with-sinks", rows="empty", sinks=True, tokens=2, beside=True),
    Case("scattered-queries", positions="given", rows="all", tokens=3),
    Case("everything", tokens=3, heads=6, rows="starts", beside=True, mask="full", bias="full",
         sinks=True, cap=3.0, window=(60, 0), rope=INTERLEAVED, scale=0.3, head_dim=80,
         value_head_dim=96, layout="paged", page_len=16, query_dtype="bfloat16",
         cache_dtype="int8", scales="head"),
)  # fmt: skip

OPTIONS: dict[str, tuple[Any, ...]] = {
    "cache_dtype": tuple(DTYPES),
    "store": (
        {"layout": "BSKH", "holder": "arrays"},
        {"layout": "BSKH"},
        {"layout": "BKSH"},
        {"layout": "BKHS"},
        {"layout": "paged", "page_len": 8},
        {"layout": "paged", "page_len": 32},
        {"layout": "paged", "page_len": 256},
    ),
    "widths": ((64, None), (80, None), (96, 64), (128, None), (192, 128), (256, None), (64, 96)),
    "rows": ("all", "lengths", "starts", "starts only", "empty", "mask"),
    "slots": (33, 96, 257, 400),
    "head_counts": ((4, 4), (6, 2), (5, 1), (8, 2)),
    "tokens": (1, 2, 4, 8),
    "query_dtype": ("float32", "bfloat16", "float16"),
    "window": (None, (15, 0), 40, (None, 3), (11, None)),
    "positions": ("slots", "given", "ring"),
    "bias": (None, "full", "shared", "alibi"),
    "mask": (None, "full", "shared"),
    "scales": (None, "tensor", "head"),
    "rope": (None, HALF_SPLIT, INTERLEAVED),
    "cap": (None, 4.0),
    "sinks": (False, True),
    "beside": (False, True),
    "causal": (True, False),
    "as_bits": (False, True),
    "holder": ("layout", "cache"),
    "scale": (None, 0.2),
}
"""What the pairwise cover combines. `store`, `widths` and `head_counts` set several fields."""


def _possible(options: dict[str, Any]) -> bool:
    """Whether the options, of which some may be missing, make sense together."""
    has, store = options.get, options.get("store", {})
    arrays = store.get("holder") == "arrays"
    return not (
        (has("rope") and not has("beside", True))
        or (has("scales") and has("cache_dtype", "int8") not in QUANTISED)
        or (has("as_bits") and (has("cache_dtype") in ("float32", "int8") or arrays))
        or (has("holder") == "cache" and (arrays or has("rows") in ("all", "mask", "starts only")))
        or (has("positions") == "ring" and has("rows") in ("all", "mask", "starts only"))
        or (has("rows") == "mask" and (has("mask") or has("positions") == "given"))
    )


def pairwise(options: dict[str, tuple[Any, ...]], prefix: str, **common: Any) -> tuple[Case, ...]:
    """Cases in which any two values of two options meet, with `common` fields.

    Greedy: each case starts with a pair not yet met and then meets as many others as it can.
    """
    values = [(name, i) for name, of in options.items() for i in range(len(of))]

    def chosen(picks: dict[str, int]) -> dict[str, Any]:
        return {name: options[name][i] for name, i in picks.items()}

    missing = {
        frozenset(pair)
        for pair in itertools.combinations(values, 2)
        if pair[0][0] != pair[1][0] and _possible(chosen(dict(pair)))
    }
    cases: list[Case] = []
    while missing:
        picks = dict(min(missing, key=sorted))
        for name in options:
            if name not in picks:
                able = [
                    i for i in range(len(options[name])) if _possible(chosen({**picks, name: i}))
                ]
                met = [
                    sum(frozenset((one, (name, i))) in missing for one in picks.items())
                    for i in able
                ]
                # Ties go round, so that values without an open pair still vary.
                turn = [(m, -((i - len(cases)) % len(able))) for i, m in enumerate(met)]
                picks[name] = able[turn.index(max(turn))]
        missing -= {frozenset(pair) for pair in itertools.combinations(picks.items(), 2)}
        cases.append(_from_options(f"{prefix}{len(cases):02d}", chosen(picks) | common))
    return tuple(cases)


def _from_options(prefix: str, options: dict[str, Any]) -> Case:
    store, holder = options.pop("store"), options.pop("holder")
    head_dim, value_head_dim = options.pop("widths")
    heads, kv_heads = options.pop("head_counts")
    name = f"{prefix}-{store['layout']}-{options['cache_dtype']}"
    fields = {"holder": holder, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return Case(name, value_head_dim=value_head_dim, **{**fields, **store, **options})


GRID_FILE = Path(__file__).parent / "grid" / "tkg-grid.csv"

QUICK_TOKENS, QUICK_SLOTS = 12 * 1024, 64 * 1024
"""Rows of the grid with more tokens in all (batch times live bucket), or with more slots, are slow
ones here, whatever their group."""


def _grid() -> tuple[Case, ...]:
    """The configurations that AWS tests its public decode-attention kernel with.

    Columns: `group` fast or slow. `batch` B; `q_heads` query heads of one KV head (so K is 1);
    `s_active` T, always beside the cache; `s_prior` live bucket, the longest row; `s_prior_full`
    size of the cache; `d_head` H; `block_len` page length, 0 if contiguous; `k_layout` s_d for keys
    [S, H], d_s for transposed ones; `mask_from_positions` 1 if the live range is given as lengths,
    0 if as a dense mask; `fused_rope`; `sink`; `fp8_kv` an e4m3 cache (the IEEE one, which Trainium
    has) with one scale; `sliding_window` in keys, the query's own included; `dtype` of the rest.
    """
    with GRID_FILE.open(newline="") as file:
        return tuple(_from_grid(i, row) for i, row in enumerate(csv.DictReader(file)))


def _from_grid(number: int, row: dict[str, str]) -> Case:
    n = {name: int(text) for name, text in row.items() if text.isdigit()}
    window, tokens = n["sliding_window"], n["s_active"]
    live, slots = (n["batch"] * n[size] for size in ("s_prior", "s_prior_full"))
    return Case(
        f"grid{number:03d}-B{n['batch']}-N{n['q_heads']}-T{tokens}-S{n['s_prior_full']}",
        batch=n["batch"],
        tokens=tokens,
        slots=n["s_prior_full"],
        longest=n["s_prior"] + tokens,
        heads=n["q_heads"],
        kv_heads=1,
        head_dim=n["d_head"],
        query_dtype=row["dtype"],
        cache_dtype="float8_e4m3" if n["fp8_kv"] else row["dtype"],
        scales="tensor" if n["fp8_kv"] else None,
        layout="paged" if n["block_len"] else {"s_d": "BKSH", "d_s": "BKHS"}[row["k_layout"]],
        page_len=n["block_len"],
        as_bits=row["dtype"] != "float32",
        rows="lengths" if n["mask_from_positions"] else "mask",
        rope=HALF_SPLIT if n["fused_rope"] else None,
        beside=True,
        sinks=bool(n["sink"]),
        window=(window - 1, 0) if window else None,
        slow=row["group"] == "slow" or live > QUICK_TOKENS or slots > QUICK_SLOTS,
    )


PAIRWISE = pairwise(OPTIONS, "pairs")
GRID = _grid()
CASES = (*BY_HAND, *PAIRWISE, *GRID)


# Inputs


def inputs(case: Case) -> Inputs:
    """The arguments of a case; the same at every call.

    What no query sees is NaN (the largest number in int8): padding, unused slots and pages.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype, width = DTYPES[case.query_dtype], case.value_head_dim or case.head_dim

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    made = Inputs(
        query=normal(case.batch, case.tokens, case.heads, case.head_dim).astype(dtype),
        key=np.zeros((case.batch, case.capacity, case.kv_heads, 0)),
        value=np.zeros(0),
        sinks=normal(case.heads) if case.sinks else None,
        scale=case.scale,
        is_causal=case.causal,
        local_window_size=case.window,
        logits_soft_cap=case.cap,
        rope=case.rope,
    )
    if case.beside:
        heads = (case.batch, case.tokens, case.kv_heads)
        made = replace(
            made,
            new_key=(normal(*heads, case.head_dim) * case.peak).astype(dtype),
            new_value=normal(*heads, width).astype(dtype),
        )
    made = replace(made, **_live_range(case, rng))
    made = replace(made, key_bounds=_bounds(case, made, rng), alibi_slopes=_slopes(case))
    made = replace(made, mask=_mask(case, made, rng), bias=_bias(case, made, rng))
    if case.rows == "mask":
        made = replace(made, key_value_seq_lengths=None)
    key, k_scale = _quantised(case, _grown(case, made, normal))
    value, v_scale = _quantised(case, normal(*key.shape[:3], width))
    made = replace(made, key=_repeat(case, key), value=_repeat(case, value))
    made = replace(made, k_scale=k_scale, v_scale=v_scale)
    return _paged(case, made, rng) if case.page_len else _unseen_blanked(made)


def _live_range(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """Lengths from the T new tokens to the longest row, starts, positions."""
    fit = case.capacity + (case.tokens if case.beside else 0)
    longest = min(case.longest or fit, fit)
    if case.positions == "ring":
        longest += 2 * case.capacity
    shortest = min(case.tokens, longest)
    steps = np.arange(case.batch) / max(case.batch - 1, 1) if case.batch > 1 else np.ones(1)
    lengths = np.round(shortest + (longest - shortest) * steps).astype(np.int32)
    if case.rows == "empty":
        lengths[0], lengths[-1] = 0, max(case.tokens - 1, 1)
    given: dict[str, Array] = {}
    if case.rows not in ("all", "starts only"):
        given["key_value_seq_lengths"] = lengths
    if case.rows in ("starts", "starts only"):
        given["key_value_seq_starts"] = (lengths // 3).astype(np.int32)
    if case.positions == "given":
        ends = lengths if case.rows not in ("all", "starts only") else np.full(case.batch, fit)
        at = rng.random((case.batch, case.tokens)) * ends[:, None]
        given["query_positions"] = np.sort(at.astype(np.int32), axis=1)
    if case.positions == "ring":
        cached = lengths[:, None] - (case.tokens if case.beside else 0)
        slots = np.arange(case.capacity)
        held = cached - 1 - (cached - 1 - slots) % case.capacity
        given["key_positions"] = np.where(held >= 0, held, -1).astype(np.int32)
    return given


def _bounds(case: Case, made: Inputs, rng: np.random.Generator) -> Array | None:
    if case.bounds is None:
        return None
    rows = []
    for b in range(case.batch):
        at = visible(made, b)[0]
        longest = int(max(at.max(initial=0), 0)) + 1
        if case.bounds == "packed":
            cuts = np.unique([0, *rng.integers(0, longest, 3), longest])
            segment = np.clip(np.searchsorted(cuts, at, side="right") - 1, 0, len(cuts) - 2)
            rows.append(np.stack([cuts[segment], cuts[segment + 1]], axis=1))
        else:
            rows.append(rng.integers(-longest // 2, longest + 2, (case.tokens, 2)))
            rows[-1][: case.tokens // 2].sort(axis=1)
    return np.stack(rows).astype(np.int32)


def _slopes(case: Case) -> Array | None:
    if not case.slopes:
        return None
    return 2.0 ** -(8 * (1 + np.arange(case.heads, dtype=np.float32)) / case.heads)


def _dense_shape(case: Case, kind: str) -> tuple[int, ...]:
    keys = case.capacity + (case.tokens if case.beside else 0)
    shared = kind == "shared"
    return (1 if shared else case.batch, 1 if shared else case.heads, case.tokens, keys)


def _mask(case: Case, made: Inputs, rng: np.random.Generator) -> Array | None:
    if case.rows == "mask":  # nothing else restricts the keys: the mask says all of it
        per_row = [visible(made, b)[2][:1] for b in range(case.batch)]
        return np.stack(per_row)
    if case.mask is None:
        return None
    mask = rng.random(_dense_shape(case, case.mask)) < 0.7
    mask[-1, -1, 0] = False  # a query that sees nothing
    return mask


def _bias(case: Case, made: Inputs, rng: np.random.Generator) -> Array | None:
    if case.bias is None:
        return None
    if case.bias == "alibi":
        slopes = 2.0 ** -(8 * (1 + np.arange(case.heads)) / case.heads)
        rows = []
        for b in range(case.batch):
            query_at, key_at, _ = visible(made, b)
            rows.append(slopes[:, None, None] * (key_at - query_at[:, None]))
        return np.stack(rows).astype(np.float32)
    bias = rng.standard_normal(_dense_shape(case, case.bias), np.float32)
    bias[rng.random(bias.shape) < 0.1] = -np.inf
    return bias.astype(DTYPES[case.query_dtype])


def _grown(case: Case, made: Inputs, normal: Any) -> Array:
    """Keys `[B, S, K, H]` float32, larger by `growth` at the end of the row than at its start."""
    distinct = min(case.batch, DISTINCT_ROWS)
    used = min(case.longest or case.capacity, case.capacity)
    key = normal(distinct, used, case.kv_heads, case.head_dim)
    at = np.broadcast_to(np.arange(used, dtype=np.float64), (distinct, used))
    if made.key_positions is not None:
        at = made.key_positions[:distinct, :used]
    sizes = case.growth ** (at / max(at.max(), 1) - (case.growth > 1)) * case.peak
    key *= sizes[..., None, None].astype(np.float32)
    return key


def _quantised(case: Case, values: Array) -> tuple[Array, Array | None]:
    """Stored numbers, and the scale of each head or of all that spreads them over the range."""
    if case.scales is None:
        return values.astype(case.stored), None
    top = 127.0 if case.stored == np.int8 else float(ml_dtypes.finfo(case.stored).max)
    largest = np.abs(values).max(axis=(0, 1, 3) if case.scales == "head" else None)
    scale = np.asarray(largest / top, np.float32)
    wide = values / scale[..., None] if scale.ndim else values / scale
    if case.stored == np.int8:
        wide = np.round(wide)
    return np.clip(wide, -top, top).astype(case.stored), scale


def _repeat(case: Case, stored: Array) -> Array:
    """All B rows and S slots; what was not made is zero here and never seen."""
    full = np.zeros((case.batch, case.capacity, *stored.shape[2:]), stored.dtype)
    for b in range(case.batch):
        full[b, : stored.shape[1]] = stored[b % len(stored)]
    return full


def _blank(dtype: np.dtype) -> Any:
    return 127 if dtype == np.int8 else np.nan


def _unseen_blanked(made: Inputs) -> Inputs:
    for b in range(made.query.shape[0]):
        unseen = ~_seen_slots(made, b)
        made.key[b][unseen] = _blank(made.key.dtype)
        made.value[b][unseen] = _blank(made.value.dtype)
    return made


def _seen_slots(made: Inputs, b: int) -> Array:
    """`[S, K]`: which slots of a row any query of the KV head sees."""
    seen = visible(made, b)[2][..., : made.slots]
    return seen.reshape(made.kv_heads, -1, made.slots).any(axis=1).T


def _paged(case: Case, made: Inputs, rng: np.random.Generator) -> Inputs:
    """Moves the slots into pages: in random order, page 0 garbage, the first page of rows shared.

    The table has no entry for pages that nobody sees.
    """
    count = case.capacity // case.page_len
    seen = np.stack([_seen_slots(made, b) for b in range(case.batch)])
    by_page = seen.reshape(case.batch, count, case.page_len, case.kv_heads)
    used = by_page.any(axis=(2, 3))
    table = np.full((case.batch, count), -1, np.int32)
    table[used] = 1 + rng.permutation(int(used.sum()))
    shared = np.flatnonzero(used[:, 0])[:2]
    table[shared, 0] = table[shared[:1], 0]
    visible_slots = np.zeros((int(used.sum()) + 1, case.kv_heads, case.page_len), bool)
    for b, p in np.argwhere(used):
        visible_slots[table[b, p]] |= by_page[b, p].T

    def pool(dense: Array) -> Array:
        shape = (visible_slots.shape[0], case.kv_heads, case.page_len, dense.shape[3])
        pages = np.zeros(shape, dense.dtype)
        for b, p in np.argwhere(used):
            rows = dense[b, p * case.page_len : (p + 1) * case.page_len]
            pages[table[b, p]] = rows.swapaxes(0, 1)
        pages[~visible_slots] = _blank(dense.dtype)
        return pages

    return replace(made, key=pool(made.key), value=pool(made.value), page_indices=table)
