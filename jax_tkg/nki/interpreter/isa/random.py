"""Random numbers: `rng`, `rand2`, `dropout`, and the state of the generators.

Every engine of every core has one XORWOW generator a partition (four on the Vector engine, which
take turns), so that a saved state continues where it was. How the hardware seeds and steps its
generators is documented nowhere: the bits here repeat from run to run, and are not the hardware's.
"""

import math
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter.hardware import NUM_PARTITIONS
from jax_tkg.nki.interpreter.isa.operands import broadcast_operand, cycles, gpsimd_cycles
from jax_tkg.nki.interpreter.record import Engine
from jax_tkg.nki.interpreter.step import PSUM, SBUF, Step, instruction
from jax_tkg.nki.interpreter.tensor import NkiTensor

STATE_WORDS = 6  # five of shift register, one of counter
STREAMS = {Engine.gpsimd: 1, Engine.vector: 4}  # generators a partition
WEYL = np.uint32(362437)
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32")
RAND2_TYPES = (
    *INTEGERS, "float8_e4m3", "float8_e5m2", "float16", "bfloat16", "float32", "tfloat32",
)  # fmt: skip


class Xorwow:
    """Marsaglia's XORWOW, one or more generators for each partition.

    Attributes:
        state: `[partitions, streams, 6]`.
    """

    def __init__(self, engine: Engine, *seed: int) -> None:
        shape = (NUM_PARTITIONS, STREAMS[engine], STATE_WORDS)
        sequence = np.random.SeedSequence([engine.value, *seed])
        self.state = sequence.generate_state(math.prod(shape)).reshape(shape)

    def draw(self, first: int, partitions: int, count: int) -> np.ndarray:
        """The next `count` numbers of 32 bits of some partitions; their generators take turns."""
        lanes = self.state[first : first + partitions]
        x, y, z, w, v, d = (lanes[..., i].copy() for i in range(STATE_WORDS))
        rounds = -(-count // lanes.shape[1])
        drawn = np.empty((partitions, rounds, lanes.shape[1]), np.uint32)
        for i in range(rounds):
            t = x ^ (x >> np.uint32(2))
            x, y, z, w = y, z, w, v
            v = v ^ (v << np.uint32(4)) ^ t ^ (t << np.uint32(1))
            d = d + WEYL
            drawn[:, i] = v + d
        lanes[...] = np.stack([x, y, z, w, v, d], axis=-1)
        return drawn.reshape(partitions, -1)[:, :count]


def _generator(step: Step, engine: Engine) -> Xorwow:
    generators: dict[Engine, Xorwow] = step.core.generators
    if engine not in generators:
        generators[engine] = Xorwow(engine, 0, step.core.index)
    return generators[engine]


def _draw(step: Step, tile: NkiTensor, engine: Engine) -> np.ndarray:
    """A number of 32 bits for each element of a tile."""
    return _generator(step, engine).draw(tile.start_partition, tile.shape[0], tile.free_size)


def _check_engine(step: Step, engine: Engine, oldest: dict[Engine, int], tile: NkiTensor) -> None:
    generation = step.core.target.generation
    if engine not in oldest or generation < oldest[engine]:
        allowed = ", ".join(e.name for e, since in oldest.items() if generation >= since)
        step.refuse(
            "engine",
            f"engine {engine.name} on {step.core.target.name}: must be {allowed or 'newer'}.",
        )
    if engine is Engine.gpsimd and tile.buffer is PSUM:
        step.refuse("gpsimd-psum", f"GpSimd does not reach PSUM: {tile!r}.")


@instruction
def rng(step: Step, dst: NkiTensor, engine: Engine = Engine.vector) -> None:
    """Random bits: the lowest of 32 for each element of an integer tile."""
    dst = step.tile("dst", dst)
    _check_engine(step, engine, {Engine.vector: 2, Engine.gpsimd: 3}, dst)
    if dst.dtype not in INTEGERS:
        step.refuse("dtype", f"dst {dst!r}: must be {', '.join(INTEGERS)}.")
    size = dst.dtype.itemsize
    bits = _draw(step, dst, engine).astype(f"u{size}").view(dst.dtype.numpy)
    step.put(dst, bits)
    cost = cycles if engine is Engine.vector else gpsimd_cycles
    step.runs_on(engine, cost(dst.free_size), dst.free_size)


@instruction
def rand2(step: Step, dst: NkiTensor, min: Any, max: Any) -> None:
    """Uniform random numbers between two bounds, numbers or one a partition."""
    dst = step.tile("dst", dst)
    if step.core.target.generation < 4:
        step.refuse("target", f"needs trn3, not {step.core.target.name}.")
    if dst.dtype not in RAND2_TYPES:
        step.refuse("dtype", f"dst {dst!r}: must be {', '.join(RAND2_TYPES)}.")
    low = np.asarray(broadcast_operand(step, "min", min, dst))
    high = np.asarray(broadcast_operand(step, "max", max, dst))
    if not (low < high).all():
        step.refuse("range", f"min {min!r}, max {max!r}: needs min < max.")
    fraction = _fractions(_draw(step, dst, Engine.vector))
    step.put(dst, low + (high - low) * fraction)
    step.runs_on(Engine.vector, cycles(dst.free_size), dst.free_size)


def _fractions(bits: np.ndarray) -> np.ndarray:
    """The leading 24 bits as float32 from 0 to below 1."""
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


@instruction
def dropout(step: Step, dst: NkiTensor, data: NkiTensor, prob: Any) -> None:
    """Data with elements replaced by 0, each with probability `prob`; the others are not scaled."""
    dst, data = step.tile("dst", dst), step.tile("data", data)
    step.same_layout(dst=dst, data=data)
    if dst.dtype != data.dtype:
        step.refuse("dtype", f"dst {dst!r}: must have the type of data {data!r}.")
    if isinstance(prob, NkiTensor) and data.dtype.is_integer and prob.dtype != "float32":
        step.refuse("prob-dtype", f"prob {prob!r}: must be float32 for data {data!r}.")
    if isinstance(prob, NkiTensor) and not prob.dtype.is_float:
        step.refuse("prob-dtype", f"prob {prob!r}: must be a float type.")
    chance = np.asarray(broadcast_operand(step, "prob", prob, data, any_type=True))
    if ((chance < 0) | (chance > 1)).any():
        step.refuse("prob", f"prob {prob!r}: must be 0 to 1.")
    values = step.bits(data)
    kept = _fractions(_draw(step, data, Engine.vector)) >= chance
    step.put(dst, np.where(kept, values, np.zeros((), values.dtype)))
    step.runs_on(Engine.vector, cycles(dst.free_size), dst.free_size)


@instruction
def set_rng_seed(step: Step, src_seeds: NkiTensor) -> None:
    """Seeds the Vector engine's generators with a tile of one 32-bit value."""
    seeds = step.tile("src_seeds", src_seeds)
    if seeds.shape[0] != 1 or seeds.free_size != 1 or seeds.dtype.itemsize != 4:
        step.refuse("seed", f"src_seeds {seeds!r}: must be (1, 1) of a type of 4 bytes.")
    seed = int(np.ascontiguousarray(step.bits(seeds)).view(np.uint32)[0, 0])
    step.core.generators[Engine.vector] = Xorwow(Engine.vector, seed)
    step.runs_on(Engine.vector, cycles(1), 1)


def _check_state(step: Step, role: str, tile: NkiTensor, engine: Engine) -> None:
    words = STATE_WORDS * STREAMS[engine]
    if tile.dtype != "uint32" or tile.ndim != 2 or tile.shape[1] != words:
        step.refuse(
            "state", f"{role} {tile!r}: must be uint32 with {words} elements a partition, two axes."
        )


STATE_ENGINES = {Engine.gpsimd: 3, Engine.vector: 4}


@instruction
def rand_set_state(step: Step, src_seeds: NkiTensor, engine: Engine = Engine.gpsimd) -> None:
    """Sets the state of the generators of the partitions of a tile."""
    seeds = step.tile("src_seeds", src_seeds, regions=(SBUF,))
    _check_engine(step, engine, STATE_ENGINES, seeds)
    _check_state(step, "src_seeds", seeds, engine)
    first, count = seeds.start_partition, seeds.shape[0]
    state = _generator(step, engine).state[first : first + count]
    state[...] = step.bits(seeds).reshape(state.shape)
    step.runs_on(engine, cycles(seeds.free_size), seeds.free_size)


@instruction
def rand_get_state(step: Step, dst: NkiTensor, engine: Engine = Engine.gpsimd) -> None:
    """Stores the state of the generators of the partitions of a tile."""
    regions = (SBUF, PSUM) if step.core.target.generation >= 4 else (SBUF,)
    dst = step.tile("dst", dst, regions=regions)
    _check_engine(step, engine, STATE_ENGINES, dst)
    _check_state(step, "dst", dst, engine)
    first, count = dst.start_partition, dst.shape[0]
    state = _generator(step, engine).state[first : first + count]
    step.put(dst, state.reshape(count, -1).copy())
    step.runs_on(engine, cycles(dst.free_size), dst.free_size)
