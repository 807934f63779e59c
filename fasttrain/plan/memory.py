"""What a rank has in memory at its fullest moment, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fasttrain.plan import bubbles, kept, states, tensors, traffic
from fasttrain.plan.job import Job, Way
from fasttrain.plan.tensors import Stage


class Memory(NamedTuple):
    """Bytes on one rank.

    Attributes:
        weights, gradients, states, gathered: see `fasttrain.plan.states.Kept`.
        activations: what autograd keeps of all micro-batches that are between forward and backward, without logits.
        logits: what the loss keeps, and the gradient of the logits.
        working: what a block makes for a while: all that it keeps, where it is recomputed; else its largest gradients.
        buffers: between stages of a pipeline, in which activations and gradients arrive.
    """

    weights: float
    gradients: float
    states: float
    gathered: float
    activations: float
    logits: float
    working: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self)


def stage(job: Job, way: Way, rank: int) -> Stage:
    """What a rank of the pipeline has."""
    return tensors.stage(job.shape, rank, way.pipeline, way.chunks, way.schedule == "zbv", way.tensor, way.expert)


def telling(way: Way) -> Sequence[int]:
    """The ranks of a pipeline among which the fullest and the slowest are: the others are like the second."""
    return sorted({0, min(1, way.pipeline - 1), way.pipeline - 1})


def memory(job: Job, way: Way, here: Stage) -> Memory:
    """What a rank has in memory."""
    has = states.kept(here, job, way)
    micro_batches = way.micro_batches(job)
    each, head = kept.of_stage(here, job, way)
    live = bubbles.live(way.schedule, way.pipeline, here.rank, micro_batches, way.chunks)
    logits = way.tokens(job) * -(-job.shape.vocabulary // way.tensor) if head else 0
    heads = bubbles.live_head(way.schedule, way.pipeline, micro_batches) * head
    return Memory(has.weights, has.gradients, has.states, has.gathered, live * each, heads + kept.FP32 * logits,
                  working(job, way, here), buffers(job, way, here, micro_batches))


def working(job: Job, way: Way, here: Stage) -> float:
    """Bytes that are made and let go within a block's forward or backward pass."""
    inside = job.shape.hidden * (job.shape.top_k or 1) * (2 if job.shape.gated else 1)
    made = way.tokens(job) * 2 * inside * job.act / way.tensor  # a gradient of what is inside, and of what made it
    again = kept.whole_block(job, way) if way.recompute != "none" else 0.0
    return made + again if here.blocks else 0.0


def buffers(job: Job, way: Way, here: Stage, micro_batches: int) -> float:
    """torch's stages have a buffer of each micro-batch for what arrives from either side."""
    if way.pipeline == 1:
        return 0.0
    sides = way.chunks * 2 - ("embedding" in here.parts) - ("head" in here.parts)
    return micro_batches * sides * traffic.boundary(job, way)
