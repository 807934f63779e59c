"""Optimizers with a reduction for each parameter: rule, sums, rule.

The first stage makes the new states and sums of terms over all elements of the parameter, in one walk; the second is a
rule whose coefficients are computed from those sums. Two walks, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fasttrain.kernels import dispatch, stages
from fasttrain.kernels.item import Item, in_turns
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.trace import trace
from fasttrain.optim.checks import number
from fasttrain.optim.examine import Examined
from fasttrain.optim.itemwise import Itemwise
from fasttrain.optim.local import is_dtensor, shares, totals_of_parts
from fasttrain.optim.page import Group
from fasttrain.optim.report import StepReport
from fasttrain.optim.two_stage_driven import TwoStageDriven
from fasttrain.rule import Rule, Step

ByBackend = dict[tuple[str, int], list[Examined]]  # and the number of sums


def alike(examined: list[Examined]) -> list[list[int]]:
    """The places of parameters of one group and step count, which have the same coefficients, together."""
    places: dict[tuple[int, float], list[int]] = {}
    for place, one in enumerate(examined):
        places.setdefault((one.where[0], one.step), []).append(place)
    return list(places.values())


class TwoStage(Itemwise):
    """Base of the layer-wise adaptive optimizers.

    A page says the first stage in `rule_of`, and the second in `second_of`. The `coefficients` of the second take,
    beside hyperparameters, the sums of the first by name and ``elements``, the size of the parameter: arrays, float64,
    with one number for each parameter. Of shards the sums are added over all parts between the stages: one collective
    of a few numbers for all parameters that are cut over the same processes.

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

    def not_driven(self) -> str | None:
        cut = any(shares(p) for group in self.param_groups for p in group["params"])
        return f"{type(self).__name__} adds sums of shards between its stages on the host" if cut else None

    def _driven(self, items: Sequence[Item], places: Sequence[tuple[int, int]], rows: Sequence[Row],
                row_of: Sequence[int], backend: str) -> TwoStageDriven:
        return TwoStageDriven(self, items, [self.param_groups[group] for group, _ in places], rows, row_of, backend)

    def _runs(self, examined: list[Examined], scale: float, report: StepReport) -> list[Callable[[], None]]:
        own: ByBackend = {}
        shared: ByBackend = {}
        for one in examined:
            report.count(one.item)
            key = dispatch.choose(one.item.tensors[0].device, self.backend), len(one.item.rule.sums or ())
            (shared if shares(self._param(one.where)) else own).setdefault(key, []).append(one)
        runs: list[Callable[[], None]] = []
        for (backend, sums), chosen in (*shared.items(), *own.items()):
            device = chosen[0].item.tensors[0].device
            second = (replace(one.item, rule=self.second_of(one.group), tensors=self.second_tensors(one.item))
                      for one in chosen)
            report.launches += (stages.launches((one.item for one in chosen), sums > 0, backend, device)
                                + stages.launches(second, False, backend, device))
            report.host_syncs += device.type != "cpu"
        if meeting := self._meeting(examined):
            runs.append(partial(self._parts, shared, meeting, scale))
        for (backend, _), chosen in own.items():
            turns = [chosen] if len(in_turns([one.item for one in chosen])) == 1 else [[one] for one in chosen]
            runs += [partial(self._both, backend, together, scale) for together in turns]
        if wholes := [p for one in examined if is_dtensor(p := self._param(one.where))]:
            runs.append(partial(torch.autograd.graph.increment_version, wholes))
        return runs

    def _both(self, backend: str, examined: list[Examined], scale: float) -> None:
        """Both stages of parameters that are here as wholes."""
        items = self._first(examined, scale)
        stages.run(self._second(examined, items, stages.run(items, backend), scale), backend)

    def _parts(self, shared: ByBackend, meeting: list[tuple[int, int]], scale: float) -> None:
        """Both stages of parameters of which other processes hold other parts: the sums of all are added between them.

        A process that steps none of them, because it holds no gradients, adds zeros.
        """
        firsts = {key: self._first(examined, scale) for key, examined in shared.items()}
        found = {one.where: sums for key, items in firsts.items()
                 for one, sums in zip(shared[key], stages.run(items, key[0]), strict=True)}
        params = [self._param(where) for where in meeting]
        widths = [len(self.rule_of(self.param_groups[group]).sums or ()) for group, _ in meeting]
        own = [torch.from_numpy(found.get(where, np.zeros(width))).to(p.device)
               for where, p, width in zip(meeting, params, widths, strict=True)]
        added = totals_of_parts(params, own)
        totals = {where: total.cpu().numpy() for where, total in zip(meeting, added, strict=True)}
        for key, items in firsts.items():
            sums = np.stack([totals[one.where] for one in shared[key]])
            for together in in_turns(self._second(shared[key], items, sums, scale)):
                stages.run(together, key[0])

    def _first(self, examined: list[Examined], scale: float) -> list[Item]:
        """The items of the first stage."""
        items = [one.item for one in examined]
        for places in alike(examined):
            one = examined[places[0]]
            row = self._row(one.item.rule, one.group, one.step, scale)
            for place in places:
                items[place] = replace(items[place], row=row)
        return items

    def _second(self, examined: list[Examined], items: list[Item], sums: np.ndarray, scale: float) -> list[Item]:
        """The items of the second stage."""
        seconds = list(items)
        elements = np.array([self._elements(one) for one in examined])
        for places in alike(examined):
            one = examined[places[0]]
            rows = self._rows(one, sums[places], elements[places], scale)
            rule = self.second_of(one.group)
            for place, row in zip(places, rows, strict=True):
                item = items[place]
                seconds[place] = Item(item.name, rule, self.second_tensors(item), row, None)
        return seconds

    def _elements(self, one: Examined) -> int:
        """The size of the whole parameter, in real numbers."""
        p = self._param(one.where)
        return p.numel() * (2 if p.is_complex() else 1)

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
