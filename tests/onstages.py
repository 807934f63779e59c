"""What tests of stages share: a model in parts, and torch's schedules of pipelines over those that a rank holds."""

from __future__ import annotations

from typing import Any

import onmesh
import torch
from onmesh import Model, parallelized, tokens_of
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble, schedules

from fasttrain.parallel import Mesh

PARTS = ["embed", "blocks.0", "blocks.1", "head"]
MICROS = 4


class Held(Model):
    """Some parts of the model, which stages run."""

    def keep(self, parts: list[str]) -> None:
        if "embed" not in parts:
            del self.embed
        if "head" not in parts:
            del self.norm, self.head
        for place in range(len(self.blocks)):
            if f"blocks.{place}" not in parts:
                self.blocks._modules.pop(str(place))

    def run(self, parts: list[str], x: Tensor) -> Tensor:
        for part in parts:
            x = self.head(self.norm(x)) if part == "head" else self.get_submodule(part)(x)
        return x


class View(nn.Module):
    def __init__(self, model: Held, parts: list[str]):
        super().__init__()
        self.__dict__["of"] = model, parts

    def parameters(self, recurse: bool = True) -> Any:
        model, parts = self.of
        names = [*parts, *(["norm"] if "head" in parts else [])]
        return iter({id(p): p for name in names for p in model.get_submodule(name).parameters()}.values())

    def forward(self, x: Tensor) -> Tensor:
        model, parts = self.of
        return model.run(parts, x)


class Stage(PipelineStage):
    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Not by torch."""


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flip(1).flatten()) / MICROS


def inputs(step: int, term: int) -> Tensor:
    return torch.cat([tokens_of(step, term, micro) for micro in range(MICROS)])


def held(mesh: Mesh, several: int, tied: bool, sequence: bool) -> tuple[Held, list[list[str]]]:
    """What this rank holds: one stage, or two; and the parts of each."""
    here = mesh.coordinates["pipeline"]
    parts = [[PARTS[here]], [PARTS[2 + here]]] if several == 2 else [PARTS[2 * here : 2 * here + 2]]
    model = parallelized(Held(tied), mesh, sequence)
    model.keep([part for one in parts for part in one])
    return model, parts


class Schedule:
    """A schedule of torch's over the stages of this rank.

    Arguments:
        name: of the class, or "zero bubble", of two stages on each rank.
    """

    def __init__(self, mesh: Mesh, name: str, model: Held, parts: list[list[str]], sequence: bool):
        self.mesh, self.several, count = mesh, len(parts), 2 * len(parts)
        here = mesh.coordinates["pipeline"]
        length = 4 // mesh.sizes["tensor"] if sequence else 4
        hidden = torch.zeros(3, length, onmesh.WIDTH, dtype=torch.float64, requires_grad=True)
        logits = torch.zeros(3, 4, onmesh.ROWS, dtype=torch.float64, requires_grad=True)
        stages = []
        for place, names in enumerate(parts):
            index = here + 2 * place
            given = torch.zeros(3, 4, dtype=torch.long) if index == 0 else hidden
            stages.append(Stage(View(model, names), index, count, mesh.device, input_args=(given,), output_args=(
                logits if index == count - 1 else hidden,), group=mesh["pipeline"].get_group()))
        options = dict(n_microbatches=MICROS, loss_fn=losses, scale_grads=False)
        self.made: Any = ScheduleInterleavedZeroBubble(stages, **options) if self.several == 2 else \
            getattr(schedules, name)(stages[0], **options)

    def step(self, x: Tensor) -> Tensor:
        """The mean loss where the last stage is, else zero."""
        told: list[Tensor] = []
        first = self.mesh.coordinates["pipeline"] == 0
        if self.mesh.last_stage:
            self.made.step(*([x] if first else []), target=x, losses=told)
        else:
            self.made.step(x)
        return torch.stack(told).sum().detach() if told else torch.zeros((), dtype=torch.float64)
