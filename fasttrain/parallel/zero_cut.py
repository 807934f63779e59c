"""Who steps what: the cut of each bucket into one interval for each rank.

Elementwise rules are cut anywhere, into the equal shards of the layout. What needs whole tensors (matrix optimizers,
norms of one parameter) is cut between slots, so that the costs of the ranks are as even as that allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fasttrain.dist.slots import Bucket, Slot

Cut = tuple[tuple[int, int], ...]  # for each rank: its first element of a bucket, and the one after its last


class Owned(NamedTuple):
    """What a rank owns of a slot: `numel` elements from the slot's element `first`, `at` elements behind its cut."""

    place: int  # among the bucket's slots
    first: int
    numel: int
    at: int


def shards(bucket: Bucket, count: int | None = None) -> Cut:
    """The equal shards of a bucket, or so many: a divisor of its ranks."""
    count = bucket.world if count is None else count
    size = bucket.elements // count
    return tuple((rank * size, (rank + 1) * size) for rank in range(count))


def whole(buckets: Sequence[Bucket], costs: Mapping[str, float], counts: Sequence[int] | None = None) -> list[Cut]:
    """Cuts between slots: each rank gets one run of neighbouring slots of a bucket, or none.

    Each bucket is divided into at most as many runs as there are ranks, so that the most costly one costs as little as
    possible; the more costly runs go to the ranks that have the least so far.

    Arguments:
        costs: of each slot, by its name, in any unit.
        counts: ranks of each bucket; None: those of its group.

    Example:
        >>> import torch
        >>> from fasttrain.dist.layout import Entry, FlatLayout
        >>> layout = FlatLayout.of([Entry(f"{n}", (256,), torch.float32) for n in range(3)], 2)
        >>> whole(layout.buckets, {"0": 1, "1": 1, "2": 2})
        [((0, 256), (256, 768))]
    """
    loads: dict[str, list[float]] = {}
    cuts = []
    for number, bucket in enumerate(buckets):
        count = bucket.world if counts is None else counts[number]
        load = loads.setdefault(bucket.group, [0.0] * count)
        runs = _runs(bucket.slots, costs, count)
        runs.sort(key=lambda run: -_cost(run, costs))
        ranks = sorted(range(count), key=lambda rank: (load[rank], rank))
        cut = [(0, 0)] * count
        for rank, run in zip(ranks, runs, strict=False):
            cut[rank] = run[0].start, run[-1].start + max(run[-1].numel, 1)
            load[rank] += _cost(run, costs)
        cuts.append(tuple(cut))
    return cuts


def owned(bucket: Bucket, cut: Cut, rank: int) -> list[Owned]:
    """What a rank owns of each slot. Every slot without elements is owned by one rank too, as nothing of it."""
    begin, end = cut[rank]
    found = []
    for place, slot in enumerate(bucket.slots):
        first, last = max(slot.start, begin), min(slot.start + slot.numel, end)
        if first < last:
            found.append(Owned(place, first - slot.start, last - first, first - begin))
        elif slot.numel == 0 and _holder(slot, cut) == rank:
            found.append(Owned(place, 0, 0, 0))
    return found


def _holder(slot: Slot, cut: Cut) -> int:
    return next((rank for rank, (begin, end) in enumerate(cut) if begin <= slot.start < end), len(cut) - 1)


def _cost(run: Sequence[Slot], costs: Mapping[str, float]) -> float:
    return sum(costs[slot.name] for slot in run)


def _runs(slots: Sequence[Slot], costs: Mapping[str, float], most: int) -> list[list[Slot]]:
    """Neighbouring slots together, in at most so many runs, of which the most costly costs the least."""
    low, high = max(costs[slot.name] for slot in slots), _cost(slots, costs)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_filled(slots, costs, middle)) <= most else (middle, high)
    return _filled(slots, costs, high)


def _filled(slots: Sequence[Slot], costs: Mapping[str, float], limit: float) -> list[list[Slot]]:
    runs: list[list[Slot]] = [[]]
    for slot in slots:
        if runs[-1] and _cost(runs[-1], costs) + costs[slot.name] > limit:
            runs.append([])
        runs[-1].append(slot)
    return runs
