"""Rule, sums, rule, where a device drives the step: the second stage reads the sums where the first one left them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fasttrain.kernels import driven
from fasttrain.kernels.item import Item
from fasttrain.kernels.moved import Gradients
from fasttrain.kernels.prologue import Row
from fasttrain.optim.page import Group


class TwoStageDriven:
    """A `fasttrain.kernels.driven.Driven` of both stages. Steps are counted by the second, which is the last to read
    them.
    """

    def __init__(self, optimizer: Any, items: Sequence[Item], groups: Sequence[Group], rows: Sequence[Row],
                 row_of: Sequence[int], backend: str) -> None:
        self.optimizer, self.groups, self.row_of = optimizer, list(groups), list(row_of)
        self.names = [item.rule.sums or () for item in items]
        self.elements = [float(item.tensors[0].numel()) for item in items]
        self.first = driven.driven(uncounted(items), rows, row_of, backend)
        self.sums = self.first.sums
        self.second = driven.driven(self._seconds(items), self._rows(items, rows), list(range(len(items))), backend)
        self.scaled = [optimizer.second_tensors(item)[1] is item.tensors[1] for item in items]
        self.others = [None if scaled else optimizer.second_tensors(item)[1]
                       for item, scaled in zip(items, self.scaled, strict=True)]
        self.launches = self.first.launches + self.second.launches

    def _seconds(self, items: Sequence[Item]) -> list[Item]:
        return [Item(item.name, self.optimizer.second_of(group), self.optimizer.second_tensors(item), (), item.counter)
                for item, group in zip(items, self.groups, strict=True)]

    def _row(self, place: int, row: Row, scaled: bool) -> Row:
        known = dict(zip(self.names[place], self.sums[place], strict=False)) | {"elements": self.elements[place]}
        group, numbers = self.groups[place], dict(row.hyperparameters)
        rule = self.optimizer.second_of(group)
        values = self.optimizer._hyperparameters(rule, {**group, **numbers, **known})
        row = replace(row, hyperparameters=values)
        return row if scaled else replace(row, scale=1.0, grad_scale=1.0, norm=0.0, max_norm=None)

    def _rows(self, items: Sequence[Item], rows: Sequence[Row]) -> list[Row]:
        return [self._row(place, rows[row], self.optimizer.second_tensors(item)[1] is item.tensors[1])
                for place, (item, row) in enumerate(zip(items, self.row_of, strict=True))]

    def launch(self) -> None:
        self.first.launch()
        self.second.launch()

    def refresh(self, rows: Sequence[Row]) -> None:
        self.first.refresh(rows)
        self.second.refresh([self._row(place, rows[row], scaled)
                             for place, (row, scaled) in enumerate(zip(self.row_of, self.scaled, strict=True))])

    def update(self, items: Sequence[Item]) -> None:
        self.first.update(uncounted(items))
        if any(self.scaled):
            self.second.update(self._seconds(items))

    def move(self, grads: Gradients) -> None:
        self.first.move(grads)
        if any(self.scaled):
            self.second.move(grads.but(self.others))


def uncounted(items: Sequence[Item]) -> list[Item]:
    """Items whose steps another part counts."""
    return [replace(item, counter=None) for item in items]
