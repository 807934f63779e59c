"""What data parallelism sends and how long that takes: formulas, to stand beside what was counted and measured.

Bytes are those that one rank sends in one step; it receives as many. Times are those of Hockney's model: a message of n
bytes takes latency + n / bandwidth, and every rank sends and receives at once.

Sources: R. Hockney, "The communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing 20 (1994);
R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19 (2005),
section 4; S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models", arXiv:1910.02054, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

CODES = 256  # elements that share one float32 unit where 8-bit codes travel


def width(dtype: torch.dtype) -> float:
    """Bytes that an element takes on the wire: of int8 codes, with their share of a unit.

    Example:
        >>> width(torch.bfloat16), width(torch.int8)
        (2.0, 1.015625)
    """
    return 1 + 4 / CODES if dtype == torch.int8 else float(dtype.itemsize)


def bytes_per_step(stage: int, elements: int, world: int, gradient: float, parameter: float,
                   micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step, by stage of ZeRO, with W ranks and f = (W - 1) / W of P elements.

    Stage 0 all-reduces gradients of g bytes: 2 f P g. Stages 1 and 2 reduce-scatter gradients and all-gather parameters
    of p bytes: f P (A g + p). Stage 3 gathers parameters in forward and again in backward: f P A (2 p + g).

    Arguments:
        stage: 0, 1, 2 or 3.
        elements: with a gradient, and padding where that travels.
        gradient, parameter: bytes of an element on the wire (see `width`).
        micro_batches: A, those of a step that communicate: 1, unless stage 2 or 3 does so for each. Stages 0 and 1 do not.

    Raises:
        ValueError: no such stage, a size below one, several micro-batches at stage 0 or 1.

    Example:
        >>> [bytes_per_step(stage, 1000, 4, 2, 2) for stage in range(4)]
        [3000.0, 3000.0, 3000.0, 4500.0]
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"there is no stage {stage!r} of ZeRO: give 0, 1, 2 or 3")
    if world < 1 or micro_batches < 1 or elements < 0:
        raise ValueError(f"{elements} elements, {world} ranks and {micro_batches} micro-batches cannot be")
    if stage < 2 and micro_batches > 1:
        raise ValueError(f"stage {stage} communicates once in a step, whatever the micro-batches: leave them out")
    sent = {0: 2 * gradient, 1: gradient + parameter, 2: micro_batches * gradient + parameter,
            3: micro_batches * (2 * parameter + gradient)}
    return (world - 1) / world * elements * sent[stage]


def hierarchical_bytes(elements: int, inside: int, across: int, gradient: float) -> tuple[float, float]:
    """Bytes that a rank sends inside its node and across nodes, where `across` nodes of `inside` ranks all-reduce.

    Reduce-scatter inside, all-reduce of each shard across, all-gather inside: 2 (S - 1) / S P g and
    2 (R - 1) / R P / S g, with S ranks in a node and R nodes.

    Example:
        >>> hierarchical_bytes(1000, 4, 2, 2)
        (3000.0, 500.0)
    """
    if inside < 1 or across < 1 or elements < 0:
        raise ValueError(f"{elements} elements on {across} nodes of {inside} ranks cannot be")
    shard = elements / inside
    return 2 * (inside - 1) * shard * gradient, 2 * (across - 1) / across * shard * gradient


def all_reduce_s(size: float, world: int, bandwidth: float, latency: float) -> float:
    """Seconds of an all-reduce on a ring: 2 (W - 1) messages of size / W bytes, one after the other.

    A reduce-scatter, or an all-gather, takes half of it.

    Arguments:
        size: bytes of the whole buffer.
        bandwidth: bytes per second that a rank sends while it receives.
        latency: seconds of a message of no bytes.

    Example:
        >>> all_reduce_s(8e9, 4, bandwidth=1e9, latency=0.5)  # 6 messages of 2.5 s
        15.0
    """
    return 2 * (world - 1) * (latency + size / world / bandwidth)


class Span(NamedTuple):
    """Seconds from the beginning of backward at which a collective could begin, began and ended."""

    ready: float
    start: float
    end: float


def overlapped(ready: Sequence[float], seconds: Sequence[float]) -> list[Span]:
    """When collectives run that are launched in this order on one link, each when it is ready and the link is free.

    start(i) = max(ready(i), end(i - 1)); end(i) = start(i) + seconds(i). One is launched after all before it.

    Example:
        >>> overlapped([1.0, 2.0, 9.0], [3.0, 3.0, 1.0])
        [Span(ready=1.0, start=1.0, end=4.0), Span(ready=2.0, start=4.0, end=7.0), Span(ready=9.0, start=9.0, end=10.0)]
    """
    spans: list[Span] = []
    for begins, lasts in zip(ready, seconds, strict=True):
        start = max(begins, spans[-1].end if spans else begins)
        spans.append(Span(begins, start, start + lasts))
    return spans


def exposed_s(spans: Sequence[Span], backward_s: float) -> float:
    """Seconds for which communication goes on after backward has ended.

    Example:
        >>> exposed_s(overlapped([1.0, 2.0, 9.0], [3.0, 3.0, 1.0]), backward_s=9.0)
        1.0
    """
    return max(0.0, max((span.end for span in spans), default=0.0) - backward_s)
