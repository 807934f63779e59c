"""The oracle of steps that a device drives: every number is read on the host, and the step is the reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import reference, stages
from fasttrain.kernels.item import Item
from fasttrain.kernels.moved import Gradients
from fasttrain.kernels.prologue import Number, Row
from fasttrain.kernels.trace import trace
from fasttrain.precision import draws
from fasttrain.rule import Rule


def why_not(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> str | None:
    """It steps everything."""
    return None


def driven(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> Naive:
    """`fasttrain.kernels.driven.driven`, on any device, which the host waits for."""
    return Naive(items, rows, row_of)


class Naive:
    """A `fasttrain.kernels.driven.Driven` that evaluates on the host what a device would."""

    def __init__(self, items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int]) -> None:
        self.items, self.rows, self.row_of = list(items), list(rows), list(row_of)
        self.launches = len(self.items)
        most = max((len(item.rule.sums or ()) for item in items), default=0)
        device = items[0].tensors[0].device if items else None
        self.sums = torch.zeros(len(self.items), most, dtype=torch.float64, device=device)

    def launch(self) -> None:
        skipped = [value(row.found) != 0.0 for row in self.rows]
        made = [item if skipped[row] else _made(self.rows[row], item)  # before a count is incremented
                for item, row in zip(self.items, self.row_of, strict=True)]
        for place, (item, row) in enumerate(zip(made, self.row_of, strict=True)):
            if skipped[row]:
                if item.zero:
                    item.tensors[1].zero_()
            elif item.rule.sums is not None:
                sums = stages.measure([item], "reference")[0]
                self.sums[place, : len(sums)] = sums
            else:
                reference.step([item])
        counts = {id(row.draws): row.draws for row, skip in zip(self.rows, skipped, strict=True) if not skip}
        for count in counts.values():
            if count is not None:
                count.add_(1)

    def refresh(self, rows: Sequence[Row]) -> None:
        if len(rows) != len(self.rows):
            raise ValueError(f"{len(rows)} rows are given for {len(self.rows)}")
        self.rows = list(rows)

    def update(self, items: Sequence[Item]) -> None:
        if len(items) != len(self.items):
            raise ValueError(f"{len(items)} items are given for {len(self.items)}")
        self.items = list(items)

    def move(self, grads: Gradients) -> None:
        self.items = [replace(item, tensors=(item.tensors[0], grad, *item.tensors[2:]))
                      for item, grad in zip(self.items, grads.tensors(), strict=True)]


def value(number: Number) -> float:
    """A number, wherever it lies."""
    return float(number.item()) if isinstance(number, Tensor) else float(number)


def values(given: Any) -> Any:
    """Hyperparameters with every tensor read."""
    if isinstance(given, (tuple, list)):
        return tuple(map(values, given))
    return given.item() if isinstance(given, Tensor) else given


def clip_coefficient(total: float, largest: Number | None) -> float:
    """`fasttrain.optim.clip.coefficient`."""
    if largest is None:
        return 1.0
    scale = value(largest) / (total + 1e-6)
    return scale if not scale >= 1.0 else 1.0


def scale_of(row: Row) -> float:
    """What the gradient is multiplied with."""
    scale = clip_coefficient(value(row.norm), row.max_norm) / value(row.grad_scale)
    each = 1.0 if row.max_each is None else clip_coefficient(abs(scale) * math.sqrt(value(row.square)), row.max_each)
    return scale * each * value(row.scale)


def numbers_of(rule: Rule, row: Row, plain: bool) -> list[float]:
    """The row, as a step on the host makes it."""
    step = row.step if row.counter is None else value(row.counter) + 1
    group = {name: values(one) for name, one in row.hyperparameters.items()}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # of norms that are zero or not finite
        made = [scale_of(row), *trace(rule).row(int(step), group)]
    if plain:
        return made
    decay = None if row.ema_decay is None else value(row.ema_decay)
    tail = (1.0, 0.0) if decay is None else (decay, 1.0 - decay)
    return [*made, math.inf if row.clip_value is None else value(row.clip_value), *tail]


def _made(row: Row, item: Item) -> Item:
    drawn = 0 if row.draws is None else int(row.draws.item())
    key = draws.parameter_key(draws.step_key(row.seed, drawn), item.key)
    return replace(item, row=numbers_of(item.rule, row, item.plain), key=key)
