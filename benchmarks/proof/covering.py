"""A short list of cases in which every pair of values occurs: all of one factor with all of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Pair = tuple[tuple[str, Any], tuple[str, Any]]  # (factor, value) twice


def pairs(case: Mapping[str, Any], among: Iterable[tuple[str, str]]) -> set[Pair]:
    """The pairs of a case, of the factors that are named."""
    return {((one, case[one]), (other, case[other])) for one, other in among if one in case and other in case}


def cover(factors: Mapping[str, Sequence[Any]], among: Sequence[tuple[str, str]] | None = None,
          allowed: Callable[[Mapping[str, Any]], bool] = lambda case: True) -> list[dict[str, Any]]:
    """Cases that have every pair, chosen greedily; the same for the same arguments.

    Each case begins with the first pair that is missing. Every other factor then takes the value that adds most missing
    pairs, of several the one that occurred least.

    Arguments:
        factors: values of each factor by its name.
        among: pairs of factors whose values are to meet; None for all of them.
        allowed: whether a case, complete or with some factors alone, can be.

    Example:
        >>> made = cover({"rule": "ab", "storage": "xyz", "arch": [80, 90]})
        >>> len(made), made[0]
        (6, {'rule': 'a', 'storage': 'x', 'arch': 80})
    """
    among = list(combinations(factors, 2)) if among is None else list(among)
    missing = {((one, a), (other, b)): None for one, other in among for a in factors[one] for b in factors[other]
               if allowed({one: a, other: b})}
    used: Counter[tuple[str, Any]] = Counter()
    found = []
    while missing:
        case: dict[str, Any] = dict(next(iter(missing)))
        for name in (name for name in factors if name not in case):
            possible = [value for value in factors[name] if allowed({**case, name: value})]
            case[name] = max(possible, key=lambda value: (
                len(pairs({**case, name: value}, among) & missing.keys()), -used[name, value]))
        case = {name: case[name] for name in factors}
        used.update(case.items())
        for pair in pairs(case, among):
            missing.pop(pair, None)
        found.append(case)
    return found
