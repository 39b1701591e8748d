"""Elementary functions with the same bits on every machine, made of additions, products, quotients and roundings alone.

IEEE 754 fixes the results of these operations. `exp`, `log`, `sin`, `cos` and powers of the C library, numpy and torch have
implementations for different CPU instructions, which differ in their last bits. Everything that decides a token uses this
module instead. Each operation is a numpy call of its own, so no compiler fuses two of them. Polynomials and constants are
those of fdlibm (Sun Microsystems, 1993), except `exp32`, which is the compiled kernel's `v_exp` without fused multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # the first exact in products with 20-bit numbers
LOG2_E = 1.44269504088896338700e00
LOG_TERMS = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
SIN_TERMS = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
COS_TERMS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)
HALF_PI = (
    1.57079632673412561417e00,
    6.07710050630396597660e-11,
    2.02226624879595063154e-21,
)  # its first 33 bits, the next, the rest
MAX_ANGLE = 2.0**20  # so many quarter turns are exact in products with 33 bits


def _polynomial(x: NDArray[Any], terms: tuple[float, ...]) -> NDArray[Any]:
    """Evaluates a polynomial by Horner's rule; `terms` begins with the constant."""
    total = np.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * x + x.dtype.type(term)
    return total


def exp(x: Doubles) -> Doubles:
    """Computes e**x with a relative error of about 1e-15, for `x` in [-708, 709]; not for infinities and NaN."""
    whole = np.rint(x * LOG2_E)
    rest = (x - whole * LN2_HIGH) - whole * LN2_LOW
    series = _polynomial(rest, tuple(1.0 / math.factorial(power) for power in range(15)))
    scaled: Doubles = np.ldexp(series, whole.astype(np.int64))
    return scaled


def exp32(x: Floats) -> Floats:
    """Computes e**x with a relative error of about 2e-7; `x` is limited to [-87, 88], so results are finite."""
    x = np.minimum(np.maximum(x, np.float32(-87.0)), np.float32(88.0))
    whole = np.rint(x * np.float32(1.44269504))
    rest = x - whole * np.float32(0.693359375)
    rest += whole * np.float32(2.12194440e-4)
    series = _polynomial(rest, tuple(1.0 / math.factorial(power) for power in range(8)))
    scale: Floats = ((whole.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    return series * scale


def log(x: Doubles) -> Doubles:
    """Computes the natural logarithm to about a unit in the last place, for finite `x` above zero."""
    fraction, exponent = np.frexp(x)
    small = fraction < math.sqrt(0.5)
    fraction = np.where(small, fraction * 2.0, fraction) - 1.0
    power = (exponent - small).astype(np.float64)
    ratio = fraction / (2.0 + fraction)
    squared = ratio * ratio
    series = squared * _polynomial(squared, LOG_TERMS)
    half = 0.5 * fraction * fraction
    result: Doubles = power * LN2_HIGH - ((half - (ratio * (half + series) + power * LN2_LOW)) - fraction)
    return result


def sin_cos(x: Doubles) -> tuple[Doubles, Doubles]:
    """Computes sine and cosine with an error of about 1e-16, for angles of at most 2**20 quarter turns.

    Raises:
        ValueError: an angle is larger, or NaN.
    """
    quarters = np.rint(x * (2.0 / math.pi))
    if not (np.abs(quarters) <= MAX_ANGLE).all():
        raise ValueError(f"expected angles of at most {MAX_ANGLE * math.pi / 2:.0f} radians")
    rest = ((x - quarters * HALF_PI[0]) - quarters * HALF_PI[1]) - quarters * HALF_PI[2]
    squared = rest * rest
    sine = rest + rest * squared * _polynomial(squared, SIN_TERMS)
    cosine = 1.0 - (0.5 * squared - squared * squared * _polynomial(squared, COS_TERMS))
    quadrant = quarters.astype(np.int64) % 4
    odd = quadrant % 2 == 1
    sines, cosines = np.where(odd, cosine, sine), np.where(odd, sine, cosine)
    return np.where(quadrant >= 2, -sines, sines), np.where((quadrant == 1) | (quadrant == 2), -cosines, cosines)


def power(base: Doubles, exponent: Doubles) -> Doubles:
    """Computes `base ** exponent` for bases above zero, with a relative error of about 1e-13."""
    return exp(exponent * log(base))


class PortableMath(TorchDispatchMode):
    """A context in which torch's elementary functions on the CPU are those of this module, rounded to the tensor's dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        replaced = REPLACED.get(func)
        if replaced is None:
            return func(*args, **(kwargs or {}))
        like = next(each for each in args if isinstance(each, torch.Tensor))
        given = (each.double().numpy() if isinstance(each, torch.Tensor) else np.float64(each) for each in args)
        computed = np.atleast_1d(replaced(*given)).reshape(torch.broadcast_shapes(*(getattr(each, "shape", ()) for each in args)))
        return torch.from_numpy(computed).to(like.dtype)


def _power(base: Any, exponent: Any) -> Doubles:
    shape = np.broadcast_shapes(np.shape(base), np.shape(exponent))
    return power(np.broadcast_to(np.asarray(base, np.float64), shape), np.broadcast_to(np.asarray(exponent, np.float64), shape))


REPLACED: dict[Any, Callable[..., Doubles]] = {
    torch.ops.aten.exp.default: exp,
    torch.ops.aten.log.default: log,
    torch.ops.aten.sin.default: lambda x: sin_cos(x)[0],
    torch.ops.aten.cos.default: lambda x: sin_cos(x)[1],
    torch.ops.aten.pow.Scalar: _power,
    torch.ops.aten.pow.Tensor_Tensor: _power,
}
