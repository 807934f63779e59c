"""How large buckets should be, by a model of the link: the sizes with which the last collective ends first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from fasttrain.dist import cutting
from fasttrain.dist.accounting import Span, all_reduce_s, overlapped, width
from fasttrain.dist.cutting import Expected, Parts
from fasttrain.dist.slots import Options

SMALLEST = 1 << 16
NEAR = 1.002  # of two plans that end within 0.2% of each other, the one with fewer buckets


def plan(order: Expected, worlds: Mapping[str, int], options: Options, bandwidth: float, latency: float,
         backward_s: float | Sequence[float] | None) -> Options:
    """The options with the sizes that `FlatLayout.plan` describes."""
    if not (0 < bandwidth < math.inf and 0 <= latency < math.inf):
        raise ValueError(f"a bandwidth of {bandwidth} bytes per second and a latency of {latency} s cannot be: give a "
                         "positive bandwidth, and a latency of zero or more")
    chains = cutting.chains(order, options)
    if backward_s is None:
        half = max(worlds.values()) * bandwidth * latency
        first, later = (max(SMALLEST, round(size)) for size in (half, 15 * half))
        return replace(options, first_bucket_bytes=first, bucket_bytes=later)
    ready = arrivals(order, backward_s)
    largest = max((sum(length.bytes for length in chain) for chain in chains.values()), default=0)
    powers = [SMALLEST]
    while powers[-1] < largest:
        powers.append(2 * powers[-1])
    tried = []
    for later in powers:
        for first in (size for size in powers if size <= later):
            parts = cutting.parts(chains, (first, later))
            spans = predicted(parts, ready, worlds, options, bandwidth, latency)
            tried.append((max((span.end for span in spans), default=0.0), len(parts), later, first))
    soonest = min(tried)[0]
    _, _, later, first = min((one for one in tried if one[0] <= soonest * NEAR), key=lambda one: one[1:])
    return replace(options, first_bucket_bytes=first, bucket_bytes=later)


def arrivals(order: Expected, backward_s: float | Sequence[float]) -> list[float]:
    """When each gradient is there, in seconds from the beginning of backward; by its share of elements if only the whole
    of backward is known."""
    times = backward_s if isinstance(backward_s, Sequence) else [backward_s]
    if not all(0 <= time < math.inf for time in times):
        raise ValueError(f"backward_s is {backward_s}: give seconds, zero or more")
    if isinstance(backward_s, Sequence):
        if len(backward_s) != len(order):
            raise ValueError(f"backward_s has {len(backward_s)} times for {len(order)} gradients: give one for each, in the "
                             "order of the layout")
        return list(backward_s)
    done = list(accumulate(entry.numel for _, entry in order))
    return [backward_s * (count / done[-1] if done[-1] else 1.0) for count in done]


def predicted(parts: Parts, ready: Sequence[float], worlds: Mapping[str, int],
              options: Options, bandwidth: float, latency: float) -> list[Span]:
    """When each bucket would be all-reduced, one after the other on one link."""
    seconds = []
    for (dtype, _, group), part in parts:
        elements = cutting.size(part, worlds[group] * options.unit(dtype))
        sent = elements * width(options.wire_dtype or dtype)
        seconds.append(all_reduce_s(sent, worlds[group], bandwidth, latency))
    complete = [max(ready[length.place] for length in part) for _, part in parts]
    return overlapped(complete, seconds)
