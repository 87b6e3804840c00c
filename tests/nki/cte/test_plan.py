"""The prefill plan: every visible key of every row once, little else, balanced programs."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_tkg.nki.cte.count import work
from jax_tkg.nki.cte.plan import GROUP_BLOCKS, PrefillPlan, loop_end, make_plan, visits_of
from jax_tkg.nki.cte.tiles import KeySource, columns_of, subtiles_of, whole_tile


def plan(*sources: KeySource, **changes: Any) -> PrefillPlan:
    sizes: dict[str, Any] = {
        "batch": 1, "tokens": 300, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "value_head_dim": 64, "scale": 0.125, "itemsize": 2, "sources": sources,
    }  # fmt: skip
    return make_plan(**(sizes | changes))


def causal(tokens: int, window: int | None = None, **changes: Any) -> PrefillPlan:
    """A whole prompt of one head; the window has so many keys."""
    before = None if window is None else 1 - window
    source = KeySource(tokens, after=0, before=before)
    return plan(source, **({"tokens": tokens, "heads": 1, "kv_heads": 1} | changes))


OFFSETS = st.none() | st.integers(-400, 400)


@given(
    tokens=st.integers(1, 700),
    slots=st.integers(1, 2500),
    group=st.integers(1, 5),
    offsets=st.tuples(OFFSETS, OFFSETS),
    is_exact=st.booleans(),
    page_len=st.sampled_from([0, 0, 1, 7, 16, 96]),
    itemsize=st.sampled_from([2, 4]),
    programs=st.sampled_from([1, 2]),
)
def test_every_visible_key_of_every_row_once(
    tokens: int, slots: int, group: int, offsets: tuple[int | None, int | None], is_exact: bool,
    page_len: int, itemsize: int, programs: int,
) -> None:  # fmt: skip
    before, after = offsets
    slots = slots if not page_len else -(-slots // page_len) * page_len
    layout = "paged" if page_len else "BKSH"
    source = KeySource(slots, layout, before, after, is_exact, page_len=page_len)
    made = plan(
        source, tokens=tokens, heads=group, kv_heads=1, itemsize=itemsize, programs=programs
    )
    rows: Counter[tuple[int, int]] = Counter()
    for share in made.shares:
        for blocks in share.groups:
            assert len(blocks) <= GROUP_BLOCKS
            for block in blocks:
                assert block.rows == block.heads * block.tokens <= 128
                rows.update(
                    (block.first_head + h, block.first_token + t)
                    for h in range(block.heads)
                    for t in range(block.tokens)
                )
            check_visits(made, source, blocks)
    assert rows == Counter((h, t) for h in range(group) for t in range(tokens))


def check_visits(made: PrefillPlan, source: KeySource, blocks: Any) -> None:
    seen: dict[int, list[int]] = {i: [] for i in range(len(blocks))}
    for visit in visits_of(made, blocks):
        tile = visit.tile
        assert tile.keys <= made.tile_keys
        assert 0 <= tile.start < tile.start + tile.keys <= source.slots
        for step in visit.steps:
            columns = []
            for j in range(*subtiles_of(tile, step)):
                start, end, stride, count = columns_of(tile, j, step.first, step.keys)
                mine = range(start, end, stride)
                assert len(mine) == count <= 128
                columns += mine
            assert sorted(columns) == list(range(step.keys))
            first = tile.start + step.first
            seen[step.block] += range(first, first + step.keys)
            if not step.is_masked:
                assert source.is_exact
                for t in (blocks[step.block].first_token, last_token(blocks[step.block])):
                    assert visible(source, t).start <= first
                    assert first + step.keys <= visible(source, t).stop
    for i, block in enumerate(blocks):
        assert len(seen[i]) == len(set(seen[i]))
        wanted = set(visible(source, block.first_token)) | set(visible(source, last_token(block)))
        assert wanted <= set(seen[i])


def last_token(block: Any) -> int:
    return int(block.first_token + block.tokens - 1)


def visible(source: KeySource, token: int) -> range:
    """What a query may see."""
    first = 0 if source.before is None else max(0, token + source.before)
    end = source.slots
    if source.after is not None:
        end = min(end, token + source.after + 1)
    return range(first, max(first, end))


@given(
    tokens=st.integers(1, 600),
    slots=st.integers(1, 2500),
    group=st.sampled_from([1, 9]),
    programs=st.sampled_from([1, 2]),
    pairs=st.sampled_from([1, 2]),
)
def test_every_row_is_in_one_round_or_in_none(
    tokens: int, slots: int, group: int, programs: int, pairs: int
) -> None:
    sizes = {"heads": group * pairs, "kv_heads": pairs, "programs": programs}
    made = plan(KeySource(slots, after=0), tokens=tokens, unrolled_steps=0, **sizes)
    if len({(len(share.looped), len(share.groups)) for share in made.shares}) > 1:
        assert made.rounds == made.sources[0].live_tiles == 0  # loops would not go alike
    rows: Counter[tuple[int, int, int]] = Counter()
    for share in made.shares:
        blocks = [(b, i) for g in share.looped for b in g for i in range(made.rounds)]
        blocks += [(b, 0) for g in share.groups for b in g]
        rows.update(
            (pair, block.first_head + h, block.first_token + i * block.stride + t)
            for pair in share.pairs
            for block, i in blocks
            for h in range(block.heads)
            for t in range(block.tokens)
        )
    every = ((k, h, t) for k in range(pairs) for h in range(group) for t in range(tokens))
    assert rows == Counter(every)
    for source in made.sources:
        assert source.live_tiles in (0, slots // 1024)


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("heads", [1, 8, 24])
def test_the_text_of_a_long_launch_does_not_grow(heads: int, programs: int) -> None:
    emitted = set()
    for tokens in (1 << 13, 1 << 14):
        made = causal(tokens, heads=heads, programs=programs, unrolled_steps=100)
        assert made.rounds > 1
        emitted.add(work(made, 0).emitted_steps)
    assert len(emitted) == 1
    # A step of each block in the loop over key tiles, and two or fewer around the diagonal.
    assert emitted.pop() <= 3 * heads * made.stride // 128


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (32, 8), (32, 32), (64, 1)])
def test_causality_halves_the_work_of_loops(
    heads: int, kv_heads: int, programs: int, itemsize: int
) -> None:
    changes = {"heads": heads, "kv_heads": kv_heads, "programs": programs, "itemsize": itemsize}
    made = causal(8192, unrolled_steps=0, **changes)
    assert made.rounds > 1
    done = work(made)
    assert done.squares == heads * 64 * 65 // 2  # as written out: nothing above the diagonal
    assert done.masked_steps == heads * 64
    shares = [work(made, program).squares for program in range(programs)]
    assert max(shares) <= 1.1 * min(shares)


@given(
    rounds=st.integers(1, 3),
    rest=st.integers(0, 200),
    ahead=st.integers(-1, 1500),
    group=st.sampled_from([3, 16]),
    page_len=st.sampled_from([0, 0, 5, 6, 48]),
    itemsize=st.sampled_from([2, 4]),
    programs=st.sampled_from([1, 2]),
)
def test_in_rounds_every_visible_key_once(
    rounds: int, rest: int, ahead: int, group: int, page_len: int, itemsize: int, programs: int
) -> None:
    """Loops at run time, what moves on with them, and the rest: every row its keys, others none."""
    tile = whole_tile(KeySource(1, page_len=page_len), 2048 // itemsize).keys
    tokens = rounds * tile + rest
    slots = max(1, tokens + ahead)
    slots = slots if not page_len else -(-slots // page_len) * page_len
    source = KeySource(slots, "paged" if page_len else "BKSH", after=ahead, page_len=page_len)
    sizes = {"tokens": tokens, "heads": group, "kv_heads": 1, "itemsize": itemsize}
    made = plan(source, programs=programs, unrolled_steps=0, **sizes)
    (source,) = made.sources
    for share in made.shares:
        groups = [(blocks, i) for i in range(made.rounds) for blocks in share.looped]
        for blocks, i in groups + [(blocks, 0) for blocks in share.groups]:
            looped = i * made.stride + loop_end(made, source, blocks[0]) if source.live_tiles else 0
            assert looped % tile == 0
            seen = [looped] * len(blocks)
            for visit in visits_of(made, blocks):
                start = visit.tile.start + i * visit.tile.stride
                assert visit.tile.stride == blocks[0].stride
                assert 0 <= start < start + visit.tile.keys <= source.slots
                for step in visit.steps:
                    assert start + step.first == seen[step.block]
                    seen[step.block] += step.keys
                    block = blocks[step.block]
                    token = block.first_token + i * block.stride
                    assert step.is_masked or seen[step.block] <= token + ahead + 1
            for block, end in zip(blocks, seen, strict=True):
                token = block.first_token + i * block.stride
                if source.is_diagonal:
                    assert looped <= min(slots, token + ahead + 1)
                assert min(slots, token + block.tokens + ahead) <= end


def test_what_is_short_is_not_in_a_loop() -> None:
    made = causal(8192, heads=8)
    assert made.rounds == made.sources[0].live_tiles == 0
    done = work(made)
    assert done.emitted_steps == done.steps
    assert done.squares <= 0.55 * done.all_squares


def test_a_dense_bias_is_not_in_a_loop() -> None:
    assert causal(8192, heads=8, has_bias=True, unrolled_steps=100).rounds == 0
    assert causal(8192, heads=8, unrolled_steps=100).rounds > 0


def test_causality_halves_the_work() -> None:
    done = work(causal(8192))
    assert done.squares <= 0.55 * done.all_squares
    assert done.squares == 64 * 65 // 2  # nothing above the diagonal
    # Those on the diagonal need a mask: one step of each block of 128 rows.
    assert done.masked_steps == 64
    full = work(plan(KeySource(8192), tokens=8192, heads=1, kv_heads=1))
    assert full.squares == full.all_squares == 64 * 64
    assert full.masked_steps == 0
    assert done.keys_loaded <= 0.65 * full.keys_loaded


@pytest.mark.parametrize("what", ["squares", "steps", "keys_loaded"])
def test_a_window_makes_the_cost_linear(what: str) -> None:
    costs = [getattr(work(causal(tokens, window=1024)), what) for tokens in (8192, 16384, 32768)]
    once, twice = costs[1] - costs[0], costs[2] - costs[1]
    assert twice == 2 * once
    assert costs[0] <= 8192 // 128 * (1024 // 128 + 2) * (1 if what != "keys_loaded" else 128)


def test_what_lies_before_a_window_is_not_even_loaded() -> None:
    source = KeySource(32768, before=32768 - 511)
    made = plan(source, KeySource(128, after=0), tokens=128, heads=1, kv_heads=1)
    assert work(made).keys_loaded == 512 + 128


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1024, 1100, 4096, 8192])
def test_two_programs_get_equal_shares_of_causal_work(tokens: int, group: int) -> None:
    made = causal(tokens, heads=group, programs=2)
    assert made.sharding == "rows"
    shares = [work(made, program).squares for program in (0, 1)]
    assert sum(shares) == work(made).squares
    assert max(shares) <= 1.1 * sum(shares) / 2


def test_an_even_number_of_pairs_is_divided() -> None:
    made = causal(256, batch=3, heads=4, kv_heads=2, programs=2)
    assert [share.pairs for share in made.shares] == [(0, 1, 2), (3, 4, 5)]
    assert made.shares[0].groups == made.shares[1].groups
    assert "6 pairs" in str(made)


def test_heads_of_a_group_share_the_keys() -> None:
    one, many = work(causal(512)), work(causal(512, heads=4))
    assert many.squares == 4 * one.squares
    assert many.keys_loaded == one.keys_loaded


def test_few_tokens_of_several_heads_share_the_partitions() -> None:
    made = plan(KeySource(100), tokens=20, heads=16, kv_heads=2)
    assert [block.rows for block in made.shares[0].groups[0]] == [120, 40]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 257}, "head_dim 257 and 64: the kernel takes up to 256"),
        ({"sources": (KeySource(8, "BKHS", has_holes=True),)}, "has_holes with layout BKHS"),
        ({"sources": ()}, "0 key sources: the cache, or the cache and new keys"),
    ],
)
def test_what_cannot_be_planned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**({"sources": (KeySource(8),)} | changes))
