"""What a schedule costs, by formula: the part of a step in which ranks are idle, and the activations that they hold.

Stages are equal, forward, backward for inputs and backward for weights take the same time, and messages none: what
`clock.run` finds for the actions that torch's schedules really run.
"""

from __future__ import annotations

from fasttrain.parallel.pipeline import schedules


def idle(schedule: str, ranks: int, micro_batches: int, each: int | None = None) -> float:
    """The most that a rank is idle between its first action and its last, over the time that it works.

    With p ranks, m micro-batches and v stages on each rank: (p - 1) / m for gpipe and 1f1b; (p - 1) / (v m) for
    interleaved and breadth-first; a third of that for zero-bubble and dualpipev; none for zbv if m >= 2 p - 1. Fewer
    micro-batches than ranks leave more idle.

    Raises:
        ValueError: there is no such schedule, or it cannot have so many micro-batches.

    Source: arXiv 1811.06965, section 2.3; 2104.04473, section 2.2; 2401.10241, sections 2.3 and 6.

    Example:
        >>> idle("1f1b", 4, 8), idle("interleaved", 4, 8), idle("zbv", 4, 8)
        (0.375, 0.1875, 0.0)
    """
    placement = schedules.placed(schedule, ranks, each)
    schedules.check_micro_batches(schedule, placement, micro_batches)
    p, m, v = ranks, micro_batches, placement.each
    work = 3.0 * v * m
    missing = max(0, p - m)  # micro-batches of a full round
    name = schedule.lower()
    if name in ("gpipe", "1f1b", "interleaved", "breadth-first"):
        return 3 * (p - 1 + (v - 1) * missing) / work
    if name == "zero-bubble":
        alone = 2 * p * v + 2 * m - 1 - 3 * v * m if missing else 0  # one micro-batch down the stages and back
        return max(p - 1 + v * missing, alone) / work
    return (max(0, 2 * (2 * p - 1 - m)) if name == "zbv" else p - 1) / work


def bubble(schedule: str, ranks: int, micro_batches: int, each: int | None = None) -> float:
    """The part of a step in which the rank that is idle most is idle: for gpipe and 1f1b (p - 1) / (m + p - 1).

    Example:
        >>> bubble("gpipe", 4, 8) == 3 / 11
        True
    """
    lost = idle(schedule, ranks, micro_batches, each)
    return lost / (1 + lost)


def live(schedule: str, rank: int, ranks: int, micro_batches: int, each: int | None = None) -> int:
    """The most micro-batches whose activations a rank holds at once, those of each of its stages counted apart.

    With p ranks, m micro-batches, v stages on each rank and rounds of q micro-batches (p, if m is a multiple of it):
    gpipe m; 1f1b min(m, p - rank); interleaved min(v m, (v - 1) q + 2 (p - 1 - rank) + 1); breadth-first v m;
    zero-bubble min(v m, (v - 1) q + p); zbv min(2 p, 2 m, m + 1 + rank); dualpipev 2 p + 1.

    Arguments:
        rank: along the pipeline.

    Example:
        >>> [live("1f1b", rank, 4, 8) for rank in range(4)]
        [4, 3, 2, 1]
    """
    placement = schedules.placed(schedule, ranks, each)
    schedules.check_micro_batches(schedule, placement, micro_batches)
    p, m, v = ranks, micro_batches, placement.each
    q = m // max(1, m // p)
    return {
        "gpipe": m,
        "1f1b": min(m, p - rank),
        "interleaved": min(v * m, (v - 1) * q + 2 * (p - 1 - rank) + 1),
        "breadth-first": v * m,
        "zero-bubble": min(v * m, (v - 1) * q + p),
        "zbv": min(2 * p, 2 * m, m + 1 + rank),
        "dualpipev": 2 * p + 1,
    }[schedule.lower()]
