"""Bytes that a rank sends in a step, axis by axis, and which of them leave its node.

An element that all n ranks of an axis need travels (n - 1) / n times from each, in a gather or a scattered sum; twice
that in a sum. Formulas are those of docs/plan.md; what is sent for gradients is `fasttrain.dist.accounting`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fasttrain.dist import accounting
from fasttrain.plan import kept, places
from fasttrain.plan.job import Job, Way
from fasttrain.plan.states import buckets
from fasttrain.plan.tensors import Stage, of_rank


class Link(NamedTuple):
    """What a rank sends in a step along an axis.

    Attributes:
        axis: "tensor", "context", "expert", "pipeline", "data" (all that average gradients), "shard" (ZeRO's stage 3).
        sent: bytes.
        across: of them, those that leave the node, on the average of the ranks that share something.
        spans: whether any of these ranks are on different nodes.
    """

    axis: str
    sent: float
    across: float
    spans: bool


def links(here: Stage, job: Job, way: Way, per_node: int) -> list[Link]:
    """What a rank sends along the axes that have several ranks."""
    m, blocks = way.micro_batches(job), here.blocks
    found = [
        _link("tensor", m * (blocks * of_block(job, way) + of_ends(here.parts, job, way)), way, per_node, "tensor"),
        _link("context", m * blocks * of_context(job, way), way, per_node, "context"),
        _link("expert", m * blocks * of_experts(job, way), way, per_node, "expert", pairs=True),
        _link("pipeline", m * of_pipeline(here.rank, job, way), way, per_node, "pipeline"),
        *_of_gradients(here, job, way, per_node)]
    return [link for link in found if link.sent]


def _link(name: str, sent: float, way: Way, per_node: int, *axes: str, pairs: bool = False) -> Link:
    ranks = places.members(way.sizes, *axes)
    share = (places.apart if pairs else places.leaving)(ranks, per_node)
    return Link(name, sent, sent * share, share > 0)


def enters(job: Job) -> int:
    """Bytes of an element that is brought to columns: norms give what their weights are, under autocast fp32."""
    return kept.FP32 if job.precision == "bf16" else job.act


def of_block(job: Job, way: Way) -> float:
    """Tensor and sequence parallelism, a micro-batch: two moves into columns and two out of rows, and their gradients.

    A sum, or a gather and a scattered sum in its place. Of a block that is recomputed in full what comes to its columns
    is gathered again, and the sum within it is made again; the last needs not be.
    """
    t = way.tensor
    once = (t - 1) / t * way.tokens(job) * job.shape.width
    enter, leave = enters(job), job.act
    if way.sequence:
        forward, backward, again = 2 * (enter + leave), 2 * (enter + leave), 2 * enter + leave
    else:
        forward, backward, again = 2 * 2 * leave, 2 * 2 * enter, 2 * leave
    return once * (forward + backward + (again if way.recompute == "full" else 0))


def of_ends(parts: Sequence[str], job: Job, way: Way) -> float:
    """Tensor parallelism, a micro-batch: the embedding's sum, what the head needs and gives back, terms of the loss."""
    t = way.tensor
    once = (t - 1) / t * job.shape.width
    found = 0.0
    if "embedding" in parts:
        found += once * way.tokens(job) * job.param * 2
    if "head" in parts:
        found += once * way.tokens(job) * enters(job) * 2 + of_loss(job, way)
    return found


def of_loss(job: Job, way: Way) -> float:
    """Terms of each row that the ranks of a divided vocabulary gather."""
    return (way.tensor - 1) * kept.TERMS * way.tokens(job)


def of_context(job: Job, way: Way) -> float:
    """Context parallelism, a block and micro-batch: keys and values gathered, their gradients scattered."""
    c = way.context
    whole = job.micro_batch * job.sequence * 2 * job.shape.keys / way.tensor * job.act
    return (c - 1) / c * whole * (3 if way.recompute == "full" else 2)


def of_experts(job: Job, way: Way) -> float:
    """Expert parallelism, a block and micro-batch: tokens to their experts and back, and their gradients."""
    e = way.expert
    if not job.shape.experts:
        return 0.0
    tokens = way.tokens(job) / (way.tensor if way.sequence else 1)
    return (e - 1) / e * tokens * job.shape.top_k * job.shape.width * job.act * (6 if way.recompute == "full" else 4)


def boundary(job: Job, way: Way) -> float:
    """Bytes of what a stage hands on of a micro-batch."""
    return way.tokens(job) * job.shape.width * kept.stream(job) / (way.tensor if way.sequence else 1)


def of_pipeline(rank: int, job: Job, way: Way) -> float:
    """Between stages, a micro-batch: activations to the next, gradients to the last, but for stages of one rank."""
    mine = of_rank(rank, way.pipeline, way.chunks, way.schedule == "zbv")
    count = way.pipeline * way.chunks
    sends = sum((stage + 1 < count and stage + 1 not in mine) + (stage > 0 and stage - 1 not in mine) for stage in mine)
    return sends * boundary(job, way)


def _of_gradients(here: Stage, job: Job, way: Way, per_node: int) -> list[Link]:
    if way.zero == 3 and way.shard > 1:
        return _of_shards(here, job, way, per_node)
    stage = way.zero if way.terms > 1 else 0
    found = []
    layout = buckets(here, job, way.terms, way.expert)
    for group, axes in (("data", ("data", "shard", "expert", "context")), ("expert", ("data", "shard", "context"))):
        elements = sum(bucket.elements for bucket in layout.buckets if bucket.group == group)
        world = way.terms if group == "data" else way.terms // way.expert
        sent = accounting.bytes_per_step(stage, elements, world, job.grad, job.param)
        found.append(_link("data" if group == "data" else "experts' data", sent, way, per_node, *axes))
    return found


def _of_shards(here: Stage, job: Job, way: Way, per_node: int) -> list[Link]:
    """Stage 3: every micro-batch gathers parameters twice, the last scatters gradients; copies sum their shards."""
    elements = here.elements
    inside = (accounting.bytes_per_step(3, elements, way.shard, 0, job.param, way.micro_batches(job))
              + accounting.bytes_per_step(3, elements, way.shard, job.grad, 0))
    copies = way.terms // way.shard
    across = accounting.bytes_per_step(0, -(-elements // way.shard), copies, job.grad, 0)
    return [_link("shard", inside, way, per_node, "shard"),
            _link("data", across, way, per_node, "data", "expert", "context")]
