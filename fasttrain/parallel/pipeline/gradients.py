"""When the gradients of a stage are complete, and who reduces them: nobody, a reducer, or torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.optim import clip
from fasttrain.parallel import tied_names
from fasttrain.parallel.data import DataParallel
from fasttrain.parallel.pipeline.copies import Copies
from fasttrain.parallel.pipeline.held import Held
from fasttrain.parallel.sharded import Sharded
from fasttrain.parallel.widened import widen
from fasttrain.precision.loss_scale import LossScaler, step_divided


class Owner(Protocol):
    """Who reduces gradients: a `Reducer`, what `shard` returned, or `Alone`."""

    def paused(self) -> AbstractContextManager[None]:
        """Hooks do nothing: gradients accumulate as torch does it."""

    def reduce(self, params: Iterable[Tensor] | None = None) -> None:
        """These gradients are complete; None: all that are left."""

    def count(self, items: int) -> None:
        """So many items were in the losses of this rank, which were added up."""

    def finish(self) -> Any:
        """End the step: all gradients are reduced."""

    def step(self, optimizer: Any, max_norm: float | None, scaler: LossScaler | None,
             unusable: Tensor | None) -> Tensor:
        """Step with the mean over the items of all ranks."""


class Alone:
    """In the place of a reducer, where nobody else has the same parameters, but for those that are tied.

    Arguments:
        copies: of the parameters that several stages have.
        mesh: whose norms are those of all stages, what is tied counted once.
    """

    def __init__(self, copies: Copies, mesh: Mesh):
        self.copies, self.device = copies, mesh.device
        self.items = 0
        for ranks, wire in copies.wires.items():
            tied_names.settle(wire, copies.held.rank, [(name, copies.model.get_parameter(name))
                                                       for name in copies.names[ranks]])
        stages = {tie.here: tie.ranks for tie in copies.held.ties if tie.here is not None}
        widen(mesh, mesh.wire(use="norms"), list(copies.model.named_parameters()), stages)

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, params: Iterable[Tensor] | None = None) -> None:
        """There is nobody to reduce with."""

    def count(self, items: int) -> None:
        self.items = items

    def finish(self) -> None:
        self.copies.add()

    def statistics(self, optimizer: Any) -> tuple[Tensor, Tensor]:
        """Over all stages."""
        return clip.statistics([optimizer])

    def step(self, optimizer: Any, max_norm: float | None, scaler: LossScaler | None,
             unusable: Tensor | None) -> Tensor:
        squares, found = self.statistics(optimizer)
        found = found if unusable is None else found | unusable
        divisor = torch.tensor(float(self.items), dtype=torch.float64, device=self.device)
        return step_divided(divisor, (squares, found), optimizer, max_norm, scaler)


def owner_of(model: Any, mesh: Mesh, copies: Copies) -> Any:
    """Who reduces the gradients of a model that was split.

    Raises:
        ValueError: the mesh has several replicas, and nobody does.
    """
    if isinstance(model, DataParallel):
        return model.reducer
    if isinstance(model, Sharded):
        return model
    if mesh.terms > 1:
        several = " and ".join(f"{axis} {mesh.sizes[axis]}" for axis in MEAN if mesh.sizes[axis] > 1)
        raise ValueError(f"the mesh has {several}, over which gradients are to be averaged: wrap what split() returned "
                         "in DataParallel(..., mesh=mesh, tied=ties(stage)), or shard it")
    return Alone(copies, mesh)


class Ready:
    """Which gradients are complete when a stage of this rank is over: those that no other stage of it still needs.

    Arguments:
        model: what the rank holds.
        held: how.
    """

    def __init__(self, model: nn.Module, held: Held):
        self.model, self.held = model, held
        self.waiting: dict[str, set[int]] = {}

    def begin(self) -> None:
        """A step begins."""
        first: dict[int, str] = {}
        self.waiting = {}
        for stage in self.held.mine:
            for name in self.held.names[stage]:
                p = self.model.get_parameter(name)
                if p.requires_grad:
                    self.waiting.setdefault(first.setdefault(id(p), name), set()).add(stage)

    def over(self, stage: int) -> list[Tensor]:
        """All backward passes of a stage have been: the parameters whose gradients are complete."""
        done: list[Tensor] = []
        for name, stages in list(self.waiting.items()):
            stages.discard(stage)
            if not stages:
                done.append(self.model.get_parameter(name))
                del self.waiting[name]
        return done
