"""Where to cut a row of parts into stages: exactly, by dynamic programming, so that the dearest stage is cheapest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise


def cut(costs: Sequence[float], stages: int) -> list[int]:
    """How many of the parts, one after the other, make each stage: the largest sum of costs is as small as it can be.

    A pipeline runs at the pace of its dearest stage. Among the cuts that are equal in that, the one with the least sum
    of squares is taken, so that what is left is spread evenly.

    Arguments:
        costs: of the parts, in order; none negative.
        stages: how many; each gets one part or more.

    Raises:
        ValueError: there are fewer parts than stages, or a cost is no number of 0 or more.

    Example:
        >>> cut([1, 1, 1, 5, 1, 1], 3)
        [3, 1, 2]
    """
    check(costs, stages)
    upto = [0.0, *accumulate(float(cost) for cost in costs)]
    most, _ = _least(upto, stages, max)
    _, begins = _least(upto, stages, lambda before, cost: before + cost * cost if cost <= most else math.inf)
    ends = [len(costs)]
    for stage in range(stages - 1, -1, -1):
        ends.append(begins[stage][ends[-1]])
    ends.reverse()
    return [end - begin for begin, end in pairwise(ends)]


def _least(upto: list[float], stages: int, join: Callable[[float, float], float]) -> tuple[float, list[list[int]]]:
    """The least that the joined costs of stages can come to; and where, in that way to cut, a stage begins that ends at
    a place: by stage and place."""
    before = [0.0] + [math.inf] * (len(upto) - 1)
    begins: list[list[int]] = []
    for _ in range(stages):
        ways = [[(join(before[begin], upto[end] - upto[begin]), begin) for begin in range(end)] or [(math.inf, 0)]
                for end in range(len(upto))]
        before, begun = map(list, zip(*map(min, ways), strict=True))
        begins.append(begun)
    return before[-1], begins


def check(costs: Sequence[float], stages: int) -> None:
    """Raise ValueError if there are more stages than parts, or a cost that is none."""
    if stages < 1 or len(costs) < stages:
        raise ValueError(f"{len(costs)} parts cannot be cut into {stages} stages: a stage has one part or more. Take "
                         f"fewer ranks along pipeline or fewer stages on each, {max(len(costs), 1)} stages at most, or "
                         "a model of more blocks")
    for place, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"the cost of part {place} is {cost}: give a number of 0 or more for each part")
