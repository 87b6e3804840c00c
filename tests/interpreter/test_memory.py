"""On-chip memory: overlaps, dead tensors, what was never written, capacity, places."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some, stored, use

BF16 = ml_dtypes.bfloat16
KIB = 1024


def at(
    byte: int, columns: int = 8, dtype: Any = nl.float32, rows: int = 4, partition: int = 0
) -> Any:
    """A tile at an address in SBUF."""
    return nl.ndarray((rows, columns), dtype, address=(partition, byte))


# Tensors that share bytes.


def test_overlaps_are_real() -> None:
    def kernel(x: Any) -> Any:
        first, second = at(64, 8), at(64 + 16, 4)
        nisa.dma_copy(first, x)
        nisa.memset(second, 7.0)
        nisa.dma_copy(first[:, 0:4], x[:, 4:8])
        return stored(second), stored(first[:, 0:4])

    x = some(4, 8)
    seven, first = interpreter.run(kernel, x).outputs
    np.testing.assert_array_equal(seven, np.full((4, 4), 7))
    np.testing.assert_array_equal(first, x[:, 4:8])


def test_capture_shows_the_bytes_of_another_tensor() -> None:
    def kernel() -> None:
        first = nl.ndarray((2, 8), nl.float32, name="first", address=(0, 0))
        nisa.memset(first, 1.0)
        nisa.memset(at(16, 2, rows=1, partition=0), 2.0)
        nisa.memset(first[:, :1], 3.0)

    captured = interpreter.run(kernel, capture=("first",)).captured
    assert len(captured) == 2
    want = np.ones((2, 8), np.float32)
    want[:, 0], want[0, 4:6] = 3, 2
    np.testing.assert_array_equal(captured[1].values, want)


def write(*tiles: Any) -> None:
    for i, tile in enumerate(tiles):
        nisa.memset(tile, i + 1)


def whole_overwritten() -> None:
    first, second = at(0), at(0)
    write(first, second)
    use(first)


def part_overwritten() -> None:
    first, second = at(0), at(28, 4)
    write(first, second)
    use(first)


def another_type() -> None:
    first, second = at(0), at(30, 1, nl.bfloat16)
    write(first, second)
    use(first)


def other_partitions_too() -> None:
    first, second = at(0, rows=64), at(4, 1, rows=32, partition=32)
    write(first, second)
    use(first[32:64])


def repaired_in_part() -> None:
    first, second = at(0), at(0)
    write(first, second, first[:, :4])
    use(first)


def repaired_with_gaps() -> None:
    first, second = at(0), at(0)
    write(first, second, first[:, ::2], first[:, 1:7:2])
    use(first)


def declared_long_ago() -> None:
    first = at(0)
    write(first)
    for _ in range(3):
        write(at(0))
    use(first)


def overwritten_piece_by_piece() -> None:
    first, second, third = at(0), at(0, 4), at(16, 4)
    write(first, second, third)
    use(first[:, 4:])


def overwritten_by_strides() -> None:
    first, second = at(16, 1), at(0, 16)
    write(first, second[:, ::4])
    use(first)


def overwritten_by_dma() -> None:
    first, second = at(0), at(0)
    write(first)
    nisa.dma_copy(second, filled((4, 8)))
    use(first)


def predicated_keeps_the_dead() -> None:
    first, second = at(0), at(0)
    write(first, second)
    mask = nl.ndarray((4, 8), nl.uint8)
    nisa.memset(mask, 0)
    nisa.tensor_copy_predicated(first, 1.0, mask)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "kernel",
    [
        whole_overwritten, part_overwritten, another_type, other_partitions_too, repaired_in_part,
        repaired_with_gaps, declared_long_ago, overwritten_piece_by_piece,
        overwritten_by_strides, overwritten_by_dma,
        predicated_keeps_the_dead,
    ],
)  # fmt: skip
def test_reading_a_dead_tensor(kernel: Any, exact: bool) -> None:
    error = refusal("memory.dead-tensor", kernel, exact=exact)
    assert isinstance(error, interpreter.DeadTensorError)
    assert "same address" in str(error)
    assert len(error.sources) == 2
    assert str(error.sources[1]) in str(error)


def read_before() -> None:
    first, second = at(0), at(0)
    write(first)
    use(first)
    write(second)
    use(second)


def rewritten() -> None:
    first, second = at(0), at(0)
    write(first, second, first)
    use(first)


def rewritten_in_two_parts() -> None:
    first, second = at(0), at(0)
    write(first, second, first[:, :4], first[:, 4:])
    use(first)


def rewritten_in_strides() -> None:
    first, second = at(0), at(0)
    write(first, second, first[:, ::2], first[:, 1::2])
    use(first)


def the_part_that_lives() -> None:
    first, second = at(0), at(16, 4)
    write(first, second)
    use(first[:, :4])
    use(second)


def neighbours() -> None:
    first, second = at(0), at(32)
    write(first, second)
    use(first)


def other_partitions() -> None:
    first, second = at(0, rows=32), at(0, rows=32, partition=32)
    write(first, second)
    use(first)


def between_the_strides() -> None:
    first, second = at(20, 1), at(0, 16)
    write(first, second[:, ::4])
    use(first)


def other_memory() -> None:
    first, second = at(0), nl.ndarray((4, 8), nl.float32, nl.psum, address=(0, 0))
    write(first, second)
    use(first)


def in_turns() -> None:
    first, second = at(0), at(0)
    for _ in range(3):
        write(first[:, :4], first[:, 4:])
        use(first)
        write(second)
        use(second)


def views_of_one_tensor() -> None:
    tile = at(0)
    write(tile, tile.view(nl.int32)[:, :2])
    use(tile)


@pytest.mark.parametrize(
    "kernel",
    [
        read_before, rewritten, rewritten_in_two_parts, rewritten_in_strides, the_part_that_lives,
        neighbours, other_partitions, between_the_strides, other_memory, in_turns,
        views_of_one_tensor,
    ],
)  # fmt: skip
def test_living_tensors(kernel: Any) -> None:
    interpreter.run(kernel)


def test_what_lies_below_a_new_tensor_is_not_its_contents() -> None:
    def kernel() -> None:
        write(at(0, dtype=nl.int32))
        use(at(0, dtype=nl.int32))

    refusal("memory.never-written", kernel)


# Capacity.


def alive_together(sizes: Any, buffer: Any, addresses: Any) -> None:
    """Tiles of so many bytes a partition, all written before the first is read."""
    tiles = [
        nl.ndarray((2, n), nl.uint8, buffer, address=None if a is None else (0, a))
        for n, a in zip(sizes, addresses, strict=True)
    ]
    write(*tiles)
    for tile in tiles:
        nisa.tensor_copy(nl.ndarray((2, 1), nl.uint8), tile[:, :1])


LIMITS = [("trn1", 176 * KIB), ("trn2", 208 * KIB), ("trn3", 240 * KIB)]


@pytest.mark.parametrize("addressed", ["none", "all", "one"])
@pytest.mark.parametrize(("target", "limit"), LIMITS)
def test_capacity_of_sbuf(target: str, limit: int, addressed: str) -> None:
    half = limit // 2 - 2  # the copies that read take two bytes
    addresses = {"none": (None, None), "all": (0, half), "one": (None, 0)}[addressed]
    run = interpreter.run(alive_together, (half, half), nl.sbuf, addresses, target=target)
    use = next(u for u in run.memory if u.region is nl.sbuf)
    assert (use.capacity_bytes, use.core) == (limit, 0)
    assert 2 * half <= use.peak_bytes <= limit
    assert any("[2, " in text for text in use.largest)
    sizes = (half, half + 8)
    error = refusal(
        "memory.sbuf-capacity", alive_together, sizes, nl.sbuf, addresses, target=target
    )
    assert isinstance(error, interpreter.CapacityError)
    assert str(limit) in str(error)


def test_of_equally_large_tiles_the_first_used_are_named() -> None:
    def kernel() -> None:
        tiles = [nl.ndarray((2, 8), nl.float32, name=f"tile{i}") for i in range(24)]
        write(*tiles)
        for tile in tiles:
            use(tile)

    largest = interpreter.run(kernel).memory[0].largest
    assert [text.split()[0] for text in largest] == [f"tile{i}" for i in range(4)]


@pytest.mark.parametrize("addresses", [(None,) * 9, (*range(0, 16 * KIB, 2 * KIB), None)])
def test_capacity_of_psum(addresses: Any) -> None:
    def kernel(banks: int) -> None:
        alive_together((2 * KIB,) * banks, nl.psum, addresses[-banks:])

    run = interpreter.run(kernel, 8)
    use = next(u for u in run.memory if u.region is nl.psum)
    assert use.peak_bytes == use.capacity_bytes == 16 * KIB
    error = refusal("memory.psum-capacity", kernel, 9)
    assert str(18 * KIB) in str(error)


@pytest.mark.parametrize("buffer", [nl.sbuf, nl.psum])
@pytest.mark.parametrize("partition", [0, 100])
def test_addresses_lie_in_memory(buffer: Any, partition: int) -> None:
    size = 208 * KIB if buffer is nl.sbuf else 16 * KIB

    def kernel(byte: int, rows: int) -> None:
        nl.ndarray((rows, 64), nl.uint8, buffer, address=(partition, byte))

    interpreter.run(kernel, size - 64, 128 - partition)
    rule = f"memory.{buffer.value}-capacity"
    assert str(size) in str(refusal(rule, kernel, size - 63, 1))
    if partition:
        refusal(rule, kernel, 0, 129 - partition)
    refusal(rule, kernel, -1, 1)


def test_tensors_that_are_over_leave_room() -> None:
    def kernel(count: int, together: bool) -> None:
        result = nl.ndarray((2, 1), nl.uint8)
        tiles = [nl.ndarray((2, 60 * KIB), nl.uint8) for _ in range(count)]
        for tile in tiles:
            nisa.memset(tile, 1)
            if not together:
                nisa.tensor_copy(result, tile[:, :1])
        for tile in tiles if together else ():
            nisa.tensor_copy(result, tile[:, :1])

    interpreter.run(kernel, 3, True)
    run = interpreter.run(kernel, 8, False)
    peak = max(u.peak_bytes for u in run.memory)
    assert 60 * KIB <= peak <= 60 * KIB + 1
    refusal("memory.sbuf-capacity", kernel, 4, True)


def test_tensors_that_share_an_address_count_once() -> None:
    def kernel() -> None:
        for _ in range(4):
            tile = nl.ndarray((2, 100 * KIB), nl.uint8, address=(0, 0))
            write(tile)
            nisa.tensor_copy(nl.ndarray((2, 1), nl.uint8), tile[:, :1])
        nisa.memset(nl.ndarray((2, 50 * KIB), nl.uint8, address=(0, 80 * KIB)), 1)

    run = interpreter.run(kernel)
    assert max(u.peak_bytes for u in run.memory) == 100 * KIB + 1


def test_the_peak_of_either_program() -> None:
    def kernel() -> None:
        write(nl.ndarray((2, 64 + 64 * nl.program_id()), nl.uint8))

    run = interpreter.run(kernel, programs=2)
    peaks = {(u.core, u.region.value): u.peak_bytes for u in run.memory}
    assert peaks == {(0, "sbuf"): 64, (0, "psum"): 0, (1, "sbuf"): 128, (1, "psum"): 0}


# Declarations.


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (((128, 4), nl.float32), None),
        (((129, 4), nl.float32), "memory.partitions"),
        (((129, 4), nl.float32, nl.psum), "memory.partitions"),
        (((129, 4), nl.float32, nl.hbm), None),
        (((128,), nl.float32), "memory.rank"),
        (((128,), nl.float32, nl.hbm), None),
        (((128, 0), nl.float32), "memory.shape"),
        (((), nl.float32, nl.hbm), "memory.shape"),
        (((4, 4), nl.float32, nl.hbm, "", (0, 0)), "ndarray.address"),
        (((4, 4), nl.float32, nl.sbuf, "", (0, 6)), "memory.alignment"),
        (((4, 4), nl.bfloat16, nl.sbuf, "", (0, 6)), None),
        (((4, 4), nl.bfloat16, nl.sbuf, "", (0, 7)), "memory.alignment"),
        (((4, 4), nl.uint8, nl.sbuf, "", (0, 7)), None),
    ],
)
def test_declarations(arguments: Any, rule: str | None) -> None:
    def kernel() -> None:
        nl.ndarray(*arguments)

    if rule is None:
        interpreter.run(kernel)
    else:
        refusal(rule, kernel)


def test_a_buffer_is_one_of_four(no_shape_checks: None) -> None:
    refusal("ndarray.buffer", lambda: nl.ndarray((2, 2), nl.float32, "sbuf"))


def test_names_are_unique() -> None:
    def kernel(names: Any) -> None:
        for name in names:
            nl.ndarray((2, 2), nl.float32, name=name)

    interpreter.run(kernel, ("a", "b", "", ""))
    assert "'a'" in str(refusal("memory.name", kernel, ("a", "b", "a")))


@pytest.mark.parametrize("by_address", [False, True])
@pytest.mark.parametrize(
    ("start", "count", "allowed"),
    [
        (0, 128, True),
        (0, 65, True),
        (32, 65, False),
        (64, 64, True),
        (0, 33, True),
        (64, 33, True),
        (32, 33, False),
        (96, 32, True),
        (32, 32, True),
        (96, 1, True),
        (16, 16, False),
        (1, 1, False),
    ],
)
def test_where_an_engine_starts(start: int, count: int, allowed: bool, by_address: bool) -> None:
    def kernel() -> None:
        if by_address:
            tile = nl.ndarray((count, 4), nl.float32, address=(start, 0))
        else:
            tile = nl.ndarray((128, 4), nl.float32)[start : start + count]
        nisa.memset(tile, 0.0)

    def by_dma(x: Any) -> None:  # DMA starts anywhere
        nisa.dma_copy(nl.ndarray((128, 4), nl.float32)[start : start + count], x[:count])

    interpreter.run(by_dma, some(128, 4))
    if allowed:
        interpreter.run(kernel)
    else:
        assert f"from partition {start}" in str(refusal("memset.start-partition", kernel))


# Patterns that leave their tensor.


@pytest.mark.parametrize(
    ("pattern", "offset", "allowed"),
    [
        (((8, 4), (1, 8)), 0, True),
        (((8, 4), (1, 9)), 0, False),
        (((8, 5), (1, 8)), 0, False),
        (((8, 3), (1, 8)), 8, True),
        (((8, 4), (1, 8)), 8, False),
        (((8, 4), (2, 4)), 1, True),
        (((8, 4), (2, 4)), 2, False),
        (((8, 4), (1, 4)), 4, True),
        (((8, 4), (1, 4)), 5, False),
    ],
)
def test_patterns_that_leave_their_tensor(pattern: Any, offset: int, allowed: bool) -> None:
    def on_chip() -> None:
        loaded(filled((4, 8)).ap(pattern, offset=offset))

    def in_hbm(x: Any) -> None:
        loaded(x.ap(pattern, offset=offset))

    if allowed:
        interpreter.run(on_chip)
        interpreter.run(in_hbm, some(4, 8))
        return
    error = refusal("memory.out-of-bounds", on_chip)
    assert isinstance(error, interpreter.OutOfBoundsError)
    assert "[4, 8]" in str(error)
    if offset + sum(s * (n - 1) for s, n in pattern) >= 32:
        refusal("memory.out-of-bounds", in_hbm, some(4, 8))
    else:  # in HBM a row may go on into the next
        interpreter.run(in_hbm, some(4, 8))


# Exact mode.


def test_exact_mode_keeps_float32() -> None:
    def kernel(x: Any) -> Any:
        tile = nl.ndarray(x.shape, nl.bfloat16)
        nisa.dma_copy(tile, x)
        copy = nl.ndarray(x.shape, nl.float8_e4m3)
        nisa.tensor_copy(copy, tile)
        return stored(copy, nl.float32)

    x = some(8, 8)
    np.testing.assert_array_equal(interpreter.run(kernel, x, exact=True).outputs, x)
    rounded = x.astype(BF16).astype(np.float32).astype(ml_dtypes.float8_e4m3)
    np.testing.assert_array_equal(interpreter.run(kernel, x).outputs, rounded.astype(np.float32))


def test_exact_mode_keeps_addresses_and_capacity() -> None:
    def kernel(second: int) -> Any:
        first = nl.ndarray((4, 8), nl.bfloat16, address=(0, 0))
        nisa.memset(first, 1.0)
        nisa.memset(nl.ndarray((4, 8), nl.bfloat16, address=(0, second)), 2.0)
        return stored(first)

    np.testing.assert_array_equal(interpreter.run(kernel, 16, exact=True).outputs, np.ones((4, 8)))
    refusal("memory.dead-tensor", kernel, 14, exact=True)

    def large() -> None:
        nisa.memset(nl.ndarray((1, 104 * KIB), nl.bfloat16), 0.0)

    interpreter.run(large, exact=True)


def test_exact_mode_converts_integers() -> None:
    def kernel(x: Any) -> Any:
        return stored(loaded(x, nl.int8))

    x = 100 * some(8, 8)
    want = np.clip(np.rint(x), -128, 127)
    np.testing.assert_array_equal(interpreter.run(kernel, x, exact=True).outputs, want)
