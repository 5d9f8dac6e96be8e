"""GELU, SwiGLU and the exponential of softmax, each as one fused kernel, in the form that suits the device.

A GPU computes erf and exp almost in hardware. MLX's CPU backend calls a C function for every element, which costs more
than the matrix products around it. There, the decaying part of each function of a = |x| is a polynomial over a power of
a polynomial: it needs neither a clamp nor a branch, so it vectorizes. The polynomials have degree six and are summed in
pairs because MLX splits a compiled expression of more than 11 levels into several kernels. The coefficients are minimax
fits made for this project.
"""

import functools
import math
from collections.abc import Callable

from fastvlm_mlx.backend import device, mx

# a·erfc(a/√2)/2 = a·(1 + n·a)/p(a)⁸ for a >= 0, to 4e-7.
_GELU_N = -0.174907935
_GELU_P = (1.09051035, 0.0848868507, 0.0447466935, 0.00776592536, 0.000813024831, 0.000101581231, 4.55057919e-05)
# a/(1 + eᵃ) = a·(1 + n₁·a + n₂·a²)/p(a)⁴ for a >= 0, to 1.2e-6.
_SILU_N = (-0.160985137, 0.0636497065)
_SILU_P = (1.18922317, 0.100671122, 0.056765912, 0.00697648067, -0.000151343232, 4.240174e-05, 1.29480269e-06)
# eᵃ = p(a)⁸ by the Taylor series of e^(a/8); its inverse is good to 2e-6 for a >= 0.
_EXP_P = tuple((1 / 8) ** n / math.factorial(n) for n in range(8))


def _polynomial(a: mx.array, c: tuple[float, ...]) -> mx.array:
    """A polynomial of degree 6 or 7, at most six operations deep."""
    square = a * a
    low = (c[0] + c[1] * a) + (c[2] + c[3] * a) * square
    high = (c[4] + c[5] * a) + (c[6] * square if len(c) == 7 else (c[6] + c[7] * a) * square)
    return low + high * (square * square)


def _power(x: mx.array, exponent: int) -> mx.array:
    """`x` to the power of 2, 4 or 8."""
    return x if exponent == 1 else _power(x * x, exponent // 2)


def _gelu_of_polynomials(x: mx.array) -> mx.array:
    a = mx.abs(x)
    return mx.maximum(x, 0.0) - (a * (1.0 + _GELU_N * a)) / _power(_polynomial(a, _GELU_P), 8)


def _gelu_of_erf(x: mx.array) -> mx.array:
    return x * (0.5 + 0.5 * mx.erf(x * math.sqrt(0.5)))


def _swiglu_of_polynomials(gate: mx.array, up: mx.array) -> mx.array:
    a = mx.abs(gate)
    numerator = (a * up) * ((1.0 + _SILU_N[0] * a) + _SILU_N[1] * (a * a))
    return mx.maximum(gate, 0.0) * up - numerator / _power(_polynomial(a, _SILU_P), 4)


def _swiglu_of_sigmoid(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


@functools.cache
def _fused_gelu(scale: float, on: str) -> Callable[[mx.array], mx.array]:
    exact = _gelu_of_polynomials if on == "cpu" else _gelu_of_erf

    def scaled_gelu(x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        return (exact(wide) if scale == 1 else exact(wide * scale) * (1 / scale)).astype(x.dtype)

    return mx.compile(scaled_gelu)


@functools.cache
def _fused_swiglu(on: str) -> Callable[[mx.array, mx.array], mx.array]:
    return mx.compile(_swiglu_of_polynomials if on == "cpu" else _swiglu_of_sigmoid)


def gelu(x: mx.array, scale: float = 1.0) -> mx.array:
    """The exact (erf) GELU; input and output are stored divided by `scale`, a power of two.

    Computed in float32 inside one fused kernel, whatever the dtype of `x`; on a CPU with an error of 1e-6.
    """
    return _fused_gelu(scale, device())(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`, fused; on a CPU the first factor has an error of 2e-6."""
    return _fused_swiglu("cpu" if device() == "cpu" and gate.dtype == mx.float32 else "gpu")(gate, up)


@mx.compile
def exp_below(x: mx.array, limit: mx.array) -> mx.array:
    """`exp(x - limit)` for x <= limit, in a form for the CPU, with an error of 2e-6."""
    return 1.0 / _power(_polynomial(limit - x, _EXP_P), 8)
