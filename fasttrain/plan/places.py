"""Which ranks share something, and which of the links between them leave a node."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from fasttrain.plan.job import AXES


@functools.lru_cache(4096)
def _members(sizes: tuple[int, ...], axes: tuple[str, ...]) -> tuple[int, ...]:
    strides = []
    apart = 1
    for axis, size in zip(reversed(AXES), reversed(sizes), strict=True):
        if axis in axes:
            strides.append([apart * number for number in range(size)])
        apart *= size
    return tuple(sorted(sum(steps) for steps in itertools.product(*strides)))


def members(sizes: Mapping[str, int], *axes: str) -> tuple[int, ...]:
    """The ranks of rank 0's group along these axes, as `Mesh.ranks` has them.

    Example:
        >>> members(dict(pipeline=1, data=2, shard=1, expert=1, context=1, tensor=4), "data")
        (0, 4)
    """
    return _members(tuple(sizes[axis] for axis in AXES), axes)


def leaving(ranks: tuple[int, ...], per_node: int) -> float:
    """The share of a ring's links that leave a node; of what all its ranks send, as much crosses nodes.

    Example:
        >>> leaving((0, 4, 8, 12), 8)
        0.5
    """
    if len(ranks) < 2:
        return 0.0
    following = (*ranks[1:], ranks[0])
    return sum(a // per_node != b // per_node for a, b in zip(ranks, following, strict=True)) / len(ranks)


def apart(ranks: tuple[int, ...], per_node: int) -> float:
    """The share of what each sends to each other that leaves its node, on average.

    Example:
        >>> apart((0, 4, 8, 12), 8)
        0.6666666666666666
    """
    if len(ranks) < 2:
        return 0.0
    pairs = [a // per_node != b // per_node for a, b in itertools.permutations(ranks, 2)]
    return sum(pairs) / len(pairs)
