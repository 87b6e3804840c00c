"""The list of prefill cases that every implementation of `attention_cte` must pass.

Why these sizes: tokens and keys from 1 up, below, at and above the tiles of every form, with the
last tile overlapping; every option alone in a case by hand, and any two together in the pairwise
cover. The large ones, up to 16k, are slow.
"""

from dataclasses import replace

from tests.cases import HALF_SPLIT, INTERLEAVED, OPTIONS, Case, pairwise

CTE = Case("", op="attention_cte", batch=2, head_dim=16, tokens=70, slots=70)


def _whole(name: str, tokens: int, **options: object) -> Case:
    """A prompt and nothing before it."""
    return replace(CTE, name=name, tokens=tokens, slots=tokens, rows="all", **options)  # type: ignore[arg-type]


BY_HAND = (
    *(_whole(f"T{t}", t, holder="arrays") for t in (1, 2, 16, 31, 127)),
    _whole("all-see-all", 45, causal=False),
    _whole("mha", 50, heads=4, kv_heads=4, layout="BKSH"),
    _whole("mqa", 50, heads=5, kv_heads=1, layout="BKHS"),
    _whole("bf16", 140, query_dtype="bfloat16", holder="arrays"),
    _whole("f16", 90, query_dtype="float16", value_head_dim=24),
    _whole("wide", 40, head_dim=256, value_head_dim=128),
    _whole("max-grows-fast", 150, growth=100.0, peak=20.0),
    _whole("max-at-the-start", 150, growth=0.01, peak=20.0),
    # Windows.
    *(_whole(f"window{w}", 75, window=(w - 1, 0)) for w in (1, 16, 30)),
    _whole("window-both-sides", 75, window=(20, 9), causal=False),
    _whole("window-ahead", 75, window=(None, 9), causal=False),
    # Packed sequences, ALiBi, states.
    _whole("packed", 100, bounds="packed"),
    _whole("packed-both-ways", 60, bounds="packed", causal=False, query_dtype="bfloat16"),
    _whole("random-bounds", 60, bounds="random"),
    _whole("slopes", 80, slopes=True, heads=6),
    _whole("slopes-both-ways", 60, slopes=True, causal=False, bounds="packed", bias="full"),
    _whole("state", 80, unnormalised=True, sinks=True),
    replace(CTE, name="state-of-empty-rows", rows="empty", unnormalised=True, bounds="random"),
    # Rows.
    replace(CTE, name="lengths"),
    replace(CTE, name="empty", rows="empty"),
    replace(CTE, name="empty-with-sinks", rows="empty", sinks=True, beside=True),
    replace(CTE, name="starts", rows="starts", window=(25, 0)),
    replace(CTE, name="right-padded", rows="lengths", positions="given"),
    replace(CTE, name="masked", rows="mask"),
    # Prior keys: chunks, prefixes, shared pages.
    replace(CTE, name="chunk", slots=150, tokens=40),
    replace(CTE, name="chunk-beside", slots=150, tokens=40, beside=True),
    replace(CTE, name="chunk-beside-nothing", slots=3, tokens=40, beside=True, rows="all"),
    replace(
        CTE, name="prefix-pages", slots=150, tokens=40, layout="paged", page_len=8, beside=True
    ),
    replace(CTE, name="pages", slots=150, tokens=40, layout="paged", page_len=32),
    replace(CTE, name="short-in-long", slots=4096, tokens=40, longest=50, layout="BKSH"),
    replace(CTE, name="more-queries-than-keys", slots=20, tokens=40, rows="all"),
    replace(
        CTE, name="ring", slots=90, tokens=30, positions="ring", holder="cache", window=(50, 0)
    ),
    replace(
        CTE, name="ring-beside", slots=60, tokens=30, positions="ring", holder="cache",
        window=(50, 0), beside=True,
    ),
    replace(
        CTE, name="everything", slots=96, tokens=50, heads=6, rows="starts", beside=True,
        mask="full", bias="full", sinks=True, cap=3.0, window=(60, 0), rope=INTERLEAVED, scale=0.3,
        head_dim=80, value_head_dim=96, layout="paged", page_len=16, query_dtype="bfloat16",
        cache_dtype="int8", scales="head", bounds="packed", slopes=True, unnormalised=True,
    ),
)  # fmt: skip

PAIRWISE = pairwise(
    OPTIONS
    | {
        "widths": ((16, None), (24, 32), (80, None)),
        "slots": (33, 96, 130),
        "tokens": (1, 17, 40),
        "rope": (None, HALF_SPLIT),
        "cache_dtype": ("float32", "bfloat16", "int8", "float8_e4m3fn"),
        "bounds": (None, "packed", "random"),
        "slopes": (False, True),
        "unnormalised": (False, True),
        "store": (
            {"layout": "BSKH", "holder": "arrays"},
            {"layout": "BKSH"},
            {"layout": "BKHS"},
            {"layout": "paged", "page_len": 8},
            {"layout": "paged", "page_len": 32},
        ),
    },
    "prefill-pairs",
    op="attention_cte",
    batch=2,
)

LARGE = (
    *(_whole(f"T{t}", t, heads=n, head_dim=64, slow=True, batch=1, kv_heads=1)
      for t, n in ((512, 2), (1000, 2), (2048, 2), (8192, 1), (16384, 1))),
    _whole("T4096-bf16", 4096, query_dtype="bfloat16", heads=2, kv_heads=2, slow=True, batch=1),
    _whole("T5000-window", 5000, window=(1023, 0), heads=2, kv_heads=1, slow=True, batch=1),
    _whole("T3000-packed", 3000, bounds="packed", heads=2, kv_heads=2, slow=True, batch=2),
    replace(CTE, name="T700-after-6000", tokens=700, slots=6000, beside=True, heads=2, kv_heads=1,
            layout="paged", page_len=64, slow=True),
    replace(CTE, name="T64-after-16384", tokens=64, slots=16384, beside=True, heads=2, kv_heads=1,
            layout="paged", page_len=16, query_dtype="bfloat16", rope=HALF_SPLIT, batch=1,
            slow=True),
    replace(CTE, name="T2000-empty", tokens=2000, slots=2000, rows="empty", slow=True, heads=2,
            kv_heads=1, sinks=True, slopes=True),
)  # fmt: skip

QUICK = (*BY_HAND, *PAIRWISE)
