"""How the values of a parameter begin: a distribution, each value of which is drawn by its place in the whole.

A value depends on the seed, the name of the parameter and its row-major index alone, so a shard is drawn by the process
that has it, and is the same whatever the shards are.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fasttrain.precision.draws import WORD, operand_key, parameter_key, random_words, step_key
from fasttrain.precision.quantile import normal_quantile, share

WEIGHTS = 1 << 16  # beyond the operands that rounding draws for
LEAST = 1e-3       # of the normal distribution has to lie within the bounds


def key_of(seed: int, name: str, step: int = 0, operand: int = WEIGHTS) -> int:
    """The key of what is drawn for a name: of a parameter's first values."""
    identity = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return operand_key(parameter_key(step_key(seed, step), identity), operand)


@dataclass(frozen=True)
class Rule:
    """How a parameter begins."""

    def values(self, key: int, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values at some places.

        Arguments:
            key: of the parameter (`key_of`).
            index: int64, row-major places in the whole parameter.

        Returns:
            Of the shape of `index`: computed in float64, rounded once to float32 and from there to `dtype`, or once
            to float64.
        """
        found = self.drawn(share(random_words(key, index).long() & WORD))
        return found if dtype == torch.float64 else found.float().to(dtype)

    def drawn(self, u: Tensor) -> Tensor:
        """The quantiles of shares in (0, 1), float64."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Rule):
    """One value.

    Example:
        >>> Constant(2.0).values(0, torch.arange(3))
        tensor([2., 2., 2.])
    """

    value: float

    def values(self, key: int, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(index.shape, self.value, dtype=dtype, device=index.device)


class Zeros(Constant):
    """All 0."""

    def __init__(self) -> None:
        super().__init__(0.0)


class Ones(Constant):
    """All 1."""

    def __init__(self) -> None:
        super().__init__(1.0)


@dataclass(frozen=True)
class Uniform(Rule):
    """Uniform between two bounds.

    Raises:
        ValueError: they stand in the wrong order.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high < math.inf:
            raise ValueError(f"Uniform({self.low}, {self.high}): give the lower bound first, both finite")

    def drawn(self, u: Tensor) -> Tensor:
        return u * (self.high - self.low) + self.low


@dataclass(frozen=True)
class Normal(Rule):
    """Normal, by the inverse of its distribution function (`fasttrain.precision.quantile`), of 32 random bits.

    Its values lie within 6.4 standard deviations.

    Raises:
        ValueError: `std` is negative.

    Example:
        >>> Normal(0.02).values(key_of(0, "weight"), torch.arange(3))
        tensor([ 0.0092,  0.0020, -0.0266])
    """

    std: float = 1.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"Normal({self.std}): a standard deviation is 0 or more, and finite")

    def drawn(self, u: Tensor) -> Tensor:
        return normal_quantile(u) * self.std + self.mean


@dataclass(frozen=True)
class TruncNormal(Normal):
    """Normal within bounds, as `torch.nn.init.trunc_normal_` has it.

    Raises:
        ValueError: less than a thousandth of the normal distribution lies between them.
    """

    low: float = -2.0
    high: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.std > 0 and self._shares()[1] - self._shares()[0] >= LEAST):
            raise ValueError(f"TruncNormal({self.std}, {self.mean}, {self.low}, {self.high}): less than {LEAST} of the "
                             "normal distribution lies between the bounds; they are values, not standard deviations")

    def _shares(self) -> tuple[float, float]:
        normal = NormalDist(self.mean, self.std)
        return normal.cdf(self.low), normal.cdf(self.high)

    def drawn(self, u: Tensor) -> Tensor:
        low, high = self._shares()
        return super().drawn((u * (high - low) + low).clamp(2.0**-34, 1 - 2.0**-34)).clamp(self.low, self.high)


@dataclass(frozen=True)
class Padded(Rule):
    """Another rule, with zeros in one row: the padding of an embedding.

    Arguments:
        row: which.
        width: elements of a row.
    """

    rule: Rule
    row: int
    width: int

    def values(self, key: int, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        found = self.rule.values(key, index, dtype)
        return found.masked_fill_(index // self.width == self.row, 0)
