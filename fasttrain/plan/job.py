"""What is planned: a job, and one way of dividing it over ranks."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fasttrain.plan.shapes import Shape
from fasttrain.train.config import BadInput

AXES = ("pipeline", "data", "shard", "expert", "context", "tensor")  # as of fasttrain.dist.mesh, which imports torch
PRECISIONS = {"fp32": (4, 4), "bf16": (4, 2), "bf16-pure": (2, 2)}
"""Bytes of a parameter and of what is computed, by the name of `fasttrain.precision.mixed`."""

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclasses.dataclass(frozen=True, eq=False)  # one object is one job: what is counted of it is kept by it
class Job:
    """A training, however it is divided.

    Attributes:
        shape: of the model.
        sequence: tokens of a sequence.
        batch: sequences of one step, of all ranks.
        micro_batch: sequences that a rank takes at a time.
        precision: "fp32", "bf16" (fp32 parameters under autocast) or "bf16-pure".
        storage: how the optimizer keeps its states: "plain", or a preset of docs/storage.md.
        grad_bytes: of an element of a gradient.
        kernels: "cuda" or "cpu": whose operators keep what they need for backward.
        flash: attention never keeps the products of all pairs of positions.
        bucket_bytes, first_bucket_bytes: of gradient buckets.
    """

    shape: Shape
    sequence: int
    batch: int
    micro_batch: int = 1
    precision: str = "bf16-pure"
    storage: str = "split"
    optimizer: str = "AdamW"
    grad_bytes: int | None = None
    kernels: Literal["cuda", "cpu"] = "cuda"
    flash: bool = True
    bucket_bytes: int = 25 << 20
    first_bucket_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("sequence", "batch", "micro_batch", "bucket_bytes", "first_bucket_bytes"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.precision not in PRECISIONS:
            raise BadInput(f"--precision {self.precision}: it is none of {', '.join(PRECISIONS)}")

    @property
    def param(self) -> int:
        """Bytes of an element of a parameter."""
        return PRECISIONS[self.precision][0]

    @property
    def grad(self) -> int:
        """Bytes of an element of a gradient."""
        return self.grad_bytes or self.param

    @property
    def act(self) -> int:
        """Bytes of an element of what is computed in matrix products and attention."""
        return PRECISIONS[self.precision][1]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of dividing a job.

    Attributes:
        pipeline, data, shard, expert, context, tensor: ranks along the axes.
        zero: stage of ZeRO: 1 and 2 over all ranks that average gradients; 3 over the shard axis.
        sequence: between blocks the tensor axis divides the positions.
        recompute: what of each block is computed again in backward.
        schedule: of the pipeline, a name in `fasttrain.plan.bubbles`.
        chunks: stages of a rank.
    """

    pipeline: int = 1
    data: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 0
    sequence: bool = False
    recompute: Recompute = "none"
    schedule: str = "1f1b"
    chunks: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def replicas(self) -> int:
        """How many ranks read different samples."""
        return self.data * self.shard * self.expert

    @property
    def terms(self) -> int:
        """Over how many ranks a gradient is averaged."""
        return self.replicas * self.context

    def micro_batches(self, job: Job) -> int:
        """Of one rank in a step."""
        return job.batch // (self.replicas * job.micro_batch)

    def tokens(self, job: Job) -> int:
        """Positions of a micro-batch on a rank."""
        return job.micro_batch * job.sequence // self.context

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "one rank"
        rest = [f"zero={self.zero}"] * (self.zero > 0) + ["sequence"] * self.sequence
        rest += [f"recompute={self.recompute}"] * (self.recompute != "none")
        if self.pipeline > 1:
            rest.append(self.schedule + (f"x{self.chunks}" if self.chunks > 1 else ""))
        return " ".join([sizes, *rest])
