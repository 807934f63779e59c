"""The normal distribution from random bits, by operations that every device rounds alike.

Addition, multiplication and division of float64 are exact to the last bit on any device; logarithms and error functions
are not, nor is torch's root on the CPU. So the logarithm is a series, and the root is corrected by its exact remainder:
the same bits everywhere, which `torch.special.ndtri` does not promise. No operation is fused with another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Wichura, Algorithm AS 241 (PPND16), Applied Statistics 37 (3), 1988: relative error 1e-16. Lowest power first.
CENTRE = ((3.3871328727963666080e0, 1.3314166789178437745e+2, 1.9715909503065514427e+3, 1.3731693765509461125e+4,
           4.5921953931549871457e+4, 6.7265770927008700853e+4, 3.3430575583588128105e+4, 2.5090809287301226727e+3),
          (1.0, 4.2313330701600911252e+1, 6.8718700749205790830e+2, 5.3941960214247511077e+3,
           2.1213794301586595867e+4, 3.9307895800092710610e+4, 2.8729085735721942674e+4, 5.2264952788528545610e+3))
TAILS = ((1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
          1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
         (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
          1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9))
LOWEST = 2.0**-34  # the tails are good down to exp(-25)
LN2 = 0.6931471805599453


def share(bits: Tensor) -> Tensor:
    """From 32 random bits, int64, the middle of one of 2^32 equal parts of (0, 1): float64, exact."""
    return (bits.double() + 0.5) * 2.0**-32


def normal_quantile(u: Tensor) -> Tensor:
    """Where the standard normal distribution reaches the share u.

    Arguments:
        u: float64, in [2^-34, 1 - 2^-34].

    Example:
        >>> normal_quantile(torch.tensor([0.5, 0.975, 1e-9], dtype=torch.float64))
        tensor([ 0.0000,  1.9600, -5.9978], dtype=torch.float64)
    """
    q = u - 0.5
    found = ratio(CENTRE, 0.180625 - q * q).mul_(q)
    outside = (q.abs() > 0.425).flatten().nonzero()[:, 0]
    far = u.flatten()[outside]
    tail = root(-logarithm(torch.minimum(far, 1 - far)))
    found.view(-1)[outside] = ratio(TAILS, tail - 1.6) * torch.where(far < 0.5, -1.0, 1.0).double()
    return found


def ratio(polynomials: tuple[Sequence[float], Sequence[float]], x: Tensor) -> Tensor:
    """Of two polynomials."""
    above, below = (polynomial(each, x) for each in polynomials)
    return above.div_(below)


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule; coefficients are given lowest power first."""
    found = torch.full_like(x, coefficients[-1])
    for each in reversed(coefficients[:-1]):
        found.mul_(x).add_(each)
    return found


def logarithm(x: Tensor) -> Tensor:
    """Of normal positive float64, to some units in the last place.

    ``log(m 2^e) = 2 atanh((m - 1) / (m + 1)) + e log 2``, with m between sqrt(1/2) and sqrt(2).
    """
    mantissa, exponent = torch.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa = torch.where(small, mantissa * 2, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    series = polynomial([1 / n for n in range(1, 25, 2)], s * s)
    return series.mul_(s).mul_(2) + (exponent - small.to(exponent.dtype)).double() * LN2


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root of float64 that is neither tiny nor huge, whatever the device's is."""
    y = x.sqrt()
    high = y * 134217729.0  # 2^27 + 1: Dekker's splitting, in which the square of y is exact in four products
    high = high - (high - y)
    low = y - high
    square = y * y
    beyond = ((high * high - square) + high * low * 2) + low * low
    return y + ((x - square) - beyond) / (y * 2)
