"""Several data sets with weights, as one: which of them gives sample i, and which of its own samples that is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from fasttrain.data.errors import DataError, WrongTokenizer
from fasttrain.data.order import mix
from fasttrain.data.windows import Source

LONGEST = 1 << 16  # samples of a period


def shares(weights: Sequence[float | Fraction]) -> tuple[list[int], int]:
    """Whole numbers in the ratio of the weights, and their sum, at most 65,536.

    Where the ratio has no such numbers, the nearest: every share is within 1/65,536 of the weights' sum.

    Raises:
        DataError: a weight is not positive and finite, or too small beside the others.

    Example:
        >>> shares([0.7, 0.2, 0.1])
        ([7, 2, 1], 10)
        >>> shares([1, 1, 1])
        ([1, 1, 1], 3)
    """
    if not weights or any(not 0 < w < math.inf for w in weights):
        raise DataError(f"weights {list(weights)}: each must be positive and finite; leave out what has no share")
    given = [w if isinstance(w, Fraction) else Fraction(w).limit_denominator(10**9) for w in weights]
    exact = [Fraction(w, sum(given)) for w in given]
    period = math.lcm(*(w.denominator for w in exact))
    if period > LONGEST:
        period = LONGEST
        counts = [int(w * period) for w in exact]
        by_rest = sorted(range(len(exact)), key=lambda j: counts[j] - exact[j] * period)
        for j in by_rest[: period - sum(counts)]:
            counts[j] += 1
        if 0 in counts:
            raise DataError(f"weight {weights[counts.index(0)]} is less than 1/{LONGEST} of all weights: leave it out, "
                            f"or join that data set with another")
    else:
        counts = [int(w * period) for w in exact]
    return counts, period


def quota(counts: Sequence[int]) -> np.ndarray:
    """One period of a sequence in which, of its first n members, each j has the share n * w_j rounded up or down.

    w_j is ``counts[j] / sum(counts)``, and every n of the endless repetition counts. After m of its own, j may come
    again once it would not be more than 1 - d ahead, and must before it is as much behind, d = 1 / (2K - 2); whoever
    must soonest is next. That this never fails is the theorem of Tijdeman, The chairman assignment problem, Discrete
    Mathematics 32, 1980. Whole numbers throughout.

    Returns:
        int64, shape (sum(counts),).

    Example:
        >>> quota([3, 1]).tolist()
        [0, 0, 1, 0]
    """
    period, parts = sum(counts), len(counts)
    if parts == 1:
        return np.zeros(period, np.int64)
    slack = 2 * parts - 2  # 1 / d
    done = [0] * parts
    waiting = [(_first_time(0, count, period, slack), j) for j, count in enumerate(counts)]  # until they may come
    heapq.heapify(waiting)
    ready: list[tuple[Fraction, int]] = []  # by when they must have come
    order = np.empty(period, np.int64)
    for n in range(period):
        while waiting and waiting[0][0] <= n:
            _, j = heapq.heappop(waiting)
            heapq.heappush(ready, (Fraction(((done[j] + 1) * slack - 1) * period, counts[j] * slack), j))
        _, j = heapq.heappop(ready)
        order[n] = j
        done[j] += 1
        heapq.heappush(waiting, (_first_time(done[j], counts[j], period, slack), j))
    return order


def _first_time(m: int, count: int, period: int, slack: int) -> int:
    """The smallest n for which (n + 1) * count / period - m >= 1 / slack."""
    return -(-(m * slack + 1) * period // (count * slack)) - 1


class Mixture:
    """Samples of several sources, interleaved by weight: a pure function of (seed, i) like those of each.

    Sample i comes from the source that `quota` names, and is that source's next one: after n samples each source has
    given n times its weight, rounded up or down, for every n. Each goes through its own passes at its own pace.

    Args:
        parts: by name, the source and its weight. Weights are relative; they become ratios of whole numbers whose sum
            is at most 65,536 (`weights`).
        seed: of the order; each source gets one of its own, made of it and of its name.

    Attributes:
        names: of the sources, in order.
        weights: of each, as a fraction.
        per_pass: samples until the first source has been read once.

    Raises:
        WrongTokenizer: the sources' tokens belong to different tokenizers.
        DataError: no sources, bad weights, or windows of different lengths.

    Example:
        >>> from fasttrain.data.windows import Windows
        >>> code = Windows(np.arange(100, dtype=np.uint8), length=4)
        >>> prose = Windows(np.arange(100, 200, dtype=np.uint8), length=4)
        >>> mixture = Mixture({"code": (code, 3), "prose": (prose, 1)})
        >>> int((mixture.batch(0, 8)[:, 0] >= 100).sum())
        2
        >>> mixture.counts(1_000_001)
        {'code': 750001, 'prose': 250000}
    """

    def __init__(self, parts: Mapping[str, tuple[Source, float | Fraction]], seed: int = 0):
        if not parts:
            raise DataError("a mixture of no data sets: give at least one")
        self.names = list(parts)
        self.seed = seed
        self._given = dict(parts)
        counts, self.period = shares([weight for _, weight in parts.values()])
        self.sources = [source.reseeded(_seed_of(seed, name)) for name, (source, _) in parts.items()]
        self._check()
        self.weights = {name: Fraction(count, self.period) for name, count in zip(self.names, counts, strict=True)}
        self._counts = np.array(counts)
        self._order = quota(counts)
        self._number = np.empty(self.period, np.int64)  # of each place among those of the same source
        for j in range(len(counts)):
            self._number[self._order == j] = np.arange(counts[j])
        self.vocabulary = max(source.vocabulary for source in self.sources)
        self.per_pass = min(int(source.per_pass / weight)
                            for source, weight in zip(self.sources, self.weights.values(), strict=True))

    def _check(self) -> None:
        tokenizers = {name: getattr(getattr(source, "stream", None), "tokenizer", None)
                      for name, source in zip(self.names, self.sources, strict=True)}
        if len({t for t in tokenizers.values() if t is not None}) > 1:
            raise WrongTokenizer(f"the data sets of a mixture were made with different tokenizers ({tokenizers}): make "
                                 f"them again with one")
        lengths = {name: getattr(source, "length", None) for name, source in zip(self.names, self.sources, strict=True)}
        if len({length for length in lengths.values() if length is not None}) > 1:
            raise DataError(f"the data sets of a mixture have windows of different lengths ({lengths}): give them one")

    def __len__(self) -> int:
        return self.per_pass

    def reseeded(self, seed: int) -> Mixture:
        """The same data sets in another order."""
        return Mixture(self._given, seed)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source gives each sample, and which of its own samples that is: int64, shape as `indices`."""
        periods, places = np.divmod(indices, self.period)
        homes = self._order[places]
        return homes, periods * self._counts[homes] + self._number[places]

    def counts(self, n: int) -> dict[str, int]:
        """How many of the first n samples come from each source."""
        periods, rest = divmod(n, self.period)
        inside = np.bincount(self._order[:rest], minlength=len(self.names))
        return {name: periods * int(all_) + int(some)
                for name, all_, some in zip(self.names, self._counts, inside, strict=True)}

    def batch(self, first: int, count: int) -> np.ndarray:
        """Tokens of samples first, first + 1, ...: shape (count, length + 1)."""
        return self.fetch(np.arange(first, first + count))["tokens"]

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples of these numbers, with what all sources give, and ``source``: int64, (b,), the number of each's."""
        homes, numbers = self.locate(indices)
        given: dict[str, np.ndarray] = {"source": homes}
        for home in np.unique(homes):
            rows = np.flatnonzero(homes == home)
            for name, values in self.sources[home].fetch(numbers[rows]).items():
                if name not in given:
                    given[name] = np.zeros((len(indices), *values.shape[1:]), values.dtype)
                given[name][rows] = values
        return given

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples."""
        return {"order": 1, "mixture": {
            name: {"weight": str(self.weights[name]), **source.fingerprint()}
            for name, source in zip(self.names, self.sources, strict=True)}, "seed": self.seed,
            "length": getattr(self.sources[0], "length", None)}


def _seed_of(seed: int, name: str) -> int:
    """Of one source: other names have other orders, and a source added does not change the others' own."""
    for byte in name.encode():
        seed = mix(seed ^ byte)
    return mix(seed) >> 1
