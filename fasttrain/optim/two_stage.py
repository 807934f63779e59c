"""Optimizers with a reduction for each parameter: rule, sums, rule.

The first stage makes the new states and sums of terms over all elements of the parameter, in one walk; the second is a
rule whose coefficients are computed from those sums. Two walks, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fasttrain.kernels import dispatch, stages
from fasttrain.kernels.item import Item, in_turns
from fasttrain.kernels.trace import trace
from fasttrain.optim.checks import number
from fasttrain.optim.examine import Examined
from fasttrain.optim.itemwise import Itemwise
from fasttrain.optim.page import Group
from fasttrain.optim.report import StepReport
from fasttrain.rule import Rule, Step


class TwoStage(Itemwise):
    """Base of the layer-wise adaptive optimizers.

    A page says the first stage in `rule_of`, and the second in `second_of`. The `coefficients` of the second take,
    beside hyperparameters, the sums of the first by name and ``elements``, the size of the parameter: arrays, float64,
    with one number for each parameter.

    States that the first stage changes are float32 for 16-bit parameters: the second reads them again, and a second
    moment that fp16 holds as zero would make its update infinite.
    """

    def init_state(self, p: torch.Tensor, group: Group, rule: Rule) -> bool:
        made = super().init_state(p, group, rule)
        if made and p.dtype in (torch.bfloat16, torch.float16):
            for name, changed in zip(rule.state, trace(rule).changed[1:], strict=True):
                if changed:
                    self.state[p][name] = self.state[p][name].float()
        return made

    def second_of(self, group: Group) -> Rule:
        """The rule of the second stage."""
        raise NotImplementedError

    def second_tensors(self, item: Item) -> tuple[torch.Tensor, ...]:
        """What the second stage takes for p, g and its states; the gradient is scaled again only if it is g."""
        return item.tensors

    def _runs(self, examined: list[Examined], scale: float, report: StepReport) -> list[Callable[[], None]]:
        by_backend: dict[tuple[str, int], list[Examined]] = {}
        for one in examined:
            report.count(one.item)
            key = dispatch.choose(one.item.tensors[0].device, self.backend), len(one.item.rule.sums or ())
            by_backend.setdefault(key, []).append(one)
        runs: list[Callable[[], None]] = []
        for (backend, sums), chosen in by_backend.items():
            device = chosen[0].item.tensors[0].device
            second = (replace(one.item, rule=self.second_of(one.group), tensors=self.second_tensors(one.item))
                      for one in chosen)
            report.launches += (stages.launches((one.item for one in chosen), sums > 0, backend, device)
                                + stages.launches(second, False, backend, device))
            report.host_syncs += device.type != "cpu"
            turns = [chosen] if len(in_turns([one.item for one in chosen])) == 1 else [[one] for one in chosen]
            runs += [partial(self._both, backend, together, scale) for together in turns]
        return runs

    def _both(self, backend: str, examined: list[Examined], scale: float) -> None:
        alike: dict[tuple[int, float], list[int]] = {}  # (group, step count): places
        for place, one in enumerate(examined):
            alike.setdefault((one.where[0], one.step), []).append(place)
        items: list[Any] = [None] * len(examined)
        for places in alike.values():
            one = examined[places[0]]
            row = self._row(one.item.rule, one.group, one.step, scale)
            for place in places:
                items[place] = replace(examined[place].item, row=row)
        sums = stages.run(items, backend)
        for places in alike.values():
            one = examined[places[0]]
            rows = self._rows(one, sums[places], np.array([items[place].tensors[0].numel() for place in places]), scale)
            rule = self.second_of(one.group)
            for place, row in zip(places, rows, strict=True):
                item = items[place]
                items[place] = Item(item.name, rule, self.second_tensors(item), row, None)
        stages.run(items, backend)

    def _rows(self, one: Examined, sums: np.ndarray, elements: np.ndarray, scale: float) -> np.ndarray:
        """The rows of the second stage, of parameters of one group and step count."""
        rule, first = self.second_of(one.group), one.item.rule
        known: dict[str, Any] = {**dict(zip(first.sums or (), sums.T, strict=True)), "elements": elements}
        numbers = {name: known[name] if name in known else number(one.group[name]) for name in rule.hyperparameters}
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # of norms that are zero or not finite
            scalars = rule.coefficients(Step(one.step), **numbers)
        names = trace(rule).coefficients
        rows = np.ones((len(sums), 1 + len(names)))
        if self.second_tensors(one.item)[1] is one.item.tensors[1]:
            rows[:, 0] = -scale if one.group.get("maximize") else scale
        for column, name in enumerate(names):
            rows[:, 1 + column] = scalars[name]
        return rows
