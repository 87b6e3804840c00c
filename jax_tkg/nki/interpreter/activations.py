"""Functions of the Scalar engine that NumPy does not have, in float32."""

import math

import numpy as np

ERF_TERMS = 60  # of its series, enough up to ERF_IS_ONE
ERF_IS_ONE = 4.0  # from here on erf is 1 in float32


def _damped(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """X * weight, 0 where the weight is 0 though x may be infinite."""
    return np.where(weight == 0, np.float32(0), x * weight)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)); exp may overflow to the infinity that gives 0."""
    return np.float32(1) / (np.float32(1) + np.exp(-x))


def _erf64(x: np.ndarray) -> np.ndarray:
    """The series with positive terms only, so that nothing cancels, by Horner's rule."""
    wide = np.clip(x.astype(np.float64), -ERF_IS_ONE, ERF_IS_ONE)
    twice = 2 * wide * wide
    total = np.ones_like(wide)
    for n in range(ERF_TERMS, 0, -1):
        total = 1 + total * twice / (2 * n + 1)
    series = 2 / math.sqrt(math.pi) * wide * np.exp(-wide * wide) * total
    return np.where(np.abs(x) >= ERF_IS_ONE, np.sign(wide), series)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function."""
    return _erf64(x).astype(np.float32)


def erf_dx(x: np.ndarray) -> np.ndarray:
    """2 / sqrt(pi) * exp(-x^2)."""
    return np.float32(2 / math.sqrt(math.pi)) * np.exp(-x * x)


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return (0.5 * (1 + _erf64(x / math.sqrt(2)))).astype(np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU: x * Phi(x)."""
    return _damped(x, _normal_cdf(x))


def gelu_dx(x: np.ndarray) -> np.ndarray:
    """Its derivative: Phi(x) + x * phi(x)."""
    phi = np.exp(-x * x / 2) / np.float32(math.sqrt(2 * math.pi))
    return _normal_cdf(x) + _damped(x, phi)


def gelu_apprx_tanh(x: np.ndarray) -> np.ndarray:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return _damped(x, np.float32(0.5) * (np.float32(1) + np.tanh(inner)))


def silu(x: np.ndarray) -> np.ndarray:
    """SiLU: x * sigmoid(x)."""
    return _damped(x, sigmoid(x))


def silu_dx(x: np.ndarray) -> np.ndarray:
    """Its derivative: sigmoid(x) * (1 + x * (1 - sigmoid(x)))."""
    s = sigmoid(x)
    return s + _damped(x, s * (1 - s))


def gelu_apprx_sigmoid(x: np.ndarray) -> np.ndarray:
    """GELU's approximation x * sigmoid(1.702 x)."""
    return _damped(x, sigmoid(np.float32(1.702) * x))


def gelu_apprx_sigmoid_dx(x: np.ndarray) -> np.ndarray:
    """The derivative of x * sigmoid(1.702 x)."""
    s = sigmoid(np.float32(1.702) * x)
    return s + _damped(np.float32(1.702) * x, s * (1 - s))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def mish(x: np.ndarray) -> np.ndarray:
    """Mish: x * tanh(softplus(x))."""
    return _damped(x, np.tanh(softplus(x)))


def relu(x: np.ndarray) -> np.ndarray:
    """ReLU: max(x, 0)."""
    return np.maximum(x, np.float32(0))


def prelu(x: np.ndarray, slope: np.ndarray | np.floating | float = 0.0) -> np.ndarray:
    """PReLU: x, or slope * x below 0."""
    return np.where(x < 0, _damped(x, np.asarray(slope, np.float32)), x)
