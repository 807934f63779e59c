"""All ways of dividing a job, each with what it takes, the best first."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from fasttrain.plan import bubbles, memory, states, times, traffic, ways
from fasttrain.plan.hardware import Assumed, Device
from fasttrain.plan.job import Job, Way
from fasttrain.plan.memory import Memory
from fasttrain.plan.tensors import forward_flops, parts
from fasttrain.plan.times import Times
from fasttrain.plan.traffic import Link
from fasttrain.plan.ways import Asked


@dataclasses.dataclass(frozen=True)
class Planned:
    """What one way takes.

    Attributes:
        memory: of the ranks of a pipeline that can be the fullest, by their place in it.
        fits: the fullest fits the GPU.
        links, times: of the slowest rank.
        bubble: the share of a step for which it waits for its pipeline, traffic that it waits for counted as work.
        flops: of the model in a step, all ranks together.
    """

    way: Way
    memory: dict[int, Memory]
    fits: bool
    links: tuple[Link, ...]
    times: Times
    bubble: float
    flops: float
    tokens: int

    @property
    def bytes(self) -> float:
        """Of the fullest rank."""
        return max(one.total for one in self.memory.values())

    def of_peak(self, device: Device) -> float:
        """The share of the GPUs' peak that the model's operations are: model FLOPs utilisation."""
        return self.flops / (self.times.total * self.way.ranks * device.flops)

    def as_json(self, device: Device) -> dict[str, Any]:
        """All numbers, bytes and seconds."""
        return {
            **{field.name: getattr(self.way, field.name) for field in dataclasses.fields(self.way)}, "fits": self.fits,
            "bytes": self.bytes, "memory": {str(rank): one._asdict() for rank, one in self.memory.items()},
            "links": [link._asdict() for link in self.links], "bubble": self.bubble, "step_s": self.times.total,
            "times": self.times._asdict(), "tokens_per_s": self.tokens / self.times.total,
            "of_peak": self.of_peak(device)}


def look(job: Job, way: Way, device: Device, assumed: Assumed) -> Planned:
    """What one way takes."""
    found: dict[int, Memory] = {}
    slowest: tuple[Times, tuple[Link, ...]] | None = None
    for rank in memory.telling(job, way):
        here = memory.stage(job, way, rank)
        has = found[rank] = memory.memory(job, way, here)
        links = tuple(traffic.links(here, job, way, assumed.per_node))
        taken = times.seconds(job, way, here, has, links, device, assumed)
        if slowest is None or taken.total > slowest[0].total:
            slowest = taken, links
    assert slowest is not None
    taken, links = slowest
    work = taken.compute + taken.serial
    tokens = job.batch * job.sequence
    flops = 3.0 * tokens * forward_flops(job.shape, parts(job.shape), job.sequence)
    return Planned(way, found, max(one.total for one in found.values()) <= device.memory, links, taken,
                   taken.bubble / (taken.bubble + work), flops, tokens)


def plan(job: Job, gpus: int, device: Device, assumed: Assumed | None = None,
         asked: Asked | None = None) -> tuple[list[Planned], Counter[str]]:
    """All ways of dividing a job over so many GPUs, the fastest that fit first; where none fits, the smallest.

    Returns:
        The ways, and how many are none, by the reason.

    Raises:
        BadInput: there is no way.

    Example:
        >>> from fasttrain.plan.hardware import device
        >>> from fasttrain.plan.shapes import named
        >>> found, _ = plan(Job(named("llama-3-8b"), 8192, 64), 8, device("h100-80"))
        >>> found[0].fits
        True
    """
    assumed, asked = assumed or Assumed(), asked or Asked()
    states.check(job)
    possible, why = ways.ways(job, gpus, asked)
    found = [look(job, way, device, assumed) for way in possible]
    return sorted(found, key=lambda one: (not one.fits, one.times.total if one.fits else 0.0, one.bytes)), why


def bubble_of(way: Way, job: Job) -> float:
    """The share of a step for which ranks wait, if forward, input gradients and weight gradients take equal times."""
    if way.pipeline == 1:
        return 0.0
    return bubbles.fraction(way.schedule, way.pipeline, way.micro_batches(job), way.chunks)
