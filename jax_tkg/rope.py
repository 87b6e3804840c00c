"""Rotary position embedding, exact at positions up to 2^20.

Channel pair `i` of a head turns by `position * frequency_i` (Su et al., RoFormer,
arXiv:2104.09864, section 3.2.2). Past a few thousand tokens that product no longer fits a float32:
at position 2^20 its rounding alone is worth 0.06 rad. Only the fraction of a full turn matters,
so the product is formed in fixed point instead, see `_turns`.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jax_tkg._typing import Array, Float, Int

_DIGIT_BITS = 11
_DIGIT_MASK = (1 << _DIGIT_BITS) - 1
_DIGITS = 5  # 55 fractional bits: at position 2^20 the constant is still good to 2^-35 turns.
_QUARTER_BITS = 2 * _DIGIT_BITS - 2  # 2^20 units of 2^-22 turns are a quarter turn.


@runtime_checkable
class FrequencyScaling(Protocol):
    """Rescales rotary frequencies for contexts longer than the trained one. Must be hashable."""

    def scale(self, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Maps frequencies in radians per token to the frequencies used instead."""
        ...


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor`.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation", arXiv:2306.15595, equation 4.

    Attributes:
        factor: How many times longer than the trained context the new one is; positive.

    Raises:
        ValueError: `factor` is not a positive finite number.
    """

    factor: float

    def __post_init__(self) -> None:
        """Validates the fields."""
        _require_positive("LinearScaling", factor=self.factor)

    def scale(self, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns `frequencies / factor`."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 scaling: long waves divided by `factor`, short waves kept, a blend between.

    A wave is long when it fits fewer than `low_freq_factor` times into the original context, short
    when it fits more than `high_freq_factor` times. Source: `apply_scaling` in
    `models/llama3/model.py` of github.com/meta-llama/llama-models.

    Attributes:
        factor: Divisor of the frequencies of long waves; positive.
        low_freq_factor: Periods per original context below which a wave is long; positive.
        high_freq_factor: Periods per original context above which a wave is short.
        original_context: Context length in tokens before scaling.

    Raises:
        ValueError: A value is not positive, or `high_freq_factor <= low_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        """Validates the fields."""
        _require_positive("Llama3Scaling", **dataclasses.asdict(self))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "Llama3Scaling: high_freq_factor must be greater than low_freq_factor, got "
                f"high_freq_factor={self.high_freq_factor}, low_freq_factor={self.low_freq_factor}."
            )

    def scale(self, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Blends `frequencies / factor` and `frequencies` by periods per original context."""
        periods = self.original_context * frequencies / (2 * np.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((periods - self.low_freq_factor) / span, 0.0, 1.0)
        return (1.0 - kept) * frequencies / self.factor + kept * frequencies


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """Rotary embedding of queries and keys: static, hashable configuration and the rotation.

    Positions may be any int32 in [-2^20, 2^20]; a negative position turns the other way, so a
    padding slot at position -1 stays finite. Beyond 2^20 accuracy fades slowly (3e-7 at 2^30); that
    of a kernel which rotates itself ends at 2^24.

    Attributes:
        base: Wavelength base: pair i of R turns `base**(-i/R)` radians per token.
        interleaved: Which channels form pair i: `(i, i + R)` if False (half-split: NeoX, Llama in
            Hugging Face layout), `(2i, 2i + 1)` if True (GPT-J, llama.cpp's Llama layout).
        rotary_dim: Number of leading channels that rotate, even; None rotates the whole head.
        scaling: Context extension applied to the frequencies, for example `LinearScaling`.

    Raises:
        ValueError: `base` is not positive and finite, or `rotary_dim` is not a positive even int.
    """

    base: float = 10000.0
    interleaved: bool = False
    rotary_dim: int | None = None
    scaling: FrequencyScaling | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        _require_positive("RotaryEmbedding", base=self.base)
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                "RotaryEmbedding: channels rotate in pairs, so rotary_dim must be a positive even "
                f"number or None for the whole head, got {self.rotary_dim}."
            )

    def frequencies(self, head_dim: int) -> npt.NDArray[np.float64]:
        """Radians per token of each channel pair.

        Args:
            head_dim: Channels of a head, H.

        Returns:
            float64 `[rotary_dim / 2]`.

        Raises:
            ValueError: `head_dim` is smaller than `rotary_dim`, or odd when the whole head rotates.
        """
        rotary_dim = self._rotary_dim(head_dim)
        frequencies = self.base ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
        return frequencies if self.scaling is None else self.scaling.scale(frequencies)

    def cos_sin(
        self, positions: Int[Array, "B T"], head_dim: int
    ) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
        """Cosine and sine of every angle, for sharing between `rotate` calls of many layers.

        The absolute error is below 2e-7 for positions in [-2^20, 2^20] on every backend: the
        angle is reduced in exact integer arithmetic to [-pi/4, pi/4] and the two functions are
        polynomials there, so nothing rests on a backend's own `sin` (Neuron's is defined on
        [-pi, pi] only).

        Args:
            positions: `[B, T]` integers, the absolute position of each token.
            head_dim: Channels of a head, H.

        Returns:
            Two float32 arrays `[B, T, R]`, with R = rotary_dim / 2.

        Raises:
            ValueError: As `frequencies`.
            TypeError: `positions` is not an integer array.
        """
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise TypeError(
                "RotaryEmbedding: positions must be integers (a float cannot hold a phase at long "
                f"contexts), got {positions.dtype}; convert with positions.astype(jnp.int32)."
            )
        high, low = _turns(positions.astype(jnp.int32), self.frequencies(head_dim))
        return _cos_sin_of_turns(high, low)

    def rotate(
        self, x: Float[Array, "B T heads H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]
    ) -> Float[Array, "B T heads H"]:
        """Rotates heads by angles from `cos_sin`; `rotate(x, cos, -sin)` is the inverse.

        Args:
            x: `[B, T, heads, H]` queries or keys.
            cos: float32 `[B, T, R]`.
            sin: float32 `[B, T, R]`.

        Returns:
            Shape and dtype of `x`, computed in float32 and rounded once. Channels beyond
            `rotary_dim` are those of `x`, bit for bit.

        Raises:
            ValueError: Shapes do not match.
            TypeError: `x` is not a float array.
        """
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"RotaryEmbedding: x must be a float array, got {x.dtype}.")
        if x.ndim != 4 or cos.shape[:-1] != x.shape[:2] or cos.shape != sin.shape:
            raise ValueError(
                "RotaryEmbedding: need x [B, T, heads, H] with positions [B, T] of the same B and "
                f"T, got x {x.shape}, cos {cos.shape}, sin {sin.shape}."
            )
        rotary_dim = self._rotary_dim(x.shape[-1])
        if cos.shape[-1] != rotary_dim // 2:
            raise ValueError(
                f"RotaryEmbedding: x {x.shape} rotates {rotary_dim // 2} channel pairs, but cos "
                f"and sin {cos.shape} hold {cos.shape[-1]}; pass head_dim={x.shape[-1]} to cos_sin."
            )
        rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        pair_axis = -1 if self.interleaved else -2
        paired_shape = (rotary_dim // 2, 2) if self.interleaved else (2, rotary_dim // 2)
        pairs = rotated.astype(jnp.float32).reshape(*x.shape[:-1], *paired_shape)
        first = lax.index_in_dim(pairs, 0, pair_axis, keepdims=False)
        second = lax.index_in_dim(pairs, 1, pair_axis, keepdims=False)
        cos, sin = cos[..., None, :], sin[..., None, :]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], pair_axis)
        return jnp.concatenate([turned.reshape(rotated.shape).astype(x.dtype), rest], axis=-1)

    def __call__(
        self, x: Float[Array, "B T heads H"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T heads H"]:
        """Rotates each token's heads to its position.

        Args:
            x: `[B, T, heads, H]` queries or keys, any float dtype.
            positions: `[B, T]` integers, the absolute position of each token.

        Returns:
            Shape and dtype of `x`; see `rotate`.

        Raises:
            ValueError: Shapes do not match, or `rotary_dim` does not fit the head.
            TypeError: `positions` is not an integer array, or `x` not a float array.
        """
        return self.rotate(x, *self.cos_sin(positions, x.shape[-1]))

    def _rotary_dim(self, head_dim: int) -> int:
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary_dim > head_dim or rotary_dim % 2:
            raise ValueError(
                f"RotaryEmbedding: rotary_dim={self.rotary_dim} does not fit head_dim={head_dim}; "
                "it must be even and at most head_dim."
            )
        return rotary_dim


def _turns(
    positions: Int[Array, "*P"], frequencies: npt.NDArray[np.float64]
) -> tuple[Int[Array, "*P R"], Int[Array, "*P R"]]:
    """Fraction of a turn of `positions * frequencies`, as `high * 2^-22 + low * 2^-33` turns.

    Schoolbook multiplication in base 2^11, whole turns dropped. The digits are that small because
    accelerators may carry integer arithmetic in float32 (NeuronCore's Vector engine does): every
    value below is under 2^24 for |position| <= 2^22, hence exact there too.
    """
    turns = frequencies / (2 * np.pi) % 1.0
    fixed = np.round(turns * 2.0 ** (_DIGITS * _DIGIT_BITS)).astype(np.int64)
    digits = [
        ((fixed >> (_DIGIT_BITS * place)) & _DIGIT_MASK).astype(np.int32)
        for place in reversed(range(_DIGITS))
    ]
    # Arithmetic shift and mask: position == upper * 2^11 + lower also for negative positions.
    upper = (positions >> _DIGIT_BITS)[..., None]
    lower = (positions & _DIGIT_MASK)[..., None]
    columns = [
        lower * digits[place] + upper * digits[place + 1] for place in range(_DIGITS - 1)
    ]  # Column c weighs 2^(-11 * (c + 1)) turns.
    words = []
    carry = jnp.zeros_like(columns[0])
    for column in reversed(columns):
        column = column + carry
        words.append(column & _DIGIT_MASK)
        carry = column >> _DIGIT_BITS
    _, low, middle, top = words
    return (top << _DIGIT_BITS) | middle, low


def _cos_sin_of_turns(
    high: Int[Array, "*S"], low: Int[Array, "*S"]
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Cosine and sine of `2 pi * (high * 2^-22 + low * 2^-33)`, error about one float32 ulp of 1.

    Taylor polynomials on [-pi/4, pi/4], truncated below 2e-9, then moved to the right quadrant.
    """
    quadrant = (high + (1 << (_QUARTER_BITS - 1))) >> _QUARTER_BITS  # Nearest, 0 to 4.
    offset = (high - (quadrant << _QUARTER_BITS)).astype(jnp.float32)
    offset = offset + low.astype(jnp.float32) * 2.0**-_DIGIT_BITS
    angle = offset * (math.pi / 2 / 2**_QUARTER_BITS)
    square = angle * angle
    cos = _horner(square, [(-1) ** n / math.factorial(2 * n) for n in range(6)])
    sin = angle * _horner(square, [(-1) ** n / math.factorial(2 * n + 1) for n in range(5)])
    odd = quadrant & 1 == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    negative_cos, negative_sin = (quadrant + 1) & 2 == 2, quadrant & 2 == 2
    return jnp.where(negative_cos, -cos, cos), jnp.where(negative_sin, -sin, sin)


def _horner(x: Float[Array, "*S"], coefficients: list[float]) -> Float[Array, "*S"]:
    """Evaluates the polynomial with the given coefficients, lowest power first."""
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{owner}: {name} must be a positive finite number, got {value}.")
