"""The decode kernel by itself: language, hardware rules, exchanges, long buckets, every step."""

import inspect
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_tkg
from jax_tkg.nki import attention_tkg as kernel_module
from jax_tkg.nki import interpreter
from jax_tkg.nki.arguments import constants
from jax_tkg.nki.attention_tkg import attend, attention_tkg
from jax_tkg.nki.buffers import Inputs
from jax_tkg.nki.implementation import NkiInterpret
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.lint import check
from jax_tkg.nki.live_tiles import place_live_tiles
from jax_tkg.nki.plan import Features, KernelPlan, make_plan
from jax_tkg.nki.rope_call import rotary_table
from jax_tkg.nki.steps import exchange
from jax_tkg.nki.steps.cached import parts_of
from jax_tkg.nki.tables import hidden_new
from jax_tkg.rope import RotaryEmbedding

NAMES = tuple(inspect.signature(attention_tkg).parameters)[:-1]
ROTARY = RotaryEmbedding()


def test_the_compiler_accepts_its_language() -> None:
    assert check(attention_tkg) == ()


class Case:
    """A problem with keys whose norm grows along the context, padding of NaN, and its answer."""

    def __init__(self, plan: KernelPlan, lengths: list[int], window: int | None = None) -> None:
        random = np.random.default_rng(0)
        b, t, s, n, k = plan.batch, plan.tokens, plan.slots, plan.heads, plan.kv_heads
        self.plan = plan

        def normal(*shape: int) -> np.ndarray:
            return random.normal(size=shape).astype(np.float32)

        query, key = normal(b, t, n, plan.head_dim), normal(b, k, s, plan.head_dim)
        key *= 1 + 3 * np.arange(s, dtype=np.float32)[:, None] / max(lengths)
        value = normal(b, k, s, plan.value_head_dim)
        end = np.array(lengths)[:, None]
        position = end - t + np.arange(t)
        new_position = end + np.arange(t)
        high = position + 1
        if plan.features.has_new_keys:
            position, high = new_position, np.broadcast_to(end, (b, t))
        low = np.zeros((b, t)) if window is None else np.maximum(0, position - window + 1)
        for row, length in enumerate(lengths):
            key[row, :, length:] = value[row, :, length:] = np.nan
        self.arrays: dict[str, Any] = dict.fromkeys(NAMES)
        bounds = np.stack([low, np.maximum(high, 0)]).astype(np.float32)
        self.bounds = bounds
        numbers = dict(zip(("low", "high"), jnp.asarray(bounds), strict=True))
        self.arrays |= {"query": query, "key": key, "value": value}
        if plan.features.has_sinks:
            self.arrays["sinks"] = normal(b, n)
        if plan.features.has_new_keys:
            hidden = (np.arange(t)[:, None] > np.arange(t)) | (
                new_position[:, :, None] < low[:, None, :]
            )  # sequence, key, token
            self.new_seen = ~hidden
            self.arrays |= {
                "new_key": normal(b, t, k, plan.head_dim),
                "new_value": normal(b, t, k, plan.value_head_dim),
                "new_hidden": np.asarray(hidden_new(jnp.asarray(hidden[:, None]), plan)),
            }
        if plan.features.rotary is not None:
            self.arrays["query_positions"] = new_position.astype(np.int32)
            self.arrays["rotary_table"] = rotary_table(ROTARY, plan.head_dim)
        if plan.live is not None:
            tables, numbers["live_edges"] = place_live_tiles(
                numbers["low"], numbers["high"], None, s, plan.live, plan.programs
            )
            self.arrays["live_tiles"] = np.asarray(tables)
        every = constants(plan, numbers)
        self.arrays["constants"] = None if every is None else np.asarray(every)

    def run(self, kernel: Any = attention_tkg, **options: Any) -> interpreter.Run:
        return interpreter.run(
            kernel, *self.arrays.values(), self.plan, programs=self.plan.programs, **options
        )

    def rotated(self, name: str) -> np.ndarray:
        """Queries or new keys as they are attended with, float64."""
        rows = self.arrays[name]
        if self.plan.features.rotary is None:
            return np.asarray(rows, np.float64)
        frequencies = np.asarray(ROTARY.frequencies(self.plan.head_dim), np.float64)
        angles = self.arrays["query_positions"][..., None, None] * frequencies
        first, second = np.split(rows.astype(np.float64), 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp in float64, one row at a time."""
        plan, arrays = self.plan, self.arrays
        out = np.zeros((plan.batch, plan.tokens, plan.heads, plan.value_head_dim))
        lse = np.full(out.shape[:3], -np.inf)
        query = self.rotated("query")
        new_keys = self.rotated("new_key") if plan.features.has_new_keys else None
        for b, t, n in np.ndindex(lse.shape):
            k = n // plan.group
            first, end = self.bounds[:, b, t].astype(int)
            keys, values = arrays["key"][b, k, first:end], arrays["value"][b, k, first:end]
            if new_keys is not None:
                seen = self.new_seen[b, :, t]
                keys = np.concatenate([keys, new_keys[b, seen, k]])
                values = np.concatenate([values, arrays["new_value"][b, seen, k]])
            logits = keys.astype(np.float64) @ query[b, t, n] * plan.features.scale
            if plan.features.soft_cap is not None:
                logits = plan.features.soft_cap * np.tanh(logits / plan.features.soft_cap)
            sinks = arrays["sinks"]
            sink = [] if sinks is None else [sinks[b, n]]
            if len(logits) + len(sink) == 0:
                continue
            top = max([*logits, *sink])
            total = np.exp(logits - top).sum() + np.exp(np.array(sink) - top).sum()
            out[b, t, n] = np.exp(logits - top) @ values / total
            lse[b, t, n] = top + np.log(total)
        return out, lse

    def error(self, **options: Any) -> float:
        """Largest deviation of output and log-sum-exp; inf for a NaN or a wrong empty row."""
        out, lse = self.run(**options).outputs[:2]
        want_out, want_lse = self.answer()
        seen = np.isfinite(want_lse)
        if np.isnan(out).any() or not np.array_equal(np.isneginf(lse), ~seen):
            return np.inf
        differences = out - want_out, lse[seen] - want_lse[seen]
        return float(max(np.abs(d).max(initial=0) for d in differences))


SIZES: dict[str, Any] = {
    "batch": 2, "tokens": 2, "slots": 900, "heads": 4, "kv_heads": 2, "head_dim": 64,
    "value_head_dim": 32, "layout": "BKSH", "max_keys": 256,
}  # fmt: skip
ALL = Features(scale=0.125, has_sinks=True, has_new_keys=True, soft_cap=8.0, is_ragged=True)
PLAIN = Features(scale=0.125, is_ragged=True)


def planned(features: Features = PLAIN, **changes: Any) -> KernelPlan:
    return make_plan(features=features, **(SIZES | {"loop": "static"} | changes))


CLOSE = 5e-6
"""Float32 against float64: about ten roundings of numbers up to 5."""


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("loop", ["static", "runtime"])
@pytest.mark.parametrize("exchange_mode", ["deferred", "every tile"])
def test_two_programs_that_share_a_sequence(
    exchange_mode: str, loop: str, seed: int | None
) -> None:
    case = Case(planned(ALL, programs=2, exchange=exchange_mode, loop=loop), [900, 333])
    assert case.plan.sharding == "sequence"
    assert case.error(seed=seed, refuse_uninitialized=True) < CLOSE


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("loop", ["static", "runtime"])
def test_empty_rows_are_zero_and_minus_infinity(loop: str, programs: int) -> None:
    case = Case(planned(loop=loop, programs=programs), [0, 1])
    assert np.isneginf(case.answer()[1]).any()
    assert case.error(refuse_uninitialized=True) < CLOSE


@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
@pytest.mark.parametrize("exchange_mode", ["deferred", "every tile"])
def test_number_of_exchanges(exchange_mode: str, tiles: int) -> None:
    case = Case(planned(programs=2, exchange=exchange_mode, slots=512 * tiles), [512 * tiles, 77])
    assert [len(s.tiles) for s in case.plan.shares] == [tiles, tiles]
    done = case.run()
    for program in done.programs:
        count = sum(step.op == "sendrecv" for step in program)
        assert count == (3 if exchange_mode == "deferred" else 2 * tiles + 1)
        assert {s.exchange for s in program if s.op == "sendrecv"} == {"gpsimd_dma"}


@pytest.mark.parametrize("loop", ["static", "runtime"])
@pytest.mark.parametrize("exchange_mode", ["deferred", "every tile"])
def test_both_programs_hold_the_same_bits(
    exchange_mode: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def spy(bufs: Any, sent: Any, weights: Any) -> None:
        from jax_tkg.nki.interpreter.window import window

        exchange.merge_outputs(bufs, sent, weights)
        for tile in (bufs.max, bufs.sum, *bufs.output):
            stored[nl.program_id()].append(window(tile).array().copy())

    monkeypatch.setattr(kernel_module, "merge_outputs", spy)
    Case(planned(ALL, programs=2, exchange=exchange_mode, loop=loop), [900, 333]).run()
    assert len(stored[0]) == len(stored[1]) > 0
    for mine, theirs in zip(stored[0], stored[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("programs", [1, 2])
def test_without_the_log_sum_exp(programs: int) -> None:
    """The kernel returns the output alone, and stores nothing else."""
    case = Case(planned(replace(ALL, returns_lse=False), programs=programs), [900, 333])
    done = case.run(refuse_uninitialized=True)
    out = done.outputs
    np.testing.assert_allclose(out, case.answer()[0], atol=CLOSE, rtol=0)
    moved = [s.transfer for program in done.programs for s in program if s.transfer]
    assert sum(t.bytes for t in moved if t.route == "sbuf->hbm") == out.nbytes


def loaded_bytes(run: interpreter.Run) -> int:
    steps = [step for program in run.programs for step in program]
    return sum(s.transfer.bytes for s in steps if s.transfer and s.transfer.route == "hbm->sbuf")


@pytest.mark.parametrize(("length", "tiles"), [(1000, 2), (8193, 4), (20_000, 6), (49_152, 12)])
def test_a_short_context_in_a_long_bucket_on_two_programs(length: int, tiles: int) -> None:
    """What is loaded follows the context, in tiles of 4,096 slots for each program."""
    sizes = {"batch": 1, "tokens": 1, "slots": 49152, "heads": 1, "kv_heads": 1, "max_keys": 4096}
    case = Case(planned(programs=2, loop=None, **sizes), [length])
    assert case.plan.live is not None
    assert case.plan.live.full.keys == 4096
    assert case.error() < CLOSE
    a_tile = 4096 * (64 + 32) * 4
    assert tiles * a_tile <= loaded_bytes(case.run()) < tiles * a_tile + 40_000


@pytest.mark.parametrize("programs", [1, 2])
def test_a_window_in_a_long_bucket(programs: int) -> None:
    sizes = {"batch": 1, "tokens": 2, "slots": 32768, "heads": 2, "kv_heads": 1, "most_live": 129}
    features = replace(PLAIN, has_new_keys=False, has_low=True)
    case = Case(planned(features, loop=None, programs=programs, **sizes), [32768], window=128)
    assert case.plan.live is not None
    assert case.error() < CLOSE
    assert loaded_bytes(case.run()) < 2 * 128 * programs * (64 + 32) * 4 + 10_000


@pytest.mark.parametrize("lengths", [[5, 900], [384, 512], [385, 129], [768, 897], [640, 0]])
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("programs", [1, 2])
def test_live_tiles_wherever_they_start(
    programs: int, window: int | None, lengths: list[int]
) -> None:
    features = replace(PLAIN, has_low=window is not None)
    case = Case(planned(features, loop="runtime", programs=programs), lengths, window)
    assert case.error(refuse_uninitialized=True) < CLOSE


@pytest.mark.parametrize("loop", ["static", "runtime"])
def test_unmasked_tiles_hold_no_unseen_slot(loop: str) -> None:
    """Known tiles are all masked where lengths are given at run time; a loop has only full ones."""
    case = Case(planned(loop=loop, slots=1024, tokens=1), [1024, 1024])
    predicated = [s for s in case.run().programs[0] if s.op == "tensor_copy_predicated"]
    masked = [s for s in predicated if "mask_cached" in str(s.source)]
    assert len(masked) == (0 if loop == "runtime" else len(case.plan.shares[0].tiles))


def test_more_rows_than_partitions() -> None:
    case = Case(planned(ALL, tokens=150, heads=4, slots=300, batch=1), [290])
    assert case.error(refuse_uninitialized=True) < CLOSE
    case = Case(planned(ALL, tokens=9, heads=120, slots=300, batch=1), [290])
    assert case.error(refuse_uninitialized=True) < CLOSE


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_rotation_in_the_kernel(batch: int, programs: int) -> None:
    """Also when sequences are shared out: with 5 of them by batch, else by keys."""
    features = Features(scale=0.125, has_new_keys=True, rotary="half", is_ragged=True)
    slots = 200 if batch == 5 else 600
    case = Case(
        planned(features, batch=batch, slots=slots, programs=programs), ([199, 64] * 3)[:batch]
    )
    assert (case.plan.sharding == "batch") == (batch == 5 and programs == 2)
    assert case.error(refuse_uninitialized=True) < CLOSE
    keys = case.run().outputs[2]
    np.testing.assert_allclose(keys, case.rotated("new_key"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize(("pages", "masked"), [(40, None), (272, None), (40, (2, 4)), (40, (1, 1))])
def test_pages_that_are_missing_among_live_ones(
    pages: int, masked: tuple[int, int] | None, programs: int
) -> None:
    """Their slots are not seen, and not taken for those of page 0, which is a page like others."""
    random = np.random.default_rng(0)
    pool = random.normal(size=(pages, 2, 16, 32)).astype(np.float32)
    table = np.stack([random.permutation(pages) for _ in range(2)]).astype(np.int32)
    table[0, [3, 17, pages - 1]] = -1
    query = jnp.asarray(random.normal(size=(2, 1, 4, 32)), jnp.float32)
    lengths = jnp.array([16 * pages - 5, 16 * pages])
    layout = jax_tkg.Paged(
        jnp.asarray(pool), jnp.asarray(pool), k_scale=None, v_scale=None,
        dtype=np.dtype(np.float32), page_indices=jnp.asarray(table),
    )  # fmt: skip
    # A dense mask with a number for every row also hides the slots; a shared one does not.
    mask = None if masked is None else jnp.asarray(random.random((*masked, 1, 16 * pages)) < 0.7)
    given = {"mask": mask, "key_value_seq_lengths": lengths}
    form = NkiInterpret(programs=programs)
    plan = jax_tkg.explain(query, layout, **given, implementation=form).plan
    assert (plan.live is not None) == (pages == 272)
    assert plan.features.has_holes == (masked != (2, 4))
    got = jax_tkg.attention_tkg(query, layout, **given, implementation=form, return_residual=True)
    dense = pool[np.maximum(table, 0)].swapaxes(2, 3).reshape(2, -1, 2, 32)
    there = np.repeat(table >= 0, 16, axis=1)[:, None, None]
    seen = jnp.asarray(there) if mask is None else there & mask
    given |= {"key": jnp.asarray(dense), "value": jnp.asarray(dense), "mask": seen}
    want = jax_tkg.attention_tkg(query, **given, implementation="reference", return_residual=True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "pairs"),
    [
        ({"batch": 3}, 6),
        ({"batch": 20, "kv_heads": 1, "slots": 140}, 20),  # bits
        ({"batch": 9, "heads": 32, "slots": 140}, 8),  # groups of 4, 4 and 1 sequences
        ({"batch": 3, "programs": 2, "value_head_dim": 160}, 6),
        ({"batch": 2, "programs": 2, "loop": "runtime"}, 4),
        ({"batch": 8, "programs": 2, "slots": 140}, 8),  # four sequences for each
    ],
)
def test_the_new_keys_of_all_pairs_at_once(sizes: dict[str, Any], pairs: int) -> None:
    """Of one token; NaN among those of one sequence does not reach another."""
    plan = planned(ALL, **({"tokens": 1} | sizes))
    assert plan.new_pairs == pairs
    lengths = ([plan.slots, 33, 7] * 7)[: plan.batch]
    case = Case(plan, lengths)
    assert case.error(refuse_uninitialized=True) < CLOSE
    before = case.run().outputs[0]
    case.arrays["new_key"][1] = case.arrays["new_value"][0] = np.nan
    after = case.run().outputs[0]
    assert np.isnan(after[:2]).all()
    np.testing.assert_array_equal(after[2:], before[2:])


def test_what_new_keys_take_of_the_tensor_engine() -> None:
    def count(op: str, *functions: str, **sizes: int) -> int:
        plan = planned(ALL, slots=140, **sizes)
        steps = Case(plan, [130] * plan.batch).run().programs[0]
        return sum(step.op == op and step.source.function in functions for step in steps)

    products = "compute_new_qk_matmul", "compute_new_pv_matmul", "add_new_values"
    assert count("nc_matmul", *products, tokens=1, batch=6) == 1 + 1  # logits, weights spread
    assert count("nc_matmul", "compute_new_qk_matmul", tokens=2, batch=6) == 12  # by pair
    assert count("nc_transpose", "transpose", tokens=2, batch=6) == 1  # with the queries
    assert count("nc_transpose", "transpose", tokens=2, batch=15) == 2  # which fill the partitions


def test_the_new_keys_of_few_pairs_each_by_itself() -> None:
    assert planned(ALL, tokens=1, batch=1).new_pairs == planned(ALL, tokens=2).new_pairs == 0


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("lengths", [[900, 5, 0, 130], [0, 900, 900, 350], [300, 128, 129, 900]])
def test_a_window_shared_by_sequences(lengths: list[int], programs: int) -> None:
    """Both programs make equally many rounds, whatever the lengths; the interpreter sees to it."""
    features = replace(ALL, has_low=True)
    sizes = {"batch": 4, "programs": programs, "loop": "runtime", "most_live": 201}
    case = Case(planned(features, **sizes), lengths, window=200)
    assert case.plan.sharding == ("none" if programs == 1 else "batch")
    done = case.run(refuse_uninitialized=True)
    assert not any(step.op == "sendrecv" for program in done.programs for step in program)
    assert case.error(refuse_uninitialized=True) < CLOSE


@pytest.mark.parametrize(("tokens", "heads"), [(9, 4), (19, 1)])
def test_a_dense_mask_for_more_tokens_than_a_word_has_bits(tokens: int, heads: int) -> None:
    """Bits of the cached keys come in words of 16 tokens, of the new keys in bytes of 8."""
    random, slots = np.random.default_rng(1), 150

    def normal(*shape: int) -> jnp.ndarray:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    key, value = normal(1, slots, 2, 32), normal(1, slots, 2, 32)
    given: dict[str, Any] = {
        "new_key": normal(1, tokens, 2, 32),
        "new_value": normal(1, tokens, 2, 32),
        "mask": jnp.asarray(random.random((1, heads, tokens, slots + tokens)) < 0.6),
    }
    query = normal(1, tokens, 4, 32)
    results = [
        jax_tkg.attention_tkg(query, key, value, **given, implementation=form, return_residual=True)
        for form in (NkiInterpret(programs=1), "reference")
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_dense_mask_of_many_sequences(heads: int) -> None:
    """Of one token: bits of the cached keys are of sequences."""
    random, batch, slots = np.random.default_rng(1), 64, 150  # two row groups

    def normal(*shape: int) -> jnp.ndarray:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    mask = random.random((batch, heads, 1, slots)) < 0.6
    key, value = normal(batch, slots, 1, 16), normal(batch, slots, 1, 16)
    value = value.at[0, 3].set(jnp.nan)
    mask[0, :, :, 3] = mask[7] = False
    query = normal(batch, 1, 4, 16)
    results = [
        jax_tkg.attention_tkg(
            query, key, value, mask=jnp.asarray(mask), implementation=form, return_residual=True
        )
        for form in (NkiInterpret(programs=1), "reference")
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=CLOSE, rtol=0)


def test_few_channels_of_transposed_keys_come_in_as_many_parts_as_fill_the_partitions() -> None:
    assert parts_of(10_241, 128) == [(0, 10_241)]
    assert parts_of(10_241, 64) == [(0, 5121), (5121, 5120)]
    assert parts_of(3000, 32) == [(0, 2048), (2048, 952)]  # no shorter ones


def attention_in_sbuf(*arrays_and_plan: Any) -> Any:
    """A larger kernel: it has the queries in SBUF and keeps the results there."""
    arrays, plan = arrays_and_plan[:-1], arrays_and_plan[-1]
    inputs = Inputs(*arrays)
    rows = plan.batch * plan.heads * plan.tokens
    query = nl.ndarray((plan.head_dim, rows), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=query, src=inputs.query.permute((3, 0, 2, 1)))
    inputs.query = query
    out = nl.ndarray((plan.value_head_dim, rows), nl.float32, buffer=nl.sbuf)
    lse = nl.ndarray((1, rows), nl.float32, buffer=nl.sbuf)
    attend(inputs, out, lse, None, plan)
    results = []
    for tile in (out, lse):
        both = nl.ndarray((plan.programs, *tile.shape), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=both[nl.program_id(0)], src=tile)
        results.append(both)
    return tuple(results)


@pytest.mark.parametrize(
    ("batch", "slots", "programs", "sharding"),
    [(2, 300, 1, "none"), (2, 600, 2, "sequence"), (3, 200, 2, "batch"), (1, 200, 2, "batch")],
)
def test_queries_and_results_in_sbuf(batch: int, slots: int, programs: int, sharding: str) -> None:
    """Both programs have the whole results, also of the sequences that the other one did."""
    case = Case(planned(ALL, batch=batch, slots=slots, programs=programs), [190, 7, 0][:batch])
    assert case.plan.sharding == sharding
    out, lse = case.run(attention_in_sbuf, refuse_uninitialized=True).outputs
    want_out, want_lse = case.answer()
    for program in range(programs):
        by_row = out[program].T.reshape(batch, 4, 2, 32).swapaxes(1, 2)
        np.testing.assert_allclose(by_row, want_out, atol=CLOSE, rtol=0)
        by_row = lse[program].reshape(batch, 4, 2).swapaxes(1, 2)
        np.testing.assert_allclose(by_row, want_lse, atol=CLOSE, rtol=0)
