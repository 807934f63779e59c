"""Muon's step where a device drives it: its two rules as steps of their own, and the matrix products between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import driven
from fasttrain.kernels.item import Item
from fasttrain.kernels.moved import Gradients
from fasttrain.kernels.prologue import Row
from fasttrain.optim.newton_schulz import orthogonalize
from fasttrain.optim.page import Group
from fasttrain.optim.workspace import Workspace
from fasttrain.rule import Rule


@dataclass
class Part:
    """Some of the items and their step, which has the rows that they read and no others."""

    places: list[int]
    rows: list[int]
    step: driven.Driven


def part(places: Sequence[int], items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int],
         backend: str) -> Part:
    """The step of the items, which are those at some places of all; `row_of` is that of all."""
    own = list(dict.fromkeys(row_of[place] for place in places))
    made = driven.driven(items, [rows[row] for row in own], [own.index(row_of[place]) for place in places], backend)
    return Part(list(places), own, made)


@dataclass
class Batch:
    """Matrices that are orthogonalised together.

    Attributes:
        moved: writes the momentum to `updates`.
        applied: steps the parameters with `factors`.
        ratios: of each parameter's learning rate.
    """

    moved: Part
    applied: driven.Driven
    groups: list[Group]
    ratios: list[float]
    parts: list[Tensor]
    updates: Tensor
    factors: Tensor
    shape: tuple[int, int]
    options: tuple[tuple[float, float, float], int, float]


class MuonDriven:
    """A `fasttrain.kernels.driven.Driven` of Muon's matrices and of what AdamW steps beside them.

    Arguments:
        plain: places of what AdamW steps.
        batches: places of matrices, with rows and columns, and the arguments of `orthogonalize`.
        ratio: of the learning rate of a group's matrices of some rows and columns.
    """

    def __init__(self, optimizer: Any, apply: Rule, items: Sequence[Item], groups: Sequence[Group],
                 rows: Sequence[Row], row_of: Sequence[int], plain: Sequence[int],
                 batches: Sequence[tuple[Sequence[int], tuple[int, int],
                                         tuple[tuple[float, float, float], int, float]]], ratio: Any,
                 backend: str) -> None:
        self.optimizer, self.apply, self.backend, self.space = optimizer, apply, backend, Workspace()
        self.sums = torch.zeros(len(items), 0, dtype=torch.float64)
        self.plain = part(plain, [items[place] for place in plain], rows, row_of, backend) if plain else None
        self.batches = []
        device = items[0].tensors[0].device
        memory: dict[tuple[str, torch.dtype], Tensor] = {}  # which batches take in turn

        def taken(role: str, dtype: torch.dtype, count: int) -> Tensor:
            most = max(sum(items[place].tensors[0].numel() for place in places) for places, *_ in batches)
            return memory.setdefault((role, dtype), torch.zeros(most, dtype=dtype, device=device))[:count]

        for places, shape, options in batches:
            own = [items[place] for place in places]
            sizes = [item.tensors[0].numel() for item in own]
            kept = torch.float64 if own[0].dtype == torch.float64 else torch.bfloat16
            updates, factors = taken("update", kept, sum(sizes)), taken("factor", torch.bfloat16, sum(sizes))
            shapes = [item.tensors[0].shape for item in own]
            parts, results = ([one.view(size) for one, size in zip(whole.split(sizes), shapes, strict=True)]
                              for whole in (updates, factors))
            moved = part(places, with_updates(own, parts), rows, row_of, backend)
            chosen = [groups[place] for place in places]
            ratios = [ratio(group, *shape) for group in chosen]
            found = rows[row_of[places[0]]].found
            applied = driven.driven(
                [Item(item.name, apply, (item.tensors[0], result), (), None)
                 for item, result in zip(own, results, strict=True)],
                self._applying(chosen, ratios, found), list(range(len(own))), backend)
            self.batches.append(Batch(moved, applied, chosen, ratios, parts, updates, factors, shape, options))
        self.launches = (0 if self.plain is None else self.plain.step.launches) + sum(
            one.moved.step.launches + one.applied.launches for one in self.batches)

    def _applying(self, groups: Sequence[Group], ratios: Sequence[float], found: Any) -> list[Row]:
        return [Row(self.optimizer._hyperparameters(self.apply, {**group, "ratio": ratio}), found=found)
                for group, ratio in zip(groups, ratios, strict=True)]

    def launch(self) -> None:
        if self.plain is not None:
            self.plain.step.launch()
        for one in self.batches:
            one.moved.step.launch()
            x = one.updates.bfloat16().view(-1, *one.shape)
            one.factors.copy_(orthogonalize(x, *one.options, self.space, self.backend).view(-1))
            one.applied.launch()

    def refresh(self, rows: Sequence[Row]) -> None:
        moved = [one.moved for one in self.batches]
        for own in [*([] if self.plain is None else [self.plain]), *moved]:
            own.step.refresh([rows[row] for row in own.rows])
        for one in self.batches:
            one.applied.refresh(self._applying(one.groups, one.ratios, rows[one.moved.rows[0]].found))

    def update(self, items: Sequence[Item]) -> None:
        if self.plain is not None:
            self.plain.step.update([items[place] for place in self.plain.places])
        for one in self.batches:
            one.moved.step.update(with_updates([items[place] for place in one.moved.places], one.parts))

    def move(self, grads: Gradients) -> None:
        for own in [*([] if self.plain is None else [self.plain]), *(one.moved for one in self.batches)]:
            own.step.move(grads.take(own.places))


def with_updates(items: Sequence[Item], parts: Sequence[Tensor]) -> list[Item]:
    """The items of the first rule, which writes an update in the parameter's place."""
    return [replace(item, tensors=(one, *item.tensors[1:])) for item, one in zip(items, parts, strict=True)]
