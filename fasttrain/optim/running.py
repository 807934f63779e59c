"""Numbers that advance with every step, where a device drives it: NAdam's product, ASGD's rates, sums of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels.device_scalars import Scalars
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.trace import trace


class Line(NamedTuple):
    """Numbers that advance alike: those of a group, or of its parameters that have made equally many steps."""

    row: Callable[[Any], Row]              # of the optimizer's `advancing`, with the hyperparameters of now
    kept: Mapping[str, Sequence[Tensor]]  # by name; the first of each stands for all


class Running:
    """Advances the numbers of some lines.

    What `advancing` of the page computes is ready before the step; it is stored before (`advances_first`) or after it,
    as the page's `coefficients` read the numbers of the step or of the one before.
    """

    def __init__(self, optimizer: Any, lines: Sequence[Line], found: Tensor, backend: str) -> None:
        self.lines, self.found = list(lines), found
        self.scalars = Scalars(optimizer.advancing, self.rows(optimizer), found.device, backend)
        self.names = trace(optimizer.advancing).coefficients
        self.first, self.advanced = optimizer.advances_first, optimizer.advanced
        self.after: dict[str, Tensor] = {}

    def rows(self, optimizer: Any) -> list[Row]:
        return [line.row(optimizer) for line in self.lines]

    def refresh(self, optimizer: Any) -> None:
        self.scalars.refresh(self.rows(optimizer))

    def before_step(self) -> None:
        """Queue what the numbers will be."""
        by = dict(zip(self.names, self.scalars.launch().unbind(1), strict=True))
        before = {name: torch.stack([line.kept[name][0].reshape(()) for line in self.lines])
                  for name in self.lines[0].kept}
        after = self.advanced(before, by)
        self.after = {name: torch.where(self.found != 0, old, after[name]) for name, old in before.items()}
        if self.first:
            self._store()

    def after_step(self) -> None:
        if not self.first:
            self._store()

    def _store(self) -> None:
        for name, new in self.after.items():
            kept = [line.kept[name] for line in self.lines]
            torch._foreach_copy_([tensor for own in kept for tensor in own],
                                 [value.reshape(tensor.shape) for own, value in zip(kept, new.unbind(), strict=True)
                                  for tensor in own])
        self.after = {}
