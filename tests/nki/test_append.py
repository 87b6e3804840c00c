"""The append kernel: the bits of `cache.append`, nothing else written, nothing else moved."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_tkg.cache.kv_cache import KVCache, RingKVCache
from jax_tkg.cache.paged_cache import PagedKVCache
from jax_tkg.nki import append as append_module
from jax_tkg.nki import interpreter
from jax_tkg.nki.append import append as kernel
from jax_tkg.nki.append import make_append_plan
from jax_tkg.nki.append_call import MAX_ROWS, append_arguments, write_slots
from jax_tkg.nki.custom_call import Outline
from jax_tkg.nki.interpreter.lint import check

KINDS = ("BSKH", "BKSH", "BKHS", "ring", "paged")
EIGHT_BIT = ("int8", "float8_e4m3fn", "float8_e4m3", "float8_e5m2")
BATCH, HEADS, WIDTH, VALUE_WIDTH = 3, 2, 8, 6


def test_the_compiler_accepts_its_language() -> None:
    assert check(kernel) == ()


def append(cache: KVCache, *new: Any) -> KVCache:
    """By the kernel, interpreted."""
    return cache.append(*new, implementation="nki_interpret")


def empty(kind: str, dtype: str, **options: Any) -> KVCache:
    """A small cache; the 8-bit ones have scales per head and per tensor that cut some values."""
    if dtype in EIGHT_BIT:
        options |= {"k_scale": jnp.array([0.013, 0.7]), "v_scale": jnp.float32(0.002)}
    given = {"value_head_dim": VALUE_WIDTH, "dtype": dtype} | options
    if kind == "ring":
        return RingKVCache.create(BATCH, 8, HEADS, WIDTH, layout="BKSH", **given)
    if kind == "paged":
        return PagedKVCache.create(BATCH, 7, 4, 3, HEADS, WIDTH, **given)
    return KVCache.create(BATCH, 12, HEADS, WIDTH, layout=kind, **given)


def new_tokens(tokens: int, dtype: Any = jnp.float32, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    shape = (BATCH, tokens, HEADS)
    key = 3 * random.normal(size=(*shape, WIDTH))
    return jnp.asarray(key, dtype), jnp.asarray(random.normal(size=(*shape, VALUE_WIDTH)), dtype)


def assert_same_bits(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def rounds_once(dtype: str) -> bool:
    """Not so XLA:CPU of jax 0.7, which goes from float32 to some 8-bit floats through float16."""
    beside_a_tie = jnp.float32(1 + 2.0**-4 + 2.0**-13 if "4" in dtype else 1 + 2.0**-3 + 2.0**-13)
    return dtype == "int8" or float(jax.jit(lambda x: x.astype(dtype))(beside_a_tie)) > 1


COMMON = [("float32", False), ("bfloat16", True), ("int8", False), ("float8_e4m3fn", False)]
OTHERS = [("bfloat16", False), ("float16", False), ("float8_e4m3", True), ("float8_e5m2", False)]


@pytest.mark.parametrize(
    ("dtypes", "new_dtypes"),
    [
        (COMMON, (jnp.float32, jnp.bfloat16)),
        pytest.param(OTHERS, (jnp.float16, jnp.float32), marks=pytest.mark.slow),
    ],
    ids=["common", "others"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_and_dtype_has_the_bits_of_append(
    kind: str, dtypes: list[tuple[str, bool]], new_dtypes: tuple[Any, Any]
) -> None:
    """Rows of different lengths; the last tokens run over the end, of the pool too."""
    caches = [
        empty(kind, dtype, as_bits=as_bits)
        for dtype, as_bits in dtypes
        if dtype not in EIGHT_BIT or rounds_once(dtype)
    ]
    want, got = caches, caches
    by_jax = jax.jit(lambda caches, *new: [c.append(*new) for c in caches])
    by_kernel = jax.jit(lambda caches, *new: [append(c, *new) for c in caches])
    for seed, counts in enumerate([[5, 2, 0], [3, 5, 1], [5, 4, 5]]):
        key, value = map(jnp.astype, new_tokens(5, seed=seed), new_dtypes)
        want = by_jax(want, key, value, jnp.array(counts))
        got = by_kernel(got, key, value, jnp.array(counts))
    assert kind == "ring" or bool(want[0].overflowed().any())
    assert_same_bits(got, want)


def test_more_tokens_than_a_ring_has_slots() -> None:
    cache, (key, value) = empty("ring", "float32"), new_tokens(19)
    counts = np.array([19, 9, 3])
    got = append(cache, key, value, jnp.asarray(counts))
    token = np.arange(19)
    slots = np.where(token < counts[:, None], token % 8, -1)
    for name, new in (("key", key), ("value", value)):
        want = by_hand(np.asarray(getattr(cache.kv, name)), "BKSH", np.asarray(new), slots)
        np.testing.assert_array_equal(getattr(got.kv, name), want)


def by_hand(cache: np.ndarray, axes: str, new: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """A float cache after the new rows are in their slots, one row at a time."""
    after = cache.copy()
    for b, t, k in np.ndindex(*new.shape[:3]):
        slot = slots[b, t]
        if 0 <= slot < cache.shape[axes.index("S")]:
            where = {"B": b, "S": slot, "K": k, "H": slice(None)}
            after[tuple(where[a] for a in axes)] = new[b, t, k].astype(cache.dtype)
    return after


OUTSIDE = np.array([[0, 12, -1], [2**30, 11, -(2**31)], [-12, 5, 2**31 - 1]], np.int32)


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_positions_out_of_range_are_written_nowhere(kind: str, programs: int) -> None:
    random = np.random.default_rng(3)
    kv = empty(kind, "bfloat16", as_bits=False).kv
    kv = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), kv)
    key, value = new_tokens(3)
    got = write_slots(kv, key, value, jnp.asarray(OUTSIDE), programs=programs)
    for name, new, axes in (("key", key, kv.key_axes), ("value", value, kv.value_axes)):
        want = by_hand(np.asarray(getattr(kv, name)), axes, np.asarray(new), OUTSIDE)
        np.testing.assert_array_equal(getattr(got, name), want)


def launched(slots_of_cache: int, kind: str, dtype: str, programs: int) -> interpreter.Run:
    """An append of two tokens to a cache of this many slots."""
    cls = {"ring": RingKVCache}.get(kind, KVCache)
    scales = {"k_scale": 0.5, "v_scale": 0.25} if dtype in EIGHT_BIT else {}
    layout = kind if kind in KINDS[:3] else "BKSH"
    cache = cls.create(
        BATCH, slots_of_cache, HEADS, WIDTH, layout=layout, dtype=dtype, as_bits=False,
        value_head_dim=VALUE_WIDTH, **scales,
    )  # fmt: skip
    slots = jnp.array([[3, 4], [0, -1], [slots_of_cache - 1, slots_of_cache]])
    arrays, plan = append_arguments(cache.kv, *new_tokens(2), slots, programs=programs)
    return interpreter.run(
        kernel, *map(np.asarray, arrays), plan=plan, programs=programs, refuse_uninitialized=True
    )


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_only_the_new_rows_are_moved(kind: str, dtype: str, programs: int) -> None:
    rows = BATCH * 2 * HEADS
    new = rows * (WIDTH + VALUE_WIDTH)
    numbers = rows * 2 * (2 if dtype in EIGHT_BIT else 1)  # row numbers and scales
    for slots in (16, 4096):
        moved: Counter[str] = Counter()
        for program in launched(slots, kind, dtype, programs).programs:
            for step in program:
                if step.transfer is not None:
                    moved[step.transfer.route] += step.transfer.bytes
        stored = new * np.dtype(dtype).itemsize
        assert moved == {"hbm->sbuf": 4 * (new + numbers), "sbuf->hbm": stored}


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_two_programs_write_half_the_rows_each(seed: int | None) -> None:
    rows, width = 300, 4
    new = np.random.default_rng(0).normal(size=(1, rows, 1, width)).astype(np.float32)
    cache = np.zeros((1, rows, 1, width), np.float32)
    order = np.random.default_rng(1).permutation(rows).astype(np.int32)
    plan = make_append_plan(rows, programs=2)
    run = interpreter.run(
        kernel, cache, cache, new, new, order, order, plan=plan, programs=2, seed=seed
    )
    for got in run.outputs:
        np.testing.assert_array_equal(got[0, order], new[0])
    assert len(run.programs[0]) == len(run.programs[1])
    assert plan.tiles[0] == ((0, 128), (128, 22))


def ties(dtype: Any, scales: np.ndarray) -> np.ndarray:
    """Dividends whose quotients lie on, or an ulp beside, the middles of stored numbers."""
    if dtype == np.int8:
        grid = np.arange(-130, 130, dtype=np.float32)
    else:
        numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
        grid = np.unique(numbers[np.isfinite(numbers)])
    middles = (grid[1:] + grid[:-1]) / 2
    dividend = middles * scales[:, None]
    up, down = (np.nextafter(dividend, np.float32(s) * np.inf) for s in (1, -1))
    return np.concatenate([down, dividend, up], axis=1).astype(np.float32)


def quantised(x: np.ndarray, scales: np.ndarray, dtype: Any) -> np.ndarray:
    """NumPy's own division and rounding."""
    quotient = x / scales[:, None]
    if dtype == np.int8:
        return np.clip(np.rint(quotient), -127, 127).astype(np.int8)
    top = float(ml_dtypes.finfo(dtype).max)
    return np.clip(quotient, -top, top).astype(dtype)


def stored_ties(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel stores of `ties`, and what it should."""
    scales = np.exp(np.random.default_rng(0).uniform(-20, 5, 128)).astype(np.float32)
    x = ties(dtype, scales)
    rows, width = x.shape
    cache = np.zeros((1, rows, 1, width), dtype)
    top = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    new, at = x.reshape(cache.shape), np.arange(rows, dtype=np.int32)
    run = interpreter.run(
        kernel, cache, cache, new, new, at, at, scales, scales, make_append_plan(rows, top=top)
    )
    return run.outputs[0].reshape(x.shape), quantised(x, scales, dtype)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_division_is_exact_where_it_matters(name: str) -> None:
    got, want = stored_ties(np.dtype(name if name == "int8" else getattr(ml_dtypes, name)))
    assert got.tobytes() == want.tobytes()


def test_a_reciprocal_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_module, "divide_rows", reciprocal_only)
    got, want = stored_ties(np.dtype(np.int8))
    assert (got != want).sum() > 1000


def reciprocal_only(rows: Any, scale: Any) -> Any:
    from jax_tkg.nki.dialect import nisa, nl

    inverse = nl.ndarray(scale.shape, nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=scale)
    quotient = nl.ndarray(rows.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=quotient, data=rows, op0=nl.multiply, operand0=inverse)
    return quotient


def test_a_donated_cache() -> None:
    cache, new = empty("BKHS", "int8"), new_tokens(2)
    before = jax.tree.map(np.array, cache)
    want = jax.tree.map(np.array, jax.jit(lambda c: c.append(*new))(cache))
    assert_same_bits(jax.jit(append)(cache, *new), want)
    assert_same_bits(cache, before)  # not donated: the old cache is as it was
    donated = jax.jit(append, donate_argnums=0)(cache, *new)
    assert cache.kv.key.is_deleted()
    assert_same_bits(donated, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_aliased_lowering_has_no_copy(kind: str) -> None:
    """The custom call takes the donated caches themselves and gives them back."""
    kv = empty(kind, "bfloat16", as_bits=False).kv

    def call(key: Any, value: Any, kv: Any, slots: Any) -> Any:
        kv = type(kv)(**vars(kv) | {"key": key, "value": value})
        written = write_slots(kv, *new_tokens(2), slots, compiler=Outline())
        return written.key, written.value

    slots = jnp.zeros((BATCH, 2), jnp.int32)
    traced = jax.jit(call, donate_argnums=(0, 1)).trace(kv.key, kv.value, kv, slots)
    text = traced.lower(lowering_platforms=("neuron",)).as_text()
    signature = next(line for line in text.splitlines() if "@main" in line)
    assert signature.count("tf.aliasing_output") == 2
    (custom,) = (line for line in text.splitlines() if "AwsNeuronCustomNativeKernel" in line)
    assert "%arg0, %arg1" in custom
    for i in range(2):
        assert f"output_tuple_indices = [{i}], operand_index = {i}" in custom
    caches = {f"tensor<{'x'.join(map(str, x.shape))}xbf16>" for x in (kv.key, kv.value)}
    assert not any(t in line for t in caches for line in text.splitlines()[2:] if custom != line
                   and "return" not in line and "@main" not in line)  # fmt: skip


def test_a_cache_too_large_to_index_is_refused() -> None:
    """A DMA indexes 2^31 - 1 rows; of transposed keys every element is one."""

    def refused(kind: str, slots: int) -> str | None:
        cache = jax.eval_shape(
            lambda: KVCache.create(4, slots, 8, 64, layout=kind, dtype="bfloat16")
        )
        choice = cache.explain_append(implementation="nki_interpret")
        return None if choice.chosen else choice.rejected[0][1]

    assert refused("BKHS", MAX_ROWS // (4 * 8 * 64)) is None
    assert refused("BKSH", MAX_ROWS // (4 * 8 * 64) + 1) is None
    reason = refused("BKHS", MAX_ROWS // (4 * 8 * 64) + 1)
    assert reason is not None
    assert "use BKSH instead of BKHS" in reason


@pytest.mark.usefixtures("no_shape_checks")
def test_shapes_that_do_not_fit_are_refused() -> None:
    kv, (key, value) = empty("BSKH", "float32").kv, new_tokens(2)
    with pytest.raises(ValueError, match=r"slots \[B, T\]; got"):
        write_slots(kv, key, value, jnp.zeros((BATCH, 3), jnp.int32))
    with pytest.raises(ValueError, match="this cache takes key"):
        write_slots(kv, key[..., 1:], value, jnp.zeros((BATCH, 2), jnp.int32))
