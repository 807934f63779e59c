"""All ways of dividing a job over so many GPUs, and why others are none."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

from fasttrain.plan import bubbles
from fasttrain.plan.job import AXES, RECOMPUTES, Job, Recompute, Way
from fasttrain.train.config import BadInput


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is wanted of the ways, None where everything is tried.

    Attributes:
        axes: sizes of axes that are given.
        per_node: GPUs of a node, in which the tensor axis stays unless its size is given.
    """

    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    zero: int | None = None
    sequence: bool | None = None
    recompute: Recompute | None = None
    schedule: str | None = None
    chunks: int | None = None
    per_node: int = 8

    def __post_init__(self) -> None:
        for axis, size in self.axes.items():
            if size < 1:
                raise BadInput(f"--{axis} {size}: an axis has 1 rank or more")
        if self.zero not in (None, 0, 1, 2, 3):
            raise BadInput(f"--zero {self.zero}: stages of ZeRO are 0, 1, 2 and 3")
        if self.schedule is not None and self.schedule not in bubbles.SCHEDULES:
            raise BadInput(f"--schedule {self.schedule}: it is none of {', '.join(bubbles.SCHEDULES)}")
        if self.chunks is not None and self.chunks < 1:
            raise BadInput(f"--stages-per-rank {self.chunks}: must be at least 1")


def divisors(number: int) -> list[int]:
    """In ascending order.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    return [one for one in range(1, number + 1) if number % one == 0]


def meshes(gpus: int, asked: Asked, experts: int) -> Iterator[dict[str, int]]:
    """Sizes of all axes whose product is `gpus`; of a model without experts that axis has one rank."""
    wanted = {**({} if experts else {"expert": 1}), **asked.axes}

    def filled(rest: int, axes: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
        if not axes:
            if rest == 1:
                yield ()
            return
        given = wanted.get(axes[0])
        for size in divisors(rest) if given is None else ([given] if rest % given == 0 else []):
            for others in filled(rest // size, axes[1:]):
                yield size, *others

    for sizes in filled(gpus, AXES):
        yield dict(zip(AXES, sizes, strict=True))


def ways(job: Job, gpus: int, asked: Asked) -> tuple[list[Way], Counter[str]]:
    """All ways that can be, and how many meshes and settings cannot, by the reason.

    Raises:
        BadInput: none can be.
    """
    found: list[Way] = []
    why: Counter[str] = Counter()
    for sizes in meshes(gpus, asked, job.shape.experts):
        if said := unfit(job, sizes, asked):
            why[said] += 1
            continue
        for way in settings(sizes, asked):
            if said := unfit_way(job, way):
                why[said] += 1
            else:
                found.append(way)
    if not found:
        told = "; ".join(f"{reason} ({count} of them)" for reason, count in why.most_common(3))
        raise BadInput(f"{job.shape.name} cannot be divided over {gpus} GPUs as asked: "
                       f"{told or 'no mesh of these sizes has as many ranks; leave an axis out'}")
    return found, why


def unfit(job: Job, sizes: Mapping[str, int], asked: Asked) -> str | None:
    """Why a mesh cannot be, whatever else is chosen."""
    shape, t = job.shape, sizes["tensor"]
    for what, size in (("heads", shape.heads), ("key-value heads", shape.kv_heads), ("hidden features", shape.hidden)):
        if size % t:
            return f"{size:,} {what} cannot be divided by tensor={t}"
    if t > asked.per_node and "tensor" not in asked.axes:
        return f"tensor={t} would leave nodes of {asked.per_node}: give --tensor {t} to have it"
    if sizes["pipeline"] > shape.layers:
        return f"{shape.layers} layers are no pipeline of {sizes['pipeline']} stages"
    if sizes["expert"] > 1 and (shape.experts % sizes["expert"] or not shape.experts):
        return f"{shape.experts or 'no'} experts cannot be divided by expert={sizes['expert']}"
    c = sizes["context"]
    if c > 1 and job.sequence % (2 * c):
        return f"sequences of {job.sequence:,} cannot be cut into {2 * c} chunks for context={c}"
    replicas = sizes["data"] * sizes["shard"] * sizes["expert"]
    if job.batch % (replicas * job.micro_batch):
        return f"a batch of {job.batch:,} cannot be divided over {replicas} ranks, {job.micro_batch} at a time"
    return None


def settings(sizes: Mapping[str, int], asked: Asked) -> Iterator[Way]:
    """All else that there is to choose for a mesh; what makes no difference there is chosen one way."""
    terms = sizes["data"] * sizes["shard"] * sizes["expert"] * sizes["context"]
    several = (3,) if sizes["shard"] > 1 else (0, 1, 2) if terms > 1 else (0,)
    stages = [stage for stage in several if asked.zero in (None, stage)]
    sequences = [one for one in (False, True) if asked.sequence in (None, one)] if sizes["tensor"] > 1 else [False]
    recomputes = tuple(one for one in RECOMPUTES if asked.recompute in (None, one))
    schedules = [(name, chunks) for name, tried in bubbles.SCHEDULES.items()
                 for chunks in (tried if asked.chunks is None or len(tried) == 1 else (asked.chunks,))
                 if asked.schedule in (None, name)]
    if sizes["pipeline"] == 1:
        schedules = [("1f1b", 1)]
    for zero, sequence, recompute, (schedule, chunks) in itertools.product(stages, sequences, recomputes, schedules):
        yield Way(**sizes, zero=zero, sequence=sequence, recompute=recompute, schedule=schedule, chunks=chunks)


def unfit_way(job: Job, way: Way) -> str | None:
    """Why a way of a mesh that can be cannot."""
    if way.sequence and (job.sequence // way.context) % way.tensor:
        return f"{job.sequence // way.context:,} positions of a rank cannot be divided by tensor={way.tensor}"
    if way.pipeline * way.chunks > job.shape.layers:
        return (f"{job.shape.layers} layers are no {way.pipeline * way.chunks} stages, {way.chunks} on each of "
                f"{way.pipeline} ranks")
    if way.schedule == "zbv" and way.chunks != 2:
        return "zbv has two stages of each rank"
    if way.pipeline > 1:
        return bubbles.problem(way.schedule, way.pipeline, way.micro_batches(job))
    return None
