"""How a layout is cut: entries to chains in the order of their gradients, chains to buckets, buckets to shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from fasttrain.dist.slots import Bucket, Entry, Options, Piece, Slot, positive

Key = tuple[torch.dtype, str, str]  # dtype, device, group: of a chain of buckets
Expected = Sequence[tuple[int, Entry]]  # (place among the entries, entry), in the order of gradients


class Length(NamedTuple):
    """What an entry takes of a chain of buckets, padding included; `place`: in the order of all gradients."""

    place: int
    elements: int
    bytes: int


Chains = Mapping[Key, Sequence[Length]]
Parts = Sequence[tuple[Key, Sequence[Length]]]  # buckets, in the order of launching


def padded(count: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit


def cut(chain: Sequence[Length], limits: Sequence[int]) -> list[list[Length]]:
    """Fill one bucket after the other; a bucket ends where the next length would exceed its limit.

    Arguments:
        limits: bytes of the first, second, ... bucket; the last holds for all that follow.

    Example:
        >>> [[length.place for length in part] for part in cut([Length(n, 8, 32) for n in range(6)], [32, 64])]
        [[0], [1, 2], [3, 4], [5]]
    """
    parts: list[list[Length]] = []
    filled = 0
    for length in chain:
        limit = limits[min(len(parts), len(limits)) - 1]
        if not parts or (filled and length.bytes and filled + length.bytes > limit):
            parts.append([])
            filled = 0
        parts[-1].append(length)
        filled += length.bytes
    return parts


def worlds_of(world: int | Mapping[str, int]) -> dict[str, int]:
    """Ranks of each group, by name; a single number is that of the group "data"."""
    known = world if isinstance(world, Mapping) else {"data": world}
    return {name: positive(f"the world of group {name!r}", known[name]) for name in sorted(known)}


def expected(entries: Sequence[Entry], worlds: Mapping[str, int], order: Sequence[str] | None) -> Expected:
    """The entries with a gradient, in the order of these; after the checks of `FlatLayout.of`."""
    times = Counter(entry.name for entry in entries)
    if twice := [name for name, count in times.items() if count > 1]:
        raise ValueError(f"names that occur more than once: {_some(twice)}; give each entry a name of its own, and a "
                         "tied parameter once")
    for entry in entries:
        if entry.group not in worlds:
            raise ValueError(f"{entry.name!r} is of the group {entry.group!r}, whose ranks are not known (only of "
                             f"{', '.join(worlds)}): give world={{'{entry.group}': ..., ...}}")
    places = {entry.name: place for place, entry in enumerate(entries) if entry.requires_grad}
    if order is None:
        return [(place, entries[place]) for place in reversed(places.values())]
    given = Counter(order)
    wrong = {"missing": [name for name in places if name not in given],
             "extra": [name for name in given if name not in places],
             "more than once": [name for name, count in given.items() if count > 1]}
    if any(wrong.values()):
        told = "; ".join(f"{what}: {_some(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"the order is no permutation of the entries with a gradient ({told}): give each name once")
    return [(places[name], entries[places[name]]) for name in order]


def _some(names: Sequence[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(map(repr, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def chains(order: Expected, options: Options) -> Chains:
    """For each chain, the lengths of its entries in the order of their gradients."""
    found: dict[Key, list[Length]] = {}
    for place, (_, entry) in enumerate(order):
        dtype = options.bucket_dtype or entry.dtype
        elements = padded(entry.numel, options.unit(dtype))
        length = Length(place, elements, elements * dtype.itemsize)
        found.setdefault((dtype, entry.device, entry.group), []).append(length)
    return found


def parts(chains: Chains, limits: Sequence[int]) -> Parts:
    """The buckets of all chains, in the order of the last gradient of each."""
    found = [(key, part) for key, chain in chains.items() for part in cut(chain, limits)]
    return sorted(found, key=lambda bucket: bucket[1][-1].place)


def size(part: Sequence[Length], unit: int) -> int:
    """Elements of a bucket that is padded to a multiple of `unit`: never none."""
    return padded(max(1, sum(length.elements for length in part)), unit)


def buckets(order: Expected, worlds: Mapping[str, int], options: Options) -> tuple[Bucket, ...]:
    """The buckets of a layout."""
    made = []
    for number, ((dtype, device, group), part) in enumerate(parts(chains(order, options), options.limits)):
        start, slots = 0, []
        for length in part:
            index, entry = order[length.place]
            slots.append(Slot(entry.name, number, start, entry.numel, index))
            start += length.elements
        elements = size(part, worlds[group] * options.unit(dtype))
        made.append(Bucket(number, dtype, device, group, worlds[group], elements, tuple(slots)))
    return tuple(made)


def pieces(bucket: Bucket, rank: int) -> Iterator[Piece]:
    """The parts of a bucket's slots in the shard of a rank."""
    begin, end = rank * bucket.shard, (rank + 1) * bucket.shard
    for slot in bucket.slots:
        first, last = max(slot.start, begin), min(slot.start + slot.numel, end)
        if first < last:
            yield Piece(slot.name, bucket.index, first - slot.start, last - first, first - begin)
        elif slot.numel == 0 and min(slot.start // bucket.shard, bucket.world - 1) == rank:
            yield Piece(slot.name, bucket.index, 0, 0, slot.start - begin)
