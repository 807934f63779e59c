"""A first guess at how long a step takes, from operations, bytes and what `Assumed` assumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fasttrain.plan import bubbles
from fasttrain.plan.hardware import Assumed, Device
from fasttrain.plan.job import Job, Way
from fasttrain.plan.memory import Memory
from fasttrain.plan.tensors import Stage, forward_flops
from fasttrain.plan.traffic import Link

SERIAL = ("tensor", "context", "expert")  # axes whose traffic computing waits for


class Times(NamedTuple):
    """Seconds of a step.

    Attributes:
        compute: products and attention of all micro-batches on the slowest rank.
        serial: traffic that they wait for.
        bubble: the slowest rank waits for others of its pipeline.
        gradients: traffic of gradients, and of parameters under ZeRO, that hides under nothing.
        optimizer: a step over memory.
    """

    compute: float
    serial: float
    bubble: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


def seconds(job: Job, way: Way, here: Stage, memory: Memory, links: Sequence[Link], device: Device,
            assumed: Assumed) -> Times:
    """What a step takes, if this rank is the slowest."""
    m = way.micro_batches(job)
    speed = device.flops * assumed.products
    tokens = way.tokens(job) / way.tensor
    forward = tokens * forward_flops(job.shape, here.parts, job.sequence) / speed
    blocks = [part for part in here.parts if part.startswith("blocks.")]
    again = tokens * forward_flops(job.shape, blocks, job.sequence) / speed if way.recompute == "full" else 0.0
    compute = m * (3 * forward + again)
    taken = {link.axis: assumed.seconds(device, link.sent, link.spans) for link in links}
    serial = sum(taken.get(axis, 0.0) for axis in SERIAL)
    waits = 0.0
    if way.pipeline > 1:
        part = serial / m / (3 if again else 2)  # of what a micro-batch waits for, in each pass over the blocks
        waits = bubbles.idle(way.schedule, way.pipeline, way.chunks, forward + part,
                             forward + part + (again + part if again else 0.0), forward)
        waits += (way.pipeline - 1) * taken.get("pipeline", 0.0) / m
    return Times(compute, serial, waits, _exposed(way, m, compute, taken), _step(job, way, memory, device, assumed))


def _exposed(way: Way, micro_batches: int, compute: float, taken: dict[str, float]) -> float:
    """Seconds of gradients' traffic that hide under nothing."""
    backward = compute / micro_batches * 2 / 3
    gradients = taken.get("data", 0.0) + taken.get("experts' data", 0.0)
    if way.zero in (1, 2):  # half of it are parameters, after the step
        return max(0.0, gradients / 2 - backward) + gradients / 2
    return max(0.0, gradients - backward) + max(0.0, taken.get("shard", 0.0) - compute)


def _step(job: Job, way: Way, memory: Memory, device: Device, assumed: Assumed) -> float:
    """Parameters and states are read and written, gradients read: the bytes of docs/storage.md."""
    share = way.terms if way.zero in (1, 2) else 1
    own = memory.weights / share
    moved = 2 * (own + memory.states) + own / job.param * job.grad
    return moved / (device.bandwidth * assumed.memory)
