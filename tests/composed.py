"""A GPT divided in every way at once, beside the same on one process: what the tests of compositions share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.losses import cross_entropy
from fasttrain.optim import AdamW
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel import ContextParallel, DataParallel, Zero, shard
from fasttrain.parallel.building import Normal, materialize
from fasttrain.parallel.pipeline import Pipeline, split
from fasttrain.parallel.tensor import tensor_parallel
from fasttrain.train.model import GPT

VOCABULARY, POSITIONS, BATCH = 37, 16, 8  # a vocabulary that no axis divides evenly
CLIP = 0.5


@dataclasses.dataclass(frozen=True)
class Composition:
    """Sizes of a mesh, what divides what, and the model."""

    mesh: dict[str, int]
    zero: int = 0
    sequence: bool = False
    schedule: str = "1f1b"
    micro: int = 1
    tied: bool = False
    gated: bool = False
    kv_heads: int | None = None
    experts: int = 0
    recompute: bool = False
    late: bool = False  # there are values only when the model is sharded
    dtype: torch.dtype = torch.float64

    @property
    def world(self) -> int:
        return math.prod(self.mesh.values())

    def __str__(self) -> str:
        return " ".join([*(f"{axis}{size}" for axis, size in self.mesh.items()),
                         *(f"{name}={value}" for name, value in dataclasses.asdict(self).items()
                           if name != "mesh" and value != type(self).__dataclass_fields__[name].default)])


def blank(how: Composition, mesh: Mesh | None) -> Any:
    with torch.device("meta"):
        model = GPT(3, 16, 4, POSITIONS, ngrams=2, rows=11, vocabulary=VOCABULARY, kv_heads=how.kv_heads,
                    gated=how.gated, tied=how.tied, experts=how.experts, mesh=mesh).to(how.dtype)
    for part in model.modules():
        if hasattr(part, "weighted"):  # of each rank's tokens, so not those of one process
            part.balance = part.z = 0.0
            part.weighted = False
    return model


def filled(model: Any) -> Any:
    """Lively weights: what begins at zero would hide what is wrong behind it."""
    return materialize(model, seed=3, rules={"*norm*": Normal(1.0), "*": Normal(0.3)})


def batch(step: int, rows: int = BATCH) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, POSITIONS + 1), generator=torch.Generator().manual_seed(step))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": [one for one in named if one[1].ndim > 1], "weight_decay": 0.1},
            {"params": [one for one in named if one[1].ndim < 2], "weight_decay": 0.0}]


class Alone:
    """One process, plain torch but for the optimizer."""

    def __init__(self, how: Composition):
        self.model = filled(blank(how, None))
        self.optimizer = AdamW(groups(self.model), lr=0.01)

    def backward(self, step: int) -> float:
        tokens = batch(step)
        loss = F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.item()

    def norm(self) -> float:
        return float(sum(p.grad.double().square().sum() for p in self.model.parameters()).sqrt())


class Divided:
    """The same, on the ranks of a mesh."""

    def __init__(self, how: Composition, mesh: Mesh):
        self.how, self.mesh = how, mesh
        model = blank(how, mesh)
        if mesh.sizes["context"] > 1:
            model.context = ContextParallel(mesh)
        model = tensor_parallel(model, mesh, sequence=how.sequence)
        if mesh.sizes["pipeline"] > 1:
            model = split(model, mesh, costs=[1.0] * len(model.parts()), schedule=how.schedule)
        self.bare = model = model if how.late else filled(model)
        if how.recompute:
            from fasttrain.train.blocks import recompute
            recompute(model, blocks="blocks")
        self.wrapped: Any = shard(model, mesh, blocks="blocks") if how.zero == 3 else DataParallel(
            model, mesh=mesh, bucket_cap_mb=0.005)
        if how.late:
            filled(model)
        self.called = model if how.zero == 3 else self.wrapped
        make = (lambda given, **options: Zero(given, AdamW, stage=how.zero, **options)) if how.zero in (1, 2) else AdamW
        self.optimizer: Any = make(groups(model), lr=0.01)
        self.pipeline = None
        if mesh.sizes["pipeline"] > 1:
            self.pipeline = Pipeline(self.wrapped, mesh, self.loss, how.schedule, how.micro)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        context = self.bare.context
        return cross_entropy(logits, targets if context is None else context.cut(targets, 1), inplace_backward=False)

    def backward(self, step: int) -> float:
        """The mean loss over all ranks, after backward passes of this rank's samples."""
        tokens = batch(step).chunk(self.mesh.replicas)[self.mesh.replica]
        if self.pipeline is not None:
            total = self.pipeline.step(tokens[:, :-1], tokens[:, 1:])
        else:
            accumulate, total = self.wrapped.accumulate(self.how.micro), torch.zeros((), dtype=torch.float64)
            for micro in tokens.chunk(self.how.micro):
                with accumulate():
                    loss = self.loss(self.called(micro[:, :-1]), micro[:, 1:]) / self.how.micro
                    loss.backward()
                    total += loss.detach()
        axes = ("data", "shard", "expert", "context")
        return self.mesh.wire(*axes).mean_(total.clone()).item()

    def statistics(self) -> tuple[Tensor, Tensor]:
        if self.how.zero in (0, 3):
            return (self.wrapped.statistics(self.optimizer) if self.how.zero == 3 else
                    self.wrapped.reducer.statistics())
        return self.optimizer.grad_statistics()

    def step(self) -> float:
        """Clip by the norm of all, step and forget; the norm."""
        norm = self.optimizer.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(p.grad).clone() for name, p in self.bare.named_parameters()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: whole(p.detach()).clone() for name, p in self.bare.named_parameters()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
