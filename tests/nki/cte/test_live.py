"""The range of live tiles holds whatever the rows of a group see, and hardly more."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_tkg.nki.cte.live import live_ranges, tile_starts
from jax_tkg.nki.cte.plan import make_plan
from jax_tkg.nki.cte.tiles import KeySource


@settings(max_examples=4)  # each compiles
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 60, 300, 700, 2500]),
    heads=st.sampled_from([1, 3]),
    slots=st.integers(512, 4000),
    programs=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_live_ranges(
    batch: int, tokens: int, heads: int, slots: int, programs: int, seed: int
) -> None:
    source = KeySource(slots, is_exact=False, is_live=True)
    plan = make_plan(
        batch=batch, tokens=tokens, heads=heads, kv_heads=1, head_dim=8, value_head_dim=8,
        sources=(source,), scale=1.0, itemsize=4, programs=programs,
    )  # fmt: skip
    (source,) = plan.sources
    if not source.live_tiles:
        assert not all(share.groups for share in plan.shares)
        return
    random = np.random.default_rng(seed)
    low = random.integers(-5, slots, (batch, tokens))
    high = low + random.integers(-9, 700, (batch, tokens))
    found = np.asarray(live_ranges(jnp.array(low), jnp.array(high), plan, source))
    np.testing.assert_array_equal(tile_starts(plan, source), np.arange(slots // 512) * 512)
    widths = set()
    for p, share in enumerate(plan.shares):
        for j, pair in enumerate(share.pairs):
            for g, blocks in enumerate(share.groups):
                first, end = found[p, j, g]
                assert 0 <= first <= end <= source.live_tiles == slots // 512
                rows = np.concatenate(
                    [np.arange(b.first_token, b.first_token + b.tokens) for b in blocks]
                )
                seen = [
                    s // 512
                    for t in rows
                    for s in (max(low[pair, t], 0), min(high[pair, t], source.live_tiles * 512) - 1)
                    if max(low[pair, t], 0) < min(high[pair, t], source.live_tiles * 512)
                ]
                assert all(first <= tile < end for tile in seen)
                widths.add((j, g, max(seen, default=-1) + 1 - min(seen, default=0)))
    for j, g in {(j, g) for j, g, _ in widths}:
        needed = max(width for other, group, width in widths if (other, group) == (j, g))
        assert set(found[:, j, g, 1] - found[:, j, g, 0]) == {needed}
