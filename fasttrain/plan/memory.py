"""What a rank has in memory at its fullest moment, part by part.

The moments that can be: the loss of a micro-batch, the backward pass of its last block and of its first, and that of
the embedding. What autograd keeps is least at the end, gradients most; where gradients have buckets, or were added up
over micro-batches before, they are all there at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fasttrain.plan import bubbles, kept, states, tensors, traffic
from fasttrain.plan.job import Job, Way
from fasttrain.plan.tensors import Stage


class Memory(NamedTuple):
    """Bytes on one rank at its fullest moment.

    Attributes:
        weights, gradients, states, gathered: see `fasttrain.plan.states.Kept`; the gradients are those of then.
        activations: what autograd keeps of all micro-batches that are between forward and backward, without the head.
        logits: what it keeps of the head and the loss, and while that is differentiated two more of the logits' size.
        working: what a block's backward pass makes for a while, and keeps again where it is recomputed; the gradient of
            a table of the embedding on its way to where gradients are.
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
    return tensors.stage(job.shape, rank, way.pipeline, way.chunks, way.schedule == "zbv", way.tensor, way.expert,
                         job.sequence)


def telling(job: Job, way: Way) -> Sequence[int]:
    """The ranks of a pipeline among which the fullest and the slowest are.

    The first two, the last, and one with most blocks: each other has no more than one of these, and no more
    micro-batches at a time.
    """
    ranks = range(way.pipeline)
    most = max(ranks, key=lambda rank: stage(job, way, rank).blocks)
    return sorted({0, min(1, way.pipeline - 1), most, way.pipeline - 1})


def memory(job: Job, way: Way, here: Stage) -> Memory:
    """What a rank has in memory at its fullest moment."""
    return max(moments(job, way, here), key=lambda one: one.total)


def moments(job: Job, way: Way, here: Stage) -> Iterator[Memory]:
    """What it has at each moment that can be the fullest."""
    has = states.kept(here, job, way)
    m = way.micro_batches(job)
    each, head = kept.of_stage(here, job, way)
    live = bubbles.live(way.schedule, way.pipeline, here.rank, m, way.chunks)
    heads = bubbles.live_head(way.schedule, way.pipeline, m)
    arrives = buffers(job, way, here, m)
    steady = way.terms > 1 or m > 1  # gradients are all there at any time

    def at(gradients: float, activations: float, logits: float, working: float) -> Memory:
        return Memory(has.weights, has.gradients if steady else gradients, has.states, has.gathered, activations,
                      logits, working, arrives)

    if head:
        copies = 2 * kept.FP32 * way.tokens(job) * job.shape.vocabulary if way.tensor == 1 else 0
        yield at(0, live * each, heads * head + copies, 0)
    own = here.elements * job.grad
    if here.blocks:
        block = _elements(here, "blocks.") / here.blocks * job.grad
        first = _elements(here, "embedding") * job.grad
        makes = working(job, way)
        down = job.shape.hidden * job.shape.width / way.tensor * job.grad
        yield at(own - first - here.blocks * block + down, live * each, (heads - 1) * head, makes)
        before = kept.of_block(job, way) * (here.blocks - 1)
        yield at(own - first - block + down, live * each - before, (heads - 1) * head, makes)
    if "embedding" in here.parts:
        table = max(one.numel for one in here.held if one.name.startswith("embedding.")) * job.grad
        rest = (live - 1) * each + kept.of_embedding(job, way)
        yield at(own, rest, (heads - 1) * head, _handed_on(job, way) + (table if steady else 0))
    yield at(own, (live - 1) * each, (heads - 1) * head, 0)


def _elements(here: Stage, start: str) -> int:
    return sum(one.numel for one in here.held if one.name.startswith(start))


def _handed_on(job: Job, way: Way) -> float:
    """Bytes of a gradient between two blocks."""
    return way.tokens(job) * job.shape.width * kept.stream(job) / (way.tensor if way.sequence else 1)


def working(job: Job, way: Way) -> float:
    """Bytes that are made for a while within a block's backward pass, beyond what is kept until then.

    Differentiating what is inside the feed-forward part takes four tensors of its hidden features without a gate, three
    with, and one that was kept is let go. What is recomputed is there in whole then; what was kept of it selectively
    is a part of that.
    """
    shape, tokens, a = job.shape, way.tokens(job), job.act
    hidden = tokens * shape.hidden * (shape.top_k or 1) * a / way.tensor
    made = hidden * (2 if shape.gated else 3) + _handed_on(job, way)
    if way.recompute == "none":
        return made
    made += kept.whole_block(job, way)
    if kept.stream(job) == a == kept.FP32:  # the block's input is what its first norm keeps
        made -= _handed_on(job, way)
    if way.recompute == "selective":
        made -= tokens * (a * (2 * shape.queries + 2 * shape.keys) + kept.FP32 * shape.heads) / way.tensor
        made -= hidden * (2 if shape.gated else 1) + tokens * a * shape.width
    return made


def buffers(job: Job, way: Way, here: Stage, micro_batches: int) -> float:
    """torch's stages have a buffer of each micro-batch for what arrives from either side."""
    if way.pipeline == 1:
        return 0.0
    sides = way.chunks * 2 - ("embedding" in here.parts) - ("head" in here.parts)
    return micro_batches * sides * traffic.boundary(job, way)
